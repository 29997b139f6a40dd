"""A-OKVQA: questions that need knowledge of the world, answered openly or from four choices."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..evaluation.benchmark import (
    Benchmark,
    EvalRecord,
    Sample,
    Source,
    Table,
    answered,
    percent,
    score_rows,
    unread_note,
)
from ..evaluation.data import Data
from ..evaluation.vqa import leave_one_out, letter, lettered, normalise, thirds, three_tenths

FILE = "aokvqa/aokvqa_v1p0_val.json"
NEEDED = ("image_id", "question_id", "question", "choices", "correct_choice_idx", "direct_answers")

Task = Literal["direct", "choice"]
RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "official": thirds,
    "vqa": leave_one_out,
    "vicrop": three_tenths,
}


@dataclass(frozen=True)
class AOKVQA(Benchmark):
    """A-OKVQA's validation set, 1,145 questions (arXiv 2206.01718).

    Percent of right choices and mean accuracy of direct answers. As in the official script, a
    question without an answer counts as wrong.

    Attributes:
        tasks: the splits: direct answers, beside those of ten people; or one of four choices.
        accuracy: of direct answers: "official" is ``min(1, n / 3)`` on equal strings, case and
            all; "vqa" normalises first and leaves one person out; "vicrop" normalises and takes
            ``min(0.3 n, 1)``.
        difficult: also ask directly what is marked as too difficult for it; the official script
            leaves these out.
        parser: of choices: "letter" takes lmms-eval's letter, unless the answer is one of the
            choices; "official" wants the choice, to the letter.
        suffix: follows direct questions.
        choice_suffix: follows the lettered choices.
    """

    suffix: str = "\nAnswer the question using a single word or phrase."
    choice_suffix: str = "\nAnswer with the option's letter from the given choices directly."
    tasks: tuple[Task, ...] = ("direct", "choice")
    accuracy: Literal["official", "vqa", "vicrop"] = "official"
    difficult: bool = False
    parser: Literal["letter", "official"] = "letter"

    name: ClassVar[str] = "aokvqa"
    title: ClassVar[str] = "A-OKVQA"
    paper: ClassVar[str] = "2206.01718"
    hub: ClassVar[tuple[str, ...]] = ("HuggingFaceM4/A-OKVQA",)
    unanswered: ClassVar[str] = "count as wrong"
    origin: ClassVar[str] = "aokvqa_v1p0.tar.gz from allenai.org, images are COCO val2017"

    def check(self) -> None:
        super().check()
        self.require(bool(self.tasks), "tasks must name direct, choice or both")

    def read(self, data: Data) -> Iterator[Sample]:
        path = data.file_or_table(FILE)
        rows: list[tuple[int, dict[str, Any], Source, str]] = []
        if path is None:
            table = data.table(*NEEDED[1:], split="validation")
            for line, (row, picture, _) in enumerate(table):
                rows.append((line, row, picture, str(row["question_id"])))
        else:
            for line, row in data.rows(path, *NEEDED):
                name = f"{int(row['image_id']):012}.jpg"
                rows.append((line, row, data.image(name, "coco/val2017", "aokvqa/images"), name))
        for task in self.tasks:
            for line, row, image, name in rows:
                if task == "choice" or self.difficult or not row.get("difficult_direct_answer"):
                    yield self._sample(task, line, row, image, name)

    def _sample(
        self, task: Task, line: int, row: dict[str, Any], image: Source, name: str
    ) -> Sample:
        question = str(row["question"])
        prompt, meta = question + self.suffix, {}
        label: str | list[str] = list(_listed(row["direct_answers"]))
        if task == "choice":
            choices = list(_listed(row["choices"]))
            prompt = f"{question}\n{lettered(choices)}{self.choice_suffix}"
            label, meta = choices[int(row["correct_choice_idx"])], {"choices": choices}
        return self.sample(
            task, line, row["question_id"], question, label, image, name, prompt=prompt, meta=meta
        )

    # -- scoring -----------------------------------------------------------------------------------

    def choose(self, answer: str, choices: Sequence[str]) -> str | None:
        """The choice that an answer names, None where it names none."""
        if self.parser == "official":
            return answer if answer in choices else None
        said = answer.strip().rstrip(".").lower()
        for choice in choices:
            if choice.lower() == said:
                return choice
        named = letter(answer)
        index = "ABCD".index(named) if named else len(choices)
        return choices[index] if index < len(choices) else None

    def grade(self, record: EvalRecord) -> float:
        answer, label = record["answer"], record["label"]
        if record["split"] == "choice":
            return float(self.choose(answer, record["meta"]["choices"]) == label)
        if self.accuracy != "official":
            answer, label = normalise(answer), [normalise(person) for person in label]
        return RULES[self.accuracy](answer, label)

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for record in records:
            groups.setdefault(record["split"], []).append(self.correct(record) or 0.0)
        return {f"{task}/accuracy": percent(groups[task]) for task in sorted(groups)}

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        records = list(records)
        chosen = [r for r in answered(records) if r["split"] == "choice"]
        unread = [
            r["answer"] for r in chosen if self.choose(r["answer"], r["meta"]["choices"]) is None
        ]
        return super().notes(records) + unread_note(unread, len(chosen), "name none of the choices")

    def table(self, scores: dict[str, float]) -> Table:
        names = {"direct": "Direct answer", "choice": "Multiple choice"}
        return [self.title, "Accuracy"], score_rows(scores, names, ("accuracy",))


def _listed(value: Any) -> Sequence[str]:
    """A list, also where the table holds it as its Python text."""
    return ast.literal_eval(value) if isinstance(value, str) else value
