"""DeCo: dynamic correction decoding (arXiv 2410.11779).

Layers before the last one often know the right token, and the last ones suppress it. So the layer
that is surest of a likely token corrects what the model writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import Anatomy, Method, Sequences, Stream, costly


@dataclass(frozen=True)
class DeCo(Method):
    """Dynamic correction decoding: a preceding layer's logits are added to the last one's.

    Candidate tokens are the model's likeliest: the fewest whose probabilities reach `top_p`
    together, and `top_k` at most. The residual stream of the last position is unembedded where it
    enters each of `layers`, after the final norm: logits e_j, probabilities P_j over the whole
    vocabulary. Layer j* is the one with the largest P_j(v) of any candidate v, and p* is that
    value. The logits become l + alpha p* e_j* on candidates, -inf elsewhere, before processors and
    warpers, in the prompt and at every decode step, each sample and token on its own. It is a
    method for text decoders and needs no image.

    Attributes:
        alpha: strength, 0 to 100; 0 leaves only the candidates. The authors' scripts: 0.6; their
            table of settings says 0.5.
        top_p: mass of the candidates, 0 to 2; above 1 leaves out none. Published: 0.9.
        top_k: the most candidates, 0 or more; 0 sets no limit. Published: 20.
        layers: what enters these layers is unembedded; the number of layers stands for the final
            norm's input. Published for 32 layers: 20 to 28, which are the outputs of 19 to 27.
    """

    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int = 20
    layers: tuple[int, ...] | None = costly(None, limit=20)  # each is unembedded for every token

    name: ClassVar[str] = "deco"
    paper: ClassVar[str] = "2410.11779"
    paper_layers = (20, ..., 28)
    to_the_norm: ClassVar[bool] = True
    needs_image: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "top_p": 2.0, "top_k": 0}
    example: ClassVar[dict[str, Any]] = {"alpha": 2.0, "top_p": 2.0, "top_k": 0}

    def check(self) -> None:
        self.require(0 <= self.alpha <= 100, "alpha must lie between 0 and 100")
        self.require(0 <= self.top_p <= 2, "top_p must lie between 0 and 2")
        self.require(self.top_k >= 0, "top_k must be 0 or more")

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is added and no token left out."""
        return self.alpha == 0 and self.top_p > 1 and self.top_k == 0

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage != "before" or self.alpha != 0)

    def setup(self, anatomy: Anatomy) -> tuple[Anatomy, Callable[[Tensor], Tensor]] | None:
        """The anatomy, and what makes logits of normed states."""
        return (anatomy, anatomy.readout()) if self.wants("before") else None

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        if stream.layer in (self.layers or ()) and seq.phase != "prefix":
            seq.memory[f"entering {stream.layer}"] = stream.last
        return stream.x

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        logits = logits.float()
        candidates = self.candidates(logits)
        corrected = logits
        if self.alpha != 0:
            corrected = logits + self.alpha * self.correction(candidates, seq)
        return corrected.masked_fill(~candidates, -torch.inf)

    def candidates(self, logits: Tensor) -> Tensor:
        """(B, V) bool of logits (B, V)."""
        vocabulary = logits.shape[-1]
        likeliest = logits.softmax(-1).topk(min(self.top_k or vocabulary, vocabulary))
        reached = pad(likeliest.values.cumsum(-1)[:, :-1], (1, 0), value=-1.0)  # before the token
        none = torch.zeros_like(logits, dtype=torch.bool)
        return none.scatter(-1, likeliest.indices, reached < self.top_p)

    def correction(self, candidates: Tensor, seq: Sequences) -> Tensor:
        """p* e_j* (B, V) float32 for candidates (B, V) bool."""
        (anatomy, readout), memory, place = seq.plan, seq.memory, candidates.device
        states = torch.stack([memory[f"entering {j}"].to(place) for j in self.layers or ()])
        e = readout(anatomy.norm(states)).to(place)  # (J, B, V)
        surest = e.softmax(-1).masked_fill(~candidates, 0).amax(-1)  # (J, B)
        p, best = surest.max(0)
        return p[:, None] * e[best, torch.arange(len(best), device=place)]
