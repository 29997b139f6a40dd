"""DoLa: decoding by contrasting layers (arXiv 2309.03883).

Facts are added in the upper layers of a language model. What an early layer would already have
written is therefore subtracted from what the last one writes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Anatomy, Method, Sequences, Stream, costly, plausible


@dataclass(frozen=True)
class DoLa(Method):
    """Decoding by contrasting layers: the last layer's prediction against an early one's.

    The residual stream of the last position is unembedded where it enters each candidate layer,
    without the final norm, as in transformers' former implementation. The candidate whose
    prediction q is furthest from the model's own p by Jensen-Shannon divergence (the mean over
    the vocabulary, as there) is chosen anew for every sample and token; the logits become
    log p - log q on tokens with at least `plausibility` times the probability of the likeliest,
    -inf elsewhere. This happens before processors and warpers, in the prompt and at every decode
    step. It is a method for text decoders and needs no image.

    Attributes:
        bucket: which layers are candidates, where `layers` names none. "low": every second one of
            the first half, from 0; "high": of the second half. On 32 layers these are the
            published 0, 2, ... 14 and 16, 18, ... 30. For other depths as in transformers
            (inferred by its authors): beyond 40 layers only the first or the last 20 count, and
            where the input and output embeddings are tied "low" begins at layer 2, since the
            embedding itself would only predict the token it stands for.
        layers: candidates, by what enters a layer: 0 is the embedding. None: those of `bucket`.
        plausibility: least share of the largest probability, 0 to 1; 0 cuts nothing. Published:
            0.1.
        strength: factor of log q, 0 or more; 0 leaves only the cut. Published: 1.
    """

    bucket: Literal["low", "high"] = "low"
    plausibility: float = 0.1
    strength: float = 1.0
    layers: tuple[int, ...] | None = costly(None, limit=20)  # each is unembedded for every token

    name: ClassVar[str] = "dola"
    paper: ClassVar[str] = "2309.03883"
    needs_image: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0, "plausibility": 0.0}
    example: ClassVar[dict[str, Any]] = {"plausibility": 0.0}

    def check(self) -> None:
        self.require(0 <= self.plausibility <= 1, "plausibility must lie between 0 and 1")
        self.require(self.strength >= 0, "strength must be 0 or more")
        self.require(self.layers != (), "layers must name at least one candidate, or be None")

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage != "before" or self.strength != 0)

    def resolve(self, anatomy: Anatomy) -> Method:
        if self.layers is not None or not self.wants("before"):
            return super().resolve(anatomy)
        depth = anatomy.depth
        half, deep = depth // 2, depth > 40
        if self.bucket == "high":
            layers = tuple(range(depth - 20 if deep else half, depth, 2))
        else:
            layers = tuple(range(2 if anatomy.tied else 0, 20 if deep else half, 2)) or (half,)
        return dataclasses.replace(self, layers=layers)

    def setup(self, anatomy: Anatomy) -> Anatomy:
        return anatomy

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        if stream.layer in (self.layers or ()) and seq.phase != "prefix":
            seq.memory[f"entering {stream.layer}"] = stream.last
        return stream.x

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        log_p = out = logits.float().log_softmax(-1)
        if self.strength != 0:
            out = log_p - self.strength * self.early(log_p, seq)
        return plausible(out, log_p, self.plausibility)

    def early(self, log_p: Tensor, seq: Sequences) -> Tensor:
        """log q (B, V) float32 of each sample's candidate furthest from p."""
        anatomy, memory = seq.plan, seq.memory
        states = [memory[f"entering {layer}"].to(log_p.device) for layer in self.layers or ()]
        log_q = anatomy.unembed(torch.stack(states)).to(log_p.device).log_softmax(-1)  # (J, B, V)
        if len(states) == 1:
            return log_q[0]
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        divergence = log_m.exp() * (2 * log_m - log_p - log_q)  # KL(m, p) + KL(m, q)
        divergence = divergence.masked_fill(log_p == -math.inf, 0)  # ruled out by a method before
        furthest = divergence.mean(-1).argmax(0)  # (B,)
        return log_q.gather(0, furthest[None, :, None].expand(1, -1, log_q.shape[-1]))[0]
