"""HallusionBench: the same question about a figure and about edited versions of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..evaluation import yesno
from ..evaluation.benchmark import EvalRecord, Sample, Source, Table, answered, percent, prefixed
from ..evaluation.data import Data
from ..evaluation.yesno import YesNo

FILE = "hallusion_bench/HallusionBench.json"
KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
NEEDED = (*KEYS, "question", "gt_answer")
SPLITS = ("VD", "VS")  # visual dependent, visual supplement
HEAD = ("qAcc", "fAcc", "easy/qAcc", "hard/qAcc", "aAcc")  # the official leaderboard's columns

WRONG, RIGHT, UNCLEAR = 0, 1, 2
"""Verdicts on an answer, as the official judge gives them."""


def contains(answer: str) -> str:
    """The rule that stands, commented out, in lmms-eval: "yes" anywhere, otherwise no."""
    return "yes" if "yes" in answer.lower() else "no"


@dataclass(frozen=True)
class HallusionBench(YesNo):
    """HallusionBench: 1,129 yes/no questions, scored singly and in groups (arXiv 2310.14566).

    In percent: aAcc of questions, qAcc of pairs (a question right on all its figures), fAcc of
    figures (right on all their questions; a visual supplement that is not shown is none), and
    qAcc of pairs without edited figures (easy) and on them (hard). Then the diagnosis: the yes
    ratio minus that of the labels, the share of "no" labels among wrong answers (the official
    fp), consistency on figures, and what wrong answers come from.

    The official verdicts are GPT-4's; here answers are right or wrong by a rule, and unclear where
    it reads neither yes nor no. On a figure that is not shown, unclear is right, as officially.

    Attributes:
        parser: "first_word" is ours; "vlmevalkit" is YOrN_Extraction; "contains" says yes for
            "yes" anywhere and is never unclear, as in lmms-eval's commented-out rule.
        figures: "all" questions, or "only" those with a figure (951), as lmms-eval's task
            hallusion_bench_image and VLMEvalKit do.
        suffix: none officially and in lmms-eval.
    """

    max_new_tokens: int = 128
    parser: Literal["first_word", "vlmevalkit", "contains"] = "first_word"
    figures: Literal["all", "only"] = "all"

    name: ClassVar[str] = "hallusionbench"
    title: ClassVar[str] = "HallusionBench"
    paper: ClassVar[str] = "2310.14566"
    folder: ClassVar[str] = "hallusion_bench"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/HallusionBench", "lmms-lab/HallusionBench")
    origin: ClassVar[str] = "from github.com/tianyi-lab/HallusionBench"
    digits: ClassVar[int] = 4
    parsers: ClassVar[dict[str, Callable[[str], str | None]]] = {
        "first_word": yesno.first_word,
        "vlmevalkit": yesno.vlmevalkit,
        "contains": contains,
    }

    def read(self, data: Data) -> Iterator[Sample]:
        path = data.file_or_table(FILE, "hallusionbench/HallusionBench.json")
        if path is None:
            yield from self._from_table(data)
            return
        for line, row in data.rows(path, *NEEDED):
            image, name = None, None
            if str(row["visual_input"]) != "0":
                name = row.get("filename") or (
                    f"{row['category']}/{row['subcategory']}/{row['set_id']}_{row['figure_id']}.png"
                )
                name = name.removeprefix("./").removeprefix("hallusion_bench/")
                image = self._figure(data, name)
            if image or self.figures == "all":
                yield self._sample(line, row, image, name)

    def _figure(self, data: Data, name: str) -> Path:
        """The figure called `name`, folders and all: every folder has a 0_1.png."""
        path = data.image(name, "hallusion_bench", "hallusionbench")
        if path.as_posix().lower().endswith(f"/{name.lower()}"):
            return path
        data.problems.add("missing images", name)
        assert data.root is not None
        return data.root / "hallusion_bench" / name

    def _from_table(self, data: Data) -> Iterator[Sample]:
        line = 0
        splits = ["image", "non_image"] if self.figures == "all" else ["image"]
        for split in splits if data.root is None else splits[:1]:
            for row, picture, _ in data.table(*NEEDED, split=split):
                shown = str(row["visual_input"]) != "0"
                name = "/".join(str(row[key]) for key in KEYS[:4]) if shown else None
                if shown or self.figures == "all":
                    yield self._sample(line, row, picture if shown else None, name)
                line += 1

    def _sample(
        self, line: int, row: dict[str, Any], image: Source | None, name: str | None
    ) -> Sample:
        meta = {key: str(row[key]) for key in KEYS}
        number = "_".join(meta[key] for key in KEYS[:5])
        label = "yes" if str(row["gt_answer"]) == "1" else "no"
        return self.sample(
            meta["category"], line, number, row["question"], label, image, name, meta=meta
        )

    # -- scoring -----------------------------------------------------------------------------------

    def verdict(self, record: EvalRecord) -> int:
        """`RIGHT`, `WRONG`, or `UNCLEAR` where the answer says neither yes nor no."""
        said = self.parse(record["answer"])
        return UNCLEAR if said is None else RIGHT if said == record["label"] else WRONG

    def grade(self, record: EvalRecord) -> float:
        return float(counts_as_right(record["meta"], self.verdict(record)))

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        given = answered(records)
        said = {(_pair(r["meta"]), r["meta"]["figure_id"]): self.parse(r["answer"]) for r in given}
        rows = [
            {
                **r["meta"],
                "yes": r["label"] == "yes",
                "verdict": self.verdict(r),
                "same": self.parse(r["answer"]) == said.get((_pair(r["meta"]), "0")),
            }
            for r in given
        ]
        scores = aggregate(rows) if rows else {}
        for split in SPLITS:
            if part := [row for row in rows if row["category"] == split]:
                of_split = aggregate(part)
                scores |= prefixed(split, {key: of_split[key] for key in HEAD})
        return scores

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        told = "Verdicts are by rule, official ones by GPT-4: compare only like with like."
        return [*super().notes(records), told]

    def table(self, scores: dict[str, float]) -> Table:
        names = ["Pairs (qAcc)", "Figures (fAcc)", "Easy", "Hard", "Questions (aAcc)"]
        rows: list[list[str | float]] = [
            [prefix.rstrip("/") or "All", *(scores[prefix + key] for key in HEAD)]
            for prefix in ("", *(f"{split}/" for split in SPLITS))
            if f"{prefix}aAcc" in scores
        ]
        return [self.title, *names], rows


def counts_as_right(meta: dict[str, str], verdict: int) -> bool:
    """The official rule: where the figure was not shown, an honest "unclear" is right too."""
    hidden = meta["category"] == "VS" and meta["figure_id"] == "0"
    return verdict == RIGHT or (hidden and verdict == UNCLEAR)


def aggregate(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The official tables, in percent and unrounded, from judged questions.

    Args:
        rows: per question the keys of the question file, ``yes`` (the label), ``verdict``, and
            ``same``: does the answer agree with the one on the original figure?
    """
    right = [counts_as_right(row, row["verdict"]) for row in rows]
    pairs: dict[str, list[bool]] = {}
    easy: dict[str, list[bool]] = {}
    hard: dict[str, list[bool]] = {}
    figures: dict[str, list[bool]] = {}
    for row, ok in zip(rows, right, strict=True):
        pairs.setdefault(_pair(row), []).append(ok)
        (hard if row["visual_input"] == "2" else easy).setdefault(_pair(row), []).append(ok)
        if row["category"] != "VS" or row["figure_id"] != "0":
            name = "_".join(row[key] for key in ("category", "subcategory", "set_id", "figure_id"))
            figures.setdefault(name, []).append(ok)
    said_yes = [row["yes"] == ok for row, ok in zip(rows, right, strict=True)]
    wrong = [row for row, ok in zip(rows, right, strict=True) if not ok]
    causes = _causes(rows)
    return {
        "aAcc": percent(right),
        "qAcc": percent(all(group) for group in pairs.values()),
        "fAcc": percent(all(group) for group in figures.values()),
        "easy/qAcc": percent(all(group) for group in easy.values()),
        "hard/qAcc": percent(all(group) for group in hard.values()),
        "yes/difference": percent(said_yes) - percent(row["yes"] for row in rows),
        "yes/false_positive": percent(not row["yes"] for row in wrong),
        "figures/wrong": percent(not any(group) for group in figures.values()),
        "figures/inconsistent": percent(any(g) and not all(g) for g in figures.values()),
        "figures/score": percent(sum(group) / len(group) for group in figures.values()),
        **{f"cause/{name}": 100 * n / len(wrong) if wrong else nan for name, n in causes.items()},
    }


def _causes(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Wrong answers by cause: language hallucination, visual illusion, or mixed.

    A question's answer on the original figure (for visual supplements: without any) decides what
    a wrong one on an edited figure shows.
    """
    original = {_pair(row): row["verdict"] for row in rows if row["figure_id"] == "0"}
    counts = {"language": 0, "vision": 0, "mixed": 0}
    for row in rows:
        verdict, first = row["verdict"], original.get(_pair(row))
        visual, repeats = row["category"] == "VD", verdict == WRONG and row["same"]
        if counts_as_right(row, verdict):
            continue
        if row["figure_id"] == "0":
            cause = "vision" if visual else "language"
        elif visual:
            cause = "mixed" if first == RIGHT and repeats else "vision"
        elif first == WRONG:
            cause = "language" if repeats else "mixed"
        elif first == RIGHT and repeats and row["visual_input"] == "2":
            cause = "language"
        else:
            cause = "vision"
        counts[cause] += 1
    return counts


def _pair(row: dict[str, str]) -> str:
    return "_".join(row[key] for key in ("category", "subcategory", "set_id", "question_id"))
