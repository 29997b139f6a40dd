"""The heat map of gates: a cell per (vision layer, decoder layer), with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .style import COLORS, INK, PAPER, QUIET

SIGNED = "PuOr"  # for gates that can be negative
NONE = "#e4e4ea"  # where nothing is injected
CLOSED = 1e-3  # where the largest gate is below this, all are drawn as closed
ROOMY = 8  # decoder layers, up to which a cell has room for two numbers


def pairs(
    panel: Any,
    mean: np.ndarray,
    spread: np.ndarray,
    vision_layers: Sequence[int],
    layers: Sequence[int],
) -> None:
    """Gates as colours, the deepest vision layer on top, with mean and spread written into them.

    Args:
        mean, spread: (decoder layers, vision layers); NaN = this pair is not connected, left grey.
            The spread is left out where it is 0 everywhere, or there are too many layers.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    values, around = mean.T, spread.T
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    most = max(abs(low), abs(high), CLOSED)
    norm = Normalize(-most if low < 0 else 0.0, most)
    colors = colormaps[SIGNED if low < 0 else COLORS]
    panel.set_facecolor(NONE)
    panel.imshow(values, cmap=colors, norm=norm, aspect="auto", origin="lower")
    roomy = len(layers) <= ROOMY
    spread_told = roomy and float(np.nanmax(around)) > 1e-6
    for row, column in np.ndindex(values.shape):
        value, deviation = float(values[row, column]), float(around[row, column])
        if np.isnan(value):
            continue
        red, green, blue, _ = colors(norm(value))
        ink = PAPER if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
        style = {"ha": "center", "color": ink, "size": 9.5 if roomy else 6.5}
        if not spread_told:
            panel.text(column, row, told(value, 3 if roomy else 2), va="center", **style)
            continue
        panel.text(column, row + 0.03, told(value), va="bottom", **style)
        style["size"] = 7.5
        panel.text(column, row - 0.08, f"± {told(deviation)}", va="top", **style)
    panel.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    panel.set_yticks(range(len(vision_layers)), [str(layer) for layer in vision_layers])
    scale = panel.figure.colorbar(
        panel.images[0], ax=panel, pad=0.02, fraction=0.05, extend="neither"
    )
    scale.ax.tick_params(labelsize=8, colors=QUIET)
    scale.outline.set_visible(False)


def told(value: float, digits: int = 3) -> str:
    """A gate in few letters: so many digits after the point, or one that counts if all are 0."""
    plain = f"{value:.{digits}f}"
    return plain if float(plain) or abs(value) < 1e-6 else f"{value:.0e}".replace("e-0", "e-")
