"""The arithmetic: rows of a paged cache as methods see them.

A row is the columns that a method asks for and one column more for the rest of them. With Z the
sum of a row's exponentials, e^lse, the rest's score is log(Z - sum of the shown e^s), and its value
is what the kernel's output owes to the rest: (o - sum of the shown a v) / (1 - sum of the shown a).
A softmax over these columns is the softmax over the whole row, so a method's own code runs on it
unchanged. The rest counts as text after the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.edit import Acting, edited_weights, products, weighted
from ...core.rows import Rows
from .plan import Group

Gather = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(B, N) cache blocks -> keys and values (B, Hkv, N * block size, D)."""


class ServedRows(Rows):
    """Rows whose heads may lie on several ranks.

    Attributes:
        ranks: vLLM's group of them; None where this process has all heads.
    """

    __slots__ = ("ranks",)
    ranks: Any

    def seen_by(self, seq: Any, x: Tensor, count: int) -> ServedRows:
        view: Any = super().seen_by(seq, x, count)
        view.ranks = self.ranks
        return view

    def over_heads(self, x: Tensor, pool: Literal["max", "mean"]) -> Tensor:
        here = super().over_heads(x, pool)
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
    gather: Gather,
    out: Tensor,
    scale: float,
    rotary: Callable[[Tensor], Any],
    ranks: Any = None,
) -> None:
    """Put the edited rows of one layer and one group into the kernel's output.

    Args:
        query: (tokens, H, D). out: (tokens, H, D), changed in place. scale: of products.
        rotary: rotary embeddings of the layer, for states like its argument.
        ranks: see `ServedRows`.
    """
    group.done.add(layer)
    state = group.state
    acting = [i for i in group.stack.edits[layer] if i in group.acting and state.acts(i)]
    if not acting:
        return
    group.acted.update(acting)
    rows = group.rows.to(query.device)
    asked = query[rows].unsqueeze(2)  # (B, H, 1, D)
    key, value = gather(group.blocks)
    mask = group.mask.to(query.device)
    scores = products(asked, key, scale).masked_fill(~mask, _LOW)
    share = [Acting(group.stack.methods[i], state.seen_by(i), 1) for i in acting]

    def edited(scores: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        first = share[0].seq
        at = (asked, key, value, mask, scale, first, lambda: rotary(scores))
        given = ServedRows(scores, layer, *at)
        given.ranks = ranks
        return edited_weights(given, share)

    if group.whole:
        new = weighted(edited(scores, key, mask), value)
    else:
        # the kernel of CPUs does not return the log of Z, so the keys are read once more
        every = products(asked, gather(group.all_blocks)[0], scale)
        every = every.masked_fill(~group.all_mask.to(query.device), _LOW)
        lse = every.logsumexp(-1, keepdim=True)
        plain = (scores - lse).exp()
        rest = (1 - plain.sum(-1, keepdim=True)).clamp(min=_LEAST)  # (B, H, 1, 1)
        value_of_rest = (out[rows].unsqueeze(2).float() - weighted(plain, value)) / rest
        columns = torch.cat([scores, rest.log() + lse], -1)
        weights = edited(columns, pad(key, (0, 0, 0, 1)), pad(mask, (0, 1), value=True))
        new = weighted(weights[..., :-1], value) + weights[..., -1:] * value_of_rest
    out[rows] = new.squeeze(2).to(out.dtype)


_LOW = -1e30  # a column that is not there
_LEAST = 1e-9
