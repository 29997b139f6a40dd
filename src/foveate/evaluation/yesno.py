"""Yes/no answers: how published scorers read them, and what they count.

Every parser turns raw text into "yes", "no" or None (neither). They differ on anything but a plain
"Yes" or "No", and so do the scores: the table of 80 odd answers in the tests shows where.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import nan
from statistics import fmean
from typing import ClassVar

from .benchmark import Benchmark, EvalRecord, answered, unread_note
from .vqa import nearest, punctuation


def pope(answer: str) -> str:
    """POPE's evaluate.py and R-Bench's eval.py: "no" by one of three words, otherwise "yes".

    Only the text before the first full stop counts, and only spaces separate words, so the empty
    answer, "NO", "No!" and "Not sure" are yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def opera(answer: str) -> str:
    """OPERA's variant of `pope`: all of the text, also "NO" and words that end in n't."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    negative = {"No", "no", "not", "NO"} & set(words) or any(w.endswith("n't") for w in words)
    return "no" if negative else "yes"


def lmms(answer: str) -> str | None:
    """lmms-eval's POPE: the answer must be the word and nothing else; case does not matter."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else None


def lmms_contains(answer: str) -> str | None:
    """lmms-eval's AMBER helper: "yes" anywhere, else "no" anywhere, also inside "know"."""
    text = answer.lower()
    return "yes" if "yes" in text else "no" if "no" in text else None


def mme(answer: str) -> str | None:
    """MME's calculation.py: "yes", else "no", within the first four characters as they are.

    Its files hold one line per answer; a space for each line break there changes nothing here.
    """
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def lmms_mme(answer: str) -> str | None:
    """lmms-eval's MME: `mme` after stripping spaces and full stops, and single letters."""
    text = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or mme(text)


def vlmevalkit(answer: str) -> str | None:
    """VLMEvalKit's YOrN_Extraction: exactly one of the two as a whole word, marks removed."""
    words = punctuation(answer.lower()).split()
    yes, no = "yes" in words, "no" in words
    return None if yes == no else "yes" if yes else "no"


def vicrop(answer: str) -> str:
    """ViCrop's get_score.py: what the raw answer is more like by difflib's ratio; "yes" on a tie.

    Case counts: "Yes" shares two letters with "yes", "NO" none with either, so it is yes.
    """
    return ("yes", "no")[nearest(answer, ("yes", "no"))]


def exact(answer: str) -> str | None:
    """AMBER's inference.py: the string Yes or No, to the letter."""
    return {"Yes": "yes", "No": "no"}.get(answer)


def first_word(answer: str) -> str | None:
    """Ours: the first word where it is yes or no, else the only yes or no of the first sentence.

    Case, marks and markup before the word do not matter; "know" and "not" do not count.
    """
    text = answer.lower().lstrip("".join(c for c in set(answer) if not c.isalnum()))
    if start := re.match(r"(yes|no)\b", text):
        return start[1]
    said = set(re.findall(r"\b(?:yes|no)\b", re.split(r"[.!?\n]", text)[0]))
    return said.pop() if len(said) == 1 else None


METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
HEADS = ["Accuracy", "Precision", "Recall", "F1", "Yes ratio"]


@dataclass(frozen=True)
class Counts:
    """Right and wrong answers around a positive class.

    Attributes:
        hits: said and truly positive (TP).
        false: said positive, truly negative (FP).
        rejected: said and truly negative (TN).
        missed: truly positive, not said so (FN).
        right: correct answers.
        total: answers.
        said: answers that say the positive class.
    """

    hits: int
    false: int
    rejected: int
    missed: int
    right: int
    total: int
    said: int

    @classmethod
    def of(
        cls, pairs: Iterable[tuple[str | None, str]], positive: str, only_read: bool = False
    ) -> Counts:
        """Counts of (said, truth) pairs; said is None where the answer could not be read.

        Unread answers are wrong and never say the positive class. With `only_read` those whose
        truth is positive are not counted as missed either.
        """
        pairs = list(pairs)
        hits = sum(s == t == positive for s, t in pairs)
        said = sum(s == positive for s, _ in pairs)
        true = sum(t == positive and not (only_read and s is None) for s, t in pairs)
        right = sum(s == t for s, t in pairs)
        return cls(
            hits=hits,
            false=said - hits,
            rejected=right - hits,
            missed=true - hits,
            right=right,
            total=len(pairs),
            said=said,
        )

    def percent(self, undefined: float = nan, epsilon: float = 0.0) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and the share of the positive class, in percent.

        Args:
            undefined: stands for what would divide by zero.
            epsilon: added to the denominators of precision, recall and F1.
        """

        def ratio(part: float, whole: float) -> float:
            return part / whole if whole else undefined

        precision = ratio(self.hits, self.said + epsilon)
        recall = ratio(self.hits, self.hits + self.missed + epsilon)
        values = {
            "accuracy": ratio(self.right, self.total),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall + epsilon),
            "yes_ratio": ratio(self.said, self.total),
        }
        return {key: 100 * value for key, value in values.items()}


def pair_scores(right: Iterable[tuple[int, bool]]) -> dict[str, float]:
    """MME's scores of (line, right) in percent; lines 2k and 2k + 1 are a pair.

    ``acc`` per question, ``acc+`` per pair of which both are right, ``score`` their sum.
    """
    pairs: dict[int, list[bool]] = {}
    for line, hit in right:
        pairs.setdefault(line // 2, []).append(hit)
    single = 100 * fmean(hit for pair in pairs.values() for hit in pair)
    both = 100 * fmean(len(pair) == 2 and all(pair) for pair in pairs.values())
    return {"acc": single, "acc+": both, "score": single + both}


@dataclass(frozen=True)
class YesNo(Benchmark):
    """Questions answered by yes or no, which are also the labels.

    Attributes:
        parser: one of `parsers`; a subclass narrows the annotation to their names.
    """

    parser: str = "official"

    parsers: ClassVar[dict[str, Callable[[str], str | None]]] = {}

    def parse(self, answer: str) -> str | None:
        return self.parsers[self.parser](answer)

    def pairs(self, records: Iterable[EvalRecord]) -> list[tuple[str | None, str]]:
        """What each answer says, and the label."""
        return [(self.parse(r["answer"]), r["label"]) for r in records]

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        records = list(records)
        given = answered(records)
        unread = [r["answer"] for r in given if self.parse(r["answer"]) is None]
        what = "say neither yes nor no to the parser"
        return super().notes(records) + unread_note(unread, len(given), what)
