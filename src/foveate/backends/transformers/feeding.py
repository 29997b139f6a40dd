"""The hooks on feed-forwards: methods get what one returned, and their answer goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...base.errors import FoveateError
from ...core.rows import FeedForward
from ...core.sequence import Stack
from . import compat, compat_parts
from .context import Context
from .heartbeat import FEED_FORWARD, astray, lost, note_beside_graphs, note_graph


class FeedForwards:
    """Those of the decoder layers and of the vision tower that methods edit there.

    Args:
        name: of the attention implementation.
        context: (keywords of a module, where it stands) -> the context among them; None where the
            module is to run plain.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        stack: Stack,
        context: Callable[[dict[str, Any], str], Context | None],
    ) -> None:
        self.model, self.name, self.stack, self.context = model, name, stack, context
        # layer that runs -> its context, and the parts of its feed-forward's sum so far
        self.begun: dict[int, tuple[Context | None, list[Tensor]]] = {}
        self.encoding: Context | None = None  # of the forward that begins, for the tower
        self.encoded: set[int] = set()  # the vision blocks that have run in it

    def install(self) -> Iterator[Any]:
        """Register every hook; yields the handles."""
        layers = compat.decoder_of(self.model).layers
        for i in self.stack.fed:
            *first, last = compat.feed_forward(layers[i])
            hook = functools.partial(self.enter, i)
            yield layers[i].register_forward_pre_hook(hook, with_kwargs=True)
            for part in first:
                yield part.register_forward_hook(functools.partial(self.collect, i))
            yield last.register_forward_hook(functools.partial(self.edit, i), with_kwargs=True)

        if self.stack.at("tower"):
            for i, block in enumerate(compat_parts.vision_blocks(self.model)):
                parts = compat.feed_forward(block)
                if len(parts) != 1:
                    raise FoveateError(
                        f"The blocks of the vision tower of {type(self.model).__name__} have no "
                        "feed-forward module whose output could be edited: leave the tower alone."
                    )
                hook = functools.partial(self.encode, i)
                yield parts[0].register_forward_hook(hook, with_kwargs=True)

    def enter(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a decoder layer: note its context, as the feed-forward gets no keywords."""
        ctx = self.context(kwargs, f"layer {layer}")
        self.begun[layer] = ctx, []
        if ctx is not None:
            ctx.begun = self.begun

    def collect(self, layer: int, module: Any, args: Any, out: Any) -> None:
        """After a part of a feed-forward to which another will be added."""
        if layer in self.begun:
            self.begun[layer][1].append(_hidden(out))

    def edit(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """After the feed-forward of a decoder layer, or the last part of it."""
        if layer not in self.begun:
            raise astray(self.model, f"the feed-forward of layer {layer}")
        ctx, parts = self.begun.pop(layer)
        if ctx is None:
            return out
        if torch.compiler.is_compiling():
            ctx.compiled = note_graph(self.name, layer, FEED_FORWARD)
        elif heartbeat := ctx.watched:
            heartbeat.feed_forward(layer)
        else:
            note_beside_graphs(self.name, (FEED_FORWARD, layer))
        x, own = compat.hidden_in(args, kwargs), _hidden(out)
        whole = sum(parts, own).view(x.shape)  # some mixtures return (tokens, D)
        with ctx.visit("mlp", layer) if ctx.replays else nullcontext():
            edited = self.edited(ctx, FeedForward(x, whole, layer, _valid(ctx, x)))
        if edited is whole:
            return out
        edited = edited.view(own.shape)
        edited = edited - sum(parts) if parts else edited  # the layer adds them
        return (edited, *out[1:]) if isinstance(out, tuple) else edited

    def edited(self, ctx: Context, fed: FeedForward) -> Tensor:
        """``fed.out`` after the methods saw it; the second stream's rows stay as they are."""
        batch, new = len(ctx.visual), fed.out
        mine = new[:batch] if ctx.paired else new
        for i in self.stack.feeds[fed.layer]:
            if ctx.acts(i):
                seen = FeedForward(fed.x[:batch], mine, fed.layer, fed.valid)
                edited = self.stack.methods[i].mlp(seen, ctx.seen_by(i))
                mine = ctx.keep(i, edited.to(new.dtype), mine)
        if mine is new or not ctx.paired:
            return mine
        return torch.cat([mine, new[batch:]])

    # -- the vision tower --------------------------------------------------------------------------

    def encode_for(self, ctx: Context | None) -> None:
        """A forward begins; with None the tower is to run plain."""
        self.encoding, self.encoded = ctx, set()

    def encode(self, block: int, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """After the feed-forward of a vision block; of two streams the second's images stay."""
        ctx = self.encoding
        if ctx is None:
            return out
        self.encoded.add(block)
        x, own = compat.hidden_in(args, kwargs), _hidden(out)
        if ctx.paired and len(x) % 2:
            raise FoveateError(
                f"The tower of {type(self.model).__name__} reads the images of both streams as "
                "one: use one method at a time."
            )
        count = len(x) // 2 if ctx.paired else len(x)
        mine = own[:count]
        for i in self.stack.at("tower"):
            if ctx.acts(i):
                fed = FeedForward(x[:count], mine, block, x.new_ones(mine.shape[:2]).bool())
                mine = self.stack.methods[i].tower(fed, ctx.seen_by(i)).to(own.dtype)
        edited = torch.cat([mine, own[count:]]) if ctx.paired else mine
        return (edited, *out[1:]) if isinstance(out, tuple) else edited

    def check_tower(self, ctx: Context) -> None:
        """Before the decoder reads images: the tower has run, and was edited throughout."""
        acting = [i for i in self.stack.at("tower") if ctx.acts(i)]
        encoded, self.encoding = self.encoded, None
        if acting and not encoded:
            raise FoveateError(
                f"{self.stack.methods[acting[0]].name} edits the vision tower, which did not run "
                "for this prompt: pass pixel_values instead of images that were encoded before."
            )
        config = self.model.config
        depth = compat_parts.tower_depth(config) or 0
        used = [k if k >= 0 else depth + 1 + k for k in compat_parts.feature_layers(config)]
        missed = set(range(max(used, default=0))) - encoded  # blocks above need not run
        if acting and missed:
            raise lost(
                self.model, f"the feed-forward of vision block {min(missed)} was never reached"
            )


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _valid(ctx: Context, x: Tensor) -> Tensor:
    """(B, Q) bool: the rows of this forward that are tokens."""
    if ctx.real is None:
        return x.new_ones(len(ctx.visual), x.shape[1], dtype=torch.bool)
    return ctx.real.to(x.device)
