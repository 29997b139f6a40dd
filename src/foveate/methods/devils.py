"""Devils in the middle layers: heads-guided attention intervention (arXiv 2411.16724).

Where the heads of a middle layer agree that an image token matters, positively or negatively, all
of them are made to look at it more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Rows, Simple


@dataclass(frozen=True)
class Devils(Method):
    """Heads-guided intervention: raise each visual token's scores by what all heads give it.

    Adds ``alpha`` times the mean over query heads of the absolute score to every head's score of
    that visual token, before the softmax; last query row, in prefill and at every decode step.

    Attributes:
        alpha: strength, 0 or more; 0 leaves the row. The authors' code: 0.5.
        layers: the authors' code: 5 to 17 of 32.
    """

    alpha: float = 0.5

    name: ClassVar[str] = "devils"
    paper: ClassVar[str] = "2411.16724"
    paper_layers = (5, ..., 17)
    columns: ClassVar = "visual"
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0}
    example: ClassVar[dict[str, Any]] = {"alpha": 1.0}

    def check(self) -> None:
        self.require(self.alpha >= 0, "alpha must be 0 or more")

    def scores(self, rows: Rows) -> Tensor:
        z = rows.x
        agreed = rows.over_heads(z.abs(), "mean")
        return torch.add(z, agreed * rows.visual[:, None, None], alpha=self.alpha)

    def simple(self, rows: Rows) -> Simple:
        return Simple(agreed=self.alpha)
