"""A layer's keys and values, in the blocks of vLLM's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.edit import Acting, edited_weights, products, weighted
from .plan import Blocks


class Cache(Protocol):
    """What `rows` reads of a layer. P is the number of blocks of each row times their size."""

    def scores(self, query: Tensor, blocks: Blocks, scale: float) -> Tensor:
        """(B, H, 1, P) float32 scaled products of queries (B, H, 1, D) and the blocks' keys."""

    def weighted(self, weights: Tensor, blocks: Blocks) -> Tensor:
        """(B, H, 1, D) float32: weights (B, H, 1, P) float32 times the blocks' values."""

    def keys(self, blocks: Blocks) -> Tensor:
        """(B, Hkv, P, D)."""

    def values(self, blocks: Blocks) -> Tensor:
        """(B, Hkv, P, D)."""

    def edited(self, rows: Any, acting: Sequence[Acting], blocks: Blocks) -> Tensor:
        """See `core.edit.edited_weights`; the blocks are those that `rows` shows one by one."""


@dataclass(eq=False)
class Part:
    """Blocks that are copied and multiplied together: N of each of S sets of rows.

    Attributes:
        sets: S; the rows of a set share their blocks. start, end: which blocks of every row.
        keys, values: (S * Hkv * N,) int64, where the halves of blocks lie.
        room: see `Blocks`.
    """

    sets: int
    start: int
    end: int
    keys: Tensor
    values: Tensor
    room: dict[str, Tensor] = field(repr=False)


class Packed:
    """As the kernel of CPUs packs it: per block and head the keys (D, size), then values (size, D).

    Blocks that all rows of a group begin with, such as those of one picture, are read once.

    Args:
        cache: (blocks, Hkv, size, 2 D), contiguous.
    """

    def __init__(self, cache: Tensor) -> None:
        _, self.heads, self.size, both = cache.shape
        self.width = both // 2
        self.halves = cache.view(-1, self.size * self.width)  # of every block and head, two

    def scores(self, query: Tensor, blocks: Blocks, scale: float) -> Tensor:
        batch, heads, _, width = query.shape
        shape = batch, heads, 1, blocks.number.shape[1] * self.size
        out = query.new_empty(shape, dtype=torch.float32)
        for part in self._parts(blocks):
            # the products are made block by block, as the keys lie: only copied blocks are read
            count = part.end - part.start
            asked = query.reshape(part.sets, -1, self.heads, heads // self.heads, width)
            asked = asked.transpose(1, 2).flatten(2, 3).unsqueeze(2)  # (S, Hkv, 1, rows, D)
            spread = asked.expand(-1, -1, count, -1, -1).flatten(0, 2).unsqueeze(1)
            keys = self._copied(part, "keys").view(-1, 1, self.width, self.size)
            x = products(spread, keys.transpose(2, 3), scale)
            x = x.view(part.sets, self.heads, count, -1, heads // self.heads, self.size)
            self._columns(out, part).copy_(x.permute(0, 3, 1, 4, 2, 5))
        return out

    def weighted(self, weights: Tensor, blocks: Blocks) -> Tensor:
        batch, heads, _, _ = weights.shape
        outs = []
        for part in self._parts(blocks):
            x = self._columns(weights, part).transpose(1, 2)
            x = x.reshape(part.sets, self.heads, -1, (part.end - part.start) * self.size)
            values = self._copied(part, "values").view(part.sets, self.heads, -1, self.width)
            x = weighted(x, values).view(part.sets, self.heads, -1, heads // self.heads, self.width)
            outs.append(x.transpose(1, 2).reshape(batch, heads, 1, self.width))
        return outs[0] if len(outs) == 1 else outs[0] + outs[1]

    def keys(self, blocks: Blocks) -> Tensor:
        packed = self._whole(blocks, 0).view(*self._shape(blocks), self.width, self.size)
        return packed.transpose(3, 4).flatten(2, 3)

    def values(self, blocks: Blocks) -> Tensor:
        return self._whole(blocks, 1).view(*self._shape(blocks)[:2], -1, self.width)

    def edited(self, rows: Any, acting: Sequence[Acting], blocks: Blocks) -> Tensor:
        return edited_weights(rows, acting)

    def _shape(self, blocks: Blocks) -> tuple[int, int, int]:
        batch, count = blocks.number.shape
        return batch, self.heads, count

    def _columns(self, x: Tensor, part: Part) -> Tensor:
        """Those of a part of (B, H, 1, P), a view (S, rows of a set, Hkv, H / Hkv, N, size)."""
        count = x.shape[3] // self.size
        x = x.view(part.sets, -1, self.heads, x.shape[1] // self.heads, count, self.size)
        return x[:, :, :, :, part.start : part.end]

    def _places(self, number: Tensor) -> Tensor:
        """Where the keys of blocks (B, N) lie, (B, Hkv, N); their values lie one further."""
        head = torch.arange(self.heads, device=number.device)[:, None]
        return (number[:, None] * self.heads + head) * 2

    def _whole(self, blocks: Blocks, half: int) -> Tensor:
        """The halves of all blocks that hold keys or values, (B * Hkv * N, size * D)."""
        return self.halves[self._places(blocks.number).flatten() + half]

    def _parts(self, blocks: Blocks) -> list[Part]:
        """Blocks that all rows begin with, and those of each row; made once per step."""
        if blocks.places is None:
            batch, count = blocks.number.shape
            same = (blocks.number == blocks.number[:1]).all(0)
            common = int(same.cumprod(0).sum())
            blocks.places = []
            for sets, start, end in ((1, 0, common), (batch, common, count)):
                if start < end:
                    keys = self._places(blocks.number[:sets, start:end]).flatten()
                    room = blocks.room.setdefault(sets == 1, {})
                    blocks.places.append(Part(sets, start, end, keys, keys + 1, room))
        parts: list[Part] = blocks.places
        return parts

    def _copied(self, part: Part, kind: str) -> Tensor:
        """The halves of a part's blocks that hold keys or values, (S * Hkv * N, size * D)."""
        place = part.keys if kind == "keys" else part.values
        shape, room = (len(place), self.halves.shape[1]), part.room
        if kind not in room or room[kind].shape != shape or room[kind].dtype != self.halves.dtype:
            room[kind] = self.halves.new_empty(shape)
        return torch.index_select(self.halves, 0, place, out=room[kind])
