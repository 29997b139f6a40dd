"""One file here is one method; `foveate.method` finds them by walking this folder."""
