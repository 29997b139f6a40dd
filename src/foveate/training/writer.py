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
        self.mark = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self.ends = {self.tokenizer.eos_token_id, *ends}
        self.end_texts = self.tokenizer.convert_ids_to_tokens(sorted(self.ends))
        self.specials = [t for t in {*self.tokenizer.all_special_tokens, self.mark} if t]
        self.visual = functools.lru_cache(maxsize=None)(self._visual)

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
        pictures = [i for i, token in enumerate(ids) if token == self.image_id]
        if len(pictures) != len(row.images):
            raise FoveateError("its chat template writes another number of images than were given")
        start = pictures[-1] + 1 if pictures else 0
        return Example(text, row.images, tuple(ids), tuple(learnt), start)

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Conversations side by side, padded on the left: what the model wants, and labels (B, S).

        Raises:
            FoveateError: where the tokens between pictures are not those of the plain text.
        """
        inputs = self._inputs(examples)
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), examples, strict=True)
        inputs["labels"] = torch.stack([self._labels(*row) for row in rows])
        positions = inputs["attention_mask"].cumsum(1) - 1
        return inputs | {"position_ids": positions.clamp(min=0)}

    def packed(self, groups: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        """Each group of conversations about one picture in one sequence, padded on the left.

        They share what comes up to the picture; each further token sees that and its own
        conversation, in a mask (B, 1, S, S) bool, at the positions it would have alone.
        """
        inputs = self._inputs([group[0] for group in groups])
        ids, real = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        parts = [self._pack(*one) for one in zip(ids, real, groups, strict=True)]
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
        self, ids: Tensor, real: Tensor, group: Sequence[Example]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, labels, positions and segments (0 what is shared, then 1, 2, ...) of a group.

        Args:
            ids, real: (S,), the first conversation with its visual tokens.
        """
        labels = self._labels(ids, real, group[0])[real]
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

    def _inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        images = [[decode(path) for path in example.images] for example in examples]
        return dict(
            self.processor(
                text=[example.text for example in examples],
                images=images if any(images) else None,
                padding=True,
                return_tensors="pt",
                add_special_tokens=self._adds(examples[0].text),
            )
        )

    def _labels(self, ids: Tensor, real: Tensor, example: Example) -> Tensor:
        """Labels (S,) of a row (S,) in which each picture has become its visual tokens."""
        spoken = real & (ids != self.image_id)
        pairs = zip(example.ids, example.learnt, strict=True)
        plain = [(token, mine) for token, mine in pairs if token != self.image_id]
        if ids[spoken].tolist() != [token for token, _ in plain]:
            raise FoveateError(
                "This model's processor writes more than visual tokens for a picture, so that "
                "answers cannot be found among its tokens: it cannot be trained here."
            )
        labels = torch.full_like(ids, IGNORE)
        mine = torch.tensor([mine for _, mine in plain])
        labels[spoken] = torch.where(mine, ids[spoken], IGNORE)
        return labels

    def _visual(self, sizes: tuple[tuple[int, int], ...]) -> int:
        """Visual tokens of pictures of these sizes in one prompt, as the processor counts them."""
        if not sizes:
            return 0
        blank = [Image.new("RGB", size) for size in sizes]
        out = self.processor(text=[self.mark * len(sizes)], images=[blank], return_tensors="pt")
        return int((out["input_ids"] == self.image_id).sum())
