"""Triton kernels for decode rows: scores, edits that are a few numbers, and sums of values.

Keys and values are read where they lie, through the block table; nothing of the cache is copied. A
layer takes three launches: `scores`, `edited` and `summed`. Where an edit is only code, that code
takes the place of the second. They are written for GPUs and held to torch in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ...core.simple import Mixing, Simple

# -- scores ----------------------------------------------------------------------------------------


@triton.jit
def _scores(
    query, keys, number, out,
    query_row, query_head, block_stride, head_stride, token_stride, out_row, out_head,
    scale, count,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One block of one row, for the query heads that share a key head."""
    row, head, at = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
    member, inside, token = tl.arange(0, G), tl.arange(0, D), tl.arange(0, S)
    asked = query + row * query_row + (head * GROUP + member[:, None]) * query_head + inside
    q = tl.load(asked, mask=(member[:, None] < GROUP) & (inside < WIDTH), other=0.0)
    block = tl.load(number + row * count + at).to(tl.int64)
    there = keys + block * block_stride + head * head_stride + token[:, None] * token_stride
    k = tl.load(there + inside, mask=(token[:, None] < SIZE) & (inside < WIDTH), other=0.0)
    if not HALF:
        q, k = q.to(tl.float32), k.to(tl.float32)
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    place = row * out_row + (head * GROUP + member[:, None]) * out_head + at * SIZE + token
    tl.store(out + place, x, mask=(member[:, None] < GROUP) & (token < SIZE))


def scores(query: Tensor, keys: Tensor, number: Tensor, scale: float) -> Tensor:
    """(B, H, 1, N * size) float32 scaled products of queries and the keys of cache blocks.

    Args:
        query: (B, H, 1, D), with D contiguous. number: (B, N) int64, the blocks of each row.
        keys: (blocks, Hkv, size, D) of any strides but that of D, which is 1.
    """
    batch, heads, _, width = query.shape
    _, key_heads, size, _ = keys.shape
    count = number.shape[1]
    out = query.new_empty((batch, heads, 1, count * size), dtype=torch.float32)
    shape = _shape(heads // key_heads, width, size)
    strides = query.stride(0), query.stride(1), *keys.stride()[:3], out.stride(0), out.stride(1)
    _scores[(batch * key_heads, count)](
        query, keys, number.contiguous(), out, *strides, scale, count, key_heads,
        **shape, HALF=_half(keys.dtype),
    )  # fmt: skip
    return out


def _half(dtype: torch.dtype) -> bool:
    """Whether products are made of numbers of half precision, and summed in float32."""
    # numpy, which the interpreter computes with, has no bfloat16
    known = (torch.float16,) if triton.knobs.runtime.interpret else (torch.float16, torch.bfloat16)
    return dtype in known


def _shape(group: int, width: int, size: int) -> dict[str, int]:
    """Sizes of a product, and the powers of two that tiles are made of, 16 or more."""
    tiles = {
        key: max(16, triton.next_power_of_2(n))
        for key, n in (("G", group), ("D", width), ("S", size))
    }
    return {"GROUP": group, "WIDTH": width, "SIZE": size, **tiles}


# -- sums of values --------------------------------------------------------------------------------


@triton.jit
def _summed(
    weights, values, number, out,
    weight_row, weight_head, block_stride, head_stride, token_stride, out_row, out_head, count,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One row, for the query heads that share a value head."""
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    member, inside, token = tl.arange(0, G), tl.arange(0, D), tl.arange(0, S)
    mine = weights + row * weight_row + (head * GROUP + member[:, None]) * weight_head
    total = tl.zeros((G, D), dtype=tl.float32)
    for at in range(count):
        asked = (member[:, None] < GROUP) & (token < SIZE)
        a = tl.load(mine + at * SIZE + token, mask=asked, other=0.0)
        block = tl.load(number + row * count + at).to(tl.int64)
        there = values + block * block_stride + head * head_stride + token[:, None] * token_stride
        v = tl.load(there + inside, mask=(token[:, None] < SIZE) & (inside < WIDTH), other=0.0)
        if HALF:  # a float32 weight is the sum of two numbers of the values' dtype
            high = a.to(v.dtype)
            total = tl.dot(high, v, total)
            total = tl.dot((a - high.to(tl.float32)).to(v.dtype), v, total)
        else:
            total = tl.dot(a, v.to(tl.float32), total, input_precision="ieee")
    place = row * out_row + (head * GROUP + member[:, None]) * out_head + inside
    tl.store(out + place, total, mask=(member[:, None] < GROUP) & (inside < WIDTH))


def summed(weights: Tensor, values: Tensor, number: Tensor) -> Tensor:
    """(B, H, 1, D) float32: weights (B, H, 1, N * size) float32 times the values of cache blocks.

    Args: see `scores`.
    """
    batch, heads = weights.shape[:2]
    _, value_heads, size, width = values.shape
    out = weights.new_empty((batch, heads, 1, width))
    shape = _shape(heads // value_heads, width, size)
    strides = weights.stride(0), weights.stride(1), *values.stride()[:3]
    strides = *strides, out.stride(0), out.stride(1)
    _summed[(batch * value_heads,)](
        weights, values, number.contiguous(), out, *strides, number.shape[1], value_heads,
        **shape, HALF=_half(values.dtype),
    )  # fmt: skip
    return out


# -- edits -----------------------------------------------------------------------------------------


@triton.jit
def _changed(
    place, kinds, here, columns, many,
    times_0, times_1, times_2, lift_0, lift_1, lift_2, agreed, HEADS: tl.constexpr,
):  # fmt: skip
    """Scores (H, T) of the columns `here` with the edit of scores, and their kinds (T,).

    Columns that are hidden, or that the row does not have, are -inf.
    """
    there = (many[:, None] < HEADS) & (here < columns)
    kind = tl.load(kinds + here, mask=here < columns, other=0)
    z = tl.load(place + here, mask=there, other=0.0)
    size = tl.abs(z)
    before, image, after = kind == 1, kind == 2, kind == 3
    gain = tl.where(before, times_0, tl.where(image, times_1, tl.where(after, times_2, 0.0)))
    lift = tl.where(before, lift_0, tl.where(image, lift_1, tl.where(after, lift_2, 0.0)))
    z += gain * z + lift * size
    mean = tl.sum(tl.where(many[:, None] < HEADS, size, 0.0), 0) / HEADS
    z += tl.where(image, agreed, 0.0) * mean
    return tl.where(kind == 0, float("-inf"), z), kind


@triton.jit
def _mixed(
    a, before, kind, many, keep, take, pull, push, gate,
    HEADS: tl.constexpr, MEAN: tl.constexpr, UPDATED: tl.constexpr,
):  # fmt: skip
    """Weights (H, T) of some columns mixed with a memory (T,), and the memory after them."""
    known = tl.where(many[:, None] < HEADS, a, 0.0)
    pooled = tl.sum(known, 0) / HEADS if MEAN else tl.max(known, 0)
    after = tl.where(kind == 2, keep * before + take * pooled, 0.0)
    used = after if UPDATED else before
    mixed = a + pull * (used - a) + push * used
    return tl.where((kind == 2) & (gate != 0), mixed, a), after


@triton.jit
def _edited(
    x, kinds, old, new, gates, out, columns,
    times_0, times_1, times_2, lift_0, lift_1, lift_2, agreed, keep, take, pull, push,
    HEADS: tl.constexpr, H: tl.constexpr, T: tl.constexpr,
    MIXING: tl.constexpr, MEAN: tl.constexpr, UPDATED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One row, all heads: some columns at a time, two or three times over."""
    row = tl.program_id(0)
    many, column = tl.arange(0, H), tl.arange(0, T)
    place = x + (row * HEADS + many[:, None]) * columns
    top = tl.full((H,), -1e38, dtype=tl.float32)
    total = tl.zeros((H,), dtype=tl.float32)
    for at in range(0, columns, T):  # the softmax's maximum and sum
        here = at + column
        z, kind = _changed(
            place, kinds + row * columns, here, columns, many,
            times_0, times_1, times_2, lift_0, lift_1, lift_2, agreed, HEADS,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
    gate = tl.load(gates + row) if GATED else 1
    whole = tl.full((H,), 1.0, dtype=tl.float32)
    if MIXING:  # the sum of every row after it
        whole = tl.zeros((H,), dtype=tl.float32)
        for at in range(0, columns, T):
            here = at + column
            z, kind = _changed(
                place, kinds + row * columns, here, columns, many,
                times_0, times_1, times_2, lift_0, lift_1, lift_2, agreed, HEADS,
            )  # fmt: skip
            a = tl.exp(z - top[:, None]) / total[:, None]
            before = tl.load(old + row * columns + here, mask=here < columns, other=0.0)
            a, after = _mixed(
                a, before, kind, many, keep, take, pull, push, gate, HEADS, MEAN, UPDATED
            )
            whole += tl.sum(a, 1)
            tl.store(new + row * columns + here, after, mask=here < columns)
    for at in range(0, columns, T):
        here = at + column
        z, kind = _changed(
            place, kinds + row * columns, here, columns, many,
            times_0, times_1, times_2, lift_0, lift_1, lift_2, agreed, HEADS,
        )  # fmt: skip
        a = tl.exp(z - top[:, None]) / total[:, None]
        if MIXING:
            before = tl.load(old + row * columns + here, mask=here < columns, other=0.0)
            a, after = _mixed(
                a, before, kind, many, keep, take, pull, push, gate, HEADS, MEAN, UPDATED
            )
        target = out + (row * HEADS + many[:, None]) * columns + here
        there = (many[:, None] < HEADS) & (here < columns)
        tl.store(target, a / whole[:, None], mask=there)


HIDDEN, SYSTEM, VISUAL, AFTER, BETWEEN = range(5)
"""Kinds of key columns: not of the row; before the image, of it, after it; between two images."""


def edited(x: Tensor, kinds: Tensor, edit: Simple, memory: dict[str, Any]) -> Tensor:
    """Weights (B, H, 1, K) float32 of scores (B, H, 1, K) float32 after a softmax, edited.

    Args:
        kinds: (B, K) int8, of the key columns. memory: as of `Rows`; what the edit leaves there
            is new, (B, 1, 1, K).
    """
    batch, heads, _, columns = x.shape
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    mixing = edit.mixing or Mixing("", 0.0, 0.0, "max")
    old, new, gates = x, x, x  # unread where nothing is mixed
    if edit.mixing:
        old = memory.get(mixing.memory, x.new_zeros((batch, 1, 1, 0)))
        old = pad(old, (0, columns - old.shape[3])).contiguous()
        new = torch.empty_like(old)
    if mixing.gate:
        gates = memory[mixing.gate].to(torch.int8)
    shares = mixing.keep, mixing.take, mixing.pull, mixing.push
    wide = triton.next_power_of_2(heads)
    _edited[(batch,)](
        x, kinds, old, new, gates, out, columns, *edit.times, *edit.lift, edit.agreed, *shares,
        heads, wide,
        T=max(16, min(256, 2048 // wide)), MIXING=edit.mixing is not None,
        MEAN=mixing.pool == "mean", UPDATED=mixing.updated, GATED=bool(mixing.gate),
    )  # fmt: skip
    if edit.mixing:
        memory[mixing.memory] = new
    return out
