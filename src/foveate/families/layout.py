"""Where on the image a visual token lies."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base.errors import FoveateError
from ..base.form import load_plugins
from ..core.visual import WHOLE, Box, runs, video_mask, visual_mask, visual_token_ids


@dataclass(frozen=True)
class Grid:
    """How a stretch of visual tokens lies on one image.

    The cells are taken as equal: where a vision tower's patches do not fill its input (SigLIP at
    384 pixels has 27 patches of 14) their places are off by less than half a cell.

    Attributes:
        rows, cols: token rows and columns, read line by line.
        start: index of the first token among the sample's visual tokens.
        box: (left, top, right, bottom) that the grid covers, as fractions of the image; beyond 0
            and 1 where part of the grid lies on padding.
        gap: visual tokens at each line's end that stand for no place, such as newline tokens.
        image: which image of the sample.
    """

    rows: int
    cols: int
    start: int = 0
    box: Box = WHOLE
    gap: int = 0
    image: int = 0

    @property
    def stop(self) -> int:
        """One past the index of the last token, the last line's gap included."""
        return self.start + self.rows * (self.cols + self.gap)

    def heat(self, values: Tensor) -> Tensor:
        """(..., N_v) per visual token -> (..., rows, cols)."""
        lines = values[..., self.start : self.stop].unflatten(-1, (self.rows, self.cols + self.gap))
        return lines[..., : self.cols]

    def token(self, x: float, y: float) -> int | None:
        """Index among the sample's visual tokens of the cell under a point; None outside `box`.

        Args:
            x, y: the point, as fractions of the image's width and height.
        """
        left, top, right, bottom = self.box
        if not (left <= x <= right and top <= y <= bottom):
            return None
        row = min(int((y - top) / (bottom - top) * self.rows), self.rows - 1)
        col = min(int((x - left) / (right - left) * self.cols), self.cols - 1)
        return self.start + row * (self.cols + self.gap) + col

    def cell(self, token: int) -> Box | None:
        """The inverse of `token`: what the token covers; None for newlines and others' tokens."""
        if not self.start <= token < self.stop:
            return None
        row, col = divmod(token - self.start, self.cols + self.gap)
        if col >= self.cols:
            return None
        left, top, right, bottom = self.box
        width, height = (right - left) / self.cols, (bottom - top) / self.rows
        return (
            left + col * width,
            top + row * height,
            left + (col + 1) * width,
            top + (row + 1) * height,
        )

    def cells(self) -> Iterator[tuple[int, Box]]:
        """Tokens that have a place, in order, and what they cover."""
        for token in range(self.start, self.stop):
            if (cell := self.cell(token)) is not None:
                yield token, cell


@dataclass(frozen=True)
class Picture:
    """One image of a batch, as a layout of `foveate.families` sees it.

    Attributes:
        config: the model's configuration.
        inputs: what the processor returned for the batch.
        processor: the image processor, or None where it is not at hand.
        index: which image of the batch.
        size: (width, height) of the original image, or None where it is not at hand.
        run: length of the contiguous stretch of visual tokens that begins with this image's.
        left: visual tokens of the sample from this image's first to the last.
    """

    config: Any
    inputs: dict[str, Any]
    processor: Any
    index: int
    size: tuple[int, int] | None
    run: int
    left: int

    def row(self, name: str) -> list[int] | None:
        """What an input tensor with one row per image says of this one; None where it has none."""
        table = self.inputs.get(name)
        if table is None or self.index >= len(table):
            return None
        return [int(value) for value in table[self.index]]


Layout = Callable[[Picture], tuple[list[Grid], int] | None]
"""An image's grids, counted from its first token, and how many visual tokens the image has, those
without a place included; None where that cannot be known."""


def grids(
    model: Any,
    inputs: dict[str, Any],
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    processor: Any = None,
    layout: Layout | None = None,
) -> list[list[Grid]]:
    """The grids of every sample, in the order of its images; see `foveate.families` for layouts.

    An image seen whole and in tiles has several: they share `Grid.image`, and `together` makes
    one map of them.

    Args:
        model: the model whose configuration names the image token and the layout.
        inputs: what the processor returned, with `input_ids` (B, Q).
        sizes: per sample, the (width, height) of its original images; layouts that crop, pad or
            tile by the image's shape need them.
        processor: the model's processor, asked how it crops, pads or tiles.
        layout: None = the one of `layout_of`.

    Raises:
        FoveateError: where the layout is not known, or does not account for every visual token,
            and for a prompt with a video.
    """
    types = inputs.get("mm_token_type_ids")
    if bool(video_mask(model.config, inputs["input_ids"], types).any()):
        raise FoveateError(
            "The prompt holds a video, whose tokens lie on several frames: heat maps and crops are "
            "for pictures. Ask about some of its frames, as a list of pictures."
        )
    mask = visual_mask(visual_token_ids(model.config), inputs["input_ids"], types)
    layout = layout or layout_of(model.config)
    unknown = FoveateError(
        f"The spatial layout of {model.config.model_type}'s image tokens is not known: "
        "attention is recorded all the same, but it cannot be drawn on the image."
    )
    out: list[list[Grid]] = []
    index = 0
    for sample, (numbers, visual) in enumerate(zip(runs(mask), mask, strict=True)):
        run = numbers[visual]
        known = None if sizes is None else sizes[sample]
        found: list[Grid] = []
        placed = image = 0
        while placed < len(run):
            if layout is None or (known is not None and image >= len(known)):
                raise unknown
            laid = layout(
                Picture(
                    model.config,
                    inputs,
                    getattr(processor, "image_processor", None),
                    index,
                    None if known is None else known[image],
                    run=int((run[placed:] == run[placed]).sum()),
                    left=len(run) - placed,
                )
            )
            if laid is None or placed + laid[1] > len(run):
                raise unknown
            found += [replace(grid, start=placed + grid.start, image=image) for grid in laid[0]]
            placed, image, index = placed + laid[1], image + 1, index + 1
        if known is not None and image < len(known):
            raise unknown
        out.append(found)
    return out


@functools.cache
def _layouts() -> dict[str, Layout]:
    """Layouts by the model type, or the vision tower's, that a file of the folder names."""
    package = importlib.import_module("foveate.families")
    names = [
        f"{package.__name__}.{module.name}"
        for module in pkgutil.iter_modules(package.__path__)
        if module.name not in ("layout", "probe")
    ]
    layouts: dict[str, Layout] = {}

    def take(module: Any) -> None:
        layouts.update(dict.fromkeys(module.serves, module.grid))

    for name in names:
        take(importlib.import_module(name))
    load_plugins(package.__name__, take)
    return layouts


def layout_of(config: Any) -> Layout | None:
    """The vision tower's own layout, else the model's; None where no file names either."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    layouts = _layouts()
    return layouts.get(tower or "", layouts.get(config.model_type))


def together(grids: Sequence[Grid], values: Tensor, image: int = 0) -> tuple[Tensor, Box]:
    """One map of an image from all its grids.

    A single grid's map is returned as it is. Tiles are put together to one mosaic. The map of the
    whole picture, where there is one beside the tiles, is resized onto the mosaic bilinearly,
    scaled to its own total and added: both looks count, each with its mass (inferred; the
    published methods read models with one grid). Values of tokens without a place are left out.

    Args:
        grids: of one sample, as `grids` returned them.
        values: (..., N_v) floating point, one per visual token of the sample, none negative.
        image: which image of the sample.

    Returns:
        The map (..., rows, cols) in the dtype of `values`, and the box that it covers.

    Raises:
        FoveateError: without a grid of that image, and where tiles do not form a mosaic.
    """
    mine = [grid for grid in grids if grid.image == image]
    if not mine:
        raise FoveateError(f"The sample has no image {image}: there is nothing to draw.")
    whole = next((g for g in mine if all(_contains(g.box, other.box) for other in mine)), None)
    tiles = [grid for grid in mine if grid is not whole]
    if whole is None or not tiles:
        return _mosaic(mine, values)
    heat, box = _mosaic(tiles, values)
    seen = whole.heat(values)
    down = _resampling(whole.rows, whole.box[1::2], heat.shape[-2], box[1::2]).to(values)
    across = _resampling(whole.cols, whole.box[0::2], heat.shape[-1], box[0::2]).to(values)
    spread = down @ seen @ across.T
    mass, got = (t.sum((-2, -1), keepdim=True) for t in (seen, spread))
    even = mass / heat.shape[-2:].numel()  # all of it where the mosaic does not reach
    return heat + torch.where(got > 0, spread * (mass / got.where(got > 0, 1)), even), box


def _contains(outer: Box, inner: Box) -> bool:
    """Whether `outer` covers what `inner` shows of the image."""
    a, b = ([min(max(edge, 0.0), 1.0) for edge in box] for box in (outer, inner))
    return a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2] and a[3] >= b[3]


def _mosaic(tiles: Sequence[Grid], values: Tensor) -> tuple[Tensor, Box]:
    """Tiles of one shape side by side, as (..., rows, cols), and the box that they cover."""
    lefts = sorted({tile.box[0] for tile in tiles})
    tops = sorted({tile.box[1] for tile in tiles})
    at = {(tile.box[1], tile.box[0]): tile for tile in tiles}
    shapes = {(tile.rows, tile.cols) for tile in tiles}
    if len(shapes) > 1 or len(tiles) != len(lefts) * len(tops) or len(at) != len(tiles):
        raise FoveateError("The tiles of this image do not form a mosaic: draw them one by one.")
    lines = [torch.cat([at[top, left].heat(values) for left in lefts], -1) for top in tops]
    last = at[tops[-1], lefts[-1]]
    return torch.cat(lines, -2), (lefts[0], tops[0], *last.box[2:])


def _resampling(old: int, here: Sequence[float], new: int, there: Sequence[float]) -> Tensor:
    """Bilinear interpolation of one axis from `old` cells on `here` to `new` cells on `there`.

    As torch's own with antialiasing, but between different stretches of the image; what lies on
    padding gets nothing. Returns (new, old) float64, rows that sum to 1 or are all 0.
    """

    def centres(cells: int, span: Sequence[float]) -> tuple[Tensor, float]:
        step = (span[1] - span[0]) / cells
        return span[0] + step * (torch.arange(cells, dtype=torch.float64) + 0.5), step

    (at, step), (to, target) = centres(old, here), centres(new, there)
    inside = (to > 0) & (to < 1)
    nearest = to.clamp(float(at[0]), float(at[-1]))  # beyond the outermost centres: their value
    weights = (1 - (nearest[:, None] - at).abs() / max(step, target)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True) * inside[:, None]
