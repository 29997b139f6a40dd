"""The plausibility cut that contrasting decoders share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plausible(contrasted: Tensor, original: Tensor, share: float) -> Tensor:
    """Contrasted logits, -inf for tokens that the model itself holds to be too unlikely.

    Args:
        contrasted, original: (B, V) floating point; the model's own are logits or
            log-probabilities.
        share: least share of the largest probability, 0 to 1; 0 cuts nothing.
    """
    if share == 0:
        return contrasted
    least = original.amax(-1, keepdim=True) + math.log(share)
    return contrasted.masked_fill(original < least, -math.inf)


def together(other: Tensor | None, logits: Tensor, strength: float, share: float) -> Tensor:
    """Logits with a second stream's beside them: l + strength l', under the cut.

    Args:
        other: l' (B, V); None where there is no second stream. logits: l (B, V).
        share: see `plausible`.
    """
    logits = logits.float()
    joined = logits if other is None else logits + strength * other.float()
    return plausible(joined, logits, share)


def away_from(other: Tensor | None, logits: Tensor, strength: float, share: float) -> Tensor:
    """Logits led away from a second stream's: (1 + strength) l - strength l', under the cut.

    Args:
        other: l' (B, V); None where there is no second stream. A row with a NaN counts as l.
        logits: l (B, V). share: see `plausible`.
    """
    logits = logits.float()
    contrasted = logits
    if other is not None:
        other = other.float()
        other = torch.where(other.isnan().any(-1, keepdim=True), logits, other)
        contrasted = (1 + strength) * logits - strength * other
    return plausible(contrasted, logits, share)
