"""A layer's keys and values, in the blocks of vLLM's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.edit import Acting, edited_weights, products, weighted
from .plan import Blocks


class Cache(Protocol):
    """What `rows` reads of a layer. P is the number of blocks of each row times their size.

    Keys and values stay until those of another layer are read.
    """

    def scores(self, query: Tensor, blocks: Blocks, scale: float) -> Tensor:
        """(B, H, 1, P) float32 scaled products of queries (B, H, 1, D) and the blocks' keys."""

    def keys(self, blocks: Blocks) -> Tensor:
        """(B, Hkv, P, D)."""

    def values(self, blocks: Blocks) -> Tensor:
        """(B, Hkv, P, D)."""

    def weighted(self, weights: Tensor, blocks: Blocks) -> Tensor:
        """(B, H, 1, D) float32: weights (B, H, 1, P) float32 times the blocks' values."""

    def edited(self, rows: Any, acting: Sequence[Acting], blocks: Blocks) -> Tensor:
        """See `core.edit.edited_weights`; the blocks are those that `rows` shows one by one."""


class Packed:
    """As the kernel of CPUs packs it: per block and head the keys (D, size), then values (size, D).

    Args:
        cache: (blocks, Hkv, size, 2 D), contiguous.
    """

    def __init__(self, cache: Tensor) -> None:
        _, self.heads, self.size, both = cache.shape
        self.width = both // 2
        self.halves = cache.view(-1, self.size * self.width)  # of every block and head, two

    def scores(self, query: Tensor, blocks: Blocks, scale: float) -> Tensor:
        batch, heads, _, width = query.shape
        count = blocks.number.shape[1]
        # the products are made block by block, as the keys lie: nothing but copied blocks is read
        spread = query.view(batch, self.heads, 1, -1, width).expand(-1, -1, count, -1, -1)
        x = products(spread.reshape(-1, 1, heads // self.heads, width), self._keys(blocks), scale)
        x = x.view(batch, self.heads, count, -1, self.size)
        return x.transpose(2, 3).reshape(batch, heads, 1, -1)

    def keys(self, blocks: Blocks) -> Tensor:
        batch, count = blocks.number.shape
        return self._keys(blocks).reshape(batch, self.heads, count * self.size, self.width)

    def values(self, blocks: Blocks) -> Tensor:
        batch, count = blocks.number.shape
        return self._copied(blocks, "values").view(batch, self.heads, count * self.size, self.width)

    def weighted(self, weights: Tensor, blocks: Blocks) -> Tensor:
        return weighted(weights, self.values(blocks))

    def edited(self, rows: Any, acting: Sequence[Acting], blocks: Blocks) -> Tensor:
        return edited_weights(rows, acting)

    def _keys(self, blocks: Blocks) -> Tensor:
        """(B * Hkv * N, 1, size, D), a view of copied blocks."""
        return self._copied(blocks, "keys").view(-1, 1, self.width, self.size).transpose(2, 3)

    def _copied(self, blocks: Blocks, kind: str) -> Tensor:
        """The halves of blocks that hold keys or values, (B * Hkv * N, size * D)."""
        if blocks.places is None:  # once per step
            head = torch.arange(self.heads, device=blocks.number.device)[:, None]
            keys = ((blocks.number[:, None] * self.heads + head) * 2).flatten()
            blocks.places = {"keys": keys, "values": keys + 1}
        place, room = blocks.places[kind], blocks.room
        shape = (len(place), self.halves.shape[1])
        if kind not in room or room[kind].shape != shape or room[kind].dtype != self.halves.dtype:
            room[kind] = self.halves.new_empty(shape)
        return torch.index_select(self.halves, 0, place, out=room[kind])
