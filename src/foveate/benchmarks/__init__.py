"""One file here is one benchmark; `foveate.evaluation.benchmark` walks this folder."""
