"""Never silent: after each step, every row that was to be edited was, in every layer."""

from __future__ import annotations

from typing import Any

_step: list[Any] | None = None  # groups of the step at work, in this process; None before its plan


def expect(groups: list[Any]) -> None:
    """A step was planned."""
    global _step
    _step = groups


def step() -> list[Any]:
    """The groups of the step at work; empty where no row is edited."""
    return _step or []


def verify(asked: bool) -> None:
    """A step's forward is over.

    Args:
        asked: whether a request of the step asks for a method.

    Raises:
        RuntimeError: the step was not planned, or a layer that was to be edited was not. The engine
            stops: an answer of the plain model under a method's name would be worse.
    """
    global _step
    planned, _step = _step, None
    if planned is None and asked:
        raise RuntimeError(f"foveate: this step was not planned, {_WHY}")
    for group in planned or ():
        missing = sorted(group.layers - group.done)
        if missing:
            raise RuntimeError(
                f"foveate: {group.stack} was not applied in layers {missing} of this step, {_WHY}"
            )


_WHY = (
    "so the answer would be the plain model's. This vLLM runs attention in a way that foveate does "
    "not know: use a version that foveate's documentation names."
)
