"""Gemma 4: one grid per image, as large as the image, rescaled to whole cells."""

from __future__ import annotations

from .layout import Grid, Picture

serves = ("gemma4",)


def grid(picture: Picture) -> tuple[list[Grid], int] | None:
    """One grid; needs the input `image_position_ids`, each patch's column and row, nothing else."""
    places = picture.inputs.get("image_position_ids")
    if places is None or picture.index >= len(places):
        return None
    pooled = picture.config.vision_config.pooling_kernel_size
    cols, rows = (int(last) // pooled + 1 for last in places[picture.index].amax(0))
    whole = Grid(rows, cols)
    return [whole], whole.stop
