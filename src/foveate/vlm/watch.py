"""What runs inside `generate`, at every token: it keeps probabilities, and it can stop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


class Probabilities(LogitsProcessor):
    """Keeps the probability of every token that was chosen, instead of all logits."""

    first: Tensor | None = None
    """Log-probabilities (B, V) of the first token."""

    def __init__(self) -> None:
        self.latest: Tensor | None = None
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.latest is not None:
            self.chosen.append(self.latest.gather(1, input_ids[:, -1:]))
        self.latest = scores.float().log_softmax(-1)
        if self.first is None:
            self.first = self.latest
        return scores

    def finish(self, sequences: Tensor) -> list[list[float]]:
        """Probabilities (B, produced tokens), or nothing where nobody asked."""
        if self.latest is None:
            return []
        last = self.latest.gather(1, sequences[:, -1:].to(self.latest.device))
        return torch.cat([*self.chosen, last], 1).exp().tolist()


class Stop(StoppingCriteria):
    """Ends the generation after the current token once `now` is set."""

    now = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.now, device=input_ids.device)
