"""The second stream of contrasting methods: beside the first in one batch, after it, or ahead."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ...base.errors import FoveateError
from ...core.prompt import Prompt
from ...core.sequence import Stack
from . import compat
from .cache import adopt
from .compat import NOT_INPUTS, length
from .context import Context
from .pictures import pictures


class Other:
    """A second stream on its own: cache, mask (B, K) int64 and next position (B,) int64.

    `aligned`: so far it was fed the same tokens as the first, so positions are the same.
    """

    aligned = True

    def __init__(self, cache: Any, mask: Tensor, position: Tensor) -> None:
        self.cache, self.mask, self.position = cache, mask, position

    def copy(self, index: Tensor | None) -> Other:
        cache, mask, position = copy.deepcopy(self.cache), self.mask, self.position
        if index is not None:
            if length(cache) > 0:
                cache.batch_select_indices(index)
            index = index.to(mask.device)
            mask, position = mask.index_select(0, index), position.index_select(0, index)
        fork = Other(cache, mask, position)
        fork.aligned = self.aligned
        return fork


class Streams:
    """Runs the second stream of the stack's owner around the forwards of the first.

    Where only pixels differ, both streams are rows of one batch. Otherwise the second one runs
    after the first, on a cache of its own.

    Args:
        visual: (model inputs) -> (B, N) bool, their visual tokens.
    """

    def __init__(self, model: Any, stack: Stack, visual: Callable[[dict[str, Any]], Tensor]):
        self.model, self.stack, self.visual = model, stack, visual
        self.waiting: tuple[Prompt, int] | None = None  # what the second stream reads after this
        self.undo: Callable[[], None] | None = None  # restores what a forward changes

    def recover(self) -> None:
        """Restore what a failed forward left changed."""
        if self.undo is not None:
            self.undo()
            self.undo = None

    def before(self, ctx: Context, kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
        """Before a forward: its inputs, with the second stream's beside them where that fits."""
        i = self.stack.owner
        if i is None or not ctx.acts(i):
            return kwargs
        self.waiting = None
        if ctx.phase == "decode":
            return self.twice(ctx, kwargs, {}) if ctx.paired else kwargs
        prompt = self.prompt(ctx, kwargs, cache)
        new = prompt.mask.shape[1]
        owner = self.stack.methods[i]
        changed = owner.contrast(prompt, ctx.seen_by(i))
        if isinstance(changed, tuple) or (changed is not None and changed.ahead):
            if ctx.phase == "prompt":
                self.go_ahead(ctx, kwargs, cache, prompt, changed)
            return kwargs
        if changed is None:
            if not ctx.paired and ctx.other is None:
                return kwargs
            changed = prompt
        alike = _differ_in_pixels(prompt, changed)
        if ctx.paired and not alike:
            raise FoveateError(
                f"{owner.name} changed only pixels in the first prompt and more in a later one, "
                "which one batch cannot hold: start from a fresh cache."
            )
        fresh = ctx.other is None and kwargs.get("labels") is None and not compat.allocated(cache)
        if ctx.paired or (alike and fresh):
            ctx.paired = True
            if cache is not None:
                adopt(cache, ctx)
            return self.twice(ctx, kwargs, changed.pixels)
        if ctx.other is None:
            ctx.other = self.fork(ctx, kwargs, cache, ctx.visual.shape[1] - new)
        ctx.other.aligned &= changed.mask is prompt.mask
        self.waiting = changed, new if ctx.other.aligned else 0
        return kwargs

    def prompt(self, ctx: Context, kwargs: dict[str, Any], cache: Any) -> Prompt:
        """This piece of prompt, as methods see it."""
        inputs = piece(kwargs, cache)
        mask, ids = inputs.pop("attention_mask"), inputs.pop("input_ids", None)
        embeds, pixels = inputs.pop("inputs_embeds", None), _pixels(inputs)
        inputs = {k: v for k, v in inputs.items() if k not in pixels}
        visual = ctx.visual[:, -mask.shape[1] :]
        split = functools.partial(pictures, self.model.config, inputs, visual)
        return Prompt(
            mask, visual.to(mask.device), ids, embeds, pixels, ctx.contrast, split, inputs
        )

    def twice(
        self, ctx: Context, kwargs: dict[str, Any], pixels: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The forward's inputs with every sample twice, the second half with other pixels."""
        batch = len(ctx.visual)

        def double(value: Any, other: Any, axis: int = 0) -> Any:
            if isinstance(value, dict):
                return {k: double(v, v) for k, v in value.items()}
            if isinstance(value, list):
                return value + other
            if not isinstance(value, Tensor) or value.shape[axis] == 1 < batch:
                return value  # one row for all samples
            return torch.cat([value, other], axis)

        deltas = compat.kept_positions(self.model)
        self.undo = functools.partial(compat.keep_positions, self.model, deltas)
        if deltas is not None and len(deltas) == batch:
            compat.keep_positions(self.model, deltas.repeat(2, 1))
        return kwargs | {
            k: double(v, pixels.get(k, v), int(k == "position_ids" and v.dim() == 3))
            for k, v in kwargs.items()
            if k not in NOT_INPUTS and v is not None
        }

    def after(self, ctx: Context, kwargs: dict[str, Any], out: Any) -> Tensor | None:
        """After a forward: the second stream's next-token logits (B, V), or None."""
        batch, other = len(ctx.visual), cast("Other | None", ctx.other)
        if ctx.paired:
            deltas, logits = compat.kept_positions(self.model), out.logits[batch:, -1]
            self.undo = None
            if deltas is not None and len(deltas) == 2 * batch:
                compat.keep_positions(self.model, deltas[:batch])
            compat.keep_rows(out, batch)
            return logits
        if other is None:
            return None
        if ctx.phase == "decode":
            names = ("input_ids", "inputs_embeds")
            token = {k: kwargs[k] for k in names if kwargs.get(k) is not None}
            return self.run(other, token, other.mask.new_ones(batch, 1), None)
        (changed, new), self.waiting = cast(Any, self.waiting), None
        positions = ctx.positions[:, :, -new:] if new else None
        return self.run(other, _inputs(changed), changed.mask, positions)

    def fork(self, ctx: Context, kwargs: dict[str, Any], cache: Any, filled: int) -> Other:
        """A new second stream; text before the first image is the same in both."""
        config, mask = ctx.decoder.config, kwargs.get("attention_mask")
        asked, side = kwargs.get("use_cache"), None
        if not filled and (cache is not None or (config.use_cache if asked is None else asked)):
            side = compat.empty_cache(ctx.decoder)  # where the model makes its own, too
        elif cache is not None:
            side = _beside(cache)
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = ctx.visual.new_ones((len(ctx.visual), filled), dtype=torch.long)
        mask, noted = mask[:, :filled].long(), ctx.positions.amax(0)[:, :filled]
        position = torch.where(mask.bool(), noted + 1, 0).amax(1) if filled else mask.sum(1)
        return Other(side, mask, position)

    def run(
        self, other: Other, inputs: dict[str, Any], mask: Tensor, positions: Tensor | None
    ) -> Tensor | None:
        """Feed a piece of prompt or a token to the second stream; next-token logits (B, V).

        Args:
            mask: (B, new) int64. positions: (C, B, new), or None to count on as text does.
        """
        if not mask.shape[1]:
            return None
        model, past = self.model, other.mask.shape[1]
        ids = inputs.get("input_ids")
        if positions is None:
            positions = (other.position[:, None] + mask.cumsum(1) - 1).clamp(min=0)[None]
            if compat.remembers_positions(model):
                positions = positions.expand(3, -1, -1)
                if ids is not None and not past and bool(self.visual(inputs).any()):
                    positions = None  # other pictures: the model works them out
        other.mask = torch.cat([other.mask, mask], 1)
        if positions is not None:
            inputs = inputs | {"position_ids": positions if len(positions) == 3 else positions[0]}
        with compat.keeping_positions(model):
            out = self.plain(other.cache, inputs | {"attention_mask": other.mask})
            if positions is None:
                deltas = cast(Tensor, compat.kept_positions(model))
                other.position = past + mask.shape[1] + deltas[:, 0]
            else:
                here = torch.where(mask.bool(), positions.amax(0) + 1, 0)
                other.position = other.position.maximum(here.amax(1))
        return out.logits[:, -1]

    def go_ahead(
        self,
        ctx: Context,
        kwargs: dict[str, Any],
        cache: Any,
        prompt: Prompt,
        changed: Prompt | tuple[Prompt, ...],
    ) -> None:
        """Plain passes, whose logits or states become ``ctx.ahead``.

        Args:
            prompt: this piece of prompt. changed: what is read instead.
        """
        found = []
        for one in changed if isinstance(changed, tuple) else (changed,):
            with _leaving(self.model.get_decoder()) as states:
                if one.mask is prompt.mask:  # the same tokens: as the main pass is given them
                    inputs = {k: v for k, v in kwargs.items() if k not in NOT_INPUTS} | one.pixels
                    with compat.keeping_positions(self.model):
                        logits = self.plain(_beside(cache), inputs).logits[:, -1]
                else:
                    filled = ctx.visual.shape[1] - prompt.mask.shape[1]
                    other = self.fork(ctx, kwargs, cache, filled)
                    logits = self.run(other, _inputs(one), one.mask, None)
            found.append(torch.stack(states, 1) if one.states else logits)
        ctx.ahead = tuple(found) if isinstance(changed, tuple) else found[0]

    def plain(self, cache: Any, inputs: dict[str, Any]) -> Any:
        """A forward without methods, on a cache beside the main one."""
        keeps = {"use_cache": cache is not None, "logits_to_keep": 1, "foveate": None}
        return self.model(**inputs, **compat.passing(self.model, cache), **keeps)


def piece(kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The inputs of a forward's piece of prompt alone, with its own mask (B, new) int64."""
    inputs = {k: v for k, v in kwargs.items() if k not in NOT_INPUTS and v is not None}
    inputs.pop("position_ids", None)
    ids = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
    mask = prompt_mask(kwargs, cache)
    mask = inputs.get("attention_mask") if mask is None else mask
    if isinstance(mask, dict):  # generate() with a static cache
        mask = mask.get("full_attention")
    if mask is not None and mask.dim() == 4:
        mask = mask if mask.dtype == torch.bool else mask >= 0
        mask = mask[:, 0, -1, : length(cache) + ids.shape[1]].expand(len(ids), -1)
    if mask is None:
        mask = torch.ones_like(ids)
    return inputs | {"attention_mask": mask[:, -ids.shape[1] :].long()}


def prompt_mask(kwargs: dict[str, Any], cache: Any) -> Tensor | None:
    """The mask (B, K) of the tokens so far, where it is given in two dimensions.

    For a static cache it may be as wide as the cache will be.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask[:, : length(cache) + new_tokens(kwargs)]


def new_tokens(kwargs: dict[str, Any]) -> int:
    """How many tokens a forward is given."""
    ids = kwargs.get("input_ids")
    return (kwargs["inputs_embeds"] if ids is None else ids).shape[1]


@contextmanager
def _leaving(decoder: Any) -> Iterator[list[Tensor]]:
    """What leaves the decoder's layers at the last row, (B, D) each, one after the other."""
    states: list[Tensor] = []

    def keep(layer: Any, args: Any, out: Any) -> None:
        last = (out[0] if isinstance(out, tuple) else out)[:, -1]
        states.append(last if not states else last.to(states[0].device))

    handles = [layer.register_forward_hook(keep) for layer in decoder.layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _inputs(prompt: Prompt) -> dict[str, Any]:
    """A prompt as model inputs, but for its mask."""
    tokens = {"input_ids": prompt.ids, "inputs_embeds": prompt.embeds}
    return {k: v for k, v in tokens.items() if v is not None} | prompt.pixels | prompt.inputs


def _beside(cache: Any) -> Any:
    """A copy of a cache that carries no context."""
    side = copy.deepcopy(cache)
    if side is not None:
        side.foveate = None
    return side


def _pixels(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {
        k: v
        for k, v in inputs.items()
        if k.startswith("pixel_values") and isinstance(v, Tensor) and v.is_floating_point()
    }


def _differ_in_pixels(a: Prompt, b: Prompt) -> bool:
    """Whether two prompts differ in nothing but the values of their pixels."""
    same = a.ids is b.ids and a.embeds is b.embeds and a.mask is b.mask and a.inputs is b.inputs
    return same and {k: v.shape for k, v in a.pixels.items()} == {
        k: v.shape for k, v in b.pixels.items()
    }
