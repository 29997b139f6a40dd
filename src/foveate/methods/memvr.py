"""MemVR: memory-space visual retracing (arXiv 2410.03577).

Where an inner layer is unsure of the next token, what the image holds is looked up once more: the
feed-forward of the layer above is mixed with a retrieval from the image's own features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Anatomy, FeedForward, FoveateError, Method, Sequences, Stream

_CANDIDATES = 10  # likeliest tokens whose entropy is the uncertainty


@dataclass(frozen=True)
class MemVR(Method):
    """Visual retracing: where a layer is unsure, the next takes from the image's features.

    After each of `layers` the last row's state is normed and unembedded; u is the entropy of its
    ten likeliest tokens' softmax, divided by log 10. The first layer i with u above `threshold`
    fires, at most one per sample and forward, and changes all rows of the feed-forward of layer
    i + 1, in the prompt and at every decode step:

        FFN'(x) = (1 - ratio) FFN(x) + ratio z mean|FFN(x)| / mean|z|,    z = (x V^T) V

    x is what the feed-forward is given, V (N, D) the sample's image features as they enter the
    first layer, all its images together (inferred; the authors' code takes the last image of the
    last sample). Means run over all numbers of the sample's rows in this forward, without padding
    (the authors' code: over the batch). The authors also scale V by mean|W_up| / mean|V| and its
    transpose by mean|W_down| / mean|V|; both factors cancel in z / mean|z|, so no weights are read
    and mixtures of experts need no care.

    The question decides which image rows change, so questions share no prefix. A prefix that
    `prefill` filled is left as it is, and its image is kept for the rows that follow.

    Attributes:
        ratio: share of the retrieval, 0 to 1; 0 is the plain model. Published for LLaVA-1.5: 0.12
            (MME, MM-Vet), 0.31 (CHAIR), 0.28 (VizWiz), 0.32 (LLaVA-Bench); for Qwen-VL 0.28 and
            0.29, for GLM-4V 0.26 and 0.28.
        threshold: uncertainty above which a layer fires, 0 or more; it never exceeds 1. Published:
            0.75.
        layers: after which uncertainty is measured; the layer after each must exist. Published: 6
            to 15; 10 to 15 for Qwen-VL and GLM-4V.
    """

    ratio: float = 0.12
    threshold: float = 0.75

    name: ClassVar[str] = "memvr"
    paper: ClassVar[str] = "2410.03577"
    paper_layers = (6, ..., 15)
    neutral: ClassVar[dict[str, Any]] = {"ratio": 0.0}
    example: ClassVar[dict[str, Any]] = {"ratio": 0.6, "threshold": 0.6}
    shares_prefix: ClassVar[bool] = False

    def check(self) -> None:
        self.require(0 <= self.ratio <= 1, "ratio must lie between 0 and 1")
        self.require(0 <= self.threshold < math.inf, "threshold must be 0 or more")

    @property
    def is_neutral(self) -> bool:
        """Whether nothing can change: no share for the retrieval, or a bar that none passes."""
        return self.ratio == 0 or self.threshold >= 1

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in self.layers or ())

    def resolve(self, anatomy: Anatomy) -> Method:
        found = super().resolve(anatomy)
        if anatomy.depth - 1 in (found.layers or ()):
            raise FoveateError(
                f"memvr changes the layer after one that is unsure, and {anatomy.depth - 1} is the "
                "last: leave it out of layers."
            )
        return found

    def setup(self, anatomy: Anatomy) -> tuple[Anatomy, Callable[[Tensor], Tensor]]:
        return anatomy, anatomy.readout()

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        x, layer, memory = stream.x, stream.layer, seq.memory
        if layer == 0:
            if seq.phase != "decode":
                self.remember(x, seq)
            memory["fired"] = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if layer in self.mlp_layers and seq.phase != "prefix":
            fired = memory["fired"].to(x.device)
            anatomy, readout = seq.plan
            u = self.uncertainty(readout(anatomy.norm(stream.last)))
            unsure = u.to(x.device) > self.threshold
            memory["fires"], memory["fired"] = unsure & ~fired, fired | unsure
        return x

    def remember(self, x: Tensor, seq: Sequences) -> None:
        """Keep V among the rows (B, Q, D) that enter the first layer, zeros beside it."""
        new = x * seq.visual[:, -x.shape[1] :].to(x.device)[..., None]
        old = seq.memory.get("image")
        seq.memory["image"] = new if old is None else torch.cat([old.to(x.device), new], 1)

    def uncertainty(self, logits: Tensor) -> Tensor:
        """u (B,) float32 of logits (B, V)."""
        log_p = logits.topk(min(_CANDIDATES, logits.shape[-1])).values.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1) / math.log(_CANDIDATES)

    def mlp(self, fed: FeedForward, seq: Sequences) -> Tensor:
        if seq.phase == "prefix":
            return fed.out
        x, out = fed.x.float(), fed.out.float()
        V = seq.memory["image"].to(x.device).float()
        z = (x @ V.transpose(1, 2)) @ V
        size = mean_size(out, fed.valid) / mean_size(z, fed.valid).clamp(min=1e-20)
        mixed = (1 - self.ratio) * out + self.ratio * size * z
        fires = seq.memory["fires"].to(x.device)[:, None, None]
        return torch.where(fires, mixed, out).to(fed.out.dtype)


def mean_size(x: Tensor, valid: Tensor) -> Tensor:
    """mean|x| (B, 1, 1) over the rows (B, Q, D) that are `valid` (B, Q)."""
    rows = x.abs().mean(-1) * valid
    return (rows.sum(1) / valid.sum(1))[:, None, None]
