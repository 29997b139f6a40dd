"""POPE: is this object in the image? Asked 3,000 times per kind of negative."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isnan
from statistics import fmean
from typing import ClassVar, Literal

from ..evaluation import yesno
from ..evaluation.benchmark import (
    EvalRecord,
    Sample,
    Table,
    by_split,
    percent,
    prefixed,
    score_rows,
)
from ..evaluation.data import Data
from ..evaluation.yesno import HEADS, METRICS, Counts, YesNo

Split = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Split, ...] = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class POPE(YesNo):
    """Object existence, half of the objects absent (arXiv 2305.10355).

    Positive class yes; accuracy, precision, recall, F1 and yes ratio in percent per split and as
    the mean of the splits. ``label_yes_ratio`` is the share of yes labels: what lmms-eval prints
    as its yes ratio.

    Attributes:
        source: whose images and objects: COCO with its annotated objects, or A-OKVQA and GQA with
            objects found by SEEM.
        version: question files of COCO: "head" has 3,000 per split (since 2023-10-09), "e3e3926"
            has 2,910 in random and is the one that LLaVA-1.5 pins (2023-08-10).
        splits: the kinds of absent objects: drawn at random, frequent ones, or ones that often
            come with what is there.
        parser: "official" is evaluate.py; "lmms" and "vlmevalkit" also count like these harnesses
            (0 for what is undefined; lmms-eval leaves unread answers out of the recall);
            "opera" and "vicrop" are the variants of these methods' authors; "first_word" is ours.
        suffix: official and VLMEvalKit: none; lmms-eval and LLaVA-1.5: "\\nAnswer the question
            using a single word or phrase."; VCD: " Please answer this question with one word."
    """

    source: Literal["coco", "aokvqa", "gqa"] = "coco"
    version: Literal["head", "e3e3926"] = "head"
    splits: tuple[Split, ...] = SPLITS
    parser: Literal["official", "lmms", "vlmevalkit", "opera", "vicrop", "first_word"] = "official"

    name: ClassVar[str] = "pope"
    title: ClassVar[str] = "POPE"
    paper: ClassVar[str] = "2305.10355"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/POPE", "lmms-lab/POPE")
    origin: ClassVar[str] = "question files from github.com/RUCAIBox/POPE"
    parsers: ClassVar = {
        "official": yesno.pope,
        "lmms": yesno.lmms,
        "vlmevalkit": yesno.vlmevalkit,
        "opera": yesno.opera,
        "vicrop": yesno.vicrop,
        "first_word": yesno.first_word,
    }

    def check(self) -> None:
        super().check()
        self.require(bool(self.splits), "splits must name at least one split")
        self.require(
            self.source == "coco" or self.version == "head", "version is about COCO questions only"
        )

    def read(self, data: Data) -> Iterator[Sample]:
        tables = data.root is None or (data.find(*self._names(self.splits[0])) is None)
        if tables and self.source == "coco" and (data.root is None or data.tables()):
            yield from self._from_table(data)
            return
        for split in self.splits:
            path = data.need(*self._names(split))
            count = 0
            for line, row in data.rows(path, "question_id", "image", "text", "label"):
                count = line + 1
                if (label := str(row["label"]).strip().lower()) not in ("yes", "no"):
                    data.problems.add("labels that are not yes or no", f"{row['label']!r}")
                    continue
                image = data.image(row["image"], *self._folders())
                yield self.sample(
                    split, line, row["question_id"], row["text"], label, image, row["image"]
                )
            expected = 2910 if (self.version, split) == ("e3e3926", "random") else 3000
            if count != expected:
                data.problems.add("question files of another version", f"{path.name} has {count}")

    def _names(self, split: str) -> list[str]:
        """Where the question file of a split may be, under the data root."""
        if self.source != "coco":
            file = f"{self.source}_pope_seem_{split}.json"
            homes = [f"pope/output/seem/{self.source}", f"pope/seem/{self.source}", "pope"]
        else:
            file = f"coco_pope_{split}.json"
            homes = ["pope/output/coco", "pope/coco", "pope"]
            if self.version != "head":
                homes = [f"pope/coco_{self.version}"]
        return [f"{home}/{file}" for home in homes]

    def _folders(self) -> tuple[str, ...]:
        if self.source == "gqa":
            return ("gqa/images", "gqa", "pope/images")
        return ("coco/val2014", "coco/images/val2014", "val2014", "pope/images", "pope/val2014")

    def _from_table(self, data: Data) -> Iterator[Sample]:
        """lmms-eval's table: the COCO questions of HEAD, the split in ``category``."""
        if self.version != "head":
            raise data.missing(self._names("random")[0])
        lines = dict.fromkeys(SPLITS, 0)
        for row, picture, name in data.table("question", "answer", "category"):
            split = str(row["category"]).lower()
            if split not in lines:
                data.problems.add("unknown categories", split)
                continue
            line, lines[split] = lines[split], lines[split] + 1
            if split in self.splits:
                label, number = row["answer"].strip().lower(), row.get("question_id", line)
                name = row.get("image_source") or name or f"{split}/{line}"
                yield self.sample(split, line, number, row["question"], label, picture, name)

    # -- scoring -----------------------------------------------------------------------------------

    def counts(self, records: list[EvalRecord]) -> Counts:
        """TP, FP, TN, FN of answered records by the chosen rule."""
        return Counts.of(self.pairs(records), "yes", only_read=self.parser == "lmms")

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        scores: dict[str, float] = {}
        groups = by_split(records)
        for split in [s for s in SPLITS if s in groups]:
            scores |= prefixed(split, self._percent(groups[split]))
        for key in METRICS if groups else ():
            scores[f"average/{key}"] = fmean(scores[f"{split}/{key}"] for split in groups)
        if self.parser in ("lmms", "vlmevalkit"):  # they pool the rows instead
            pooled = self._percent([r for group in groups.values() for r in group])
            scores |= prefixed("pooled", pooled)
        return scores

    def _percent(self, records: list[EvalRecord]) -> dict[str, float]:
        harness = self.parser in ("lmms", "vlmevalkit")
        counts = self.counts(records)
        scores = counts.percent(undefined=0.0) if harness else counts.percent()
        return {**scores, "label_yes_ratio": percent(r["label"] == "yes" for r in records)}

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        records = list(records)
        undefined = [
            split for split, group in by_split(records).items() if isnan(self._percent(group)["f1"])
        ]
        notes = super().notes(records)
        if undefined:
            notes.append(
                f"No answer in {', '.join(undefined)} is a right yes: precision or F1 is not "
                "defined there, and the official script stops."
            )
        return notes

    def table(self, scores: dict[str, float]) -> Table:
        splits = {split: split.capitalize() for split in (*SPLITS, "average")}
        return ["Split", *HEADS], score_rows(scores, splits, METRICS)
