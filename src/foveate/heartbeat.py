"""The heartbeat: every forward inside `enhance` proves that it passed all its stations.

A release that renames an argument, or calls a layer in another way, can make a method do nothing
and raise no error. So the hook at the top, the one at the decoder and the attention of every edited
layer note that they were reached, and the closing hook raises where one was missed or met twice.

While a model is compiled there is nothing to note in every forward. There each layer is noted once,
when its graph is made, and `check_graphs` looks at the notes outside the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .compat import VERSION
from .form import FoveateError

if TYPE_CHECKING:
    from .context import Stack

_traced: dict[str, set[int]] = {}  # implementation name -> layers that some graph has reached


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

    def __init__(self) -> None:
        self.decoders = 0
        self.layers: dict[int, int] = {}  # attention calls by layer
        self.entered: dict[int, int] = {}  # inputs of layers, and of the final norm, by layer

    def decoder(self, model: Any) -> None:
        """The decoder begins."""
        self.decoders += 1
        if self.decoders > 1:
            raise lost(model, "it calls its decoder twice in one forward")

    def attention(self, layer: int) -> None:
        """The attention of a layer runs."""
        self.layers[layer] = self.layers.get(layer, 0) + 1

    def input(self, layer: int) -> None:
        """The residual stream enters a layer, or the final norm."""
        self.entered[layer] = self.entered.get(layer, 0) + 1

    def check(self, stack: Stack) -> None:
        """At the end of a forward.

        Raises:
            FoveateError: a station was missed, or met more than once.
        """
        if not self.decoders:
            raise lost(stack.model, "the forward ended and its decoder was never called")
        for layer, methods in stack.edits.items():
            if methods:
                self._once(stack, self.layers.get(layer, 0), f"the attention of layer {layer}")
        if stack.at("before"):
            for layer in range(stack.depth + 1):
                what = f"layer {layer}" if layer < stack.depth else "the final norm"
                self._once(stack, self.entered.get(layer, 0), f"the input of {what}")

    def _once(self, stack: Stack, count: int, what: str) -> None:
        if count == 0:
            raise lost(stack.model, f"{what} was never reached")
        if count > 1:
            raise lost(stack.model, f"{what} was reached {count} times in one forward")


@torch.compiler.assume_constant_result
def note_graph(name: str, layer: int) -> bool:
    """The attention of a layer becomes part of a graph; runs when the graph is made, and only then.

    Args:
        name: the attention implementation, one per stack of methods.
    """
    _traced.setdefault(name, set()).add(layer)
    return True


def check_graphs(name: str, stack: Stack) -> None:
    """Whether the graphs made for this stack have the attention of every edited layer in them.

    Raises:
        FoveateError: some have and some have not.
    """
    traced = _traced.get(name, set())
    for layer, methods in stack.edits.items():
        if traced and methods and layer not in traced:
            raise lost(
                stack.model, f"its compiled graph never reaches the attention of layer {layer}"
            )
