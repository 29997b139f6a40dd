"""V*Bench: a small thing somewhere in a large photograph, as multiple choice."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..evaluation.benchmark import (
    Benchmark,
    EvalRecord,
    Sample,
    Source,
    Table,
    answered,
    by_split,
    percent,
    unread_note,
)
from ..evaluation.data import Data
from ..evaluation.vqa import LETTERS, letter, lettered, nearest

SPLITS = ("direct_attributes", "relative_position")
LIST = "vstar_bench/test_questions.jsonl"
ASK = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class VStar(Benchmark):
    """V*Bench: 191 questions of two kinds, answered by a letter (arXiv 2312.14135).

    Accuracy in percent over all questions and per kind. The data set's text already holds options
    ``(A) red`` and the request for a letter; lmms-eval rewrites the options to ``A. red`` and
    adds the request again, and so do we.

    Attributes:
        parser: "lmms" is lmms-eval's search for a letter; "vicrop" takes the option that is most
            like the answer by difflib's ratio, as ViCrop's scorer does. (The paper compares the
            model's loss on each option instead of asking.)
        suffix: lmms-eval's.
    """

    suffix: str = ASK
    parser: Literal["lmms", "vicrop"] = "lmms"

    name: ClassVar[str] = "vstar"
    title: ClassVar[str] = "V*Bench"
    paper: ClassVar[str] = "2312.14135"
    folder: ClassVar[str] = "vstar_bench"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/vstar-bench", "lmms-lab/vstar-bench")
    origin: ClassVar[str] = "from huggingface.co/datasets/craigwu/vstar_bench"

    def read(self, data: Data) -> Iterator[Sample]:
        if path := data.find(LIST):
            for line, row in data.rows(path, "image", "text", "label", "category"):
                name = str(row["image"])
                yield self._sample(line, row, data.image(name, self.folder), name)
        elif data.root is None or data.tables():
            for line, (row, picture, _) in enumerate(data.table("text", "label", "category")):
                yield self._sample(line, row, picture, f"{row['category']}/{line}")
        else:
            yield from self._from_folders(data)

    def _sample(self, line: int, row: dict[str, Any], image: Source, image_name: str) -> Sample:
        text = str(row["text"])
        return self.sample(
            str(row["category"]),
            line,
            row.get("question_id", line),
            text,
            str(row["label"]).strip().upper(),
            image,
            image_name,
            prompt=prompt(text) + self.suffix,
            meta={"options": re.findall(r"^\([A-H]\).*", text, re.MULTILINE)},
        )

    def _from_folders(self, data: Data) -> Iterator[Sample]:
        """A JSON file beside each image; its first option is the right one, so they are shuffled.

        The order depends on the file's name only.
        """
        for split in SPLITS:
            folder = data.need(f"{self.folder}/{split}")
            for line, path in enumerate(sorted(folder.glob("*.json"))):
                entry = data.json(path)
                options = list(entry["options"])
                random.Random(path.stem).shuffle(options)
                lines = [f"({x}) {option}" for x, option in zip(LETTERS, options, strict=False)]
                row = {
                    "text": "\n".join([entry["question"], *lines]) + ASK,
                    "label": LETTERS[options.index(entry["options"][0])],
                    "category": split,
                    "question_id": path.stem,
                }
                picture = _beside(path)
                if not picture.exists():
                    data.problems.add("missing images", str(picture))
                yield self._sample(line, row, picture, f"{split}/{path.stem}")

    # -- scoring -----------------------------------------------------------------------------------

    def parse(self, answer: str) -> str | None:
        return letter(answer)

    def grade(self, record: EvalRecord) -> float:
        if self.parser == "lmms":
            said = letter(record["answer"])
        else:
            said = LETTERS[nearest(record["answer"], record["meta"]["options"])]
        return float(said == record["label"])

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        given = answered(records)
        groups = dict(sorted(by_split(given).items())) | ({"overall": given} if given else {})
        return {f"{name}/accuracy": percent(map(self.grade, g)) for name, g in groups.items()}

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        records = list(records)
        given = answered(records)
        unread = [r["answer"] for r in given if letter(r["answer"]) is None]
        notes = super().notes(records)
        if self.parser == "lmms":
            notes += unread_note(unread, len(given), "name no option")
        return notes

    def table(self, scores: dict[str, float]) -> Table:
        rows: list[list[str | float]] = [
            [key.removesuffix("/accuracy").replace("_", " ").capitalize(), value]
            for key, value in scores.items()
        ]
        return [self.title, "Accuracy"], rows


def prompt(text: str) -> str:
    """A question of the data set as lmms-eval rewrites it: options as ``A. red``.

    The last option runs to the end of the text, with the request for a letter that stands there.
    """
    options = re.findall(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)", text)
    if not options:
        return text
    return text.split("(A)")[0].strip() + "\n" + lettered([option.strip() for option in options])


def _beside(path: Path) -> Path:
    """The image that belongs to a JSON file: .jpg, unless there is another kind only."""
    known = [path.with_suffix(end) for end in (".jpg", ".jpeg", ".png", ".webp")]
    return next((image for image in known if image.exists()), known[0])
