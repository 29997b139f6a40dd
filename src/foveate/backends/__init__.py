"""One folder per engine: the callers of `foveate.core`."""
