"""The attention function: the model's own kernel, with the methods' query rows done explicitly.

Only the last rows that some method edits get explicit float32 weights (rows x keys); all others
are left to the kernel the model was loaded with.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...base.errors import FoveateError
from ...core.context import Context
from . import compat
from .heartbeat import astray, lost, note_beside_graphs, note_graph

Attention = Callable[..., tuple[Tensor, None]]

_CHUNK = 2**24  # elements of explicit weights at a time (64 MiB of float32)
_KEPT = 256  # registered names, beside those in use
_names: OrderedDict[str, None] = OrderedDict()  # the one used longest ago first
_registering = threading.Lock()


class Rows:
    """One attention layer, cut to the query rows of one method.

    Attributes:
        x: (B, H, R, K) float32: scores in `scores`, softmax weights in `weights`.
        query: (B, H, R, D); key, value: (B, Hkv, K, D), as cached, after RoPE.
        layer: 0-based. ctx: the sequence's `Context`. module: the attention module.
        scaling: what the scores are multiplied with.
    """

    __slots__ = ("_mask", "ctx", "key", "layer", "module", "query", "scaling", "value", "x")

    def __init__(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        module: nn.Module,
        scaling: float,
        ctx: Context,
    ) -> None:
        self.x, self.query, self.key, self.value = x, query, key, value
        self._mask, self.module, self.scaling, self.ctx = mask, module, scaling, ctx
        self.layer: int = cast(int, module.layer_idx)

    @property
    def plan(self) -> Any:
        """What the method's `setup` returned."""
        return self.ctx.plan

    @property
    def memory(self) -> dict[str, Any]:
        """The method's dictionary on this sequence."""
        return self.ctx.memory

    @property
    def visual(self) -> Tensor:
        """Visual key columns, (B, K) bool."""
        return self.ctx.columns(self.key.shape[2], self.x.device)[0]

    @property
    def system(self) -> Tensor:
        """Key columns before the first visual token, (B, K) bool."""
        return self.ctx.columns(self.key.shape[2], self.x.device)[1]

    @property
    def after(self) -> Tensor:
        """Key columns after the last visual token, (B, K) bool; generated tokens included."""
        return self.ctx.columns(self.key.shape[2], self.x.device)[2]

    @property
    def valid(self) -> Tensor:
        """Key columns that the last query row may attend to, (B, K) bool."""
        size = (self.x.shape[0], self.key.shape[2])
        if self._mask is None:
            return torch.ones(size, dtype=torch.bool, device=self.x.device)
        return _allowed(self._mask)[:, 0, -1].expand(size)

    def dot(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled scores of (B, H, R, D) against (B, Hkv, N, D), (B, H, R, N) float32."""
        return _scores(query, key, self.scaling)

    def rotation(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) float32 that move rotary keys or queries by position differences.

        Args:
            delta: (1, B, N) or, under M-RoPE, (3, B, N) int64.

        Raises:
            FoveateError: for a decoder without one rotary embedding for all layers.
        """
        decoder = self.ctx.stack.decoder
        if compat.rotary(decoder) is None:
            raise FoveateError(
                f"{type(decoder).__name__} has no rotary position embedding to re-rotate cached "
                "keys with: switch unified positions off."
            )
        cos, sin = compat.rotation(decoder, self.module, self.x, delta.to(self.x.device))
        return cos.to(self.x.device), sin.to(self.x.device)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Apply a `rotation` to (B, *, N, D) rotary states; computed in float32, dtype kept."""
        return compat.rotate(self.module, x, *rotation).to(x.dtype)


def register(stack: str, implementation: str) -> str:
    """One implementation name per method stack, in both interfaces.

    Compiled graphs guard on the name and not on hooks, so a graph compiled outside the block, or
    for other methods, is never reused. So a name never stands for another stack, but those used
    longest ago are forgotten: a server is asked for ever new parameters.
    """
    if implementation in ("eager", "flex_attention") or implementation is None:
        implementation = "sdpa"
    digest = hashlib.sha256(f"{stack} on {implementation}".encode()).hexdigest()[:12]
    name = f"foveate_{digest}"
    with _registering:
        if not compat.is_registered(name):
            function = _attention(name, implementation)
            compat.register_attention(name, function, like=implementation)
        _names[name] = None
        _names.move_to_end(name)
        if len(_names) > _KEPT:
            _forget()
    return name


def _forget() -> None:
    """Unregister the names used longest ago, but none that an open block uses."""
    from .enhance import _enhanced  # which stands on this module

    try:
        used = {compat.attention_name(decoder) for decoder in _enhanced}
    except RuntimeError:  # another thread leaves a block: the next name makes up for it
        return
    *older, _ = _names  # the latest is about to be used
    for name in [name for name in older if name not in used][: len(_names) - _KEPT]:
        del _names[name]
        compat.forget_attention(name)


def _attention(name: str, implementation: str) -> Attention:
    """The attention function `name`: that of `implementation`, but the methods' rows explicitly."""
    run = compat.kernel(implementation)
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
        ctx: Context | None = kwargs.pop("foveate")
        kwargs |= {"scaling": scaling, "dropout": dropout}
        given = query, key, value, attention_mask
        if ctx is None:
            return run(module, *given, **kwargs)
        layer = cast(int, module.layer_idx)
        if torch.compiler.is_compiling():
            ctx.compiled = note_graph(name, layer)
        elif heartbeat := ctx.watched:
            heartbeat.attention(layer)
        else:
            note_beside_graphs(name, layer)
        if not ctx.replays:
            return edited(ctx, layer, module, *given, **kwargs)
        with ctx.visit(("attention", layer)):
            return edited(ctx, layer, module, *given, **kwargs)

    def edited(
        ctx: Context,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """`run`, with the rows that methods edit in this layer."""
        kwargs["scaling"] = scaling
        new, length = query.shape[2], key.shape[2]
        acting = [(i, ctx.rows(i, new)) for i in ctx.stack.edits[layer] if ctx.acts(i)]
        count = max([0] + [rows for _, rows in acting])
        if count == 0:
            return run(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
            raise FoveateError("Attention with sinks or soft-capped scores cannot be edited.")
        if compat.paged(kwargs):
            raise FoveateError(
                "Paged caches (continuous batching) hold no rows to edit: call generate()."
            )
        if not (attention_mask is None and aligned):
            _check_mask(ctx, layer, new, attention_mask)
        if length < ctx.visual.shape[1]:
            raise FoveateError(
                f"Layer {layer} keeps {length} keys of a prompt of {ctx.visual.shape[1]} tokens, "
                "so it does not see the whole image: choose other layers, as in layers=(N,)."
            )

        out, touched = None, _touched(ctx, acting, count)
        if count < new or touched is not None or ctx.paired:
            out, _ = run(module, query, key, value, attention_mask, **kwargs)
        if ctx.paired:  # the second half is another stream's and stays plain
            half = len(ctx.visual)
            query, key, value = query[:half], key[:half], value[:half]
            if attention_mask is not None and len(attention_mask) > half:
                attention_mask = attention_mask[:half]
        if attention_mask is None and 1 < new < length:  # an empty static cache
            key, value = key[:, :, :new], value[:, :, :new]
        mask = _row_mask(attention_mask, new, key.shape[2], count, query.device)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        size = max(1, _CHUNK // (query.shape[0] * query.shape[1] * key.shape[2]))
        pieces = []
        for lo in range(new - count, new, size):
            hi = min(lo + size, new)
            part = None if mask is None else mask[:, :, lo - new + count : hi - new + count]
            pieces.append(
                _edit(ctx, module, acting, query, key, value, part, scale, lo, hi).transpose(1, 2)
            )
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        if out is None:
            return rows.contiguous(), None
        mine = out[: len(rows)]
        if touched is not None:
            rows = torch.where(touched.to(rows.device)[..., None, None], rows, mine[:, -count:])
        if out.requires_grad or rows.requires_grad:
            rows = torch.cat([mine[:, :-count], rows], 1)
            return torch.cat([rows, out[len(rows) :]]) if ctx.paired else rows, None
        mine[:, -count:] = rows
        return out, None

    return attention


def _check_mask(ctx: Context, layer: int, new: int, mask: Tensor | None) -> None:
    """Refuse a missing mask where the kernel would then attend to padding or to the future."""
    if mask is None and (ctx.padded or 1 < new < ctx.visual.shape[1]):
        kind = "padded batch" if ctx.padded else "prompt on a filled cache"
        raise lost(ctx.stack.model, f"layer {layer} got no mask for a {kind}")


def _touched(ctx: Context, acting: list[tuple[int, int]], count: int) -> Tensor | None:
    """(B, count) bool: which of the last rows some method edits; None for all of them."""
    masks = [(ctx.touched(i, rows), rows) for i, rows in acting]
    if any(mask is None and rows == count for mask, rows in masks):
        return None
    union = ctx.has_image.new_zeros(len(ctx.has_image), count)
    for mask, rows in masks:
        union[:, count - rows :] |= union.new_ones(1, 1) if mask is None else mask
    return union


def _edit(
    ctx: Context,
    module: nn.Module,
    acting: list[tuple[int, int]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    lo: int,
    hi: int,
) -> Tensor:
    """Attention output (B, H, hi - lo, D) of the query rows [lo, hi) with the methods applied."""
    new = query.shape[2]
    query = query if hi - lo == new else query[:, :, lo:hi]
    x = _scores(query, key, scale)
    for stage in ("scores", "weights"):
        for i, count in acting:
            rows = hi - max(lo, new - count)
            if rows <= 0 or not ctx.stack.methods[i].wants(stage):
                continue
            method, old, asked = ctx.use(i), x, query
            if rows < x.shape[2]:
                old, asked = x[:, :, -rows:], query[:, :, -rows:]
            view = Rows(old, asked, key, value, mask, module, scale, ctx)
            edited, touched = getattr(method, stage)(view), ctx.touched(i, count)
            if touched is not None and edited is not old:
                touched = touched.to(x.device)[:, count - new + hi - rows : count - new + hi]
                edited = torch.where(touched[:, None, :, None], edited, old)
            x = edited if rows == x.shape[2] else torch.cat([x[:, :, :-rows], edited], 2)
        if stage == "scores":
            if mask is not None:
                lowest = torch.finfo(x.dtype).min
                x = x.masked_fill(~mask, lowest) if mask.dtype == torch.bool else x + mask
            x = x.softmax(-1)
    return _values(x, value).to(value.dtype)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled dot products (B, H, R, K) float32 without expanding key/value heads."""
    batch, heads, rows, width = query.shape
    grouped = query.reshape(batch * key.shape[1], -1, width)
    turned = key.flatten(0, 1).transpose(1, 2)  # a view: cached keys lie batch by head
    return _product(grouped, turned, scale).view(batch, heads, rows, -1)


def _values(x: Tensor, value: Tensor) -> Tensor:
    """Weights (B, H, R, K) float32 times values (B, Hkv, K, D), as (B, H, R, D) float32."""
    batch, heads, rows, columns = x.shape
    grouped = x.reshape(batch * value.shape[1], -1, columns)
    value = value.flatten(0, 1)
    if not _narrow(x, value):
        return _product(grouped, value).view(batch, heads, rows, -1)
    # float32 weights are the sum of two numbers of the values' dtype: one pass over the values
    high = grouped.to(value.dtype)
    low = (grouped - high).to(value.dtype)
    high, low = _product(torch.cat([high, low], 1), value).chunk(2, 1)
    return (high + low).view(batch, heads, rows, -1)


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """a @ b * scale in float32, whatever the dtypes, for (N, R, K) and (N, K, D)."""
    if _narrow(a, b):
        return torch.bmm(a, b, out_dtype=torch.float32) * scale
    a, b = a.float(), b.float()  # nothing for float32
    unread = a.new_empty(1, 1, 1)  # as beta is 0
    return torch.baddbmm(unread, a, b, beta=0, alpha=scale)


def _narrow(a: Tensor, b: Tensor) -> bool:
    """Whether a kernel multiplies `b` as it is and sums in float32: half precision on CUDA."""
    half = b.dtype in (torch.float16, torch.bfloat16)
    return b.is_cuda and half and not (a.requires_grad or b.requires_grad)


def _row_mask(
    mask: Tensor | None, new: int, length: int, count: int, device: torch.device
) -> Tensor | None:
    """The last `count` rows of whatever mask the kernel got: (B|1, 1, count, K), True = attend."""
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


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask >= 0
