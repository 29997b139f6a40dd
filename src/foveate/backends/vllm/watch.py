"""Never silent: after each step, every row that was to be edited was, in every layer."""

from __future__ import annotations

from typing import Any

_step: list[Any] = []  # groups of the step at work, in this process


def expect(groups: list[Any]) -> None:
    """A step begins."""
    _step[:] = groups


def verify() -> None:
    """A step's forward is over.

    Raises:
        RuntimeError: a layer that was to be edited was not. The engine stops: an answer of the
            plain model under a method's name would be worse.
    """
    for group in _step:
        missing = sorted(group.layers - group.done)
        if missing:
            raise RuntimeError(
                f"foveate: {group.stack} was not applied in layers {missing} of this step, so the "
                "answer would be the plain model's. This vLLM runs attention in a way that foveate "
                "does not know: use a version that foveate's documentation names."
            )
    _step.clear()
