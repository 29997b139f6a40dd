"""VAF: visual amplification fusion, from ClearSight (arXiv 2503.13107).

In the middle layers text and image meet. There, VAF scales the scores that text gives the image up
and those that it gives the system prompt down, before the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..core import Method, Rows, Simple


@dataclass(frozen=True)
class VAF(Method):
    """Visual amplification fusion: text scores the image up and the system prompt down.

    Acts on every query row after the last visual token, in prefill and at every decode step, in
    all heads. The system prompt is everything before the first visual token, BOS included.

    Scaling amplifies positive scores only: a negative one falls when multiplied by 1.15 (and rises
    with 0.95), as in the authors' code; ``mode="abs"`` always amplifies the image.

    The authors' code edits *all* rows, those of the image too, of any prompt of at most 611 tokens:
    it tells a prompt from a decode step by its length. No image prompt of the model it was written
    for is that short, so this is not reproduced.

    Attributes:
        enhance: factor on scores of visual tokens, 0 or more; 1 leaves them. Published: 1.15, the
            paper's 1 + alpha.
        suppress: factor on scores of the system prompt, 0 or more; 1 leaves them. Published: 0.95,
            the paper's 1 - beta.
        mode: "multiply" scales the score z, as published; "abs" adds (factor - 1) * |z|
            (inferred, after PAI).
        layers: published: 9 to 14 of 32.
    """

    enhance: float = 1.15
    suppress: float = 0.95
    mode: Literal["multiply", "abs"] = "multiply"

    name: ClassVar[str] = "vaf"
    paper: ClassVar[str] = "2503.13107"
    rows: ClassVar = "text"
    columns: ClassVar = "through"
    remembers: ClassVar[bool] = False
    paper_layers = (9, ..., 14)
    neutral: ClassVar[dict[str, Any]] = {"enhance": 1.0, "suppress": 1.0}
    example: ClassVar[dict[str, Any]] = {"enhance": 1.8, "suppress": 0.4}

    def check(self) -> None:
        self.require(self.enhance >= 0, "enhance is a factor and must be 0 or more")
        self.require(self.suppress >= 0, "suppress is a factor and must be 0 or more")

    def scores(self, rows: Rows) -> Tensor:
        z = rows.x
        gain = (self.enhance - 1) * rows.visual + (self.suppress - 1) * rows.system
        scale = z if self.mode == "multiply" else z.abs()
        return z.addcmul(scale, gain[:, None, None])  # z + gain z

    def simple(self, rows: Rows) -> Simple:
        gain = self.suppress - 1, self.enhance - 1, 0.0
        return Simple(times=gain) if self.mode == "multiply" else Simple(lift=gain)
