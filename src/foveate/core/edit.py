"""A stack of methods applied to rows of attention: the arithmetic, whichever engine calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Acting:
    """A method that edits some of the rows.

    Attributes:
        seq: what it sees of its sequences.
        count: how many of the last rows it receives.
        touched: (B, count) bool, the rows that it edits; None for all of them.
    """

    method: Any
    seq: Any
    count: int
    touched: Tensor | None = None


def edit_rows(rows: Any, acting: Sequence[Acting]) -> Tensor:
    """Attention output (B, H, R, D) of query rows with methods applied, in the values' dtype.

    Args: see `edited_weights`.
    """
    return weighted(edited_weights(rows, acting), rows.value).to(rows.value.dtype)


def edited_weights(rows: Any, acting: Sequence[Acting]) -> Tensor:
    """Attention weights (B, H, R, K) float32 of query rows with methods applied.

    Methods act in order: all of them on the scores, then, after mask and softmax, on the weights.

    Args:
        rows: `Rows` whose x holds plain scores (B, H, R, K) float32.
    """
    x = rows.x
    for stage in ("scores", "weights"):
        for one in acting:
            if not one.method.wants(stage):
                continue
            view = rows.seen_by(one.seq, x, one.count)
            edited = getattr(one.method, stage)(view)
            if one.touched is not None and edited is not view.x:
                edited = torch.where(one.touched.to(x.device)[:, None, :, None], edited, view.x)
            whole = one.count == x.shape[2]
            x = edited if whole else torch.cat([x[:, :, : -one.count], edited], 2)
        if stage == "scores":
            x = masked(x, rows.mask).softmax(-1)
    return x


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (B, H, R, K) under a mask: bool, True = attend, or a number that is added."""
    if mask is None:
        return x
    lowest = torch.finfo(x.dtype).min
    return x.masked_fill(~mask, lowest) if mask.dtype == torch.bool else x + mask


def products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled scores (B, H, R, K) float32 of (B, H, R, D) and (B, Hkv, K, D); keys are not copied.

    Query heads share key heads in groups of H / Hkv.
    """
    batch, heads, rows, width = query.shape
    grouped = query.reshape(batch * key.shape[1], -1, width)
    turned = key.flatten(0, 1).transpose(1, 2)  # a view: cached keys lie batch by head
    return _product(grouped, turned, scale).view(batch, heads, rows, -1)


def weighted(x: Tensor, value: Tensor) -> Tensor:
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
