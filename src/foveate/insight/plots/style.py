"""What all figures share: colours, panels placed in inches, pictures with heat on them."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.errors import FoveateError

if TYPE_CHECKING:
    from PIL import Image

COLORS = "inferno"
PAD, GAP = 0.25, 0.1  # inches
INK, PAPER, QUIET = "#1b1b1f", "#ffffff", "#6a6a75"
BLUE, RED = "#0072b2", "#d55e00"  # told apart by everyone (Okabe and Ito)


def figure_class() -> Any:
    """matplotlib's Figure, without its global state; one helpful sentence where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FoveateError(
            "Drawing needs matplotlib: install it with `pip install 'foveate[plot]'`."
        ) from error
    return Figure


def check_path(path: Path) -> None:
    """Raise `FoveateError` unless a picture can be written to `path`."""
    kinds = sorted(figure_class()().canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in kinds:
        raise FoveateError(f"{path} cannot be drawn: end its name in .png, .pdf, .svg or .jpg.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FoveateError(f"There is no folder {folder}: make it first.")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise FoveateError(f"{path} cannot be written: give another path.")


def evenly(count: int, most: int) -> list[int]:
    """At most `most` indices out of `count`, evenly spread, the first and the last included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


class Page:
    """A figure measured in inches from its upper left corner: a head, rows of panels, notes."""

    def __init__(self, wide: float, head: list[str], rows: int, row: float, notes: str) -> None:
        self.wide, self.row = wide, row
        self.head = 0.55 + 0.28 * len(head) + 0.2
        self.bottom = self.head + rows * row - 0.15
        lines = wrapped(notes, wide, 13.0)
        self.notes = "\n".join(lines)
        self.high = self.bottom + 0.75 + 0.17 * len(lines)
        self.figure = figure_class()(figsize=(self.wide, self.high), dpi=150, facecolor=PAPER)
        self.write(PAD, PAD, "\n".join(head), size=15, weight="bold", linespacing=1.25)

    def top(self, row: int) -> float:
        """Of the panels of a row."""
        return self.head + row * self.row

    def axes(self, left: float, top: float, wide: float, high: float) -> Any:
        box = (left / self.wide, 1 - (top + high) / self.high, wide / self.wide, high / self.high)
        return self.figure.add_axes(box)

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        style = {"va": "top", "color": INK, "parse_math": False, **style}
        self.figure.text(left / self.wide, 1 - top / self.high, text, **style)


def wrapped(text: str, wide: float, letters: float, most: int = 99) -> list[str]:
    """Lines of about `letters` letters per inch; beyond `most` lines the rest is left out."""
    return textwrap.wrap(
        " ".join(text.split()),
        int((wide - 2 * PAD) * letters),
        max_lines=most,
        placeholder=" ...",
    )


def lit(back: np.ndarray, heat: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Greys (H, W, 3) with heat (rows, cols), 0 to 1, in colour over `box`, and pale outside of it.

    `box`: (left, top, right, bottom) as fractions of the picture; it may reach beyond it.
    """
    from matplotlib import colormaps

    def cells(pixels: int, start: float, stop: float, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels inside the box along one side, and the cell that each lies in."""
        place = ((np.arange(pixels) + 0.5) / pixels - start) / (stop - start) * count
        cell = np.floor(place).astype(int)
        inside = (cell >= 0) & (cell < count)
        return inside.nonzero()[0], cell[inside]

    left, top, right, bottom = box
    y, row = cells(back.shape[0], top, bottom, heat.shape[0])
    x, col = cells(back.shape[1], left, right, heat.shape[1])
    heat = heat.clip(0, 1)[np.ix_(row, col)]
    alpha = 0.55 + 0.3 * heat[..., None]
    pale, seen = 0.3 * back + 0.7, np.ix_(y, x)
    pale[seen] = (1 - alpha) * back[seen] + alpha * colormaps[COLORS](heat)[..., :3]
    return pale


def greys(image: Image.Image) -> np.ndarray:
    """The image without its colours, which here mean attention and nothing else; (H, W, 3)."""
    grey = np.asarray(image.convert("L"), float) / 255
    low, high = np.percentile(grey, [1, 99])
    grey = ((grey - low) / max(high - low, 0.05)).clip(0, 1)
    return np.repeat((0.1 + 0.9 * grey)[..., None], 3, axis=2)


def bare(panel: Any) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for side in panel.spines.values():
        side.set_visible(False)


def plain(panel: Any) -> None:
    """Only the axes' own two lines."""
    panel.tick_params(labelsize=10, colors=INK, length=3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
