"""Attention drawn on the image, layer by layer, readable by someone who has never seen a map."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import (
    COLORS,
    GAP,
    PAD,
    QUIET,
    Page,
    bare,
    check_path,
    color_range,
    evenly,
    greys,
    lit,
    small,
    wrapped,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ...families.layout import Grid

ROW_GAP = 0.66  # inches
HOW_TO_READ = (
    "Each small picture is one layer of the language model, from its first to its last. The "
    "brighter a square, the more the model looks there while it writes its answer. The percentage "
    "is how much of its attention goes to the picture at all; the rest goes to the words. Within "
    "a layer, colours mean the same in every row."
)
CUT_AWAY = " Pale parts are cut away before the model sees the picture."


@dataclass(frozen=True)
class AttentionRow:
    """What the model looked at with one method: one row of the figure.

    `attention`: (n_layers, N_v), weights of the last query row on the visual tokens.
    """

    title: str
    answer: str
    attention: Tensor


def show_attention(
    image: Image.Image,
    question: str,
    rows: Sequence[AttentionRow],
    layers: Sequence[int],
    grid: Grid,
    path: str | Path,
) -> Path:
    """Write `image` with the attention drawn on it: a row per method, a column per layer.

    All rows share one colour scale within a layer, so that they can be compared: from the 1st to
    the 99th percentile of that layer's weights in all rows, as single tokens often draw very much.
    Where weights differ by less than a quarter, colours do not exaggerate it.

    Args:
        image: as the model saw it.
        rows: what was recorded, one per method.
        layers: the layer number of every row of `AttentionRow.attention`.
        grid: where the visual tokens lie on the image.
        path: of the picture to write; its ending chooses the format.
    """
    path = check_path(path)
    aspect = image.width / image.height
    height = 1.75 * min(1.0, max(aspect, 0.5) ** -0.5) * (1.25 if aspect < 0.8 else 1.0)
    width = height * min(max(aspect, 0.45), 3.0)
    columns = evenly(len(layers), max(3, min(7, int(14 / width))))
    maps = [np.asarray(grid.heat(row.attention.float().cpu()))[columns] for row in rows]
    shares = [row.attention.float().sum(-1)[columns].tolist() for row in rows]
    ranges = [color_range([m[c] for m in maps]) for c in range(len(columns))]

    page = Page(
        wide=2 * PAD + width + 0.15 + (width + GAP) * len(columns),
        head=wrapped(question, 2 * PAD + (width + GAP) * (len(columns) + 1), 8.3, most=3),
        rows=len(rows),
        row=height + ROW_GAP,
        notes=HOW_TO_READ + (CUT_AWAY if grid.box != (0.0, 0.0, 1.0, 1.0) else ""),
    )
    image = small(image, 480)
    back = greys(image)
    for number, row in enumerate(rows):
        top = page.top(number)
        said = textwrap.shorten(f"{row.title}: {row.answer}", int(page.wide * 10))
        page.write(PAD, top - 0.3, said, size=11, weight="bold")
        panel = page.axes(PAD, top, width, height)
        panel.imshow(np.asarray(image))
        bare(panel)
        for c, column in enumerate(columns):
            panel = page.axes(PAD + 0.15 + (width + GAP) * (c + 1), top, width, height)
            low, span = ranges[c]
            panel.imshow(lit(back, (maps[number][c] - low) / span, grid.box))
            panel.set_xlabel(
                f"layer {layers[column]}: {shares[number][c]:.0%}",
                size=8.5,
                color=QUIET,
                labelpad=3,
            )
            bare(panel)
    _scale(page.axes(PAD, page.bottom + 0.05, min(3.2, page.wide - 2 * PAD), 0.14))
    return page.save(path, below=0.52)


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
