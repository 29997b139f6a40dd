"""What a benchmark is: a frozen dataclass that reads questions and scores the answers.

A benchmark has a name and options, like a method: ``pope(parser=lmms, suffix=" One word.")`` is
its text form, and every option moves the scores, so the text form goes into the results. Questions
come from the user's own copy of the data, or from the hub; scores come from records alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, NotRequired, TypedDict

from PIL import Image

from ..base.errors import FoveateError
from ..base.form import Form, Registry
from ..base.images import decode
from .data import Data, Problems

__all__ = ["Benchmark", "EvalRecord", "Problems", "Sample", "benchmarks", "get", "parse"]

Source = Path | bytes | Callable[[], Image.Image | bytes]
"""Where a picture comes from: a file, an encoded file, or a call that draws or fetches one."""

Table = tuple[list[str], list[list[str | float]]]
"""Column heads, and rows that start with their own head."""

Scores = dict[str, float]

registry = Registry(
    "benchmark", "foveate.benchmarks", 'pope(source=gqa, suffix=" One word.")', ("all",)
)


@dataclass(frozen=True)
class Sample:
    """One question.

    Benchmark, split and line name a question; its id need not: some benchmarks repeat ids.

    Attributes:
        split: the part of the benchmark, such as "popular".
        line: position in the question list of the split, from 0, broken lines counted.
        id: the id that the benchmark's file gives.
        question: as in the file.
        prompt: exactly what the model is asked.
        label: the right answer, in the form the benchmark compares.
        image: where the picture comes from, None for a question without one.
        image_name: equal for questions about the same picture, and different otherwise.
        meta: what else `Benchmark.score` needs, ready for JSON.
    """

    split: str
    line: int
    id: str
    question: str
    prompt: str
    label: Any
    image: Source | None = None
    image_name: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Image.Image | None:
        """The picture, upright RGB; None without one. Raises `FoveateError` for a bad one."""
        if self.image is None:
            return None
        return decode(self.image() if callable(self.image) else self.image)


class EvalRecord(TypedDict):
    """One line of ``records.jsonl``: a question, and how one method answered it.

    Benchmarks score it by split, line, id, label, meta and answer.
    """

    benchmark: str
    split: str
    line: int
    id: str
    image: NotRequired[str | None]  # `Sample.image_name`
    question: str
    prompt: NotRequired[str]
    label: Any
    meta: dict[str, Any]
    method: str
    answer: Any  # a text; None where the method failed
    error: NotRequired[str | None]  # why it failed
    yes: NotRequired[float | None]
    probability: NotRequired[float | None]
    tokens: NotRequired[int | None]
    ms: NotRequired[float]
    notes: NotRequired[dict[str, Any]]


class Mentions(NamedTuple):
    """What one caption names: mentions invented and in all, things there that are named, and in
    all."""

    invented: int
    named: int
    covered: int
    there: int


@dataclass(frozen=True)
class Benchmark(Form, ABC):
    """Questions, how they are asked, and how the answers are scored.

    A subclass with a `name` registers itself; its fields are its options.

    Attributes:
        suffix: follows every question, as written (with its own leading space or newline).
        max_new_tokens: length limit of an answer.
    """

    suffix: str = ""
    max_new_tokens: int = 16

    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # arXiv id
    hub: ClassVar[tuple[str, ...]] = ()  # dataset ids, tried in this order
    folder: ClassVar[str] = ""  # under the data root; empty: the name
    origin: ClassVar[str] = ""  # where its files come from, for messages
    digits: ClassVar[int] = 2  # after the point, as papers print its table
    unanswered: ClassVar[str] = "are left out"  # what happens to questions without an answer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registry.add(cls)

    def check(self) -> None:
        self.require(self.max_new_tokens >= 1, "max_new_tokens must be 1 or more")

    # -- questions ---------------------------------------------------------------------------------

    @abstractmethod
    def read(self, data: Data) -> Iterator[Sample]:
        """The questions found through `data`, which also collects what was wrong."""

    def samples(
        self, root: str | Path | None = None, problems: Problems | None = None
    ) -> list[Sample]:
        """Every question, in order, images not yet opened.

        Args:
            root: the folder with the user's data sets; None reads from the hub.
            problems: collects what is wrong with single questions.

        Raises:
            FoveateError: a needed file is missing, or no question or no image is usable.
        """
        problems = Problems() if problems is None else problems
        data = Data(self, None if root is None else Path(root).expanduser(), problems)
        samples = list(self.read(data))
        if not samples:
            raise FoveateError(
                f"{self.name}: there is no question in {data.place}{problems.first}."
            )
        pictured = [s.image for s in samples if s.image is not None]
        files = [image for image in pictured if isinstance(image, Path)]
        if files and len(files) == len(pictured) and not any(map(Path.exists, files)):
            raise FoveateError(
                f"{self.name}: not one image is there, the first is expected at {files[0]}: "
                f"{data.source}."
            )
        ids = Counter((s.split, s.id) for s in samples)
        for (split, name), count in ids.items():
            if count > 1:
                problems.add("repeated ids", f"{name} {count} times in {split}")
        return samples

    def sample(
        self,
        split: str,
        line: int,
        id: object,
        question: str,
        label: Any,
        image: Source | None,
        image_name: str | None,
        *,
        prompt: str | None = None,
        meta: dict[str, Any] | None = None,
    ) -> Sample:
        """A `Sample`; its prompt is the question and the suffix where no other is given."""
        asked = question + self.suffix if prompt is None else prompt
        return Sample(split, line, str(id), question, asked, label, image, image_name, meta or {})

    # -- answers -----------------------------------------------------------------------------------

    @abstractmethod
    def score(self, records: Iterable[EvalRecord]) -> Scores:
        """The benchmark's numbers under flat names such as ``existence/accuracy``.

        The order of `records` is free. Records without an answer are left out. A number that is
        not defined (precision when no answer is positive) is NaN.
        """

    @abstractmethod
    def table(self, scores: Scores) -> Table:
        """The table that papers print, from `score`'s numbers."""

    def parse(self, answer: str) -> str | None:
        """What the answer says, in the form of the labels; None where it cannot be read."""
        return answer

    def grade(self, record: EvalRecord) -> float:
        """The score of one given answer, in 0..1."""
        return float(self.parse(record["answer"]) == record["label"])

    def mentions(self, record: EvalRecord) -> Mentions | None:
        """What a caption names, found in its words; None for other answers."""
        return None

    def correct(self, record: EvalRecord) -> float | None:
        """`grade` for paired tests; None without an answer."""
        return None if record["answer"] is None else self.grade(record)

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        """What a reader of the scores must know, in sentences."""
        records = list(records)
        lost = sum(r["answer"] is None for r in records)
        note = f"{lost} of {len(records)} questions have no answer and {self.unanswered}."
        return [note] * bool(lost)


# -- what benchmarks share -------------------------------------------------------------------------


def answered(records: Iterable[EvalRecord]) -> list[EvalRecord]:
    """The records that have an answer, in the order of the questions."""
    given = [r for r in records if r["answer"] is not None]
    return sorted(given, key=lambda r: (r["split"], r["line"]))


def by_split(records: Iterable[EvalRecord]) -> dict[str, list[EvalRecord]]:
    """`answered` records per split."""
    groups: dict[str, list[EvalRecord]] = {}
    for record in answered(records):
        groups.setdefault(record["split"], []).append(record)
    return groups


def image_of(record: EvalRecord) -> Hashable:
    """What questions about one image have in common."""
    return record.get("image") or (record["split"], record["line"])


def percent(values: Iterable[float]) -> float:
    """100 times the mean; NaN of nothing."""
    listed = list(values)
    return 100 * fmean(listed) if listed else nan


def scored(b: Benchmark, records: Iterable[EvalRecord]) -> tuple[Scores, list[str]]:
    """Scores and notes; where the records cannot be scored, a note says why."""
    records, notes = list(records), list[str]()
    try:
        notes = b.notes(records)
        if all(r["answer"] is None for r in records):
            return {}, notes
        return b.score(records), notes
    except FoveateError as error:  # a package or word list is missing or damaged
        return {}, [*notes, f"Not scored: {error}"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"[:100]
        return {}, [*notes, f"Not scored: the labels or `meta` of its records are no {b.name}'s "
                    f"({reason})."]  # fmt: skip


def prefixed(group: str, scores: Scores) -> Scores:
    """The scores of a group under ``group/name``."""
    return {f"{group}/{name}": value for name, value in scores.items()}


def score_rows(
    scores: Scores, groups: Mapping[str, str], keys: Sequence[str]
) -> list[list[str | float]]:
    """Rows of a table: per group that has scores its head, then ``group/key`` for every key."""
    return [
        [head, *(scores[f"{group}/{key}"] for key in keys)]
        for group, head in groups.items()
        if f"{group}/{keys[0]}" in scores
    ]


def unread_note(unread: Sequence[str], count: int, what: str) -> list[str]:
    """A note on answers, of `count`, that cannot be read; none where all can."""
    if not unread:
        return []
    example = f"such as {unread[0][:60]!r}"
    return [f"{len(unread)} of {count} answers {what} and count as wrong, {example}."]


benchmarks = registry.all
get = registry.get


def parse(text: str) -> tuple[Benchmark, ...]:
    """Benchmarks from their text form: ``"pope(source=gqa)+amber"`` gives two."""
    return registry.parse(text)
