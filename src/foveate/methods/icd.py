"""ICD: instruction contrastive decoding (arXiv 2403.18715).

A disturbing instruction makes a model see things that are not there. What it would write under
such an instruction is subtracted from what it writes without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..core import FoveateError, Method, Prompt, Sequences, away_from, costly


@dataclass(frozen=True)
class ICD(Method):
    """Instruction contrastive decoding: the logits against those under a disturbing instruction.

    A second stream sees the same picture under disturbed text, and reads the same answer. Its
    logits l' are subtracted from the true l,

        (1 + alpha) l - alpha l'

    on tokens with at least `beta` times the probability of the likeliest; the rest get -inf. This
    happens in the prompt and at every decode step, before processors and warpers, so greedy
    decoding and sampling both use it. Attention is untouched. A prompt without an image is
    answered plainly.

    A text needs the front door (`VLM`), which knows the chat template. Token ids do not. They are
    put in behind the last visual token of each piece of prompt that has one.

    Attributes:
        alpha: strength of the contrast, 0 or more; 0 leaves only the plausibility cut. Default of
            the authors' scripts: 1.
        beta: plausibility cut, 0 to 1; 0 cuts nothing. Default of the authors' scripts: 0.1.
        prefix: the disturbing text, or token ids; empty changes nothing. The authors' script runs
            five texts, of which this is one.
        where: "system": the text stands for the system text, as the authors do it for LLaVA. Where
            a template takes no system text it stands before the question, and the notes of the
            chat say so (inferred). "question": it stands before the question, behind the image.
    """

    alpha: float = 1.0
    beta: float = 0.1
    prefix: str | tuple[int, ...] = costly(
        "You are a confused objects detector to provide a fuzzy overview or impression of the "
        "image.",
        limit=500,
    )
    where: Literal["system", "question"] = "system"

    name: ClassVar[str] = "icd"
    paper: ClassVar[str] = "2403.18715"
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {
        "alpha": 1.0,
        "beta": 0.0,
        "prefix": (20, 31, 42),
        "where": "question",
    }

    def check(self) -> None:
        self.require(self.alpha >= 0, "alpha must be 0 or more")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")
        if isinstance(self.prefix, tuple):
            self.require(
                self.where == "question",
                "token ids stand behind the image: pass where='question', or a text",
            )
            self.require(all(i >= 0 for i in self.prefix), "token ids must be 0 or more")

    def wants(self, stage: str) -> bool:
        if stage == "rewrite":
            return self.alpha != 0 and isinstance(self.prefix, str) and bool(self.prefix.strip())
        return super().wants(stage) and (stage != "contrast" or self.alpha != 0)

    # -- the disturbed text ------------------------------------------------------------------------

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        return [self.disturbed(vlm, chat) if chat.images else chat for chat in chats]

    def disturbed(self, vlm: Any, chat: Any) -> Any:
        """The chat, with another for the second stream."""
        text, where = str(self.prefix).strip(), self.where
        if where == "system":
            other = replace(chat, system=text, contrast=None)
            try:
                vlm.prompt(other)
            except FoveateError:
                vlm.prompt(chat)  # what is wrong without the prefix is told
                where = "question"
        if where == "question":
            other = replace(chat, text=f"{text} {chat.text}", contrast=None)
        return replace(chat, contrast=other, notes={**chat.notes, "prefix": where})

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        if isinstance(self.prefix, str):
            return prompt.given
        if not self.prefix or not bool(prompt.visual.any()):
            return None
        columns = prompt.visual.new_ones(prompt.visual.shape).cumsum(1) * prompt.visual
        return prompt.inserted(columns.amax(1) - 1, self.prefix)

    # -- the contrast ------------------------------------------------------------------------------

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        return away_from(other, logits, self.alpha, self.beta)
