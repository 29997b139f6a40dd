"""TextVQA: reading text in photographs, ten human answers per question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..evaluation.benchmark import Benchmark, EvalRecord, Sample, Source, Table, answered, percent
from ..evaluation.data import Data
from ..evaluation.vqa import leave_one_out, normalise, three_tenths

FILE = "textvqa/TextVQA_0.5.1_val.json"
NEEDED = ("image_id", "question", "answers")


@dataclass(frozen=True)
class TextVQA(Benchmark):
    """TextVQA's validation set: 5,000 questions about 3,166 images (arXiv 1904.08920).

    Accuracy in percent, after the EvalAI normaliser. No OCR tokens are given, as in lmms-eval.

    Attributes:
        accuracy: "official" leaves one person out and takes ``min(1, n / 3)``, as LLaVA and
            lmms-eval do; "vicrop" is ``min(0.3 n, 1)`` as in ViCrop's scorer, the same number
            wherever ten people answered.
        capitalize: ask "What brand?" for "what BRAND?", as lmms-eval does.
        suffix: lmms-eval's, VLMEvalKit's and LLaVA-1.5's.
    """

    suffix: str = "\nAnswer the question using a single word or phrase."
    accuracy: Literal["official", "vicrop"] = "official"
    capitalize: bool = True

    name: ClassVar[str] = "textvqa"
    title: ClassVar[str] = "TextVQA"
    paper: ClassVar[str] = "1904.08920"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/textvqa", "lmms-lab/textvqa")
    origin: ClassVar[str] = "questions and train_val_images.zip from textvqa.org"

    def read(self, data: Data) -> Iterator[Sample]:
        path = data.file_or_table(FILE)
        if path is None:
            table = data.table("question", "answers", split="validation")
            for line, (row, picture, _) in enumerate(table):
                yield self._sample(line, row, picture, str(row.get("image_id", line)))
            return
        for line, row in data.entries(path, "data", *NEEDED):
            name = str(row["image_id"])
            image = data.image(f"{name}.jpg", "textvqa/train_images", "textvqa")
            yield self._sample(line, row, image, name)

    def _sample(self, line: int, row: dict[str, Any], image: Source, image_name: str) -> Sample:
        question, name = str(row["question"]), row.get("question_id", line)
        prompt = (question.capitalize() if self.capitalize else question) + self.suffix
        people = [str(answer) for answer in row["answers"]]
        return self.sample("val", line, name, question, people, image, image_name, prompt=prompt)

    def parse(self, answer: str) -> str:
        return normalise(answer)

    def grade(self, record: EvalRecord) -> float:
        rule = leave_one_out if self.accuracy == "official" else three_tenths
        return rule(self.parse(record["answer"]), [normalise(person) for person in record["label"]])

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        given = answered(records)
        return {"accuracy": percent(map(self.grade, given))} if given else {}

    def table(self, scores: dict[str, float]) -> Table:
        rows: list[list[str | float]] = [["Validation", value] for value in scores.values()]
        return [self.title, "Accuracy"], rows
