"""The drawn world: scenes, and what is asked of them."""
