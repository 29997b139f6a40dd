"""Models with a Pixtral tower (Mistral 3, Pixtral): one grid, as large as the image.

The image is rescaled to whole cells. The break tokens at the lines' ends are text tokens.
"""

from __future__ import annotations

from .layout import Grid, Picture

serves = ("pixtral",)


def grid(picture: Picture) -> tuple[list[Grid], int] | None:
    """One grid; needs the input `image_sizes`, which is of the rescaled image, nothing else."""
    size = picture.row("image_sizes")
    if size is None:
        return None
    merge = getattr(picture.config, "spatial_merge_size", 1)
    cell = picture.config.vision_config.patch_size * merge
    rows, cols = (edge // cell for edge in size)
    whole = Grid(rows, cols, box=(0.0, 0.0, cols * cell / size[1], rows * cell / size[0]))
    return [whole], whole.stop
