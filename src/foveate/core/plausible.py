"""The plausibility cut that contrasting decoders share."""

from __future__ import annotations

import math

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
