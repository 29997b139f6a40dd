"""InternVL: tiles of the image squeezed onto a mosaic of a similar shape, then the whole picture.

An image that needs no tiles is seen once. The tokens of all tiles are one contiguous stretch, which
tells how many there are; their arrangement is the image processor's choice, so it is asked for it.
"""

from __future__ import annotations

import math

from ..backends.transformers.compat import tiling
from .layout import Grid, Picture

serves = ("internvl",)


def grid(picture: Picture) -> tuple[list[Grid], int] | None:
    """Tiles line by line, then the thumbnail; several need the image's size and the processor."""
    config = picture.config
    height, width = config.vision_config.image_size
    patch = config.vision_config.patch_size
    side = math.isqrt(height // patch[0] * (width // patch[1]))
    side = int(side * config.downsample_ratio)
    tiles, rest = divmod(picture.run, side * side)
    if rest:
        return None
    if tiles == 1:
        return [Grid(side, side)], side * side
    arrange = tiling(picture.processor)
    if picture.size is None or arrange is None:
        return None
    options = picture.processor
    cols, rows = arrange(
        picture.size[::-1],
        (options.size["height"], options.size["width"]),
        options.min_patches,
        options.max_patches,
    )
    return mosaic(rows, cols, side) if rows * cols + 1 == tiles else None


def mosaic(rows: int, cols: int, side: int) -> tuple[list[Grid], int]:
    """`rows` x `cols` tiles of `side` x `side` tokens, line by line, and the whole picture last."""
    boxes = [
        (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)
        for row in range(rows)
        for col in range(cols)
    ]
    boxes.append((0.0, 0.0, 1.0, 1.0))
    found = [Grid(side, side, start=i * side * side, box=box) for i, box in enumerate(boxes)]
    return found, found[-1].stop
