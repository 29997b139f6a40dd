"""AMBER: 14,216 yes/no questions on 1,004 images, and what captions of them make up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

from ..base.errors import FoveateError
from ..evaluation import yesno
from ..evaluation.benchmark import (
    Benchmark,
    EvalRecord,
    Sample,
    Table,
    answered,
    prefixed,
    score_rows,
)
from ..evaluation.data import Data
from ..evaluation.words import lemmas
from ..evaluation.yesno import HEADS, METRICS, YesNo

Split = Literal["existence", "attribute", "relation"]
SPLITS: tuple[Split, ...] = ("existence", "attribute", "relation")

KINDS = {  # the annotation's type -> our kind
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
GROUPS = {  # what is scored together
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}
Pair = tuple[str | None, str]
START = 0.001  # of every denominator, metrics.txt
ORIGIN = "from github.com/junyangwang0410/AMBER, images from its Google Drive"
IMAGES = ("amber/images", "amber/image", "amber/data/images", "amber")


def _homes(name: str) -> tuple[str, str]:
    return f"amber/data/{name}", f"amber/{name}"


@dataclass(frozen=True)
class AMBER(YesNo):
    """Existence, attributes (state, number, action) and relations (arXiv 2311.07397).

    Positive class "no", as hallucinations are what is looked for. Percent, rounded to one digit
    before F1 is made from precision and recall; denominators start at 0.001 per kind. All labels
    of existence are no, so its precision is 100 and its accuracy is its recall. Unread answers are
    wrong and say nothing. ``average/accuracy`` is VLMEvalKit's: the plain mean of the three.

    Attributes:
        splits: the dimensions to ask about.
        parser: "exact" is inference.py, which takes "Yes" and "No" to the letter; "first_word" is
            ours, since there is no published converter; "lmms" is lmms-eval's helper; or
            "vlmevalkit".
        suffix: official: none; VLMEvalKit: "\\nPlease answer yes or no."
    """

    splits: tuple[Split, ...] = SPLITS
    parser: Literal["first_word", "exact", "lmms", "vlmevalkit"] = "first_word"

    name: ClassVar[str] = "amber"
    title: ClassVar[str] = "AMBER"
    paper: ClassVar[str] = "2311.07397"
    origin: ClassVar[str] = ORIGIN
    digits: ClassVar[int] = 1
    parsers: ClassVar = {
        "first_word": yesno.first_word,
        "exact": yesno.exact,
        "lmms": yesno.lmms_contains,
        "vlmevalkit": yesno.vlmevalkit,
    }

    def check(self) -> None:
        super().check()
        self.require(bool(self.splits), "splits must name at least one split")

    def read(self, data: Data) -> Iterator[Sample]:
        annotations = _annotations(data)
        for split in self.splits:
            path = data.need(*_homes(f"query/query_discriminative-{split}.json"))
            for line, row in data.rows(path, "id", "image", "query"):
                note = annotations.get(row["id"], {})
                kind = KINDS.get(note.get("type", ""))
                if kind is None or note.get("truth") not in ("yes", "no"):
                    data.problems.add("questions without annotation", f"id {row['id']}")
                    continue
                yield _sample(self, data, split, line, row, note["truth"], {"kind": kind})

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        given = answered(records)
        kinds: dict[str, list[Pair]] = {}
        for record, pair in zip(given, self.pairs(given), strict=True):
            kinds.setdefault(record["meta"]["kind"], []).append(pair)
        if not given:
            return {}
        scores = prefixed("all", _metrics([p for ps in kinds.values() for p in ps], START, 1e-4))
        for group, parts in GROUPS.items():
            pairs = [pair for part in parts for pair in kinds.get(part, ())]
            if pairs:
                epsilon = 1e-3 if group == "existence" else 1e-4
                scores |= prefixed(group, _metrics(pairs, START * len(parts), epsilon))
        if all(f"{split}/accuracy" in scores for split in SPLITS):
            plain = []
            for split in SPLITS:
                pairs = [pair for part in GROUPS[split] for pair in kinds.get(part, ())]
                plain.append(fmean(said == truth for said, truth in pairs))
            scores["average/accuracy"] = 100 * fmean(plain)
        return scores

    def table(self, scores: dict[str, float]) -> Table:
        groups = {group: group.capitalize() for group in (*GROUPS, "all")}
        return ["Dimension", *HEADS[:4]], score_rows(scores, groups, METRICS[:4])


@dataclass(frozen=True)
class AMBERCaptions(Benchmark):
    """The generative part: objects that a caption names, against those in the image.

    CHAIR: share of named objects that are not there; Cover: share of objects there that are named;
    Hal: share of captions with an object that is not there; Cog: share of the listed likely
    hallucinations that are named. Sums over all captions, percent, one digit. Lower is better but
    for Cover. Nouns come from nltk's tokenizer, tagger and lemmatizer, or from ``meta["nouns"]``
    of the records where they are stored.

    Attributes:
        similarity: a spaCy model whose word vectors say which nouns are the same (above 0.8);
            official: "en_core_web_lg". With "equal" only equal words are, and the numbers cannot
            be compared with published ones.
        max_new_tokens: inferred; the authors give none.
    """

    max_new_tokens: int = 512
    similarity: Literal["en_core_web_lg", "en_core_web_md", "equal"] = "en_core_web_lg"

    name: ClassVar[str] = "amber_captions"
    title: ClassVar[str] = "AMBER, generative"
    paper: ClassVar[str] = "2311.07397"
    origin: ClassVar[str] = ORIGIN
    digits: ClassVar[int] = 1

    def read(self, data: Data) -> Iterator[Sample]:
        _nouns("A dog.")  # what scoring needs must be there before an hour of captions is made
        self.similar("dog", "cat")
        annotations = _annotations(data)
        related = data.json(data.need(*_homes("relation.json")))
        neutral = data.text(data.need(*_homes("safe_words.txt"))).split()
        vocabulary = sorted({*related, *(word for words in related.values() for word in words)})
        path = data.need(*_homes("query/query_generative.json"))
        for line, row in data.rows(path, "id", "image", "query"):
            note = annotations.get(row["id"], {})
            if note.get("type") != "generative":
                data.problems.add("questions without annotation", f"id {row['id']}")
                continue
            meta = {
                "truth": [[word, related.get(word, [])] for word in note["truth"]],
                "likely": [[word, related.get(word, [])] for word in note["hallu"]],
                "neutral": neutral,
                "vocabulary": vocabulary,
            }
            yield _sample(self, data, "generative", line, row, note["truth"], meta)

    def similar(self, first: str, second: str) -> float:
        """How alike two words are; 0.8 is the same. A subclass may plug in another measure."""
        if self.similarity == "equal":
            return float(first == second)
        return _vectors(self.similarity)(first).similarity(_vectors(self.similarity)(second))

    def judge(self, record: EvalRecord) -> dict[str, int]:
        """Counts for one caption.

        ``named`` objects, ``invented`` ones among them, ``covered`` of ``there``, and ``fallen``
        for of ``likely`` hallucinations.
        """
        meta = record["meta"]
        nouns = meta["nouns"] if "nouns" in meta else _nouns(record["answer"])
        vocabulary, neutral = set(meta["vocabulary"]), set(meta["neutral"])
        nouns = [noun for noun in nouns if noun in vocabulary]
        there, likely = _owners(meta["truth"]), _owners(meta["likely"])
        covered, fallen, invented = set(), set(), 0
        for noun in nouns:
            if noun in neutral:
                continue
            if (owner := _first(there, noun.__eq__)) is not None:
                covered.add(owner)
                continue
            if (owner := _first(likely, noun.__eq__)) is not None:
                fallen.add(owner)

            def alike(word: str, noun: str = noun) -> bool:
                return self.similar(noun, word) > 0.8

            if (owner := _first(likely, alike)) is not None:
                fallen.add(owner)
            if (owner := _first(there, alike)) is not None:
                covered.add(owner)
            else:
                invented += 1
        return {
            "named": len(nouns),
            "invented": invented,
            "covered": len(covered),
            "there": len(meta["truth"]),
            "fallen": len(fallen),
            "likely": len(meta["likely"]),
        }

    def grade(self, record: EvalRecord) -> float:
        """1 for a caption that invents nothing."""
        return float(self.judge(record)["invented"] == 0)

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        judged = [self.judge(record) for record in answered(records)]
        if not judged:
            return {}

        def percent(part: str, whole: str) -> float:
            return round(
                sum(j[part] for j in judged) / (sum(j[whole] for j in judged) + START) * 100, 1
            )

        return {
            "chair": percent("invented", "named"),
            "cover": percent("covered", "there"),
            "hal": round(sum(j["invented"] > 0 for j in judged) / (len(judged) + START) * 100, 1),
            "cog": percent("fallen", "likely"),
        }

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        notes = super().notes(records)
        if self.similarity != "en_core_web_lg":
            notes.append(
                f"Word similarity is {self.similarity!r} instead of spaCy's en_core_web_lg: not "
                "comparable with published numbers."
            )
        return notes

    def table(self, scores: dict[str, float]) -> Table:
        rows: list[list[str | float]] = [[self.title, *scores.values()]] if scores else []
        return ["", "CHAIR", "Cover", "Hal", "Cog"], rows


def _metrics(pairs: list[Pair], start: float, epsilon: float) -> dict[str, float]:
    """Rounded percent of (said, truth) pairs with positive class "no"."""
    hits = sum(said == truth == "no" for said, truth in pairs)

    def percent(part: int, whole: int) -> float:
        return round(part / (whole + start) * 100, 1)

    precision = percent(hits, sum(said == "no" for said, _ in pairs))
    recall = percent(hits, sum(truth == "no" for _, truth in pairs))
    p, r = precision / 100, recall / 100
    return {
        "accuracy": percent(sum(said == truth for said, truth in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": round(2 * p * r / (p + r + epsilon) * 100, 1),
    }


def _sample(
    b: Benchmark,
    data: Data,
    split: str,
    line: int,
    row: dict[str, Any],
    truth: Any,
    meta: dict[str, Any],
) -> Sample:
    image = data.image(row["image"], *IMAGES)
    return b.sample(split, line, row["id"], row["query"], truth, image, row["image"], meta=meta)


def _annotations(data: Data) -> dict[int, dict[str, Any]]:
    path = data.need(*_homes("annotations.json"))
    return {row["id"]: row for _, row in data.rows(path, "id", "type", "truth")}


def _owners(words: list[tuple[str, list[str]]]) -> list[tuple[str, int]]:
    """Every word with the position of its owner: first the related words of all, then their own."""
    related = [(word, i) for i, (_, others) in enumerate(words) for word in others]
    return related + [(word, i) for i, (word, _) in enumerate(words)]


def _first(words: list[tuple[str, int]], fits: Callable[[str], bool]) -> int | None:
    return next((owner for word, owner in words if fits(word)), None)


def _nouns(text: str) -> tuple[str, ...]:
    """The lemmatised nouns of a caption, repeats and case kept."""
    return tuple(lemma for lemma, tag in lemmas(text) if tag.startswith("NN"))


@functools.cache
def _vectors(model: str) -> Callable[[str], Any]:
    """Word -> spaCy document of the model, remembered."""
    try:
        import spacy

        return functools.cache(spacy.load(model))
    except (ImportError, OSError):
        raise FoveateError(
            f"amber_captions compares words with spaCy's {model}: pip install spacy and python -m "
            f"spacy download {model}, or use amber_captions(similarity=equal), whose numbers "
            "cannot be compared with published ones."
        ) from None
