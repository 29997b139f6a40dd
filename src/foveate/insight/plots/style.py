"""What all figures share: colours, panels placed in inches, pictures with heat on them."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.errors import FoveateError
from ...base.files import replacing

if TYPE_CHECKING:
    from PIL import Image

COLORS = "inferno"
PAD, GAP = 0.25, 0.1  # inches
INK, PAPER, QUIET = "#1b1b1f", "#ffffff", "#6a6a75"
BLUE, RED = "#0072b2", "#d55e00"
SERIES = (RED, BLUE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # everyone can tell them apart
"""Colours of Okabe and Ito."""


def figure_class() -> Any:
    """matplotlib's Figure, without its global state; one helpful sentence where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FoveateError(
            "Drawing needs matplotlib: install it with `pip install 'foveate[plot]'`."
        ) from error
    return Figure


def check_path(path: str | Path) -> Path:
    """The path of a picture; raises `FoveateError` unless one can be written there."""
    path = Path(path)
    kinds = sorted(figure_class()().canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in kinds:
        raise FoveateError(f"{path} cannot be drawn: end its name in .png, .pdf, .svg or .jpg.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FoveateError(f"There is no folder {folder}: make it first.")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise FoveateError(f"{path} cannot be written: give another path.")
    return path


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

    def save(self, path: Path, below: float) -> Path:
        """Write the notes `below` inches under the panels, then the picture, which ends there."""
        from matplotlib.transforms import Bbox

        top = self.bottom + below
        self.write(PAD, top, self.notes, size=8.5, color=QUIET, linespacing=1.35)
        high = min(self.high, top + 0.17 * (self.notes.count("\n") + 1) + PAD)
        used = Bbox([(0, self.high - high), (self.wide, self.high)])
        with replacing(path) as part:
            self.figure.savefig(part, facecolor=PAPER, bbox_inches=used)
        return path


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


def small(image: Image.Image, side: int) -> Image.Image:
    """The picture in RGB with a longer side of `side` pixels."""
    image = image.convert("RGB")
    scale = side / max(image.size)
    return image.resize([max(1, round(pixels * scale)) for pixels in image.size])


def color_range(heats: list[np.ndarray]) -> tuple[float, float]:
    """(lowest, span) of the colours that maps share: from the 1st to the 99th percentile.

    Where weights differ by less than a quarter, the span is wider and shows it.
    """
    low, high = np.percentile(np.concatenate([heat.ravel() for heat in heats]), [1, 99])
    low = min(low, 0.75 * high)
    return low, max(high - low, 1e-12)


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


def lined(panel: Any) -> None:
    """`plain`, with quiet lines across at the ticks."""
    panel.grid(axis="y", color="#e4e4ea", lw=0.8)
    panel.set_axisbelow(True)
    plain(panel)


def legend(panel: Any, columns: int) -> None:
    """Names of the curves in a row above the panel."""
    panel.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize=9.5
    )
