"""Conversations in a model's own template, tokens and pixels.

The tokens of the answers and the end token after each are learnt; all other labels are -100.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..base.errors import FoveateError
from ..base.images import decode
from ..core.visual import visual_token_ids
from .conversations import Conversation

IGNORE = -100
Sizes = tuple[tuple[int, int], ...]  # width and height of the pictures of one prompt


@dataclass(frozen=True)
class Example:
    """A row as the model's chat template and tokenizer write it.

    Attributes:
        text: the conversation, every picture as one mark.
        ids: its tokens, every picture as one.
        learnt: which of them are answers or the end of one.
        start: tokens up to the last picture, that included; 0 without one.
    """

    text: str
    images: tuple[Path, ...]
    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    start: int


class Writer:
    """Conversations in a model's own template, tokens and pixels.

    Args:
        processor: the model's; its tokenizer pads on the left.
        config: the model's, which names the image token.
        ends: ids of further tokens that end an answer, beside the tokenizer's own.

    Raises:
        FoveateError: without a chat template or an end token.
    """

    def __init__(self, processor: Any, config: Any, ends: Sequence[int] = ()) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        if not (processor.chat_template or self.tokenizer.chat_template):
            raise FoveateError(
                "The model's processor has no chat template: set `processor.chat_template` to one "
                "(a Jinja text) and save it with the model."
            )
        if self.tokenizer.eos_token is None:
            raise FoveateError("The model's tokenizer has no end token, so no answer would end.")
        self.image_id = visual_token_ids(config)[0]
        named = self.tokenizer.get_vocab().get(getattr(processor, "image_token", None))
        self.mark_id = self.image_id if named is None else named  # Gemma's text has another token
        self.mark = self.tokenizer.convert_ids_to_tokens(self.mark_id)
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        self.places = "mrope_section" not in rope  # else the model finds positions by its pictures
        self.ends = {self.tokenizer.eos_token_id, *ends}
        self.end_texts = self.tokenizer.convert_ids_to_tokens(sorted(self.ends))
        self.specials = [t for t in {*self.tokenizer.all_special_tokens, self.mark} if t]
        self.written = functools.lru_cache(maxsize=None)(self._written_for)

    def special(self, row: Conversation) -> str | None:
        """A special token of the model in a row's text, which would not be read as text."""
        texts = [part.get("text", "") for turn in row.turns for part in turn["content"]]
        return next((token for token in self.specials for text in texts if token in text), None)

    def example(self, row: Conversation) -> Example:
        """The whole conversation in the template; where it writes no end token, that is added.

        Raises:
            FoveateError: if the template objects, or writes earlier turns in another way later.
        """
        text, before, starts = "", "", []
        for number, turn in enumerate(row.turns):
            if turn["role"] != "assistant":
                continue
            prompt = self._written(row.turns[:number], True)
            whole = self._written(row.turns[: number + 1], False)
            if not (prompt.startswith(before) and whole.startswith(prompt)):
                raise FoveateError("its chat template changes what it wrote of earlier turns")
            text += prompt[len(before) :]
            starts.append(len(text))
            answer = whole[len(prompt) :]
            if not any(end in answer for end in self.end_texts):
                answer = answer.rstrip() + self.tokenizer.eos_token
            text, before = text + answer, whole
        ids = self._ids(text)
        learnt = [False] * len(ids)
        for start in starts:
            prompt_ids = self._ids(text[:start])
            pairs = zip(prompt_ids, ids, strict=False)
            at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            while at < len(ids):
                learnt[at] = True
                if ids[at] in self.ends:
                    break
                at += 1
        pictures = [i for i, token in enumerate(ids) if token == self.mark_id]
        if len(pictures) != len(row.images):
            raise FoveateError("its chat template writes another number of images than were given")
        start = pictures[-1] + 1 if pictures else 0
        return Example(text, row.images, tuple(ids), tuple(learnt), start)

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Conversations side by side, padded on the left: what the model wants, and labels (B, S).

        Raises:
            FoveateError: where the tokens between pictures are not those of the plain text.
        """
        inputs, sizes = self._inputs(examples)
        real = inputs["attention_mask"].bool()
        rows = zip(inputs["input_ids"], real, examples, sizes, strict=True)
        inputs["labels"] = torch.stack([self._labels(*row) for row in rows])
        if not self.places:
            return inputs
        positions = inputs["attention_mask"].cumsum(1) - 1
        return inputs | {"position_ids": positions.clamp(min=0)}

    def packed(self, groups: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        """Each group of conversations about one picture in one sequence, padded on the left.

        They share what comes up to the picture; each further token sees that and its own
        conversation, in a mask (B, 1, S, S) bool, at the positions it would have alone.
        """
        inputs, sizes = self._inputs([group[0] for group in groups])
        ids, real = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        parts = [self._pack(*one) for one in zip(ids, real, groups, sizes, strict=True)]
        blanks = (self.tokenizer.pad_token_id, IGNORE, 0, -1)
        tokens, labels, positions, segments = (
            pad_sequence(list(part), batch_first=True, padding_value=blank, padding_side="left")
            for part, blank in zip(zip(*parts, strict=True), blanks, strict=True)
        )
        seen = (segments[:, None] == 0) | (segments[:, None] == segments[:, :, None])
        causal = torch.ones(seen.shape[1:], dtype=torch.bool).tril()
        kept = {k: v for k, v in inputs.items() if not k.endswith("token_type_ids")}
        return kept | {
            "input_ids": tokens,
            "labels": labels,
            "position_ids": positions,
            "attention_mask": (seen & causal)[:, None],
        }

    def _pack(
        self, ids: Tensor, real: Tensor, group: Sequence[Example], sizes: Sizes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, labels, positions and segments (0 what is shared, then 1, 2, ...) of a group.

        Args:
            ids, real: (S,), the first conversation with its visual tokens.
            sizes: of the pictures.
        """
        labels = self._labels(ids, real, group[0], sizes)[real]
        first = ids[real]
        pictures = (first == self.image_id).nonzero()
        start = int(pictures[-1]) + 1 if len(pictures) else 0
        tokens, learnt, counts = [first], [labels], [start, len(first) - start]
        for example in group[1:]:
            rest = torch.tensor(example.ids[example.start :])
            mine = torch.tensor(example.learnt[example.start :])
            tokens.append(rest)
            learnt.append(torch.where(mine, rest, IGNORE))
            counts.append(len(rest))
        positions = [torch.arange(start), *(start + torch.arange(n) for n in counts[1:])]
        segments = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return torch.cat(tokens), torch.cat(learnt), torch.cat(positions), segments

    def _written(self, turns: Sequence[dict[str, Any]], prompt: bool) -> str:
        try:
            return self.processor.apply_chat_template(list(turns), add_generation_prompt=prompt)
        except jinja2.TemplateError as error:
            raise FoveateError(f"its chat template objects: {error}") from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=self._adds(text))["input_ids"]

    def _adds(self, text: str) -> bool:
        """Whether the tokenizer is to put its start token, which most templates write."""
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _inputs(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], list[Sizes]]:
        """What the model wants of conversations, and the sizes of the pictures of each."""
        images = [[decode(path) for path in example.images] for example in examples]
        inputs = self.processor(
            text=[example.text for example in examples],
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=self._adds(examples[0].text),
        )
        return dict(inputs), [tuple(image.size for image in some) for some in images]

    def _labels(self, ids: Tensor, real: Tensor, example: Example, sizes: Sizes) -> Tensor:
        """Labels (S,) of a row (S,) in which each picture has become what stands for it."""
        pictures = iter(self.written(sizes))
        tokens: list[int] = []
        learnt: list[bool] = []
        for token, mine in zip(example.ids, example.learnt, strict=True):
            more = next(pictures) if token == self.mark_id else (token,)
            tokens += more
            learnt += [mine] * len(more)
        if ids[real].tolist() != tokens:
            raise FoveateError(
                "This model's processor writes a picture in another way than by itself, so that "
                "answers cannot be found among its tokens: it cannot be trained here."
            )
        labels = torch.full_like(ids, IGNORE)
        labels[real] = torch.where(torch.tensor(learnt), ids[real], IGNORE)
        return labels

    def _written_for(self, sizes: Sizes) -> tuple[tuple[int, ...], ...]:
        """The tokens that stand for each of the pictures of these sizes in one prompt."""
        if not sizes:
            return ()
        blank, border = [Image.new("RGB", size) for size in sizes], self.tokenizer.eos_token
        out = self.processor(
            text=[border.join([self.mark] * len(sizes))],
            images=[blank],
            return_tensors="pt",
            add_special_tokens=False,
        )
        written: list[list[int]] = [[]]
        for token in out["input_ids"][0].tolist():
            if token == self.tokenizer.eos_token_id:
                written.append([])
            else:
                written[-1].append(token)
        return tuple(map(tuple, written))
