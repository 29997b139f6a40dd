"""What is asked and answered: chats with their earlier turns, their prompt text, answers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jinja2
from PIL import Image

from ..backends.transformers.record import Record
from ..base.errors import FoveateError

Role = Literal["user", "assistant"]

_ASKS_YES_OR_NO = re.compile(
    r"yes or no|(?:^|[.!?:\n])\s*"
    r"(?:is|are|am|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might|must)"
    r"(?:n['’]t)?\s[^.!?]*\?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Turn:
    """An earlier message: the user's pictures and text, or the model's answer."""

    role: Role
    text: str
    images: int = 0
    """How many of `Chat.images` belong to it: each turn takes the next ones."""


@dataclass
class Chat:
    """A question: pictures, then text. What `Method.rewrite` receives and returns."""

    images: list[Image.Image]
    """Those of earlier turns first; the rest belongs to the question."""
    text: str
    system: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    """What a method found out on the way, such as the box it cropped; back on `Answer.chat`."""
    contrast: list[Image.Image] | Chat | None = None
    """What a method's second stream sees instead: other pictures of the same sizes, or other
    text: another chat about `images`."""
    earlier: tuple[Turn, ...] = ()
    """The conversation so far, oldest first: user and assistant in turn, the user first."""

    @property
    def kind(self) -> int:
        """Chats of one kind can share a padded batch: some models tile only lone pictures."""
        return len(self.images)

    @property
    def second(self) -> Chat:
        """The chat as a method's second stream sees it."""
        if isinstance(self.contrast, Chat):
            return replace(self.contrast, images=self.images)
        return replace(self, images=self.contrast or self.images, contrast=None)

    @property
    def asks_yes_or_no(self) -> bool:
        return bool(_ASKS_YES_OR_NO.search(self.text))


@dataclass(frozen=True)
class Answer:
    """What a model said to one chat."""

    text: str
    tokens: tuple[str, ...] = field(repr=False)
    """The produced tokens, without the end token."""
    probabilities: tuple[float, ...] = field(repr=False)
    """The probability of each token when it was chosen, before temperature; empty with beams."""
    yes: float | None
    """P(yes) / (P(yes) + P(no)), all spellings, at the first token; None for other questions."""
    timings: dict[str, float] = field(repr=False)
    """Wall-clock seconds spent on `rewrite`, `prepare` and `generate`; a batch's divided by its
    size."""
    chat: Chat = field(repr=False)
    """The prompt as the model saw it, after the methods' `rewrite`."""
    record: Record | None = field(default=None, repr=False)
    """What a `Recorder` among the methods kept."""

    @property
    def seconds(self) -> float:
        return sum(self.timings.values())

    @property
    def probability(self) -> float | None:
        """Of "yes" against "no" or the reverse, where the answer is one of them; else the
        geometric mean of the tokens' probabilities. None where there are none."""
        first = re.match(r"\W*(yes|no)\b", self.text, re.IGNORECASE)
        if self.yes is not None and first:
            return self.yes if first[1].lower() == "yes" else 1 - self.yes
        if not self.probabilities:
            return None
        logs = [math.log(max(p, 1e-45)) for p in self.probabilities]
        return math.exp(sum(logs) / len(logs))


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text for which a tokenizer has no tokens, each once, in order."""
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    words = [
        text[start:end].strip()
        for token, (start, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        if token == tokenizer.unk_token_id
    ]
    return list(dict.fromkeys(filter(None, words)))


def render(chat: Chat, processor: Any, model: str) -> str:
    """The chat in the processor's own template, up to where the answer begins.

    Raises:
        FoveateError: `model` has no template, or one that drops a part of the chat.
    """
    pictures = len(chat.images) - sum(turn.images for turn in chat.earlier)
    said = [*chat.earlier, Turn("user", chat.text, pictures)]
    turns = [_message(turn.role, turn.text, turn.images) for turn in said]
    if chat.system:
        turns.insert(0, _message("system", chat.system))
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise FoveateError(
            f"The processor of {model} has no chat template: set "
            "`vlm.processor.chat_template` to one (a Jinja text)."
        )
    try:
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise FoveateError(f"The chat template of {model} objects: {error}.") from error
    if chat.system and chat.system.strip() not in text:
        raise FoveateError(
            f"The chat template of {model} drops system prompts: put it in the question."
        )
    asked = (turn.text for turn in chat.earlier if turn.role == "user")  # answers are shortened
    if not all(question.strip() in text for question in asked):
        raise FoveateError(
            f"The chat template of {model} drops earlier turns: put them in the question."
        )
    return text


def _message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}
