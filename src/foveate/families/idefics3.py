"""Idefics3 and SmolVLM: rows of tiles of the enlarged image, then the whole picture.

Text tokens with each tile's place stand between them. How many rows and columns there are follows
from the image's size and the image processor's options: the longer edge is brought to a fixed
length, both edges to whole tiles.
"""

from __future__ import annotations

import math

from .internvl import mosaic
from .layout import Grid, Picture

serves = ("idefics3", "smolvlm")

LARGEST = 4096  # transformers' limit for the enlarged image's edges, in pixels


def grid(picture: Picture) -> tuple[list[Grid], int] | None:
    """Tiles line by line, then the whole picture; tiles need the image's size and the processor."""
    vision = picture.config.vision_config
    side = vision.image_size // vision.patch_size // picture.config.scale_factor
    alone = [Grid(side, side)], side * side
    if picture.left == side * side:
        return alone
    if picture.size is None or picture.processor is None:
        return None
    if not picture.processor.do_image_splitting:
        return alone
    rows, cols = _tiles(picture)
    return alone if rows == cols == 1 else mosaic(rows, cols, side)


def _tiles(picture: Picture) -> tuple[int, int]:
    """Rows and columns of tiles, by the steps of `Idefics3ImageProcessor`."""
    assert picture.size is not None
    options = picture.processor
    width, height = picture.size
    if options.do_resize:
        wide = width >= height
        width, height = _scaled(width, height, options.size["longest_edge"])
        if wide:
            height = max(height + height % 2, 1)
        else:
            width = max(width + width % 2, 1)
        if max(width, height) > LARGEST:
            width, height = _scaled(width, height, LARGEST)
    tile = options.max_image_size["longest_edge"]
    width, height = _scaled(width, height, math.ceil(max(width, height) / tile) * tile)
    return math.ceil(height / tile), math.ceil(width / tile)


def _scaled(width: int, height: int, edge: int) -> tuple[int, int]:
    """Width and height with the longer of them brought to `edge` pixels."""
    aspect = width / height
    if width >= height:
        return edge, max(int(edge / aspect), 1)
    return max(int(edge * aspect), 1), edge
