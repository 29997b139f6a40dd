"""A part of an image that is looked for in attention: a box, a mask, or a thing with a name.

Names are known where the ground truth is: the demo's scene and pictures that `foveate draw` wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import FoveateError
from ..base.images import decode
from ..families.layout import WHOLE, Box, Grid
from ..scenes import questions, world

Names = dict[str, Callable[[int], np.ndarray]]
"""Name -> what draws its mask, (side, side) bool, for a square picture of so many pixels."""


@dataclass(frozen=True)
class Target:
    """Where something is on an image.

    Attributes:
        name: what it is called.
        mask: (H, W) float32, the share of each pixel that belongs to it, 0 to 1.
    """

    name: str
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels, half-open, that holds all of it."""
        x, y = (np.flatnonzero(self.mask.any(axis)) for axis in (0, 1))
        return int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1

    @property
    def area(self) -> float:
        """Share of the image."""
        return float(self.mask.mean())

    def cells(self, grid: Grid, part: Box = WHOLE) -> Tensor:
        """The share of every cell's area that belongs to it, (rows, cols) float32.

        Args:
            grid: lies on a picture that shows `part` of the image; cells on padding get nothing.
        """
        left, top, right, bottom = part
        wide, high = right - left, bottom - top
        x = [left + wide * edge for edge in grid.box[0::2]]
        y = [top + high * edge for edge in grid.box[1::2]]
        down = _overlap(grid.rows, y, part[1::2], len(self.mask))
        across = _overlap(grid.cols, x, part[0::2], self.mask.shape[1])
        return torch.from_numpy((down @ self.mask @ across.T).astype(np.float32))

    def seen(self, part: Box, size: tuple[int, int]) -> np.ndarray:
        """Which pixels of a picture of (width, height) show it, (height, width) bool.

        Args:
            part: what the picture shows of the image.
        """
        index = [
            ((start + (stop - start) * (np.arange(pixels) + 0.5) / pixels) * side).astype(int)
            for pixels, side, start, stop in zip(
                size, self.mask.shape[::-1], part[:2], part[2:], strict=True
            )
        ]
        return self.mask[np.ix_(index[1].clip(0, len(self.mask) - 1), index[0])] >= 0.5

    def tokens(self, grids: Sequence[Grid], count: int, parts: Sequence[Box]) -> Tensor:
        """`cells` for every visual token of a sample, (N_v,) float32; newline tokens get 0.

        Args:
            grids: of the sample. count: N_v. parts: what each picture shows of the image.
        """
        shares = torch.zeros(count)
        for grid in grids:
            places = grid.heat(torch.arange(count))
            shares[places] = self.cells(grid, parts[grid.image])
        return shares


def _overlap(cells: int, span: Sequence[float], part: Sequence[float], pixels: int) -> np.ndarray:
    """(cells, pixels): the share of each cell's length, on `span`, that each pixel covers.

    Only what lies inside `part` counts. All are fractions of the image's side.
    """
    edges = np.linspace(span[0], span[1], cells + 1)[:, None] * pixels
    pixel = np.arange(pixels)
    low = np.maximum(edges[:-1], np.maximum(pixel, part[0] * pixels))
    high = np.minimum(edges[1:], np.minimum(pixel + 1, part[1] * pixels))
    return (high - low).clip(0) / (edges[1:] - edges[:-1])


# -- reading ---------------------------------------------------------------------------------------


def read(given: Any, size: tuple[int, int], names: Names | None = None) -> Target:
    """A target from what a user gives.

    Args:
        given: a box as ``"l,t,r,b"`` or four numbers, in pixels, or in fractions where none is
            above 1; a mask, as a file or an array (H, W), where all that is not black counts; or
            one of `names`.
        size: (width, height) of the image in pixels.
        names: things that are known, see `known`.

    Raises:
        FoveateError: for anything else, and for what is not on the image.
    """
    if isinstance(given, Target):
        _same_size(given.mask, size, f"The mask of {given.name}")
        return given
    if isinstance(given, np.ndarray):
        return _mask(given != 0, size, "the mask")
    if isinstance(given, (tuple, list)):
        return _box([float(number) for number in given], size)
    text = str(given).strip()
    if re.fullmatch(r"[-+\d.eE\s]+(,[-+\d.eE\s]+)+", text):
        try:
            numbers = [float(number) for number in text.split(",")]
        except ValueError:
            raise FoveateError(
                f"Cannot read the box {text!r}: write it like 10,20,90,60."
            ) from None
        return _box(numbers, size)
    if names and text in names:
        return _mask(names[text](size[0]), size, text)
    if Path(text).is_file():
        return _mask(np.asarray(decode(text)).max(-1) > 0, size, Path(text).name)
    if names:
        raise FoveateError(f"There is no {text!r} in this scene: it has {', '.join(names)}.")
    raise FoveateError(
        f"The object {text!r} is neither a box (left,top,right,bottom) nor a mask file; names are "
        "known only of the demo's scene and of pictures that `foveate draw` wrote."
    )


def _box(box: list[float], size: tuple[int, int]) -> Target:
    told = ",".join(f"{number:g}" for number in box)
    if len(box) != 4:
        raise FoveateError(f"The box {told} has {len(box)} numbers: give left,top,right,bottom.")
    wide, high = size
    if max(box) <= 1:
        box = [edge * side for edge, side in zip(box, (wide, high, wide, high), strict=True)]
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        raise FoveateError(f"The box {told} is empty: give left,top,right,bottom.")
    if left < 0 or top < 0 or right > wide or bottom > high:
        raise FoveateError(
            f"The box {told} reaches outside the image, which has {wide} x {high} pixels."
        )
    down, across = (
        (np.minimum(np.arange(side) + 1, stop) - np.maximum(np.arange(side), start)).clip(0)
        for side, start, stop in ((high, top, bottom), (wide, left, right))
    )
    return Target(f"box {told}", np.outer(down, across).astype(np.float32))


def _mask(mask: np.ndarray, size: tuple[int, int], name: str) -> Target:
    _same_size(mask, size, f"The mask {name}" if name != "the mask" else "The mask")
    if not mask.any():
        raise FoveateError(f"In {name} nothing is marked: the object must not be black.")
    return Target(name, mask.astype(np.float32))


def _same_size(mask: np.ndarray, size: tuple[int, int], what: str) -> None:
    if mask.shape != size[::-1]:
        told = " x ".join(map(str, mask.shape[::-1]))
        raise FoveateError(f"{what} has {told} pixels and the image {size[0]} x {size[1]}.")


# -- ground truth ----------------------------------------------------------------------------------


def known(image: str | Path) -> Names:
    """The things on the demo's scene, or on a picture that `foveate draw` wrote, by their kind.

    Several things of one kind are one target. Nothing is known about any other picture.
    """
    path, scene = Path(image), None
    truth = path.parent.parent / "scenes.jsonl"
    if str(image) == "demo" and not path.is_file():
        scene = world.sample(questions.FIRST_HELD_OUT)
    elif path.parent.name == "images" and truth.is_file():
        rows = map(json.loads, truth.read_text(encoding="utf-8").splitlines())
        scenes = (row["scene"] for row in rows if row["image"] == f"images/{path.name}")
        scene = next(map(world.Scene.from_dict, scenes), None)
    kinds = dict.fromkeys(thing.kind for thing in scene.things) if scene else {}
    return {kind: partial(of_kind, scene, kind) for kind in kinds}


def of_kind(scene: Any, kind: str, size: int) -> np.ndarray:
    """All things of one kind, (size, size) bool."""
    of_this_kind = [thing.kind == kind for thing in scene.things]
    return world.masks(scene, size)[of_this_kind].max(0)
