"""Never silent: every station of a step was passed, and every edited row is counted.

A step is planned, enters every decoder layer, has its attention edited and its logits, and ends.
Where a station was missed the engine stops with a sentence. What was edited is handed on with the
tokens of the step; `count` brings it to the client.
"""

from __future__ import annotations

from typing import Any

Ranges = dict[str, tuple[int, int]]
"""A method's name -> the first position of the rows that it edited, and the end of them."""

_step: list[Any] | None = None  # groups of the step at work, in this process; None before its plan
_entered: set[int] = set()  # decoder layers that it entered, the final norm after them
_counted: dict[int, Ranges] = {}  # row of the batch -> what the last step edited


def expect(groups: list[Any]) -> None:
    """A step was planned."""
    global _step
    _step = groups
    _entered.clear()
    _counted.clear()


def step() -> list[Any]:
    """The groups of the step at work; empty where no row is edited."""
    return _step or []


def enter(layer: int) -> None:
    """The step enters a decoder layer, or the final norm, where methods may look."""
    _entered.add(layer)


def watched() -> list[Any]:
    """The groups of the step at work with methods that read what enters layers."""
    return [g for g in step() if not set(g.acting).isdisjoint(g.stack.at("before"))]


def check_entered() -> None:
    """After the forward: methods that read what enters layers saw all of them.

    Raises:
        RuntimeError: they did not.
    """
    for group in watched():
        stations = range(group.stack.depth + 1)  # the last one is the final norm
        missing = sorted(set(stations) - _entered)
        if missing:
            raise RuntimeError(
                f"foveate: {group.stack} could not read what enters layers {missing} of this "
                f"step, {_WHY}"
            )


def verify(asked: bool) -> None:
    """A step is over; counts its rows.

    Args:
        asked: whether a request of the step asks for a method.

    Raises:
        RuntimeError: the step was not planned, or a layer or logits that were to be edited were
            not. The engine stops: an answer of the plain model under a method's name would be
            worse.
    """
    global _step
    if _step is None and asked:
        raise RuntimeError(f"foveate: this step was not planned, {_WHY}")
    check_entered()
    planned, _step = _step, None
    for group in planned or ():
        missing = sorted(group.layers - group.done)
        if missing:
            raise RuntimeError(
                f"foveate: {group.stack} was not applied in layers {missing} of this step, {_WHY}"
            )
        if group.speaks and not group.spoke:
            raise RuntimeError(
                f"foveate: {group.stack} was not applied to the logits of this step, {_WHY}"
            )
        for i in group.acting:
            for row, position in group.places:
                _count(row, group.stack.methods[i].name, position, i in group.acted)


def _count(row: int, name: str, position: int, acted: bool) -> None:
    """A row at a position was edited; or not, where the method rested in every layer."""
    counted = _counted.setdefault(row, {})
    first, end = counted.get(name, (position, position))
    if acted:
        first, end = (position, position + 1) if first == end else (first, end)
        first, end = min(first, position), max(end, position + 1)
    counted[name] = first, end


def counted() -> dict[int, Ranges]:
    """Row of the batch -> what the last step edited; each step is told once."""
    told = dict(_counted)
    _counted.clear()
    return told


_WHY = (
    "so the answer would be the plain model's. This vLLM runs attention in a way that foveate does "
    "not know: use a version that foveate's documentation names."
)
