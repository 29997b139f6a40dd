"""DoLa: decoding by contrasting layers (arXiv 2309.03883).

Facts are added in the upper layers of a language model. What an early layer would already have
written is therefore subtracted from what the last one writes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base.form import costly
from ..core.method import Method

if TYPE_CHECKING:
    from ..core.context import Context


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
        layers: candidates by number, where 0 is the embedding and l what enters layer l; literal.
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
    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0, "plausibility": 0.0}
    example: ClassVar[dict[str, Any]] = {"plausibility": 0.0}

    def check(self) -> None:
        self.require(0 <= self.plausibility <= 1, "plausibility must lie between 0 and 1")
        self.require(self.strength >= 0, "strength must be 0 or more")
        self.require(self.layers != (), "layers must name at least one candidate, or be None")

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage != "before" or self.strength != 0)

    def resolve(self, model: Any) -> Method:
        if self.layers is not None or not self.wants("before"):
            return super().resolve(model)
        depth = model.get_decoder().config.num_hidden_layers
        half, deep = depth // 2, depth > 40
        if self.bucket == "high":
            layers = tuple(range(depth - 20 if deep else half, depth, 2))
        else:
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            layers = tuple(range(2 if tied else 0, 20 if deep else half, 2)) or (half,)
        return dataclasses.replace(self, layers=layers)

    def setup(self, model: Any) -> SimpleNamespace:
        return SimpleNamespace(unembed=model.get_output_embeddings())

    def before(self, hidden: Tensor, ctx: Context, layer: int) -> Tensor:
        assert self.layers is not None
        if layer in self.layers and ctx.phase != "prefix":
            ctx.memory[f"entering {layer}"] = hidden[:, -1]
        return hidden

    def logits(self, logits: Tensor, other: Tensor | None, ctx: Context) -> Tensor:
        own = out = logits.float().log_softmax(-1)
        if self.strength != 0:
            out = own - self.strength * self.early(own, ctx)
        if self.plausibility == 0:
            return out
        least = own.amax(-1, keepdim=True) + math.log(self.plausibility)
        return out.masked_fill(own < least, -math.inf)

    def early(self, own: Tensor, ctx: Context) -> Tensor:
        """Log-probabilities (B, V) float32 of each sample's candidate furthest from `own`."""
        unembed, layers = ctx.plan.unembed, self.layers or ()
        states = [ctx.memory[f"entering {layer}"].to(unembed.weight.device) for layer in layers]
        early = unembed(torch.stack(states)).float().to(own.device).log_softmax(-1)  # (J, B, V)
        if len(layers) == 1:
            return early[0]
        middle = torch.logaddexp(own, early) - math.log(2)
        apart = middle.exp() * (2 * middle - own - early)  # KL from the middle to p and to q
        apart = apart.masked_fill(own == -math.inf, 0)  # ruled out by a method before this one
        chosen = apart.mean(-1).argmax(0)  # (B,)
        return early.gather(0, chosen[None, :, None].expand(1, -1, early.shape[-1]))[0]
