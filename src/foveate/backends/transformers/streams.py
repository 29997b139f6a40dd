"""The second stream of contrasting methods: in one batch with the first, after it, or ahead."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...base.errors import FoveateError
from ...core.method import Method
from ...core.prompt import Prompt
from ...core.sequence import Stack
from . import compat, compat_cache, compat_parts
from .cache import adopt, side_by_side
from .compat import NOT_INPUTS
from .compat_cache import length
from .context import Aside, Context
from .heartbeat import lost
from .pictures import pictures, pixels_in, stackable


class Other:
    """A second stream with a cache of its own: mask (B, K) int64 and next position (B,) int64.

    It reads its prompt in forwards of its own, after the first stream. From then on both decode in
    one batch, each on its cache: so neither moves the other's columns, masks or positions.

    `aligned`: so far it was fed the same tokens as the first, so positions are the same.
    """

    aligned = True

    def __init__(self, cache: Any, mask: Tensor, position: Tensor) -> None:
        self.cache, self.mask, self.position = cache, mask, position
        self.padded = not bool(mask.all())
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> what its cache has just given

    def copy(self, index: Tensor | None) -> Other:
        fork = copy.copy(self)
        if index is None or not length(self.cache):
            fork.cache = copy.deepcopy(self.cache)
        else:
            fork.cache = compat_cache.rows(self.cache, index)
        if index is not None:
            index = index.to(self.mask.device)
            fork.mask = self.mask.index_select(0, index)
            fork.position = self.position.index_select(0, index)
        return fork

    def take(self, mask: Tensor) -> None:
        """A piece with this mask (B, new) int64 is about to be read."""
        self.mask = torch.cat([self.mask, mask], 1)
        self.padded |= not bool(mask.all())

    def step(self) -> None:
        """One token per sample is about to be read, in a batch with the first stream's."""
        self.mask = pad(self.mask, (0, 1), value=1)
        self.seen = {}

    def keys(self, layer: int, flat: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask for the new token of `step`.

        Args:
            flat: the kernel takes masks as (B, K) int64, and not as (B, 1, 1, K) bool.
        """
        key, value = self.seen.pop(layer)
        if not self.padded:
            return key, value, None
        mask = self.mask[:, -key.shape[2] :].to(key.device)
        return key, value, mask if flat else mask[:, None, None].bool()


class Streams:
    """Runs the second stream of the stack's owner around the forwards of the first.

    Where only pixels differ, both streams are rows of one batch and of one cache, if the model
    takes the pictures of two batches one behind the other. Otherwise the
    second one reads its prompt after the first, on a cache of its own, and both decode in one
    batch. It decodes in forwards of its own, too, where a cache is static or has layers that do
    not simply grow (linear attention), and in training.

    Args:
        visual: (model inputs) -> (B, N) bool, their visual tokens.
    """

    def __init__(self, model: Any, stack: Stack, visual: Callable[[dict[str, Any]], Tensor]):
        self.model, self.stack, self.visual = model, stack, visual
        # this piece of prompt, and what the second stream reads after it
        self.waiting: tuple[Prompt, Prompt] | None = None
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
            return self.step(ctx, kwargs, cache)
        prompt = self.prompt(ctx, kwargs, cache)
        new = prompt.mask.shape[1]
        owner = self.stack.methods[i]
        changed = owner.contrast(prompt, ctx.seen_by(i))
        if isinstance(changed, tuple) or (changed is not None and changed.ahead):
            if ctx.phase == "prompt":
                every = changed if isinstance(changed, tuple) else (changed,)
                if any(one.mask is not prompt.mask for one in every):
                    self.check_direction(owner)
                self.go_ahead(ctx, kwargs, cache, prompt, changed)
            return kwargs
        if changed is None:
            if not ctx.paired and ctx.other is None:
                return kwargs
            changed = prompt
        alike = not changed.after and _differ_in_pixels(prompt, changed)
        if ctx.paired and not alike:
            raise FoveateError(
                f"{owner.name} changed only pixels in the first prompt and more in a later one, "
                "which one batch cannot hold: start from a fresh cache."
            )
        if not alike:
            self.check_direction(owner)
        fresh = (
            ctx.other is None
            and kwargs.get("labels") is None
            and not compat_cache.allocated(cache)
            and stackable(kwargs)
        )
        if ctx.paired or (alike and fresh):
            ctx.paired = True
            if cache is not None:
                adopt(cache, ctx)
            return self.twice(ctx, kwargs, changed.pixels)
        if ctx.other is None:
            ctx.other = self.fork(ctx, kwargs, cache, ctx.visual.shape[1] - new)
        ctx.other.aligned &= changed.mask is prompt.mask
        self.waiting = prompt, changed
        return kwargs

    def check_direction(self, owner: Method) -> None:
        """Whether other tokens than the prompt's can be read beside it.

        Raises:
            FoveateError: where prompts are read in both directions.
        """
        if compat.reads_both_ways(self.model):
            raise FoveateError(
                f"{owner.name} has the model read other tokens beside the prompt, and foveate does "
                f"not know how {type(self.model).__name__} would read them, which reads prompts in "
                "both directions: use a method without a second stream, or one that changes "
                "pixels, such as vcd."
            )

    def step(self, ctx: Context, kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
        """The inputs of a decode step, with the second stream's token beside them if it fits."""
        if ctx.other is not None and self.fits(ctx, kwargs, cache):
            side_by_side(cache)
            ctx.abreast = True
            ctx.other.step()
        return self.twice(ctx, kwargs, {}) if ctx.doubled else kwargs

    def fits(self, ctx: Context, kwargs: dict[str, Any], cache: Any) -> bool:
        """Whether one forward can decode both streams, each on its cache."""
        if ctx.decoder.training or kwargs.get("labels") is not None:
            return False
        if torch.compiler.is_compiling() or ctx.other.cache is None or compat.latent(ctx.decoder):
            return False
        return all(compat_cache.grows(ctx.decoder, each) for each in (cache, ctx.other.cache))

    def placed(self, ctx: Context, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments in a decode step, with each stream's own positions."""
        positions, batch = kwargs.get("position_ids"), len(ctx.visual)
        if positions is None:
            past = length(compat.cache_in(kwargs))
            positions = torch.full((1, 1), past, device=kwargs["inputs_embeds"].device)
        # (B, 1), or (C, B, 1) under M-RoPE, where text has the same position on every axis
        mine = positions[..., :batch, :].expand(*positions.shape[:-2], batch, 1)
        theirs = ctx.other.position[:, None].to(mine.device).expand_as(mine)
        ctx.other.position = ctx.other.position + 1
        return kwargs | {"position_ids": torch.cat([mine, theirs], -2)}

    def prompt(self, ctx: Context, kwargs: dict[str, Any], cache: Any) -> Prompt:
        """This piece of prompt, as methods see it."""
        inputs = piece(kwargs, cache)
        mask, ids = inputs.pop("attention_mask"), inputs.pop("input_ids", None)
        embeds, pixels = inputs.pop("inputs_embeds", None), pixels_in(inputs)
        inputs = {k: v for k, v in inputs.items() if k not in pixels}
        visual = ctx.visual[:, -mask.shape[1] :]
        split = functools.partial(pictures, self.model.config, inputs, visual)
        own = Prompt(mask, visual.to(mask.device), ids, embeds, pixels, None, split, inputs)
        return own if ctx.contrast is None else replace(own, given=self.given(own, ctx.contrast))

    def given(self, own: Prompt, contrast: dict[str, Tensor]) -> Prompt:
        """The second stream's prompt, from tensors of a processor: other pixels, or other text."""
        if "input_ids" not in contrast:
            return replace(own, pixels=own.pixels | contrast)
        rest = dict(contrast)
        ids, mask = rest.pop("input_ids"), rest.pop("attention_mask")
        return own.rewritten(mask, self.visual(contrast), ids, rest)

    def twice(
        self, ctx: Context, kwargs: dict[str, Any], pixels: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The forward's inputs with every sample twice, the second half with other pixels."""
        batch = len(ctx.visual)

        def double(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {k: double(name, v) for k, v in value.items()}
            other = pixels.get(name, value)
            if isinstance(value, list):
                return value + other
            if not isinstance(value, Tensor):
                return value
            axis = int(name == "position_ids" and value.dim() == 3)
            if name in ("position_ids", "attention_mask") and value.shape[axis] == 1 < batch:
                return value  # one row for all samples
            return torch.cat([value, other], axis)

        deltas = compat.kept_positions(self.model)
        self.undo = functools.partial(compat.keep_positions, self.model, deltas)
        if deltas is not None and len(deltas) == batch:
            compat.keep_positions(self.model, deltas.repeat(2, 1))
        return kwargs | {
            k: double(k, v) for k, v in kwargs.items() if k not in NOT_INPUTS and v is not None
        }

    def after(self, ctx: Context, kwargs: dict[str, Any], out: Any) -> Tensor | None:
        """After a forward: the second stream's next-token logits (B, V), or None."""
        batch, other = len(ctx.visual), cast("Other | None", ctx.other)
        if ctx.doubled:
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
            return self.run(other, token, other.mask.new_ones(batch, 1), None, self.aside(ctx))
        (own, changed), self.waiting = cast(Any, self.waiting), None
        there = ctx.positions[:, :, -own.mask.shape[1] :]
        positions: Tensor | None = there if other.aligned else None
        given = _inputs(changed)
        if positions is None and len(there) > 1 and changed.ids is not None:
            shown = self.visual(given)
            if bool(shown.any()):
                positions = carried(own, replace(changed, visual=shown), there, other.position)
        return self.run(other, given, changed.mask, positions, self.aside(ctx))

    def fork(self, ctx: Context, kwargs: dict[str, Any], cache: Any, filled: int) -> Other:
        """A new second stream; text before the first image is the same in both."""
        config, mask = ctx.decoder.config, kwargs.get("attention_mask")
        asked, side = kwargs.get("use_cache"), None
        if not filled and (cache is not None or (config.use_cache if asked is None else asked)):
            side = compat_cache.empty_cache(ctx.decoder)  # where the model makes its own, too
        elif cache is not None:
            side = _beside(cache)
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = ctx.visual.new_ones((len(ctx.visual), filled), dtype=torch.long)
        mask, noted = mask[:, :filled].long(), ctx.positions.amax(0)[:, :filled]
        position = torch.where(mask.bool(), noted + 1, 0).amax(1) if filled else mask.sum(1)
        return Other(side, mask, position)

    def aside(self, ctx: Context) -> Aside | None:
        """What the second stream's forwards get in place of the context."""
        return Aside(ctx) if self.stack.aside else None

    def run(
        self,
        other: Other,
        inputs: dict[str, Any],
        mask: Tensor,
        positions: Tensor | None,
        aside: Aside | None = None,
    ) -> Tensor | None:
        """Feed a piece of prompt or a token to another stream; next-token logits (B, V).

        Args:
            mask: (B, new) int64. positions: (C, B, new), or None to count on as text does.
        """
        if not mask.shape[1]:
            return None
        if positions is None:
            positions = (other.position[:, None] + mask.cumsum(1) - 1).clamp(min=0)[None]
            positions = positions.expand(compat.position_axes(self.model), -1, -1)
        other.take(mask)
        inputs = inputs | {"position_ids": positions if len(positions) > 1 else positions[0]}
        with compat.keeping_positions(self.model):
            out = self.plain(other.cache, inputs | {"attention_mask": other.mask}, aside)
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
            with _leaving(compat.decoder_of(self.model)) as states:
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

    def embedded(self, ctx: Context, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments in a forward of the second stream, as its owner embeds it."""
        i = cast(int, self.stack.owner)
        owner, embeds = self.stack.methods[i], kwargs.get("inputs_embeds")
        if ctx.phase == "decode" or not owner.wants("other_embeds"):
            return kwargs
        if embeds is None:
            raise lost(self.model, "its decoder gets no embeddings of a prompt with an image")
        edited = owner.other_embeds(embeds, ctx.seen_by(i))
        return compat_parts.with_embeds(kwargs, edited)

    def plain(self, cache: Any, inputs: dict[str, Any], aside: Aside | None = None) -> Any:
        """A forward without methods but the second stream's, on a cache beside the main one."""
        keeps = {"use_cache": cache is not None, "logits_to_keep": 1, "foveate": aside}
        return self.model(**inputs, **compat.passing(self.model, cache), **keeps)


def carried(own: Prompt, other: Prompt, positions: Tensor, start: Tensor) -> Tensor:
    """Positions (3, B, M) under M-RoPE of the same pictures in other text.

    A picture's tokens keep their places relative to its beginning, which moves by as many positions
    as there is more text before it. Text goes on one by one behind the largest position so far.

    Args:
        positions: (3, B, N) of the stream's `own` prompt. start: (B,) where `other` begins.
    """
    real = own.mask.bool()
    begins = positions.amin(0).masked_fill(~real, torch.iinfo(torch.long).max).amin(1)
    positions = (positions - begins[:, None]).masked_fill(~real, -1)
    texts, other_texts = (
        (one.mask.bool() & ~one.visual).cumsum(1) for one in (own, other)
    )  # up to each column
    seen = other.visual.cumsum(1)
    order = (~own.visual).int().argsort(dim=1, stable=True)  # visual columns first
    latest = order.gather(1, (seen - 1).clamp(min=0))  # of the visual tokens up to each column
    shift = other_texts - texts.gather(1, latest)
    largest = positions.amax(0).cummax(1).values.gather(1, latest)
    text = torch.where(seen > 0, largest + shift, other_texts - 1)
    visual = positions.gather(2, latest.expand(len(positions), -1, -1)) + shift
    return start[:, None] + torch.where(other.visual, visual, text).clamp(min=0)


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


def _differ_in_pixels(a: Prompt, b: Prompt) -> bool:
    """Whether two prompts differ in nothing but the values of their pixels."""
    same = a.ids is b.ids and a.embeds is b.embeds and a.mask is b.mask and a.inputs is b.inputs
    return same and {k: v.shape for k, v in a.pixels.items()} == {
        k: v.shape for k, v in b.pixels.items()
    }
