"""Recall against CHAIR: captions of every method, cut to fewer and fewer words."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .analysis import Sheet
from .style import QUIET, SERIES, check_path

if TYPE_CHECKING:
    from ...evaluation.lengths import Lengths

MOST = len(SERIES)  # methods that have a colour; more are drawn by their whole captions alone
MARKS = "o^vPX"  # the first for the first methods that have a colour, and so on
SAMPLED = "D"


def show_lengths(lengths: Lengths, title: str, path: str | Path) -> Path:
    """Write the curves of recall against CHAIRi, and of recall against CHAIRs.

    Args:
        title: the benchmark and the model.
        path: of the picture to write; its ending chooses the format.
    """
    path = check_path(path)
    plain, *others = lengths.curves
    looks = itertools.cycle((mark, color) for mark in MARKS for color in SERIES)
    styled = [(curve, *look) for curve, look in zip(others, looks, strict=False)]

    def panel(axes: Any, measure: str) -> None:
        def places(curve: Any) -> tuple[list[float], list[float]]:
            return [c.recall for c in curve.cuts], [getattr(c, measure) for c in curve.cuts]

        recall, chair = places(plain)
        axes.plot(recall, chair, "--", color=QUIET, lw=1.6, label="vanilla, cut")
        axes.plot(recall[-1:], chair[-1:], "s", color=QUIET, ms=7, label="vanilla")
        for number, (curve, mark, color) in enumerate(styled):
            recall, chair = places(curve)
            if number < MOST:
                axes.plot(recall, chair, "-", color=color, lw=1.2, alpha=0.6)
            mark = SAMPLED if curve.method.startswith("vanilla,") else mark
            axes.plot(recall[-1:], chair[-1:], mark, color=color, ms=7, label=curve.method)
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
        axes.grid(color="#e4e4ea", lw=0.8)
        axes.set_axisbelow(True)

    sheet = Sheet(
        f"Recall against CHAIR, {title}",
        f"n = {lengths.captions:,} captions, the same for all. Marks: whole captions. Lines: the "
        "same captions cut to fewer and fewer words from the mark to the left. The dashed line is "
        "what cutting vanilla's captions gives: a method helps where its mark lies below that "
        "line, or to the right of it. A diamond is vanilla sampled at a temperature.",
    )
    sheet.add("mentions that are invented", "recall (%)", "CHAIRi (%)",
              lambda axes: panel(axes, "chair_i"))  # fmt: skip
    sheet.add("captions that invent something", "recall (%)", "CHAIRs (%)",
              lambda axes: panel(axes, "chair_s"))  # fmt: skip
    sheet.save(path)
    return path
