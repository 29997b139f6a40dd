"""InternVL: tiles of the image squeezed onto a mosaic of a similar shape, then the whole picture.

An image that needs no tiles is seen once. The tokens of all tiles are one contiguous stretch, which
tells how many there are; their arrangement is the image processor's choice, so it is asked for it.
"""

from __future__ import annotations

import math
from typing import Any

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
    limits = getattr(picture.processor, "min_patches", None)
    if picture.size is None or limits is None:
        return None
    cols, rows = arrangement(picture.size, picture.processor)
    return mosaic(rows, cols, side) if rows * cols + 1 == tiles else None


def arrangement(size: tuple[int, int], processor: Any) -> tuple[int, int]:
    """Columns and rows of tiles for an image (width, height).

    The processor takes the arrangement whose shape is nearest to the image's. Among equally near
    ones it takes the one with most tiles whose area is below twice the image's.
    """
    (width, height), most = size, processor.max_patches
    tile = processor.size["height"] * processor.size["width"]
    counts = range(1, most + 1)
    allowed = [(c, r) for c in counts for r in counts if processor.min_patches <= c * r <= most]
    best, least = (1, 1), math.inf
    for cols, rows in sorted(allowed, key=math.prod):
        apart = abs(width / height - cols / rows)
        if apart < least or (apart == least and width * height > 0.5 * tile * cols * rows):
            best, least = (cols, rows), apart
    return best


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
