"""AdaptVis: broaden or sharpen the look at the image by confidence (arXiv 2503.01773).

A model that is sure of its answer looks at the right place and may look sharper; one that is not
should look around. A plain pass over the prompt tells which, and ScalingVis does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Prompt, Rows, Sequences
from .scalingvis import scaled


@dataclass(frozen=True)
class AdaptVis(Method):
    """Scale the image's scores by confidence: broader where unsure, sharper where sure.

    A plain pass over the prompt goes ahead; the largest probability of its next token is the
    confidence. Below `threshold` the scores of visual tokens are multiplied by `low`, else by
    `high`, before the softmax, in every head; on the prompt's last query row only (of every turn),
    and decode steps are plain. As with ScalingVis, a factor above 1 lowers negative scores.

    The authors tune the three numbers on each test set: `threshold` 0.3 or 0.4, `low` 0.5 or 0.8,
    `high` 1.2, 1.5 or 2.0. The defaults are those of their script for Controlled_Images_A.

    Attributes:
        threshold: least confidence that counts as sure, 0 to 1. Authors' script: 0.4.
        low: factor where unsure, 0 or more. Authors' script: 0.5.
        high: factor where sure, 0 or more. Authors' script: 1.5.
        decimals: places the confidence is rounded to before the comparison, 0 or more; None does
            not round. The authors' code: 2.
        layers: None: all, as published.
    """

    threshold: float = 0.4
    low: float = 0.5
    high: float = 1.5
    decimals: int | None = 2

    name: ClassVar[str] = "adaptvis"
    paper: ClassVar[str] = "2503.01773"
    rows: ClassVar = "prompt"
    columns: ClassVar = "visual"
    remembers: ClassVar[bool] = False
    passes: ClassVar[str] = "the prompt once more"
    neutral: ClassVar[dict[str, Any]] = {"low": 1.0, "high": 1.0}
    example: ClassVar[dict[str, Any]] = {"low": 0.3, "high": 2.0}

    def check(self) -> None:
        self.require(0 <= self.threshold <= 1, "threshold must lie between 0 and 1")
        self.require(self.low >= 0, "low is a factor and must be 0 or more")
        self.require(self.high >= 0, "high is a factor and must be 0 or more")
        self.require(self.decimals is None or self.decimals >= 0, "decimals must be 0 or more")

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt:
        return replace(prompt, ahead=True)  # what the main pass reads

    def scores(self, rows: Rows) -> Tensor:
        if rows.layer == self.layers[0]:  # type: ignore[index]  # resolved before use
            rows.memory["weight"] = self.weight(rows.seq.ahead)
        return scaled(rows, rows.memory["weight"])

    def weight(self, logits: Tensor) -> Tensor:
        """The factor of every sample, (B,) float32, from plain next-token logits (B, V)."""
        confidence = logits.double().softmax(-1).amax(-1)
        if self.decimals is not None:
            confidence = confidence.round(decimals=self.decimals)
        return torch.where(confidence < self.threshold, self.low, self.high)
