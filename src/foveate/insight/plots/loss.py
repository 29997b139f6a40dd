"""The loss of a training run by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .analysis import Sheet
from .style import BLUE, QUIET


def show_loss(method: str, losses: Sequence[float], path: Path) -> None:
    """Write a picture of the loss of each step, and of its mean over the steps around it.

    Args:
        method: what was trained, in text form.
        losses: per answer token in nats, one per step from the first on.
        path: of the picture to write; its ending chooses the format.
    """
    values = np.asarray(losses, float)
    steps = np.arange(1, len(values) + 1)
    around = max(1, len(values) // 50)
    window = np.ones(2 * around + 1)
    sums, counts = (np.convolve(v, window)[around:-around] for v in (values, np.ones_like(values)))

    def panel(axes: Any) -> None:
        dots = "o" if len(values) < 30 else None
        axes.plot(steps, values, color=QUIET, lw=0.6, alpha=0.6, marker=dots, ms=3)
        axes.plot(steps, sums / counts, color=BLUE, lw=1.8, marker=dots, ms=3)
        axes.set_ylim(0, max(values.max(), 1e-3) * 1.05)
        axes.set_xlim(0, len(values) + 1)
        axes.xaxis.get_major_locator().set_params(integer=True)

    thick = f"Thick: its mean over {len(window)} steps."
    sheet = Sheet("Training loss", f"{method}. Thin: the loss of each step's batch. {thick}")
    sheet.add("", "step", "loss per answer token (nats)", panel)
    sheet.save(path)
