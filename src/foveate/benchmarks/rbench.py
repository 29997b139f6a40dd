"""R-Bench: does this relation hold in the image? 7,787 questions, five balanced subsets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

from ..evaluation import yesno
from ..evaluation.benchmark import EvalRecord, Sample, Table, answered, prefixed, score_rows
from ..evaluation.data import Data
from ..evaluation.yesno import HEADS, METRICS, Counts, YesNo

SUBSETS = ("1", "2", "3", "4", "5")
EPSILON = 1e-5
SPLIT = "image"


@dataclass(frozen=True)
class RBench(YesNo):
    """Relation hallucination, image level (arXiv 2406.16449).

    Every question is asked once; the subsets are lists of ids. Positive class yes; percent.
    ``all`` is over every line; ``subset1`` to ``subset5`` walk their lists, repeats included;
    ``average`` is the mean of the five, two digits. Ids are not unique: in the subsets the last
    line with an id gives both label and answer, as in the official script. Precision, recall and
    F1 have 1e-5 in the denominator.

    Attributes:
        parser: "official" is eval.py (POPE's rule); "lmms" and "vlmevalkit" read like those
            harnesses read POPE, neither has R-Bench; "first_word" is ours.
        suffix: official: none.
        max_new_tokens: the official demo allows 128.
    """

    parser: Literal["official", "lmms", "vlmevalkit", "first_word"] = "official"

    name: ClassVar[str] = "rbench"
    title: ClassVar[str] = "R-Bench"
    paper: ClassVar[str] = "2406.16449"
    hub: ClassVar[tuple[str, ...]] = ("MM-Hallu/R-Bench",)
    origin: ClassVar[str] = "from github.com/mrwu-mac/R-Bench, data on its Google Drive"
    parsers: ClassVar = {
        "official": yesno.pope,
        "lmms": yesno.lmms,
        "vlmevalkit": yesno.vlmevalkit,
        "first_word": yesno.first_word,
    }

    def read(self, data: Data) -> Iterator[Sample]:
        rows = list(self._rows(data))
        last = {row["question_id"]: _label(row["label"]) for _, row, _, _ in rows}
        lists = self._lists(data)
        for line, row, image, name in rows:
            if str(row["label"]).strip().lower() not in ("yes", "no"):
                data.problems.add("labels that are not yes or no", repr(row["label"]))
            counts = {i: ids[row["question_id"]] for i, ids in lists.items()}
            meta = {
                "kind": str(row.get("qtype", "")),
                "subsets": {i: count for i, count in counts.items() if count},
                "last_label": last[row["question_id"]],
            }
            label = _label(row["label"])
            yield self.sample(
                SPLIT, line, row["question_id"], row["text"], label, image, name, meta=meta
            )

    def _rows(self, data: Data) -> Iterator[tuple[int, dict[str, Any], Any, str]]:
        """Position, question, image and image name of every line."""
        path = data.file_or_table(*(f"{home}/image-level_filterd.json" for home in _HOMES))
        if path is None:
            for line, (row, picture, name) in enumerate(
                data.table("question_id", "question", "label")
            ):
                if row.get("level") not in (None, "image", "image-level"):
                    data.problems.add("rows of another level", str(row["level"]))
                    continue
                yield line, {**row, "text": row["question"]}, picture, name or f"row {line}"
            return
        for line, row in data.rows(path, "question_id", "image", "text", "label"):
            yield line, row, data.image(row["image"], "rbench/images", "rbench"), row["image"]

    def _lists(self, data: Data) -> dict[str, Counter[Any]]:
        """Per subset, how often it names each id."""
        lists = {}
        for i in SUBSETS:
            file = f"nocaps_image-level_rel_ids_{i}.json"
            path = data.find(*(f"{home}/{file}" for home in (*_HOMES, *_LISTS)))
            if path is None:
                data.problems.add("missing subset lists", file)
            else:
                lists[i] = Counter(data.json(path))
        return lists

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        given = answered(records)
        if not given:
            return {}
        scores = prefixed("all", _percent(self.pairs(given)))
        last = {record["id"]: record for record in given}
        subsets = []
        for i in SUBSETS:
            pairs = [
                (self.parse(record["answer"]), record["meta"]["last_label"])
                for record in last.values()
                for _ in range(record["meta"]["subsets"].get(i, 0))
            ]
            if pairs:
                subsets.append(_percent(pairs))
                scores |= prefixed(f"subset{i}", subsets[-1])
        for key in METRICS if subsets else ():
            scores[f"average/{key}"] = round(fmean(values[key] for values in subsets), 2)
        return scores

    def table(self, scores: dict[str, float]) -> Table:
        groups = {name: name.capitalize() for name in ("all", *map("subset{}".format, SUBSETS))}
        groups["average"] = "Average"
        return ["Questions", *HEADS], score_rows(scores, groups, METRICS)


_HOMES = ("rbench/data_filterd", "rbench/data", "rbench")
_LISTS = ("rbench/data_filterd/nocaps_image-level_rel_ids", "rbench/ids")


def _label(label: Any) -> str:
    return "no" if "no" in str(label).lower() else "yes"


def _percent(pairs: list[tuple[str | None, str]]) -> dict[str, float]:
    return Counts.of(pairs, "yes").percent(epsilon=EPSILON)
