"""The step that steering methods take: states are turned towards a direction, never stretched."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

_LEAST = 1e-12  # of a norm that is divided by


def turned(x: Tensor, direction: Tensor, by: float | Tensor) -> Tensor:
    """States (..., D) with their norm, turned towards `direction`; float32.

    Both are scaled to norm 1, `by` times the direction is added, and the sum is scaled to the norm
    that the state had. A direction of zeros leaves the state, but for rounding.
    """
    x = x.float()
    unit = normalize(x, dim=-1, eps=_LEAST)
    added = unit + by * normalize(direction.float(), dim=-1, eps=_LEAST)
    return x.norm(dim=-1, keepdim=True) * normalize(added, dim=-1, eps=_LEAST)
