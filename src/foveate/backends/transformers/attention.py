"""The attention function of `enhance`: the usual kernel, but the methods' rows explicitly."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...base.errors import FoveateError
from ...core.edit import Acting, edit_rows, masked, products, weighted
from ...core.rows import Rows
from . import compat
from .context import Aside, Context
from .heartbeat import ATTENTION, astray, lost, note_beside_graphs, note_graph
from .rotary import rotary

Attention = Callable[..., tuple[Tensor, None]]

_CHUNK = 2**24  # elements of explicit weights at a time (64 MiB of float32)
_users: Counter[str] = Counter()  # open blocks per registered name
_registering = threading.Lock()


def register(stack: str, implementation: str) -> str:
    """One implementation name per method stack, in both interfaces; `release` it afterwards.

    Compiled graphs guard on the name and not on hooks, so a graph compiled outside the block, or
    for other methods, is never reused. A name never stands for another stack.
    """
    if implementation in ("eager", "flex_attention") or implementation is None:
        implementation = "sdpa"
    digest = hashlib.sha256(f"{stack} on {implementation}".encode()).hexdigest()[:12]
    name = f"foveate_{digest}"
    with _registering:
        if not _users[name]:
            compat.register_attention(name, _attention(implementation), like=implementation)
        _users[name] += 1
    return name


def release(name: str) -> None:
    """A block that used the name is left; the last one takes the name with it."""
    with _registering:
        _users[name] -= 1
        if not _users[name]:
            del _users[name]
            compat.forget_attention(name)


@functools.cache  # one per kernel, so that a graph finds the same function under a renewed name
def _attention(implementation: str) -> Attention:
    """The attention function around the kernel of `implementation`."""
    run, masking = compat.kernel(implementation), compat.kernel("sdpa")
    aligned = implementation.startswith("flash")  # needs no mask for rows behind a filled cache

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if "foveate" not in kwargs:
            raise astray(module, "the attention")
        ctx: Context | Aside | None = kwargs.pop("foveate")
        kwargs |= {"scaling": scaling, "dropout": dropout}
        if ctx is None:
            return run(module, query, key, value, attention_mask, **kwargs)
        layer = cast(int, module.layer_idx)
        if isinstance(ctx, Aside):
            theirs = query, key, value, attention_mask
            return others(ctx.main, layer, module, *theirs, kwargs), None
        if torch.compiler.is_compiling():
            ctx.compiled = note_graph(compat.attention_name(module), layer)
        elif heartbeat := ctx.watched:
            heartbeat.attention(layer)
        else:
            note_beside_graphs(compat.attention_name(module), (ATTENTION, layer))
        beside: list[Tensor] = []
        if ctx.abreast:  # the second half has keys and values of its own
            kwargs.pop("position_ids", None)  # of both; a kernel looks there for packed sequences
            half = len(ctx.visual)
            theirs = query[half:], *ctx.other.keys(layer, flat=aligned)
            beside = [others(ctx, layer, module, *theirs, kwargs)]
            query, attention_mask = query[:half], _first(attention_mask, half)
        given = query, key, value, attention_mask, kwargs
        if ctx.replays and ctx.stack.feeds[layer]:  # it may run again without its hooks
            ctx.begun[layer] = ctx, []
        with ctx.visit("attention", layer) if ctx.replays else nullcontext():
            out = edited(ctx, layer, module, *given)
        return (torch.cat([out, *beside]) if beside else out), None

    def edited(
        ctx: Context,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The kernel's output, with the rows that methods edit put in."""
        plain = functools.partial(run, module, query, key, value, attention_mask, **kwargs)
        new, length = query.shape[2], key.shape[2]
        acting = [(i, ctx.rows(i, new)) for i in ctx.stack.edits[layer] if ctx.acts(i)]
        count = max([0] + [rows for _, rows in acting])
        if count == 0:
            return plain()[0]
        _refuse(ctx, layer, query, key, attention_mask, aligned, kwargs)
        scale = query.shape[3] ** -0.5 if kwargs["scaling"] is None else kwargs["scaling"]
        out, touched = None, _touched(ctx, acting, count)
        if count < new or touched is not None or ctx.paired:
            out, _ = plain()
        if ctx.paired:  # the second half is another stream's and stays plain
            half = len(ctx.visual)
            query, key, value = query[:half], key[:half], value[:half]
            attention_mask = _first(attention_mask, half)
        if attention_mask is None and 1 < new < length:  # an empty static cache
            key, value = key[:, :, :new], value[:, :, :new]
        mask = _row_mask(attention_mask, new, key.shape[2], count, query.device)
        size = max(1, _CHUNK // (query.shape[0] * query.shape[1] * key.shape[2]))
        pieces = []
        for lo in range(new - count, new, size):
            hi = min(lo + size, new)
            part = None if mask is None else mask[:, :, lo - new + count : hi - new + count]
            asked = query if hi - lo == new else query[:, :, lo:hi]
            scores = products(asked, key, scale)
            here = [one for i, rows in acting if (one := _acting(ctx, i, rows, new, lo, hi))]
            turn = functools.partial(rotary, ctx.decoder, module, scores)
            first = here[0].seq
            given = Rows(scores, layer, asked, key, value, part, scale, first, turn)
            pieces.append(edit_rows(given, here).transpose(1, 2))
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        if out is None:
            return rows.contiguous()
        mine = out[: len(rows)]
        if touched is not None:
            rows = torch.where(touched.to(rows.device)[..., None, None], rows, mine[:, -count:])
        if out.requires_grad or rows.requires_grad:
            rows = torch.cat([mine[:, :-count], rows], 1)
            return torch.cat([rows, out[len(rows) :]]) if ctx.paired else rows
        mine[:, -count:] = rows
        return out

    def others(
        ctx: Context,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The kernel's output for the second stream: its owner may read a row, and hide columns."""
        stack, new, length = ctx.stack, query.shape[2], key.shape[2]
        if layer not in stack.others:
            return run(module, query, key, value, attention_mask, **kwargs)[0]
        _refuse(ctx, layer, query, key, attention_mask, aligned, kwargs)
        i = cast(int, stack.owner)
        owner, seq = stack.methods[i], ctx.seen_by(i)
        if attention_mask is None and 1 < new < length:  # an empty static cache
            key, value = key[:, :, :new], value[:, :, :new]
        mask = _row_mask(attention_mask, new, key.shape[2], new, query.device)
        scale = query.shape[3] ** -0.5 if kwargs["scaling"] is None else kwargs["scaling"]
        if layer in stack.other_read:
            last, part = query[:, :, -1:], None if mask is None else mask[:, :, -1:]
            x = masked(products(last, key, scale), part).softmax(-1)
            owner.other_row(Rows(x, layer, last, key, value, part, scale, seq))
        hidden = owner.other_hidden(layer, seq) if layer in stack.other_hidden else None
        if hidden is None:
            return run(module, query, key, value, attention_mask, **kwargs)[0]
        mask = _hiding(mask, hidden.to(query.device)[:, None, None])
        if new == 1:  # one row costs less than keys repeated for their groups, as the kernel does
            x = masked(products(query, key, scale), mask).softmax(-1)
            return weighted(x, value).to(value.dtype).transpose(1, 2)
        return masking(module, query, key, value, mask, **kwargs)[0]

    return attention


def _first(mask: Tensor | None, half: int) -> Tensor | None:
    """The mask of the first stream, of one for both or for each."""
    return mask if mask is None or len(mask) <= half else mask[:half]


def _hiding(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """A mask without `hidden` columns (B, 1, 1, K) bool, but in rows that would see nothing."""
    if mask is None:
        return ~hidden
    if mask.dtype != torch.bool:
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    seen = mask & ~hidden
    return torch.where(seen.any(-1, keepdim=True), seen, mask)


def _refuse(
    ctx: Context,
    layer: int,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    aligned: bool,
    kwargs: dict[str, Any],
) -> None:
    """Refuse attention whose rows cannot be edited exactly."""
    new, length = query.shape[2], key.shape[2]
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise FoveateError("Attention with sinks or soft-capped scores cannot be edited.")
    if compat.paged(kwargs):
        raise FoveateError(
            "Paged caches (continuous batching) hold no rows to edit: call generate()."
        )
    unmasked = mask is None and not aligned  # the kernel would see padding, or the future
    if unmasked and (ctx.padded or 1 < new < ctx.visual.shape[1]):
        kind = "padded batch" if ctx.padded else "prompt on a filled cache"
        raise lost(ctx.model, f"layer {layer} got no mask for a {kind}")
    if length < ctx.visual.shape[1]:
        raise FoveateError(
            f"Layer {layer} keeps {length} keys of a prompt of {ctx.visual.shape[1]} tokens, "
            "so it does not see the whole image: choose other layers, as in layers=(N,)."
        )


def _touched(ctx: Context, acting: list[tuple[int, int]], count: int) -> Tensor | None:
    """(B, count) bool: which of the last rows some method edits; None for all of them."""
    masks = [(ctx.touched(i, rows), rows) for i, rows in acting]
    if any(mask is None and rows == count for mask, rows in masks):
        return None
    union = ctx.has_image.new_zeros(len(ctx.has_image), count)
    for mask, rows in masks:
        union[:, count - rows :] |= union.new_ones(1, 1) if mask is None else mask
    return union


def _acting(ctx: Context, i: int, count: int, new: int, lo: int, hi: int) -> Acting | None:
    """Method i on its share of the query rows [lo, hi), of the last `count` of `new`; or None."""
    rows = hi - max(lo, new - count)
    if rows <= 0:
        return None
    touched = ctx.touched(i, count)
    if touched is not None:
        touched = touched[:, count - new + hi - rows : count - new + hi]
    return Acting(ctx.stack.methods[i], ctx.seen_by(i), rows, touched)


def _row_mask(
    mask: Tensor | None, new: int, length: int, count: int, device: torch.device
) -> Tensor | None:
    """The last `count` rows of the mask that the kernel got: (B|1, 1, count, K), True = attend."""
    if mask is not None and mask.dim() == 4:
        return mask[:, :, new - count :, :length]
    causal = None
    if count > 1:
        row = torch.arange(length - count, length, device=device)
        causal = (torch.arange(length, device=device) <= row[:, None])[None, None]
    if mask is None:
        return causal
    valid = mask[:, None, None, -length:].bool()  # flash: (B, K), 1 = a real token
    return valid if causal is None else valid & causal
