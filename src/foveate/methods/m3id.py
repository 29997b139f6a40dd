"""M3ID: multi-modal mutual-information decoding (arXiv 2403.14003).

The longer an answer grows, the more a model writes what its own words suggest, and the less what
the picture shows. M3ID subtracts what it would write without the picture, more with every token.

No code of the authors is known; the rule is that of AvisC's authors, who compare with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Prompt, Sequences, plausible

_MOST = 80.0  # exp(80) times a difference of log-probabilities is still a float32


@dataclass(frozen=True)
class M3ID(Method):
    """Mutual-information decoding: guidance away from text alone that grows with the answer.

    A second stream reads the prompt without its visual tokens and then the same answer. With p and
    q the log-probabilities with and without the picture, the logits of token t = 0, 1, ... become

        p + g (p - q),   g = exp(forgetting * (t + first_step)) - 1

    on tokens with at least `beta` times the probability of the likeliest, -inf elsewhere, before
    processors and warpers, so greedy decoding and sampling both use it. g is 0.02 at the first
    token, 1.7 at the fiftieth and grows without bound (here until float32 ends). Only visual tokens
    are taken out of the prompt: the text around an image stays as it is. Another turn on the same
    cache counts on.

    Attributes:
        forgetting: how fast the picture is forgotten, 0 to 1 per token; 0 leaves the model's own
            log-probabilities, under the cut. AvisC's authors: 0.02.
        beta: plausibility cut, 0 to 1; 0 cuts nothing. AvisC's authors: 0.1.
        confidence: the correction is added only for samples whose likeliest token has less than
            this probability, 0 to 1; 1 always adds it, as AvisC's code does. Such a gate is in
            the paper, as others report it (inferred).
        first_step: where the count begins, 0 or more. AvisC's authors: 1. Later copies of their
            code start at 0, where the first token is plain up to the cut.
    """

    forgetting: float = 0.02
    beta: float = 0.1
    confidence: float = 1.0
    first_step: int = 1

    name: ClassVar[str] = "m3id"
    paper: ClassVar[str] = "2403.14003"
    neutral: ClassVar[dict[str, Any]] = {"forgetting": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"forgetting": 0.1, "beta": 0.0}

    def check(self) -> None:
        self.require(0 <= self.forgetting <= 1, "forgetting must lie between 0 and 1")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")
        self.require(0 <= self.confidence <= 1, "confidence must lie between 0 and 1")
        self.require(self.first_step >= 0, "first_step must be 0 or more")

    def wants(self, stage: str) -> bool:
        acts = self.forgetting != 0 and self.confidence != 0
        return super().wants(stage) and (stage != "contrast" or acts)

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        return prompt.only(~prompt.visual) if bool(prompt.visual.any()) else None

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        p = out = logits.float().log_softmax(-1)
        if other is not None:
            q = other.float().log_softmax(-1)
            t = seq.memory.get("tokens", seq.visual.new_zeros(len(p), dtype=torch.float32))
            seq.memory["tokens"] = t + 1
            grown = (self.forgetting * (t + self.first_step)).clamp(max=_MOST)
            g = torch.expm1(grown)[:, None].to(p.device)
            out = p + g * (p - q)
            if self.confidence < 1:
                sure = p.amax(-1, keepdim=True) >= _log(self.confidence)
                out = torch.where(sure, p, out)
        return plausible(out, p, self.beta)


def _log(share: float) -> float:
    return math.log(share) if share else -math.inf
