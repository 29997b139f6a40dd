"""PAI: pay more attention to the image (arXiv 2407.21771).

Two parts, each of them usable alone: the image's attention scores are raised for the token being
predicted, and what the language model would write without the image is subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core import Method, Prompt, Rows, Sequences, Simple, plausible


@dataclass(frozen=True)
class PAI(Method):
    """Pay attention to the image: boosted image scores, and guidance away from text alone.

    Attention: to every score z of a visual token ``alpha |z|`` is added before the softmax, in all
    heads, on the last query row of the prompt and at every decode step. It always raises.

    Guidance: a second stream, without the boost, reads the prompt without its visual tokens and
    then the same answer. From its log-probabilities u and the model's own p, the logits become
    u + gamma (p - u) on tokens with at least `plausibility` times the probability of the
    likeliest, -inf elsewhere, before processors and warpers. Only visual tokens are taken out of
    the prompt: the text around an image stays as it is, with the marks that some models put at an
    image's borders, tiles or rows.

    Attributes:
        alpha: strength of the boost, 0 or more; 0 switches it off. Published for LLaVA-1.5: 0.5
            (Shikra 0.6, MiniGPT-4 0.2); the authors' script defaults to 0.2.
        gamma: strength of the guidance, 0 or more; 1 switches it off, and there is no second
            stream then. Published: 1.1; the authors' script defaults to 2.
        boost_first_token: boost the last row of the prompt, from which an answer's first token
            comes. True is the paper's intent, and what the authors' code does without guidance;
            with guidance, it does what False does: the boost begins with the second token.
        plausibility: least share of the largest probability in the guidance, 0 to 1; 0 cuts
            nothing. Fixed at 0.1 in the authors' code.
        layers: whose scores are boosted. Published: 2 to the last.
    """

    alpha: float = 0.5
    gamma: float = 1.1
    boost_first_token: bool = True
    plausibility: float = 0.1

    name: ClassVar[str] = "pai"
    paper: ClassVar[str] = "2407.21771"
    paper_layers = (2, ..., -1)
    columns: ClassVar = "visual"
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "gamma": 1.0}
    example: ClassVar[dict[str, Any]] = {"alpha": 1.0, "gamma": 1.5, "plausibility": 0.0}

    def check(self) -> None:
        self.require(self.alpha >= 0, "alpha must be 0 or more")
        self.require(self.gamma >= 0, "gamma must be 0 or more")
        self.require(0 <= self.plausibility <= 1, "plausibility must lie between 0 and 1")

    def wants(self, stage: str) -> bool:
        if stage == "scores":
            return self.alpha != 0
        return super().wants(stage) and self.gamma != 1

    # -- the boost ---------------------------------------------------------------------------------

    def scores(self, rows: Rows) -> Tensor:
        if rows.phase == "prompt" and not self.boost_first_token:
            return rows.x
        gain = self.alpha * rows.visual
        return rows.x.addcmul(rows.x.abs(), gain[:, None, None])  # z + gain |z|

    def simple(self, rows: Rows) -> Simple:
        left = rows.phase == "prompt" and not self.boost_first_token
        return Simple() if left else Simple(lift=(0.0, self.alpha, 0.0))

    # -- the guidance ------------------------------------------------------------------------------

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        return prompt.only(~prompt.visual) if bool(prompt.visual.any()) else None

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        if other is None:
            return logits
        p, u = logits.float().log_softmax(-1), other.float().log_softmax(-1)
        return plausible(u + self.gamma * (p - u), p, self.plausibility)
