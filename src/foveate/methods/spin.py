"""SPIN: heads that look at the image least are turned down (arXiv 2505.16411).

For the token being predicted the heads of a layer are ranked by what they give the image. Those
that give it least say less, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Rows


@dataclass(frozen=True)
class SPIN(Method):
    """Suppress image-inattentive heads: what they put out is scaled down, layer by layer.

    On the last query row, in the prompt and at every decode step: g_h is the sum of head h's
    scaled scores over the visual tokens, before the softmax. The int(keep H) heads with the
    largest g stay as they are; the rows of all others are multiplied by `scale`, so they no longer
    sum to 1. Heads are query heads, and every sample ranks its own.

    Attributes:
        keep: share of heads that stay, 0 to 1; 1 keeps all. int() truncates as in the authors'
            code: 0.95 of 32 heads are 30. Published for LLaVA-1.5: 0.95 for captions, 0.8 for
            POPE; Qwen-VL-Chat: 0.7.
        scale: factor of the other heads, 0 to 1; 1 leaves them. Published: 0.08 for captions, 0.1
            for POPE; the authors' script defaults to removing them.
        rank_by: the "scores" as in the authors' code, or the softmax "weights" (inferred).
        layers: None: all, as published for 32 layers; larger models' scripts take 0 to 19.
    """

    keep: float = 0.95
    scale: float = 0.0
    rank_by: Literal["scores", "weights"] = "scores"

    name: ClassVar[str] = "spin"
    paper: ClassVar[str] = "2505.16411"
    columns: ClassVar = "visual"
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"keep": 1.0}
    example: ClassVar[dict[str, Any]] = {"keep": 0.5, "scale": 0.1}
    row_sum_one: ClassVar[bool] = False

    def check(self) -> None:
        self.require(0 <= self.keep <= 1, "keep must lie between 0 and 1")
        self.require(0 <= self.scale <= 1, "scale must lie between 0 and 1")

    @property
    def is_neutral(self) -> bool:
        """Whether every head stays as it is."""
        return self.keep == 1 or self.scale == 1

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage != "scores" or self.rank_by == "scores")

    def scores(self, rows: Rows) -> Tensor:
        rows.seq.scratch["g"] = self.given(rows)
        return rows.x

    def weights(self, rows: Rows) -> Tensor:
        g = rows.seq.scratch["g"] if self.rank_by == "scores" else self.given(rows)
        g = rows.all_heads(g)
        heads = g.shape[1]
        best = g.topk(int(self.keep * heads), dim=1).indices
        factors = torch.full_like(g, self.scale).scatter(1, best, 1.0)
        return rows.x * rows.these_heads(factors)[:, :, None, None]

    def given(self, rows: Rows) -> Tensor:
        """What every head gives the image, (B, H) float32."""
        return rows.x[:, :, -1].masked_fill(~rows.visual[:, None], 0).sum(-1)
