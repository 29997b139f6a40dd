"""LLaVA-NeXT and LLaVA-OneVision: the whole picture, then the mosaic of its tiles without padding.

The image is fitted into the best of the configured resolutions and padded there; the model cuts
whole lines of padding away again and puts a newline token at the end of each line that is left.
LLaVA-OneVision pools a mosaic that has grown too large, and where several images are in one prompt
it pads each to a square and sees it once, with one newline token behind it.

The arithmetic is that of transformers (`pack_image_features`, `unpad_image`), which counts tokens
where the image processor counts pixels; so the lines that are kept may reach over the image's edge
or leave a part of a line out, and the mosaic's box says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .layout import Box, Grid, Picture
from .square import letterbox

serves = ("llava_next", "llava_next_video", "llava_onevision")


def grid(picture: Picture) -> tuple[list[Grid], int] | None:
    """The whole picture's grid and the mosaic's; needs the input `image_sizes`, nothing else."""
    size = picture.row("image_sizes")
    if size is None:
        return None
    vision = picture.config.vision_config
    side = vision.image_size // vision.patch_size
    if not _tiled(picture):
        return [Grid(side, side, box=letterbox((size[1], size[0])))], side * side + 1

    canvas = best_resolution((size[0], size[1]), picture.config.image_grid_pinpoints)
    lines = [edge // vision.image_size * side for edge in canvas]  # rows and columns of tokens
    cut = _padding(size, lines)
    box = _kept(size, canvas, lines, cut)
    rows, cols = (count - 2 * padding for count, padding in zip(lines, cut, strict=True))
    limit = getattr(picture.config, "vision_aspect_ratio", None)  # OneVision: "anyres_max_9"
    if limit:
        ratio = math.sqrt(rows * cols / (int(limit.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
    whole = Grid(side, side)
    if not rows or not cols:  # so long and thin an image that nothing of its mosaic is left
        return [whole], whole.stop + rows
    mosaic = Grid(rows, cols, start=whole.stop, box=box, gap=1)
    return [whole, mosaic], mosaic.stop


def best_resolution(size: tuple[int, int], choices: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The resolution (height, width) that keeps most pixels of an image (height, width).

    Among equal ones the smallest, and the first of these, as in LLaVA-NeXT.
    """

    def kept(choice: Sequence[int]) -> int:
        scale = min(choice[0] / size[0], choice[1] / size[1])
        fitted = int(size[0] * scale) * int(size[1] * scale)
        return min(fitted, size[0] * size[1])

    height, width = max(choices, key=lambda choice: (kept(choice), -choice[0] * choice[1]))
    return height, width


def _tiled(picture: Picture) -> bool:
    """Whether the image is alone in its prompt; without `batch_num_images` the model thinks so."""
    counts = picture.inputs.get("batch_num_images")
    if counts is None:
        return True
    owners = [int(count) for count in counts for _ in range(int(count))]
    return picture.index >= len(owners) or owners[picture.index] == 1


def _padding(size: list[int], lines: list[int]) -> tuple[int, int]:
    """Token rows and columns cut at either end, for an image (height, width) on its mosaic."""
    (height, width), (rows, cols) = size, lines
    if width / height > cols / rows:
        return (rows - int(round(height * (cols / width), 7))) // 2, 0
    return 0, (cols - int(round(width * (rows / height), 7))) // 2


def _kept(size: list[int], canvas: tuple[int, int], lines: list[int], cut: tuple[int, int]) -> Box:
    """What the lines that are left cover, as fractions of the image."""
    (height, width), (high, wide) = size, canvas
    if wide / width < high / height:
        fitted = min(math.ceil(height * (wide / width)), high), wide
    else:
        fitted = high, min(math.ceil(width * (high / height)), wide)
    edges = []
    for pixels, total, count, padding in zip(fitted, canvas, lines, cut, strict=True):
        offset, step = (total - pixels) // 2, total / count
        edges.append([(line * step - offset) / pixels for line in (padding, count - padding)])
    (top, bottom), (left, right) = edges
    return (left, top, right, bottom)
