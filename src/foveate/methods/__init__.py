"""One file here is one method; `foveate.core.method` finds them by walking this folder."""
