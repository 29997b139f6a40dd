"""Words of captions: their lemmas by nltk, the rule of several scorers; length and repetition."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..base.errors import FoveateError
from .benchmark import EvalRecord, percent

LONG = 8  # words: answers longer than this on average are captions
_KINDS = {"J": "a", "V": "v", "N": "n", "R": "r"}  # first letter of a tag -> WordNet's kind


@functools.lru_cache(maxsize=100_000)
def lemmas(text: str, otherwise: str = "") -> tuple[tuple[str, str], ...]:
    """(lemma, Penn tag) of every token; kinds that WordNet does not know are taken as nouns.

    Args:
        otherwise: what a user can do without nltk, the tail of a sentence.

    Raises:
        FoveateError: nltk or its data is missing.
    """
    try:
        import nltk
    except ImportError:
        raise FoveateError(
            f"Words of captions are found with nltk: pip install 'foveate[eval]'{otherwise}."
        ) from None
    try:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
        return tuple((lemmatize(word, _KINDS.get(tag[:1], "n")), tag) for word, tag in tagged)
    except LookupError:
        raise FoveateError(
            "Words of captions need nltk's data: python -m nltk.downloader punkt punkt_tab "
            f"averaged_perceptron_tagger averaged_perceptron_tagger_eng wordnet{otherwise}."
        ) from None


# -- length and repetition -------------------------------------------------------------------------


@dataclass
class Captions:
    """How long answers are written.

    Attributes:
        answers: how many.
        words: mean length in words.
        repeated: mean share, in percent, of pairs of neighbouring words that occurred before in
            the same answer.
        longest: mean length, in words, of the longest sequence that occurs again later.
    """

    answers: int
    words: float
    repeated: float
    longest: float


def measure_captions(given: list[EvalRecord]) -> Captions | None:
    """Length and repetition of long answers; None where there are none.

    Long answers are those in splits whose labels are not yes and no and whose answers have more
    than `LONG` words on average.
    """
    splits: dict[str, list[list[str]]] = {}
    for record in given:
        if record["label"] not in ("yes", "no"):
            splits.setdefault(record["split"], []).append(words(record["answer"]))
    long = [w for group in splits.values() if fmean(map(len, group)) > LONG for w in group]
    if not long:
        return None
    return Captions(
        answers=len(long),
        words=fmean(map(len, long)),
        repeated=percent(map(repeated_pairs, long)),
        longest=fmean(map(longest_repeat, long)),
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case, without marks."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def repeated_pairs(sequence: Sequence[str]) -> float:
    """Share of the pairs of neighbours that occurred before in the same sequence (RE-2)."""
    pairs = list(itertools.pairwise(sequence))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def longest_repeat(sequence: Sequence[str]) -> int:
    """Length of the longest piece that occurs again later; the two may overlap, as loops do."""

    def twice(length: int) -> bool:
        pieces = [tuple(sequence[i : i + length]) for i in range(len(sequence) - length + 1)]
        return len(set(pieces)) < len(pieces)

    low, high = 0, max(0, len(sequence) - 1)  # a piece that repeats holds shorter ones that do
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if twice(middle) else (low, middle - 1)
    return low
