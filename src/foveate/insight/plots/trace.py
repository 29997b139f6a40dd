"""A trace as pictures: every layer's attention on the image, and curves over the layers."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..seen import HeatMap, MethodTrace, Seen
from .style import (
    GAP,
    INK,
    PAD,
    PAPER,
    QUIET,
    SERIES,
    Page,
    bare,
    check_path,
    color_range,
    greys,
    legend,
    lined,
    lit,
    small,
    wrapped,
)

OUTLINE = "#7fe0ff"
ACROSS, HIGH, ROW_GAP = 8, 1.3, 0.62  # layers in a line; inches
THIN = 24  # tokens that get lines of their own
HOW_TO_READ = (
    "Each small picture is one layer of the language model. The brighter a square, the more the "
    "model looks there, as a mean over the tokens of its answer. Within a layer, colours mean the "
    "same in every row."
)
_SHARES = " The percentage is how much of its attention goes to this picture at all."
_MEANS = "Curves are means over the answer's tokens."
_MEANS_AND_TOKENS = "Thick: means over the answer's tokens; thin: single tokens."


def show_strip(trace: Seen, path: str | Path) -> Path:
    """Write every layer's heat map for every method, as a mean over the answer's tokens.

    Methods stand below each other and share one colour scale within a layer, from the 1st to the
    99th percentile of that layer's weights in all of them.

    Args:
        path: of the picture to write; its ending chooses the format.
    """
    path = check_path(path)
    rows = [
        (run, picture, _title(run, number))
        for run in trace.runs
        for number, picture in enumerate(run.pictures)
    ]
    layers = trace.runs[0].layers
    heats = [picture.heat[: run.said].mean(0, dtype=np.float32) for run, picture, _ in rows]
    shares = [heat.sum((-2, -1)) for heat in heats]
    scales = [color_range([heat[at] for heat in heats]) for at in range(len(layers))]
    aspects = [picture.image.width / picture.image.height for _, picture, _ in rows]
    width = HIGH * min(max(*aspects, 0.6), 2.2) if len(aspects) > 1 else HIGH * aspects[0]
    lines = list(_lines(len(layers)))
    wide = 2 * PAD + 0.15 + (width + GAP) * (len(lines[0]) + 1)
    notes = HOW_TO_READ + _SHARES * (trace.heads != "max")
    if trace.target:
        notes += f" Outlined: {trace.target.name}."
    page = Page(
        wide=max(wide, 7.0),
        head=wrapped(trace.question, max(wide, 7.0), 8.3, most=3),
        rows=len(lines) * len(rows),
        row=HIGH + ROW_GAP,
        notes=notes,
    )
    row = 0
    for line in lines:
        for (_, picture, title), heat, share in zip(rows, heats, shares, strict=True):
            top = page.top(row)
            told = textwrap.shorten(title, int(page.wide * 11), placeholder=" ...")
            page.write(PAD, top - 0.27, told, size=10, weight="bold")
            image = small(picture.image, 320)
            panel = page.axes(PAD, top, width, HIGH)
            panel.imshow(np.asarray(image))
            _outline(panel, trace, picture, image.size)
            bare(panel)
            back = greys(image)
            for place, at in enumerate(line):
                panel = page.axes(PAD + 0.15 + (width + GAP) * (place + 1), top, width, HIGH)
                low, span = scales[at]
                panel.imshow(lit(back, (heat[at] - low) / span, picture.box))
                _outline(panel, trace, picture, image.size)
                told = f"layer {layers[at]}" + f": {share[at]:.0%}" * (trace.heads != "max")
                panel.set_xlabel(told, size=8, color=QUIET, labelpad=2)
                bare(panel)
            row += 1
    return page.save(path, below=0.1)


def show_curves(trace: Seen, path: str | Path) -> Path:
    """Write the attention to the object (without one: to the image) and u over the layers.

    A thick line is the mean over the answer's tokens, thin lines are single tokens where they are
    few. A triangle is the layer after which CLVS stopped for a token.

    Args:
        path: of the picture to write; its ending chooses the format.
    """
    path = check_path(path)
    thin = max(run.said for run in trace.runs) > 1 and sum(run.said for run in trace.runs) <= THIN
    notes = (
        f"{_MEANS_AND_TOKENS if thin else _MEANS} Attention is that of the last "
        f"row, {_heads(trace)}, after the method's edits. Uncertainty is the entropy of the "
        "layer's own prediction over its likeliest tokens, 0 to 1 (CLVS, eq. 8)."
    )
    clvs = [run for run in trace.runs if run.threshold is not None]
    if clvs:
        notes += (
            " Triangle: the layer after which CLVS stops, the first tested one (from layer "
            f"{clvs[0].tested[0]} on) whose uncertainty is below the dashed line."
            if clvs[0].tested
            else " CLVS is not stopped here."
        )
    wide = 7.5
    page = Page(wide, wrapped(trace.question, wide, 8.3, most=3), 2, 3.3, notes)
    upper = page.axes(PAD + 0.75, page.top(0) + 0.15, wide - 2 * PAD - 0.85, 2.5)
    lower = page.axes(PAD + 0.75, page.top(1) + 0.1, wide - 2 * PAD - 0.85, 2.5)
    depth = trace.runs[0].uncertainty.shape[1]
    for color, run in zip(itertools.cycle(SERIES), trace.runs, strict=False):
        values: np.ndarray | None = getattr(run, trace.measure)
        told = textwrap.shorten(f"{run.method}: {run.answer.text}", 40, placeholder=" ...")
        if values is not None:
            _curve(upper, run.layers, values[: run.said], thin, color, told)
        _curve(lower, range(depth), run.uncertainty[: run.said], thin, color, told)
        if run.threshold is not None and run.tested:
            lower.axhline(run.threshold, color=color, lw=1, ls="--")
        for token, layer in enumerate(run.stopped[: run.said]):
            if layer is not None:
                at = run.uncertainty[token, layer]
                lower.plot(
                    [layer], [at], "v", color=color, ms=8, mec=PAPER, zorder=5, clip_on=False
                )
    upper.set_ylabel(_measured(trace), size=10, color=INK)
    lower.set_ylabel("uncertainty u", size=10, color=INK)
    lower.set_ylim(0, 1)
    upper.set_ylim(bottom=0)
    if trace.measure != "on_image" or trace.heads != "max":
        upper.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for panel in (upper, lower):
        panel.set_xlim(-0.3, depth - 0.7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        lined(panel)
    lower.set_xlabel("layer", size=10, color=INK)
    legend(upper, 2)
    return page.save(path, below=0.1)


def _measured(trace: Seen) -> str:
    """What the upper curves are."""
    target = textwrap.shorten(trace.target.name if trace.target else "the image", 24)
    if trace.heads != "max":
        return f"attention to {target}"
    return f"share on {target}" if trace.target else "largest weights, sum"


def _curve(
    panel: Any, layers: Sequence[int], values: np.ndarray, thin: bool, color: str, told: str
) -> None:
    panel.plot(layers, values.mean(0), color=color, lw=2.2, label=told, zorder=3)
    for line in values if thin else ():
        panel.plot(layers, line, color=color, lw=0.6, alpha=0.35)


def _heads(trace: Seen) -> str:
    if isinstance(trace.heads, str):
        return f"{trace.heads} over heads"
    return f"mean over heads {', '.join(map(str, trace.heads))}"


def _title(run: MethodTrace, number: int) -> str:
    if len(run.pictures) == 1:
        return f"{run.method}: {run.answer.text}"
    return f"{run.method}, picture {number + 1} of {len(run.pictures)}: {run.answer.text}"


def _lines(count: int) -> Iterator[range]:
    """Layers in lines of nearly equal length."""
    many = -(-count // ACROSS)
    length = -(-count // many)
    for start in range(0, count, length):
        yield range(start, min(start + length, count))


def _outline(panel: Any, trace: Seen, picture: HeatMap, size: tuple[int, int]) -> None:
    if trace.target is None or picture.part is None:
        return
    seen = trace.target.seen(picture.part, size)
    if seen.any() and not seen.all():
        panel.contour(seen, levels=[0.5], colors=OUTLINE, linewidths=0.9)
