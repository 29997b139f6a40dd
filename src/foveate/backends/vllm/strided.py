"""A layer's keys and values in the caches of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.edit import Acting, edited_weights, products, weighted
from ...core.simple import Simple
from .plan import Blocks

_MOST_HEADS = 128  # a kernel holds a column of all of them at once


class Strided:
    """Keys and values of every token side by side, blocks and heads in any order in memory.

    Args:
        cache: (blocks, Hkv, size, 2 D), with the last dimension contiguous.
        kernels: the module of Triton kernels; None to compute with torch.
    """

    def __init__(self, cache: Tensor, kernels: Any = None) -> None:
        width = cache.shape[3] // 2
        self._keys, self._values = cache[..., :width], cache[..., width:]
        self.kernels = kernels

    def scores(self, query: Tensor, blocks: Blocks, scale: float) -> Tensor:
        if self.kernels is None:
            return products(query, self.keys(blocks), scale)
        return self.kernels.scores(query, self._keys, blocks.number, scale)

    def keys(self, blocks: Blocks) -> Tensor:
        return self._gathered(self._keys, blocks)

    def values(self, blocks: Blocks) -> Tensor:
        return self._gathered(self._values, blocks)

    def weighted(self, weights: Tensor, blocks: Blocks) -> Tensor:
        if self.kernels is None:
            return weighted(weights, self.values(blocks))
        return self.kernels.summed(weights.contiguous(), self._values, blocks.number)

    def edited(self, rows: Any, acting: Sequence[Acting], blocks: Blocks) -> Tensor:
        simple = None if self.kernels is None else together(rows, acting)
        if simple is None:
            return edited_weights(rows, acting)
        edit, memory = simple
        return self.kernels.edited(rows.x, self._kinds(rows, blocks), edit, memory)

    def _gathered(self, half: Tensor, blocks: Blocks) -> Tensor:
        """(B, Hkv, N * size, D), copied."""
        return half[blocks.number].transpose(1, 2).flatten(2, 3)

    def _kinds(self, rows: Any, blocks: Blocks) -> Tensor:
        """(B, K) int8: what the kernels know of the key columns of a group."""
        if blocks.places is None:  # once per step
            named = self.kernels
            kinds = torch.full_like(rows.valid, named.BETWEEN, dtype=torch.int8)
            of = named.SYSTEM, named.VISUAL, named.AFTER
            for kind, columns in zip(of, (rows.system, rows.visual, rows.after), strict=True):
                kinds.masked_fill_(columns, kind)
            blocks.places = kinds.masked_fill_(~rows.valid, named.HIDDEN)
        return blocks.places


def together(rows: Any, acting: Sequence[Acting]) -> tuple[Simple, dict[str, Any]] | None:
    """All edits of a stack as one, and the memory that it goes on with; None where some is code.

    Ranks pool over their heads in code.
    """
    if rows.x.shape[1] > _MOST_HEADS:
        return None
    whole, memory = Simple(), {}
    for one in acting:
        edit = one.method.simple(rows.seen_by(one.seq, rows.x, one.count))
        both = None if edit is None else whole.then(edit)
        if both is None or (both.pools and rows.ranks is not None):
            return None
        whole = both
        if edit.mixing:
            memory = one.seq.memory
    return whole, memory
