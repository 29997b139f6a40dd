"""SID: self-introspective decoding (arXiv 2408.02032).

A second stream keeps only those image tokens that the model itself finds least important. What it
then writes is what the model makes up, and is subtracted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Anatomy, FoveateError, Method, Prompt, Rows, Sequences, away_from


@dataclass(frozen=True)
class SID(Method):
    """Self-introspective decoding: logits against those of the least important image tokens.

    A second stream reads the same inputs. Layers below the first of `layers`, f, are plain. There
    a is the mean over heads of the stream's own weights in layer f - 1, of the last row on the
    image's columns. From layer f on all image tokens but the `keep` with the smallest a are hidden
    from every row: their scores are -inf before the softmax. Positions stay, and the keys and
    values of hidden tokens are still computed and cached. The choice is made anew in the prompt
    and in each decode step, and holds for the whole cache in that step. The stream's logits l' are
    subtracted from the model's own l, (1 + alpha) l - alpha l', on tokens with at least `beta`
    times the probability of the likeliest; the rest get -inf. This happens before processors and
    warpers. A row that would see nothing at all sees what it saw before (inferred).

    Attributes:
        alpha: strength of the contrast, 0 to 100; 0 leaves only the plausibility cut. In the
            authors' code 0.5 acts, whatever their scripts ask for.
        beta: plausibility cut, 0 to 1; 0 cuts nothing, as in the authors' greedy decoding. With
            sampling 0.1 acts there.
        keep: how many image tokens of a sample the second stream sees, above 0, up to 1e9; below 1
            it is a share of them, rounded down, and one at least (inferred). Published: 100 on
            POPE, 50 on CHAIR.
        layers: the lowest of them is f, and all layers from there on hide. Published: 2 to the
            last. In a decoder of which some layers do not see the whole image, only those that do
            take part, and a is read in the nearest of them below f (inferred). Where the published
            f would be the first layer, it is the next one.
    """

    alpha: float = 0.5
    beta: float = 0.1
    keep: float = 100.0

    name: ClassVar[str] = "sid"
    paper: ClassVar[str] = "2408.02032"
    paper_layers = (2, ..., -1)
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"alpha": 1.0, "beta": 0.0, "keep": 2}
    shares_prefix: ClassVar[bool] = False

    def check(self) -> None:
        self.require(0 <= self.alpha <= 100, "alpha must lie between 0 and 100")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")
        whole = 0 < self.keep < 1 or (1 <= self.keep <= 1e9 and self.keep == int(self.keep))
        self.require(whole, "keep must be a number of tokens, or a share of them between 0 and 1")

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage == "logits" or self.alpha != 0)

    def resolve(self, anatomy: Anatomy) -> Method:
        found = super().resolve(anatomy)
        if not found.layers:
            return found
        lowest, above = found.layers[0], anatomy.full_layers[1:]
        if lowest == anatomy.full_layers[0] and (self.layers is not None or not above):
            raise FoveateError(
                f"sid: below layer {lowest} no layer sees the whole image, so there is nothing to "
                "choose tokens by: name a higher layer, as in layers=(N,)."
            )
        layers = tuple(layer for layer in above if layer >= lowest)
        return dataclasses.replace(found, layers=layers)

    def other_layers(self, anatomy: Anatomy) -> tuple[Iterable[int], Iterable[int]]:
        if not self.layers:
            return (), ()
        below = max(layer for layer in anatomy.full_layers if layer < self.layers[0])
        return (below,), self.layers

    # -- the second stream -------------------------------------------------------------------------

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        if not bool(prompt.visual.any()):
            return None
        if seq.phase == "prefix":
            raise FoveateError(
                "sid hides image tokens by what the whole prompt ends with, so no prefix can be "
                "filled before its question: give whole prompts."
            )
        return dataclasses.replace(prompt, after=True)

    def other_row(self, rows: Rows) -> None:
        visual = rows.visual
        a = rows.over_heads(rows.x, "mean")[:, 0, 0]  # (B, K)
        order = a.masked_fill(~visual, torch.inf).argsort(dim=-1, stable=True)
        rank = torch.empty_like(order).scatter(
            -1, order, torch.arange(a.shape[-1], device=a.device).expand_as(order)
        )
        rows.seq.scratch["hidden"] = visual & (rank >= self.kept(visual))

    def kept(self, visual: Tensor) -> Tensor | int:
        """How many tokens each sample keeps, of its `visual` (B, K) bool."""
        if self.keep >= 1:
            return int(self.keep)
        return (visual.sum(-1, keepdim=True) * self.keep).floor().clamp(min=1)

    def other_hidden(self, layer: int, seq: Sequences) -> Tensor | None:
        return seq.scratch["hidden"]

    # -- the contrast ------------------------------------------------------------------------------

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        return away_from(other, logits, self.alpha, self.beta)
