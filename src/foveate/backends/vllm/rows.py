"""The arithmetic: rows of a paged cache as methods see them.

A method sees all columns of a row where most of them lie about the image. Otherwise it sees the
columns that it asks for and one more for the rest of them. With Z the sum of the exponentials of
the rest, the rest's score is log Z. A softmax over these columns is the softmax over the whole row,
so a method's own code runs on it unchanged. The rest counts as text after the image.

What the rest adds to the output is what the kernel's output o owes to it. With a the weights of the
plain row and a' those of the edited one, the new output is

    g o + sum of the shown (a' - g a) v,   where g = a'(rest) / a(rest).

So g also multiplies the rounding of o. Where an edit takes mass away from the shown columns, g may
be large: beyond `MOST` the values of the rest are read, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.edit import Acting
from ...core.rows import Rows
from .cache import Cache
from .plan import Blocks, Group

MOST = 2.0
"""The most that the kernel's output is multiplied with. In half precision, a corrected output is
then off by at most this many times the rounding of the kernel's output, and by its own rounding."""


class Cached(NamedTuple):
    """Where the keys and values of a group's rows are gathered from when a method asks."""

    cache: Cache
    group: Group

    def padded(self, gather: Callable[[Blocks], Tensor]) -> Tensor:
        """(B, Hkv, K, D) of the columns shown; zeros for the one that stands for the rest."""
        x = gather(self.group.shown)
        return x if self.group.rest is None else pad(x, (0, 0, 0, 1))


class ServedRows(Rows):
    """Rows whose heads may lie on several ranks, and whose keys are gathered when asked for.

    Args:
        cached: their keys and values. ranks: vLLM's group of ranks; None where this process has
            all heads. Others as of `Rows`.
    """

    __slots__ = ("_cached", "ranks")

    def __init__(self, x: Tensor, layer: int, cached: Cached, ranks: Any, *given: Any) -> None:
        query, mask, scale, seq, rotary = given
        self.x, self.layer, self.query = x, layer, query
        self.mask, self.scale, self.seq, self._rotary = mask, scale, seq, rotary
        self._cached, self.ranks = cached, ranks

    @property
    def key(self) -> Tensor:  # type: ignore[override]
        return self._cached.padded(self._cached.cache.keys)

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self._cached.padded(self._cached.cache.values)

    def products(self, query: Tensor) -> Tensor:
        cached = self._cached
        x = cached.cache.scores(query, cached.group.shown, self.scale)
        return x if cached.group.rest is None else pad(x, (0, 1))

    def seen_by(self, seq: Any, x: Tensor, count: int) -> ServedRows:
        given = self.query, self.mask, self.scale, seq, self._rotary
        return ServedRows(x, self.layer, self._cached, self.ranks, *given)

    def over_heads(self, x: Tensor, pool: Literal["max", "mean"]) -> Tensor:
        here = super().over_heads(x, pool)
        if self.ranks is None:
            return here
        return super().over_heads(self.all_heads(here), pool)  # every rank holds as many heads

    def all_heads(self, x: Tensor) -> Tensor:
        return x if self.ranks is None else self.ranks.all_gather(x.contiguous(), dim=1)

    def these_heads(self, x: Tensor) -> Tensor:
        if self.ranks is None:
            return x
        count = self.x.shape[1]
        return x.narrow(1, self.ranks.rank_in_group * count, count)


def edit(
    group: Group,
    layer: int,
    query: Tensor,
    cache: Cache,
    out: Tensor,
    scale: float,
    rotary: Callable[[Tensor], Any],
    ranks: Any = None,
) -> None:
    """Put the edited rows of one layer and one group into the kernel's output.

    Args:
        query: (tokens, H, D). scale: of products.
        out: (tokens, H, D), changed in place; not read where every column is shown.
        rotary: rotary embeddings of the layer, for states like its argument.
        ranks: see `ServedRows`.
    """
    group.done.add(layer)
    acting = group.at_work(layer)
    if not acting:
        return
    group.acted.update(acting)
    asked = query[group.at].unsqueeze(2)  # (B, H, 1, D)
    share = [Acting(group.stack.methods[i], group.state.seen_by(i), 1) for i in acting]
    seen = Cached(cache, group), ranks, asked, group.bias, scale, share[0].seq

    def edited(x: Tensor) -> Tensor:
        rows = ServedRows(x, layer, *seen, lambda: rotary(x))
        return cache.edited(rows, share, group.shown)

    rest = group.rest
    if rest is None:
        weights = edited(cache.scores(asked, group.shown, scale))
        out[group.at] = cache.weighted(weights, group.shown).squeeze(2).to(out.dtype)
        return
    # the kernel of CPUs returns no log-sum-exp, so the keys of the rest are read, too
    every = cache.scores(asked, rest.blocks, scale)
    x = every.gather(3, rest.columns.expand(-1, every.shape[1], -1, -1))
    others = every + rest.bias
    columns = torch.cat([x, others.logsumexp(-1, keepdim=True)], -1)
    plain = (columns + group.bias).softmax(-1)
    weights = edited(columns)
    gain = weights[..., -1:] / plain[..., -1:].clamp(min=_LEAST)
    if bool((gain > MOST).any()):
        new = cache.weighted(weights[..., :-1], group.shown)
        new += weights[..., -1:] * cache.weighted(others.softmax(-1), rest.blocks)
    else:
        new = cache.weighted((weights - gain * plain)[..., :-1], group.shown)
        new += gain * out[group.at].unsqueeze(2)
    out[group.at] = new.squeeze(2).to(out.dtype)


_LEAST = 1e-30
