"""The heartbeat: every forward inside `enhance` proves that it passed all its stations.

A release that renames an argument, or calls a layer in another way, can make a method do nothing
and raise no error. So the hook at the top, the one at the decoder and, in every layer that methods
edit there, attention and feed-forward note that they were reached, and the closing hook raises
where one was missed or met twice.

While a model is compiled there is nothing to note in every forward. There each station is noted
once, when its graph is made, and `check_graphs` looks at the notes outside the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...base.errors import FoveateError
from ...core.sequence import Stack
from .compat import VERSION

ATTENTION, FEED_FORWARD = "attention", "feed-forward"
Station = tuple[str, int]  # of a layer

# implementation name -> stations that forwards with graphs reach
_traced: dict[str, set[Station]] = {}


def lost(model: Any, what: str) -> FoveateError:
    """The error for a route that this release of transformers has changed."""
    return FoveateError(
        f"{type(model).__name__} on transformers {VERSION}: {what}. Its result would be wrong, so "
        "foveate stops. Upgrade foveate, or install the transformers release that its lock names."
    )


def astray(model: Any, where: str) -> FoveateError:
    """The error for a part of a model that was called without the context of its sequence."""
    return FoveateError(
        f"Inside enhance() {where} of {type(model).__name__} was called without the context of its "
        "sequence: call the whole model, not its parts. If you did, transformers "
        f"{VERSION} no longer hands the keyword on: upgrade foveate, or install the release that "
        "its lock names."
    )


class Heartbeat:
    """What one forward has passed so far."""

    def __init__(self, model: Any, stack: Stack) -> None:
        self.model, self.stack = model, stack
        self.open = True  # afterwards a backward pass may run layers again
        self.decoders = 0
        self.edited = 0  # how many of the layers with edited attention were reached, in order
        self.fed = 0  # and of those with an edited feed-forward
        self.inputs = 0  # and how many inputs of layers, the final norm's among them

    def decoder(self) -> None:
        """The decoder begins."""
        self.decoders += 1
        if self.decoders > 1:
            raise lost(self.model, "it calls its decoder twice in one forward")

    def attention(self, layer: int) -> None:
        """The attention of a layer runs."""
        if self.open and layer in self.stack.edited:
            self._reach(self.edited, self.stack.edited, layer, ATTENTION)
            self.edited += 1

    def feed_forward(self, layer: int) -> None:
        """The feed-forward of a layer has run."""
        if self.open:
            self._reach(self.fed, self.stack.fed, layer, FEED_FORWARD)
            self.fed += 1

    def input(self, layer: int) -> None:
        """The residual stream enters a layer; the last one is the final norm."""
        if self.open:
            self._reach(self.inputs, range(self.stack.depth + 1), layer, "input")
            self.inputs += 1

    def close(self) -> None:
        """The forward ends.

        Raises:
            FoveateError: a station was missed.
        """
        self.open = False
        if not self.decoders:
            raise lost(self.model, "the forward ended and its decoder was never called")
        self._reach(self.edited, self.stack.edited, None, ATTENTION)
        self._reach(self.fed, self.stack.fed, None, FEED_FORWARD)
        if self.stack.at("before"):
            self._reach(self.inputs, range(self.stack.depth + 1), None, "input")

    @property
    def passed(self) -> list[Station]:
        """The stations of layers that were reached."""
        return _stations(self.stack.edited[: self.edited], self.stack.fed[: self.fed])

    def _reach(self, done: int, layers: Sequence[int], layer: int | None, what: str) -> None:
        """Layers come in order and once; `layer` is the one that has come, None is the end."""
        expected = layers[done] if done < len(layers) else None
        if layer == expected:
            return
        if layer is None or (expected is not None and layer > expected):
            raise lost(self.model, f"the {what} of layer {expected} was never reached")
        raise lost(self.model, f"the {what} of layer {layer} was reached twice")


@torch.compiler.assume_constant_result
def note_graph(name: str, layer: int, station: str = ATTENTION) -> bool:
    """A station of a layer becomes part of a graph; runs when the graph is made, and only then.

    Args:
        name: the attention implementation, one per stack of methods.
    """
    _traced.setdefault(name, set()).add((station, layer))
    return True


def note_beside_graphs(name: str, *stations: Station) -> None:
    """Stations were passed without a graph, in a forward of which other parts are graphs."""
    _traced.setdefault(name, set()).update(stations)


def check_graphs(name: str, model: Any, stack: Stack) -> None:
    """Whether the graphs made for this stack have every station in them.

    Raises:
        FoveateError: some are in them and some are not.
    """
    traced = _traced.get(name, set())
    for station, layer in _stations(stack.edited, stack.fed):
        if traced and (station, layer) not in traced:
            raise lost(model, f"its compiled graph never reaches the {station} of layer {layer}")


def forget_unfinished(name: str, stack: Stack) -> None:
    """Forget the notes of a graph whose making failed halfway, so that later blocks start anew."""
    if not _traced.get(name, set()).issuperset(_stations(stack.edited, stack.fed)):
        _traced.pop(name, None)


def _stations(edited: Sequence[int], fed: Sequence[int]) -> list[Station]:
    return [(ATTENTION, i) for i in edited] + [(FEED_FORWARD, i) for i in fed]
