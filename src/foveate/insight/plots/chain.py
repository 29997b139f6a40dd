"""How a method that looks again came from the picture to what it asks about: a row per method."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...vlm.look import Chain, Panel
from .style import BLUE, GAP, PAD, PAPER, QUIET, Page, bare, check_path, greys, lit, small, wrapped

HIGH = 2.1  # of a panel, inches
ROW_GAP = 0.95  # between rows: their titles
LETTERS = 15.0  # of a panel's title, per inch
HOW_TO_READ = (
    "Read from left to right. The brighter a square, the more of what the title names lies there; "
    "each small picture has a colour scale of its own, from the least to the most in it. A blue "
    "frame is the part that is cut out and shown to the model again."
)


@dataclass(frozen=True)
class Link:
    """One row: a method, what it answered, and how it came to its picture."""

    title: str
    answer: str
    chain: Chain


def show_chain(
    question: str, links: Sequence[Link], others: dict[str, str], path: str | Path
) -> Path:
    """Write every method's chain of pictures, and beside it what the other methods answered.

    Args:
        others: answers of methods that have no chain, such as the plain model's.
        path: of the picture to write; its ending chooses the format.
    """
    path = check_path(path)
    wide = 2 * PAD + max(
        sum(_width(panel) + GAP for panel in link.chain.panels) - GAP for link in links
    )
    wide = max(wide, 7.0)
    head = wrapped(question, wide, 8.3, most=3)
    plain = wrapped("   ".join(f"{n}: {said}" for n, said in others.items()), wide, 13.0, most=2)
    page = Page(wide, [*head, *[""] * len(plain)], len(links), HIGH + ROW_GAP, HOW_TO_READ)
    page.write(PAD, PAD + 0.3 * len(head) + 0.05, "\n".join(plain), size=11)
    for row, link in enumerate(links):
        left, top = PAD, page.top(row)
        said = textwrap.shorten(f"{link.title}: {link.answer}", int(page.wide * 10))
        page.write(PAD, top - 0.32, said, size=11, weight="bold")
        for panel in link.chain.panels:
            width = _width(panel)
            _draw(page.axes(left, top, width, HIGH), panel)
            title = textwrap.wrap(panel.title, max(10, int(width * LETTERS)))
            page.write(left, top + HIGH + 0.05, "\n".join(title), size=8, color=QUIET)
            left += width + GAP
    return page.save(path, below=-0.3)


def _width(panel: Panel) -> float:
    return HIGH * min(max(panel.image.width / panel.image.height, 0.5), 2.5)


def shaded(panel: Panel, side: int) -> np.ndarray:
    """The panel's picture with its heat, (H, W, 3) in 0..1, its longer side `side` pixels."""
    image = small(panel.image, side)
    if panel.heat is None:
        return np.asarray(image) / 255
    heat = np.asarray(panel.heat, float)
    low, high = np.percentile(heat, [1, 99])
    return lit(greys(image), (heat - low) / max(high - low, 1e-12), panel.box)


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    picture = shaded(panel, 480)
    high, wide = picture.shape[:2]
    axes.imshow(picture)
    for left, top, right, bottom in panel.frames:
        corner, sides = (left * wide, top * high), ((right - left) * wide, (bottom - top) * high)
        axes.add_patch(Rectangle(corner, *sides, fill=False, ec=PAPER, lw=4.0, clip_on=False))
        axes.add_patch(Rectangle(corner, *sides, fill=False, ec=BLUE, lw=2.0, clip_on=False))
    bare(axes)
