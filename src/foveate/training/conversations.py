"""Conversations about images, in LLaVA's format, as training batches of any model's processor.

    rows = read("conversations.jsonl", images=None)            # JSON lines, or one JSON list
    writer = Writer(processor, model.config)
    checked = check(rows, writer, max_length=2048)             # every row, before the first step
    batch = writer.batch(examples) or writer.packed(groups)    # model(**batch), labels included

A row is ``{"id", "image": path or list of paths, "conversations": [{"from": "human", "value":
"<image>\\nQuestion"}, {"from": "gpt", "value": "Answer"}, ...]}``. What is learnt are the tokens of
the answers and the end token after each; all other labels are -100.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from ..evaluation.data import Problems

MARK = "<image>"  # where a picture stands in a question, whatever the model's own token is
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IGNORE = -100
THREADS, MANY = 8, 256  # that decode pictures for the check, and pictures between two reports

Progress = Callable[[int, int, str], None]
"""Called with what is done, of how much, and what it is."""


@dataclass(frozen=True)
class Row:
    """One conversation: pictures' paths, and turns as chat templates want them."""

    line: int  # of the file, or the number of the entry in a JSON list; from 1
    id: str
    images: tuple[Path, ...]
    turns: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Broken:
    """A row that cannot be learnt from, and why."""

    line: int
    id: str
    kind: str
    detail: str = ""


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


@dataclass
class Checked:
    """What a look at all the data found.

    Attributes:
        units: what a step draws from, as indices of rows: conversations one by one, or the groups
            that share a sequence.
        tokens: of the longest sequence.
    """

    units: list[list[int]] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    tokens: int = 0

    @property
    def problems(self) -> Problems:
        """Counts by kind, with the first few cases."""
        found = Problems()
        for row in self.broken:
            found.add(row.kind, f"line {row.line}{row.detail and f' ({row.detail})'}")
        return found


# -- reading ---------------------------------------------------------------------------------------


def read(path: Path | str, images: Path | str | None = None) -> list[Row | Broken]:
    """The rows of a file in order; those that are no conversation as `Broken`.

    Args:
        images: folder that pictures' paths are relative to; default: the file's.

    Raises:
        FoveateError: if the file cannot be read, is cut short, or has no rows.
    """
    path = Path(path)
    folder = Path(images) if images is not None else path.parent
    if not folder.is_dir():
        raise FoveateError(f"There is no folder of images {folder}: check --images.")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise FoveateError(f"The data {path} cannot be read: {reason}.") from error
    rows = [_row(line, value, folder) for line, value in _values(text, path)]
    if not rows:
        raise FoveateError(f"The data {path} has no rows: one conversation per line is expected.")
    return rows


def _values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except json.JSONDecodeError as error:
            raise FoveateError(f"{path} is not valid JSON ({error}): write it again.") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, None


def _row(line: int, value: Any, folder: Path) -> Row | Broken:
    """A row's pictures and turns; what is wrong with them is found in the order of the format."""
    if not isinstance(value, dict):
        return Broken(line, "", "not a JSON object")
    name = str(value.get("id", ""))

    def broken(kind: str, detail: str = "") -> Broken:
        return Broken(line, name, kind, detail)

    given = value.get("image", value.get("images"))
    images = [given] if isinstance(given, str) else [] if given is None else given
    said = value.get("conversations")
    if not (isinstance(images, list) and all(isinstance(i, str) and i for i in images)):
        return broken("image is neither a path nor a list of paths")
    if not (isinstance(said, list) and said and all(isinstance(turn, dict) for turn in said)):
        return broken("without conversations")
    turns: list[dict[str, Any]] = []
    if said[0].get("from") == "system":
        if not str(said[0].get("value", "")).strip():
            return broken("empty system prompt")
        turns.append({"role": "system", "content": _content(str(said[0]["value"]))})
        said = said[1:]
    roles = [ROLES.get(turn.get("from", "")) for turn in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return broken("roles that do not alternate between human and gpt")
    for role, turn in zip(roles, said, strict=True):
        if not isinstance(turn.get("value"), str) or not turn["value"].strip():
            return broken("empty answer" if role == "assistant" else "empty question")
        turns.append({"role": role, "content": _content(turn["value"])})
    parts = [(turn["role"], part["type"]) for turn in turns for part in turn["content"]]
    if any(role != "user" and kind == "image" for role, kind in parts):
        return broken(f"{MARK} outside a question")
    marks = sum(kind == "image" for _, kind in parts)
    if marks != len(images):
        return broken(f"{MARK} marks unlike images", f"{marks} marks, {len(images)} images")
    return Row(line, name, tuple(folder / i for i in images), tuple(turns))


def _content(value: str) -> list[dict[str, str]]:
    """Text and pictures of a turn in order, as chat templates want them."""
    content: list[dict[str, str]] = []
    for number, text in enumerate(value.split(MARK)):
        if number:
            content.append({"type": "image"})
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
    return content


# -- checking --------------------------------------------------------------------------------------


def check(
    rows: Sequence[Row | Broken],
    writer: Writer,
    max_length: int,
    pack: bool = False,
    progress: Progress | None = None,
) -> Checked:
    """Look at every row and every picture once; group the good ones as training wants them.

    Args:
        max_length: tokens of a sequence, visual ones included; longer rows are broken.
        pack: put conversations about one picture into one sequence, as many as `max_length` takes.
    """
    tell = progress or (lambda done, total, what: None)
    found = Checked()
    paths = list(dict.fromkeys(i for row in rows if isinstance(row, Row) for i in row.images))
    total = len(paths) + len(rows)
    sizes: dict[Path, tuple[int, int] | str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(paths), MANY):
            some = paths[at : at + MANY]
            sizes |= zip(some, pool.map(_size, some), strict=True)
            tell(len(sizes), total, "pictures")
    open_groups: dict[Any, tuple[list[int], int]] = {}  # the unit that still takes rows, its tokens
    for index, row in enumerate(rows):
        tell(len(paths) + index + 1, total, "conversations")
        result = row if isinstance(row, Broken) else _looked(row, writer, sizes)
        if isinstance(result, Broken):
            found.broken.append(result)
            continue
        example, visual = result
        length = len(example.ids) - len(example.images) + visual
        start = example.start and example.start - len(example.images) + visual
        if length > max_length:
            kind = f"longer than {max_length} tokens"
            found.broken.append(Broken(row.line, row.id, kind, f"{length} tokens"))
            continue
        shared = pack and len(example.images) == 1 and not example.learnt[example.start]
        key = (example.images, example.ids[: example.start]) if shared else index
        unit, tokens = open_groups.get(key, ([], 0))
        if not unit or tokens + length - start > max_length:
            unit, tokens = [], start
            found.units.append(unit)
        unit.append(index)
        open_groups[key] = (unit, tokens + length - start)
        found.tokens = max(found.tokens, tokens + length - start)
    return found


def _looked(
    row: Row, writer: Writer, sizes: dict[Path, tuple[int, int] | str]
) -> tuple[Example, int] | Broken:
    """A row as it will be written, and its visual tokens."""
    seen = [sizes[image] for image in row.images]
    bad = next((size for size in seen if isinstance(size, str)), None)
    if bad is not None:
        return Broken(row.line, row.id, "images that cannot be read", bad)
    if special := writer.special(row):
        return Broken(row.line, row.id, "texts with a special token of the model", special)
    try:
        return writer.example(row), writer.visual(tuple(s for s in seen if not isinstance(s, str)))
    except (FoveateError, ValueError) as error:
        return Broken(row.line, row.id, "refused by the model's processor", str(error))


def _size(path: Path) -> tuple[int, int] | str:
    """A picture's width and height once it has been decoded whole, or what is wrong with it."""
    try:
        return decode(path).size
    except FoveateError as error:
        return str(error).rstrip(".")


# -- writing ---------------------------------------------------------------------------------------


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

    def special(self, row: Row) -> str | None:
        """A special token of the model in a row's text, which would not be read as text."""
        texts = [part.get("text", "") for turn in row.turns for part in turn["content"]]
        return next((token for token in self.specials for text in texts if token in text), None)

    def example(self, row: Row) -> Example:
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
