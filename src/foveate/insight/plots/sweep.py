"""The figure of a sweep: a line over one parameter, a heat map over two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...evaluation.sweep import best
from .style import (
    BLUE,
    INK,
    PAD,
    PAPER,
    QUIET,
    RED,
    SERIES,
    Page,
    check_path,
    legend,
    lined,
    plain,
    wrapped,
)

if TYPE_CHECKING:
    from ...evaluation.points import Point
    from ...evaluation.sweep import Sweep

BELOW_ABOVE = "PuOr"  # orange to violet: told apart by everyone


def show_sweep(sweep: Sweep, path: str | Path) -> Path:
    """Write the figure of a sweep: a line over one parameter, a heat map over two.

    Args:
        path: of the picture to write; its ending chooses the format.
    """
    path = check_path(path)
    page = _map(sweep) if len(sweep.axes) == 2 else _line(sweep)
    return page.save(path, below=0.4)


def _line(sweep: Sweep) -> Page:
    """The metric over one parameter, with the interval of its difference from vanilla."""
    axis = sweep.axes[0]
    page = Page(
        wide=7.5,
        head=wrapped(f"{sweep.method} over {axis.parameter}, {sweep.title}", 7.5, 8.3, most=2),
        rows=1,
        row=4.1,
        notes=_caption(
            sweep,
            f"{'Band' if axis.numeric else 'Bars'}: {_interval(sweep)}; where it leaves out the "
            "dashed line, the setting differs from vanilla.",
        ),
    )
    panel = page.axes(PAD + 0.7, page.top(0), page.wide - 2 * PAD - 0.8, 3.6)
    places = axis.places
    known = [
        (place, point)
        for place, point in zip(places, sweep.points, strict=True)
        if point.value is not None
    ]
    name = re.sub(r"\((?:[^()]|\([^()]*\))*\)", "", sweep.method)  # its parameters stand above
    x, y = [place for place, _ in known], [point.value for _, point in known]
    panel.axhline(sweep.vanilla, color=RED, dashes=(5, 3), lw=1.6, label="vanilla")
    panel.plot(x, y, "o-" if axis.numeric else "o", color=BLUE, lw=2, ms=6, label=name)
    banded = [
        (place, sweep.vanilla + point.low, sweep.vanilla + point.high)
        for place, point in known
        if point.low is not None and point.high is not None
    ]
    if banded and axis.numeric and len(banded) > 1:
        where, low, high = zip(*banded, strict=True)
        panel.fill_between(where, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    elif banded:
        where, low, high = zip(*banded, strict=True)
        panel.vlines(where, low, high, color=BLUE, alpha=0.5, lw=3, label="95 % interval")
    if sweep.choice is not None:
        spots = [(at, p.value) for at, p in known if p.method == sweep.choice.method]
        ring = {"facecolors": "none", "edgecolors": INK, "linewidths": 1.6, "zorder": 3}
        panel.scatter(*zip(*spots, strict=True), s=150, label="chosen on half", **ring)
    default = axis.default_at
    if default is not None:
        panel.axvline(default, color=QUIET, lw=1, ls=":", label=f"default, {_short(axis.default)}")
    if not axis.numeric or len(places) <= 12:
        panel.set_xticks(places, [_short(value) for value in axis.values])
    if not axis.numeric:
        panel.set_xlim(-0.5, len(places) - 0.5)
    panel.set_xlabel(axis.parameter, size=11, color=INK)
    panel.set_ylabel(_measured(sweep), size=11, color=INK)
    lined(panel)
    legend(panel, 4)
    return page


def _map(sweep: Sweep) -> Page:
    """The metric over two parameters, the first from left to right, with vanilla beside."""
    from matplotlib.colors import TwoSlopeNorm

    across, up = sweep.axes
    framed = all(axis.default in axis.values for axis in sweep.axes)
    columns, rows = len(across.values), len(up.values)
    longest = max(len(_short(value)) for value in up.values)
    wide, high, left, right = 0.85, 0.62, PAD + 0.5 + 0.09 * longest, 2.5
    page = Page(
        wide=max(7.0, left + columns * wide + right),
        head=wrapped(
            f"{sweep.method} over {across.parameter} and {up.parameter}, {sweep.title}",
            max(7.0, left + columns * wide + right),
            8.3,
            most=2,
        ),
        rows=1,
        row=max(rows, 3) * high + 0.5,
        notes=_caption(
            sweep,
            f"Large: {_measured(sweep)}. Small: its difference from vanilla, with * where the "
            f"{_interval(sweep)} leaves out 0.{' Framed: the default.' * framed}"
            f"{' Dashed: chosen on half of the images.' * (sweep.choice is not None)}",
        ),
    )
    top, tall = page.top(0), rows * high
    changes = [abs(point.difference or 0.0) for point in sweep.points]
    most = max([*changes, 1e-9])
    norm = TwoSlopeNorm(0, -most, most)
    panel = page.axes(left, top, columns * wide, tall)
    cells = np.full((rows, columns), np.nan)
    for point in sweep.points:
        column, row = (
            axis.values.index(value) for axis, value in zip(sweep.axes, point.values, strict=True)
        )
        if point.difference is not None:
            cells[row, column] = point.difference
        _tell(panel, column, row, sweep, point, norm)
    panel.set_facecolor("#d5d5dc")
    panel.imshow(cells, cmap=BELOW_ABOVE, norm=norm, aspect="auto", origin="lower")
    if framed:
        column, row = (axis.values.index(axis.default) for axis in sweep.axes)
        panel.add_patch(_frame(column, row))
    if sweep.choice is not None:
        places = zip(sweep.axes, sweep.choice.values, strict=True)
        column, row = (axis.values.index(value) for axis, value in places)
        panel.add_patch(_frame(column, row, dashed=True))
    heads = [_short(value) for value in across.values]
    panel.set_xticks(range(columns), heads)
    panel.set_yticks(range(rows), [_short(value) for value in up.values])
    panel.set_xlabel(across.parameter, size=11, color=INK)
    panel.set_ylabel(up.parameter, size=11, color=INK)
    plain(panel)
    if max(map(len, heads)) > 8:
        panel.tick_params(axis="x", labelsize=8)
    beside = page.axes(left + columns * wide + 0.3, top, wide, high)
    beside.imshow([[0.0]], cmap=BELOW_ABOVE, norm=norm, aspect="auto")
    beside.text(0, 0, _told(sweep, sweep.vanilla), ha="center", va="center", size=11, color=INK)
    beside.set_xlabel("vanilla", size=11, color=INK)
    beside.set_xticks([])
    beside.set_yticks([])
    scale = page.axes(left + columns * wide + 1.5, top, 0.16, max(rows, 3) * high)
    ramp = np.linspace(-most, most, 256)[:, None]
    scale.imshow(
        ramp, cmap=BELOW_ABOVE, norm=norm, aspect="auto", origin="lower", extent=(0, 1, -most, most)
    )
    scale.set_xticks([])
    scale.yaxis.tick_right()
    scale.yaxis.set_label_position("right")
    unit = "points" if sweep.unit == "%" else sweep.unit
    scale.set_ylabel(f"above vanilla, {unit}", size=9, color=QUIET)
    scale.tick_params(labelsize=8.5, colors=QUIET)
    return page


def _tell(panel: Any, column: int, row: int, sweep: Sweep, point: Point, norm: Any) -> None:
    """A cell's numbers, dark on light and light on dark."""
    from matplotlib import colormaps

    if point.value is None or point.difference is None:
        panel.text(column, row, "no value", ha="center", va="center", size=9, color=INK)
        return
    red, green, blue, _ = colormaps[BELOW_ABOVE](norm(point.difference))
    ink = PAPER if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
    style = {"ha": "center", "color": ink}
    panel.text(column, row + 0.04, _told(sweep, point.value), va="bottom", size=11, **style)
    change = f"{point.difference:+.{sweep.digits}f}{'*' * point.apart}"
    panel.text(column, row - 0.08, change, va="top", size=8, **style)


def _frame(column: int, row: int, dashed: bool = False) -> Any:
    from matplotlib.patches import Rectangle

    inset = 0.05 * dashed  # inside another frame
    corner, wide, high = (column - 0.47 + inset, row - 0.46 + inset), 0.94, 0.92
    style: dict[str, Any] = {"ec": INK, "lw": 1.8}
    if dashed:
        style = {"ec": SERIES[2], "lw": 2.2, "ls": "--"}  # seen on violet, white and orange
    return Rectangle(corner, wide - 2 * inset, high - 2 * inset, fill=False, **style)


def _caption(sweep: Sweep, reading: str) -> str:
    """What was asked of whom, and how to read it."""
    return (
        f"Model {sweep.model}, {sweep.benchmark}; n = {sweep.questions:,} questions about "
        f"{sweep.images:,} images, the same for vanilla and every setting. {reading} Intervals "
        f"are for each setting alone, not corrected for trying several. {best(sweep)} "
        f"{' '.join(sweep.notes)}"
    )


def _interval(sweep: Sweep) -> str:
    drawn = "whole images" if sweep.metric == "accuracy" else "groups of images"
    return f"95 % paired bootstrap interval of the difference ({drawn} drawn)"


def _measured(sweep: Sweep) -> str:
    if sweep.metric == "accuracy":
        return f"accuracy, all questions ({sweep.unit})"
    return f"{sweep.metric} ({sweep.unit})"


def _told(sweep: Sweep, value: float) -> str:
    return f"{value:.{sweep.digits}f}"


def _short(value: Any) -> str:
    """A value on an axis, in few letters."""
    told = f"{value:g}" if isinstance(value, float) else str(value)
    return told if len(told) <= 12 else f"{told[:5]} … {told[-4:]}"
