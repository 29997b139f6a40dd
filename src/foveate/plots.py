"""Pictures of what a model looked at, readable by someone who has never seen an attention map."""

from __future__ import annotations

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
INK, PAPER, QUIET = "#1b1b1f", "#ffffff", "#6a6a75"
HOW_TO_READ = (
    "Every small picture is one layer of the language model, in the order they work. Bright: this "
    "part of the picture weighs much in the next word. The percentage says how much of all "
    "attention goes to the picture; the rest goes to the words."
)


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
    if not path.absolute().parent.is_dir():
        raise FoveateError(f"There is no folder {path.absolute().parent}: make it first.")


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

    All looks share one colour scale within a layer, so that rows can be compared: its top is the
    99th percentile of that layer's weights in all rows, as single tokens often draw very much.

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
    tops = [max(float(np.percentile([m[c] for m in maps], 99)), 1e-12) for c in range(len(columns))]

    title = textwrap.wrap(" ".join(question.split()), 90)
    title = [*title[:3], "..."] if len(title) > 4 else title
    head = 0.75 + 0.27 * len(title)
    foot, pad, gap, row_gap = 0.95, 0.25, 0.12, 0.62
    full = (2 * pad + (width + gap) * (len(columns) + 1) + 0.15, 0.0)
    notes = textwrap.wrap(HOW_TO_READ, int(full[0] * 11.5))
    foot += 0.19 * len(notes)
    total = (full[0], head + foot + len(looks) * (height + row_gap))
    figure = figure_class()(figsize=total, dpi=150, facecolor=PAPER)

    def axes(left: float, top: float, wide: float, high: float) -> Any:
        """Axes placed in inches from the upper left corner."""
        x, y = left / total[0], 1 - (top + high) / total[1]
        return figure.add_axes((x, y, wide / total[0], high / total[1]))

    def write(left: float, top: float, text: str, **style: Any) -> None:
        style = {"va": "top", "color": INK, "parse_math": False, **style}
        figure.text(left / total[0], 1 - top / total[1], text, **style)

    write(pad, pad, "\n".join(title), size=15, weight="bold", linespacing=1.25)
    back = _backdrop(image)
    for row, look in enumerate(looks):
        top = head + row * (height + row_gap) + 0.3
        write(pad, top - 0.28, _short(f"{look.title}: {look.answer}", 110), size=11, weight="bold")
        panel = axes(pad, top, width, height)
        panel.imshow(np.asarray(image))
        _bare(panel)
        for c, column in enumerate(columns):
            panel = axes(pad + 0.15 + (width + gap) * (c + 1), top, width, height)
            panel.imshow(back)
            _overlay(panel, maps[row][c] / tops[c], image, grid)
            panel.set_xlabel(
                f"layer {layers[column]}   {shares[row][c]:.0%}", size=8.5, color=QUIET, labelpad=3
            )
            _bare(panel)
    bottom = head + len(looks) * (height + row_gap)
    _scale(axes(pad, bottom + 0.12, 3.2, 0.14), axes)
    write(pad, bottom + 0.62, "\n".join(notes), size=8.5, color=QUIET, linespacing=1.35)
    figure.savefig(path, facecolor=PAPER)
    return path


def _overlay(panel: Any, heat: np.ndarray, image: Image.Image, grid: Grid) -> None:
    """Heat (rows, cols), 0 to 1, in colour over the part of the image that the grid covers."""
    from matplotlib import colormaps

    left, top, right, bottom = grid.box
    extent = (
        left * image.width - 0.5,
        right * image.width - 0.5,
        bottom * image.height - 0.5,
        top * image.height - 0.5,
    )
    heat = heat.clip(0, 1)
    colors = colormaps[COLORS](heat)
    colors[..., 3] = 0.35 + 0.45 * heat
    panel.imshow(colors, extent=extent, interpolation="nearest")
    panel.set_xlim(-0.5, image.width - 0.5)
    panel.set_ylim(image.height - 0.5, -0.5)


def _backdrop(image: Image.Image) -> np.ndarray:
    """The image in pale greys, so that colour means attention and nothing else."""
    grey = np.asarray(image.convert("L"), float) / 255
    low, high = np.percentile(grey, [1, 99])
    grey = ((grey - low) / max(high - low, 0.05)).clip(0, 1)
    return np.repeat((0.15 + 0.7 * grey)[..., None], 3, axis=2)


def _scale(panel: Any, axes: Any) -> None:
    ramp = np.linspace(0, 1, 256)[None]
    panel.imshow(ramp, cmap=COLORS, aspect="auto", extent=(0, 1, 0, 1))
    panel.set_yticks([])
    panel.set_xticks([0, 1], ["no attention", "most of this layer, in any row"], size=8.5)
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


def _short(text: str, most: int) -> str:
    return textwrap.shorten(text, most, placeholder=" ...")
