"""The figures of analyses: panels side by side, under them what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .style import BLUE, COLORS, INK, PAD, PAPER, QUIET, SERIES, Page, check_path, plain, wrapped

WIDE, HIGH = 4.1, 3.0  # inches of a panel
LEFT, BETWEEN, ABOVE, BELOW = 0.75, 0.95, 0.6, 0.7

Numbers = dict[str, Any]


class Sheet:
    """A figure that is filled panel by panel, two in a row, with its caption below.

    Args:
        title: above everything. caption: below, as text.
    """

    def __init__(self, title: str, caption: str) -> None:
        self.title, self.caption = title, caption
        self.panels: list[tuple[str, str, str, Callable[[Any], None]]] = []

    def add(self, title: str, x: str, y: str, draw: Callable[[Any], None]) -> None:
        """A panel: its title, its axes' names, and a call that draws on matplotlib's axes."""
        self.panels.append((title, x, y, draw))

    def save(self, path: Path) -> None:
        """Draw and write everything; the path's ending chooses the format."""
        check_path(path)
        columns = min(2, len(self.panels))
        wide = 2 * PAD + columns * (LEFT + WIDE) + (columns - 1) * (BETWEEN - LEFT) + 0.3
        page = Page(
            wide=wide,
            head=wrapped(self.title, wide, 8.3, most=2),
            rows=-(-len(self.panels) // 2),
            row=ABOVE + HIGH + BELOW,
            notes=self.caption,
        )
        for number, (title, x, y, draw) in enumerate(self.panels):
            row, column = divmod(number, 2)
            left, top = PAD + LEFT + column * (WIDE + BETWEEN), page.top(row)
            panel = page.axes(left, top + ABOVE, WIDE, HIGH)
            panel.set_xlabel(x, size=9.5, color=INK)
            panel.set_ylabel(y, size=9.5, color=INK)
            plain(panel)
            panel.tick_params(labelsize=8.5)
            draw(panel)
            handles, names = panel.get_legend_handles_labels()
            lines = -(-len(names) // 4)
            above = top + ABOVE - 0.26 - 0.18 * lines
            page.write(left, above, title, size=10.5, weight="bold")
            if names:
                panel.legend(
                    handles, names, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4,
                    frameon=False, fontsize=8.5, handlelength=1.4, columnspacing=1.2,
                    borderaxespad=0.2,
                )  # fmt: skip
        page.save(path, below=0.4)


def band(
    panel: Any,
    x: Sequence[float],
    means: Numbers,
    color: str,
    label: str,
    scale: float = 1.0,
    dots: bool = True,
) -> None:
    """A line of means over `x` with its 95 % interval, from `foveate.base.intervals.mean`."""
    middle, low, high = (scale * np.array(means[k], float) for k in ("mean", "low", "high"))
    panel.plot(x, middle, "o-" if dots else "-", color=color, lw=1.8, ms=3.5, label=label)
    panel.fill_between(x, low, high, color=color, alpha=0.18, lw=0)


def bands(
    panel: Any,
    layers: Sequence[int],
    curves: Mapping[str, Numbers],
    colors: Sequence[str] = SERIES,
    scale: float = 1.0,
) -> None:
    """A `band` per curve over layers, by the curves' names."""
    for color, (name, means) in zip(itertools.cycle(colors), curves.items(), strict=False):
        band(panel, layers, means, color, name, scale)
    whole(panel, layers)


def marks(
    panel: Any,
    x: Sequence[float],
    points: Sequence[Numbers],
    color: str,
    label: str,
    scale: float = 1.0,
) -> None:
    """Points with their intervals, one {"mean", "low", "high"} each."""
    middle, low, high = (
        scale * np.array([point[k] for point in points], float) for k in ("mean", "low", "high")
    )
    panel.vlines(x, low, high, color=color, alpha=0.55, lw=2.2)
    panel.plot(x, middle, "o", color=color, ms=5, label=label)


def table(
    panel: Any, values: np.ndarray, x: Sequence[Any], unit: str, middle: float | None = None
) -> None:
    """Values (rows, columns) as colours, the first row below, with their scale on the right.

    Args:
        middle: a value from which colours go both ways, on a logarithmic scale, down as far as up;
            smaller values look like the smallest.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FormatStrFormatter

    if middle is None:
        norm: Any = Normalize(0, float(np.nanmax(values)) or 1.0)
        colors = COLORS
    else:
        most = max(float(np.nanmax(values)), 1.1 * middle)
        norm, colors = LogNorm(middle**2 / most, most), "PuOr"
    shown = panel.imshow(values, cmap=colors, norm=norm, aspect="auto", origin="lower")
    whole(panel, range(len(x)), x)
    whole(panel, range(len(values)), range(len(values)), up=True)
    scale = panel.figure.colorbar(
        shown, ax=panel, pad=0.02, fraction=0.05, extend="neither" if middle is None else "min"
    )
    scale.ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    scale.set_label(unit, size=8.5, color=QUIET)
    scale.ax.tick_params(labelsize=8, colors=QUIET)
    scale.outline.set_visible(False)


def cells(panel: Any, values: np.ndarray, x: Sequence[Any], y: Iterable[str]) -> None:
    """Percentages (rows, columns) as colours with their numbers, the first row on top."""
    panel.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, column in np.ndindex(values.shape):
        if values[row, column] >= 0.5:
            ink = PAPER if values[row, column] > 55 else INK
            told = f"{values[row, column]:.0f}"
            panel.text(column, row, told, ha="center", va="center", size=7.5, color=ink)
    whole(panel, range(len(x)), x)
    panel.set_yticks(range(len(values)), list(y))
    panel.tick_params(axis="y", labelsize=8, length=0)


def ranked(panel: Any, names: Sequence[str], means: Numbers) -> None:
    """Horizontal bars from the top down, with intervals."""
    y = np.arange(len(names))[::-1]
    panel.barh(y, means["mean"], 0.7, color=BLUE)
    panel.hlines(y, means["low"], means["high"], color=INK, lw=1.2)
    panel.set_yticks(y, names)
    panel.tick_params(axis="y", labelsize=7, length=0)


def bars(panel: Any, x: Sequence[float], groups: dict[str, Sequence[float]]) -> None:
    """Bars of several groups beside each other at every `x`."""
    width = 0.8 / max(len(groups), 1)
    for number, (label, heights) in enumerate(groups.items()):
        places = np.asarray(x, float) - 0.4 + width * (number + 0.5)
        color = SERIES[number % len(SERIES)] if len(groups) > 1 else BLUE
        panel.bar(places, heights, width, color=color, label=label)


def whole(panel: Any, x: Sequence[float], names: Sequence[Any] = (), up: bool = False) -> None:
    """Ticks at layers, named, not so many that they touch."""
    step = -(-len(x) // 16)
    set_ticks = panel.set_yticks if up else panel.set_xticks
    set_ticks(list(x)[::step], [str(name) for name in list(names or x)[::step]])


def zero(panel: Any) -> None:
    panel.axhline(0, color=QUIET, lw=0.8)
