"""Pictures of what a model looked at, readable by someone who has never seen an attention map."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .method import FoveateError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from .vision import Grid

COLORS = "inferno"
PAD, GAP, ROW_GAP = 0.25, 0.1, 0.66  # inches
INK, PAPER, QUIET = "#1b1b1f", "#ffffff", "#6a6a75"
HOW_TO_READ = (
    "Each small picture is one layer of the language model, from its first to its last. The "
    "brighter a square, the more the model looks there while it writes its answer. The percentage "
    "is how much of its attention goes to the picture at all; the rest goes to the words. Within "
    "a layer, colours mean the same in every row."
)
CUT_AWAY = " Pale parts are cut away before the model sees the picture."


@dataclass(frozen=True)
class Look:
    """What one method's run looked at: one row of the picture.

    `attention`: (n_layers, N_v), weights of the last query row on the visual tokens.
    """

    title: str
    answer: str
    attention: Tensor


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


def show_attention(
    image: Image.Image,
    question: str,
    looks: Sequence[Look],
    layers: Sequence[int],
    grid: Grid,
    path: str | Path,
) -> Path:
    """Write `image` with every look's attention drawn on it: a row per look, a column per layer.

    All looks share one colour scale within a layer, so that rows can be compared: from the 1st to
    the 99th percentile of that layer's weights in all rows, as single tokens often draw very much.
    Where weights differ by less than a quarter, colours do not exaggerate it.

    Args:
        image: as the model saw it.
        looks: what was recorded, one per method.
        layers: the layer number of every row of `Look.attention`.
        grid: where the visual tokens lie on the image.
        path: of the picture to write; its ending chooses the format.
    """
    path = Path(path)
    check_path(path)
    aspect = image.width / image.height
    height = 1.75 * min(1.0, max(aspect, 0.5) ** -0.5) * (1.25 if aspect < 0.8 else 1.0)
    width = height * min(max(aspect, 0.45), 3.0)
    columns = evenly(len(layers), max(3, min(7, int(14 / width))))
    maps = [np.asarray(grid.heat(look.attention.float().cpu()))[columns] for look in looks]
    shares = [look.attention.float().sum(-1)[columns].tolist() for look in looks]
    ranges = []
    for c in range(len(columns)):
        low, high = np.percentile([m[c] for m in maps], [1, 99])
        low = min(low, 0.75 * high)
        ranges.append((low, max(high - low, 1e-12)))

    page = _Page(
        wide=2 * PAD + width + 0.15 + (width + GAP) * len(columns),
        head=_wrapped(question, 2 * PAD + (width + GAP) * (len(columns) + 1), 8.3, most=3),
        rows=len(looks),
        row=height + ROW_GAP,
        notes=HOW_TO_READ + (CUT_AWAY if grid.box != (0.0, 0.0, 1.0, 1.0) else ""),
    )
    scale = 480 / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    back = _greys(image)
    for row, look in enumerate(looks):
        top = page.top(row)
        said = textwrap.shorten(f"{look.title}: {look.answer}", int(page.wide * 10))
        page.write(PAD, top - 0.3, said, size=11, weight="bold")
        panel = page.axes(PAD, top, width, height)
        panel.imshow(np.asarray(image))
        _bare(panel)
        for c, column in enumerate(columns):
            panel = page.axes(PAD + 0.15 + (width + GAP) * (c + 1), top, width, height)
            low, span = ranges[c]
            panel.imshow(_lit(back, (maps[row][c] - low) / span, grid.box))
            panel.set_xlabel(
                f"layer {layers[column]}: {shares[row][c]:.0%}", size=8.5, color=QUIET, labelpad=3
            )
            _bare(panel)
    _scale(page.axes(PAD, page.bottom + 0.05, min(3.2, page.wide - 2 * PAD), 0.14))
    page.write(PAD, page.bottom + 0.52, page.notes, size=8.5, color=QUIET, linespacing=1.35)
    page.figure.savefig(path, facecolor=PAPER)
    return path


class _Page:
    """A figure measured in inches from its upper left corner: a head, rows of panels, notes."""

    def __init__(self, wide: float, head: list[str], rows: int, row: float, notes: str) -> None:
        self.wide, self.row = wide, row
        self.head = 0.55 + 0.28 * len(head) + 0.2
        self.bottom = self.head + rows * row - 0.15
        lines = _wrapped(notes, wide, 13.0)
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


def _wrapped(text: str, wide: float, letters: float, most: int = 99) -> list[str]:
    """Lines of about `letters` letters per inch; beyond `most` lines the rest is left out."""
    return textwrap.wrap(
        " ".join(text.split()),
        int((wide - 2 * PAD) * letters),
        max_lines=most,
        placeholder=" ...",
    )


def _lit(back: np.ndarray, heat: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Greys (H, W, 3) with heat (rows, cols) in colour over `box`, and pale outside of it."""
    from matplotlib import colormaps

    high, wide = back.shape[:2]
    left, top, right, bottom = box
    y = np.arange(round(top * high), max(round(bottom * high), round(top * high) + 1))
    x = np.arange(round(left * wide), max(round(right * wide), round(left * wide) + 1))
    heat = heat.clip(0, 1)
    cells = np.ix_((y - y[0]) * len(heat) // len(y), (x - x[0]) * heat.shape[1] // len(x))
    alpha, color = (0.55 + 0.3 * heat[..., None])[cells], colormaps[COLORS](heat)[cells][..., :3]
    lit = 0.3 * back + 0.7
    seen = np.ix_(y, x)
    lit[seen] = (1 - alpha) * back[seen] + alpha * color
    return lit


def _greys(image: Image.Image) -> np.ndarray:
    """The image without its colours, which here mean attention and nothing else; (H, W, 3)."""
    grey = np.asarray(image.convert("L"), float) / 255
    low, high = np.percentile(grey, [1, 99])
    grey = ((grey - low) / max(high - low, 0.05)).clip(0, 1)
    return np.repeat((0.1 + 0.9 * grey)[..., None], 3, axis=2)


def _scale(panel: Any) -> None:
    ramp = np.linspace(0, 1, 256)[None]
    panel.imshow(ramp, cmap=COLORS, aspect="auto", extent=(0, 1, 0, 1))
    panel.set_yticks([])
    panel.set_xticks([0, 1], ["least in its layer", "most in its layer"], size=8.5)
    panel.tick_params(length=0, colors=QUIET)
    for side in panel.spines.values():
        side.set_visible(False)
    for label, where in zip(panel.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(where)


def _bare(panel: Any) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for side in panel.spines.values():
        side.set_visible(False)
