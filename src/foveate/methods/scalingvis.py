"""ScalingVis: a temperature on the image's scores (arXiv 2503.01773).

Spatial questions fail when attention misses the objects. Scaling the scores of image tokens makes
attention over the image sharper (above 1) or broader (below 1) for the token being predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Rows, Simple


@dataclass(frozen=True)
class ScalingVis(Method):
    """Scale the image's scores: sharpen or broaden where the first token looks.

    Multiplies the scores of visual tokens before the softmax, in every head; on the prompt's last
    query row only, so the first token of an answer (of every turn); decode steps are plain.

    It is a temperature and not an amplifier: a negative score falls when multiplied by more than
    1, so heads that score the image negatively look at it less.

    Attributes:
        weight: the factor, 0 or more; 1 leaves the row. The authors tune it on each test set over
            0.5, 0.8, 1.2, 1.5 and 2.0; the mildest that sharpens, 1.2, is the default here
            (inferred).
        layers: None: all, as published.
    """

    weight: float = 1.2

    name: ClassVar[str] = "scalingvis"
    paper: ClassVar[str] = "2503.01773"
    rows: ClassVar = "prompt"
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"weight": 1.0}
    example: ClassVar[dict[str, Any]] = {"weight": 2.0}

    def check(self) -> None:
        self.require(self.weight >= 0, "weight is a factor and must be 0 or more")

    @property
    def columns(self) -> Literal["visual", "through", "all"]:  # type: ignore[override]
        # what the rest of a row gains, below 1, would be known to few digits
        return "visual" if self.weight >= 1 else "all"

    def scores(self, rows: Rows) -> Tensor:
        return scaled(rows, self.weight)

    def simple(self, rows: Rows) -> Simple:
        return Simple(times=(0.0, self.weight - 1, 0.0))


def scaled(rows: Rows, weight: float | Tensor) -> Tensor:
    """The rows' scores, those of visual tokens times `weight` (of every sample, where (B,))."""
    if isinstance(weight, Tensor):
        weight = weight.to(rows.x)[:, None, None, None]
    return torch.where(rows.visual[:, None, None], rows.x * weight, rows.x)
