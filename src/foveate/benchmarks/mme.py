"""MME: 14 tasks, two questions per image, one true and one false."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..evaluation import yesno
from ..evaluation.benchmark import EvalRecord, Sample, Table, by_split, prefixed, score_rows
from ..evaluation.data import Data
from ..evaluation.yesno import YesNo, pair_scores

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TOTALS = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}
SUFFIX = " Please answer yes or no."
_HOMES = ("mme/MME_Benchmark_release_version", "mme/MME_Benchmark", "mme")


@dataclass(frozen=True)
class MME(YesNo):
    """Perception and cognition in 2,374 questions (arXiv 2306.13394).

    A task scores 100 x accuracy over its questions + 100 x acc+ over its images, of which both
    questions must be right: 200 at most. Perception sums ten tasks, cognition four;
    ``hallucination`` is existence, count, position and color, the 800 points of many papers.

    Attributes:
        tasks: the tasks to ask.
        suffix: the ending of the official questions; another one takes its place (lmms-eval:
            "\\nAnswer the question using a single word or phrase.").
        parser: "official" is calculation.py: "yes" or "no" within the first four characters;
            "lmms" and "vlmevalkit" are those harnesses (no judge model); "first_word" is ours.
    """

    suffix: str = SUFFIX
    tasks: tuple[str, ...] = (*PERCEPTION, *COGNITION)
    parser: Literal["official", "lmms", "vlmevalkit", "first_word"] = "official"

    name: ClassVar[str] = "mme"
    title: ClassVar[str] = "MME"
    paper: ClassVar[str] = "2306.13394"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/MME", "lmms-lab/MME")
    origin: ClassVar[str] = "MME_Benchmark_release_version.zip of the hub's darkyarding/MME"
    parsers: ClassVar = {
        "official": yesno.mme,
        "lmms": yesno.lmms_mme,
        "vlmevalkit": yesno.vlmevalkit,
        "first_word": yesno.first_word,
    }

    def check(self) -> None:
        super().check()
        self.require(bool(self.tasks), "tasks must name at least one task")
        for task in self.tasks:
            self.require(task in (*PERCEPTION, *COGNITION), f"there is no task {task!r}")

    # -- questions ---------------------------------------------------------------------------------

    def read(self, data: Data) -> Iterator[Sample]:
        if data.root is None or (self._home(data) is None and data.tables()):
            yield from self._from_table(data)
            return
        home = self._home(data)
        if home is None:
            raise data.missing(f"{_HOMES[0]}/{self.tasks[0]}")
        for task in self.tasks:
            if not (home / task).is_dir():
                data.problems.add("missing tasks", str(home / task))
                continue
            line = 0
            for file in self._files(home / task):
                pair = list(self._questions(data, file))
                if len(pair) != 2:
                    data.problems.add("images without two questions", f"{task}/{file.name}")
                image = self._image(data, home / task, file.stem)
                for i, (question, label) in enumerate(pair[:2]):
                    yield self._sample(task, line + i, file.stem, question, label, image)
                line += 2

    def _home(self, data: Data) -> Path | None:
        """The folder that holds the folders of the tasks."""
        folder = data.find(*(f"{home}/{task}" for home in _HOMES for task in self.tasks))
        return folder and folder.parent

    def _files(self, folder: Path) -> list[Path]:
        """The question files of a task, one per image, by name."""
        inner = folder / "questions_answers_YN"
        return sorted((inner if inner.is_dir() else folder).glob("*.txt"))

    def _questions(self, data: Data, file: Path) -> Iterator[tuple[str, str]]:
        """Question and label of every line."""
        for i, text in enumerate(filter(str.strip, data.text(file).splitlines())):
            question, _, label = text.partition("\t")
            if label.strip().lower() in ("yes", "no"):
                yield question, label.strip().lower()
            else:
                data.problems.add("broken lines", f"{file.name} line {i + 1}")

    def _image(self, data: Data, folder: Path, stem: str) -> Path:
        """The image called `stem`, with any ending, in any inner folder."""
        assert data.root is not None
        inside = str(folder.relative_to(data.root))
        folders = [f"{inside}/images", f"{inside}/images/toy_dataset", inside]
        for name in folders:
            for ending in (".jpg", ".png", ".jpeg"):
                if (path := data.root / name / f"{stem}{ending}").is_file():
                    return path
        return data.image(f"{stem}.jpg", inside)

    def _from_table(self, data: Data) -> Iterator[Sample]:
        """lmms-eval's table: the task in ``category``, the image's name in ``question_id``."""
        pairs: dict[tuple[str, str], list[tuple[dict[str, Any], Any]]] = {}
        for row, picture, _ in data.table("question_id", "question", "answer", "category"):
            pairs.setdefault((row["category"], row["question_id"]), []).append((row, picture))
        lines = dict.fromkeys(self.tasks, 0)
        for (task, name), pair in pairs.items():
            if task not in lines:
                if task not in (*PERCEPTION, *COGNITION):
                    data.problems.add("unknown categories", task)
                continue
            if len(pair) != 2:
                data.problems.add("images without two questions", f"{task}/{name}")
            for i, (row, picture) in enumerate(pair[:2]):
                label = row["answer"].strip().lower()
                yield self._sample(task, lines[task] + i, name, row["question"], label, picture)
            lines[task] += 2

    def _sample(
        self, task: str, line: int, name: str, question: str, label: str, image: Any
    ) -> Sample:
        prompt, number = question.removesuffix(SUFFIX) + self.suffix, f"{name}/{line % 2}"
        picture = f"{task}/{Path(name).name}"
        return self.sample(task, line, number, question, label, image, picture, prompt=prompt)

    # -- scoring -----------------------------------------------------------------------------------

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for task, group in by_split(records).items():
            right = ((record["line"], self.grade(record) == 1) for record in group)
            scores |= prefixed(task, pair_scores(right))
        for total, tasks in TOTALS.items():
            if all(f"{task}/score" in scores for task in tasks):
                scores[total] = sum(scores[f"{task}/score"] for task in tasks)
        return scores

    def table(self, scores: dict[str, float]) -> Table:
        tasks = {task: task for task in (*PERCEPTION, *COGNITION)}
        rows = score_rows(scores, tasks, ("acc", "acc+", "score"))
        rows += [[total.capitalize(), "", "", scores[total]] for total in TOTALS if total in scores]
        return ["Task", "Accuracy", "Accuracy+", "Score"], rows
