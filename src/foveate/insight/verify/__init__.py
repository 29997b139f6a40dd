"""Whether a checkpoint does what foveate promises: `checks`, one by one, and `report`, together."""
