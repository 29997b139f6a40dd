"""The loss of a training run by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .style import BLUE, PAD, QUIET, Page, check_path, plain, wrapped

WIDE, HIGH = 7.5, 3.6  # inches


def show_loss(title: str, losses: Sequence[float], path: str | Path) -> Path:
    """Write a picture of the loss of each step, and of its mean over the steps around it.

    Args:
        losses: per answer token in nats, one per step from the first on.
        path: of the picture to write; its ending chooses the format.
    """
    path = Path(path)
    check_path(path)
    values = np.asarray(losses, float)
    steps = np.arange(1, len(values) + 1)
    around = max(1, len(values) // 50)
    page = Page(
        WIDE,
        wrapped(title, WIDE, 8.3, most=3),
        1,
        HIGH,
        f"Thin: the loss of each step's batch. Thick: its mean over {2 * around + 1} steps.",
    )
    axes = page.axes(0.75, page.top(0) - 0.3, WIDE - 0.75 - PAD, HIGH)
    dots = "o" if len(values) < 30 else None
    axes.plot(steps, values, color=QUIET, lw=0.6, alpha=0.6, marker=dots, ms=3)
    axes.plot(steps, _smoothed(values, around), color=BLUE, lw=1.8, marker=dots, ms=3)
    axes.set_xlabel("step", fontsize=10)
    axes.set_ylabel("loss per answer token (nats)", fontsize=10)
    axes.set_ylim(0, max(values.max(), 1e-3) * 1.05)
    axes.set_xlim(0, len(values) + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    plain(axes)
    page.write(PAD, page.bottom + 0.55, page.notes, size=8.5, color=QUIET, linespacing=1.35)
    page.figure.savefig(path)
    return path


def _smoothed(values: np.ndarray, around: int) -> np.ndarray:
    """Mean over each place and `around` places on either side, as far as there are any."""
    sums = np.concatenate([[0.0], values.cumsum()])
    low = np.clip(np.arange(len(values)) - around, 0, None)
    high = np.clip(np.arange(len(values)) + around + 1, None, len(values))
    return (sums[high] - sums[low]) / (high - low)
