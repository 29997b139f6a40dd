"""Captions at equal length: does a method invent less, or does it only write less?

Whoever stops earlier invents less, and names less of what is there. Two measures tell the two
apart. Both come from the records alone.

* CHAIR at equal length: image by image, the method's caption and vanilla's are cut to the number
  of words of the shorter one, and scored again. A method that only stops vanilla's captions earlier
  then has vanilla's scores, exactly. What is left is what it writes differently.
* Recall against CHAIR: all captions of a method cut to so many words, for many numbers. The curve
  of vanilla is what shorter captions alone give; a method has to lie beside it, with fewer
  inventions at the same recall. Sampled answers (`foveate eval --temperature`) are rows, too.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from statistics import fmean
from typing import cast

import numpy as np

from ..base import stats
from .benchmark import Benchmark, EvalRecord, Mentions, image_of, percent
from .merge import Key
from .published import VANILLA

FINE, COARSE = 24, 6
"""Vanilla's captions, and a method's, are cut to multiples of a 24th, and a 6th, of a length that
one in ten of vanilla's captions exceeds; the shortest cut is a 6th."""


@dataclass
class Cut:
    """Captions cut to so many words.

    Attributes:
        words: at most; None = whole.
        length: mean length in words.
        chair_s: share of captions that invent something, in percent.
        chair_i: share of mentions that are invented, in percent; NaN where nothing is named.
        recall: share of what is there that is named, in percent.
    """

    words: int | None
    length: float
    chair_s: float
    chair_i: float
    recall: float


@dataclass
class Curve:
    """A method's captions cut ever less; the last cut is the whole captions."""

    method: str
    cuts: list[Cut]

    @property
    def whole(self) -> Cut:
        return self.cuts[-1]


@dataclass
class Equal:
    """A method's captions and vanilla's, cut to the shorter one of each pair.

    Attributes:
        difference: of `chair_s`, method minus vanilla, in percentage points.
        low, high: ends of its 95 % bootstrap interval, images resampled; None with one image.
        match: vanilla's captions cut to the fewest words with which they have at least the recall
            of the method's whole captions; None where whole ones have less.
    """

    method: str
    own: Cut
    vanilla: Cut
    difference: float
    low: float | None
    high: float | None
    match: Cut | None


@dataclass
class Lengths:
    """All methods on the captions that every one of them wrote.

    Attributes:
        figure: the curves as a data URI, where somebody has drawn them.
    """

    captions: int
    curves: list[Curve]
    equal: list[Equal]
    figure: str = ""


def measure_lengths(
    b: Benchmark, methods: dict[str, dict[Key, EvalRecord]], seed: int
) -> Lengths | None:
    """Captions at equal length; None without vanilla, or where no record is a caption.

    Args:
        methods: text form -> question -> record.
        seed: of the bootstrap.
    """
    written = {
        name: {k: r for k, r in records.items() if r["answer"] is not None and b.mentions(r)}
        for name, records in methods.items()
    }
    written = {name: records for name, records in written.items() if records}
    if VANILLA not in written:
        return None
    common = sorted(set.intersection(*map(set, written.values())))
    if not common:
        return None
    order = sorted(written, key=lambda name: name != VANILLA)
    captions = {name: [written[name][key] for key in common] for name in order}
    plain = captions[VANILLA]
    longest = np.quantile([count_words(r) for r in plain], 0.9)
    curves = []
    for name, rows in captions.items():
        count = FINE if name == VANILLA else COARSE
        steps = range(count // COARSE, count + 1)
        limits = sorted({max(1, round(longest * n / count)) for n in steps})
        cuts = [_cut(b, rows, [limit] * len(rows), limit) for limit in limits]
        whole = _cut(b, rows, [count_words(r) for r in rows], None)
        curves.append(Curve(name, [*cuts, whole]))
    equal = [
        _equal(b, curve, captions[curve.method], plain, seed)
        for curve in curves
        if curve.method != VANILLA
    ]
    return Lengths(len(common), curves, equal)


def count_words(record: EvalRecord) -> int:
    return len(record["answer"].split())


def shortened(record: EvalRecord, words: int) -> EvalRecord:
    """The record with the first so many words of its answer, split at white space."""
    ends = [word.end() for word in re.finditer(r"\S+", record["answer"])]
    if len(ends) <= words:
        return record
    answer = record["answer"][: ends[words - 1]] if words else ""
    return cast(EvalRecord, {**record, "answer": answer})


def _equal(
    b: Benchmark, curve: Curve, own: Sequence[EvalRecord], plain: Sequence[EvalRecord], seed: int
) -> Equal:
    limits = [min(map(count_words, pair)) for pair in zip(own, plain, strict=True)]
    invents = [
        [bool(_mentions(b, r, n).invented) for r, n in zip(rows, limits, strict=True)]
        for rows in (own, plain)
    ]
    changes = [100.0 * (after - before) for after, before in zip(*invents, strict=True)]
    low, high = stats.interval(changes, [image_of(r) for r in plain], seed) or (None, None)
    return Equal(
        method=curve.method,
        own=_cut(b, own, limits, None),
        vanilla=_cut(b, plain, limits, None),
        difference=fmean(changes),
        low=low,
        high=high,
        match=_as_much(b, plain, curve.whole.recall),
    )


def _as_much(b: Benchmark, rows: Sequence[EvalRecord], recall: float) -> Cut | None:
    """The captions cut to the fewest words with at least this recall; None where none has it."""
    limits = range(1, max(map(count_words, rows)) + 1)

    def cut(words: int) -> Cut:
        return _cut(b, rows, [words] * len(rows), words)

    place = bisect.bisect_left(limits, recall, key=lambda words: cut(words).recall)
    return cut(limits[place]) if place < len(limits) else None


def _mentions(b: Benchmark, record: EvalRecord, words: int) -> Mentions:
    return cast(Mentions, b.mentions(shortened(record, words)))


def _cut(b: Benchmark, rows: Sequence[EvalRecord], limits: Sequence[int], words: int | None) -> Cut:
    found = [_mentions(b, record, limit) for record, limit in zip(rows, limits, strict=True)]
    invented, named, covered, there = (sum(column) for column in zip(*found, strict=True))
    return Cut(
        words=words,
        length=fmean(min(count_words(r), limit) for r, limit in zip(rows, limits, strict=True)),
        chair_s=percent(bool(one.invented) for one in found),
        chair_i=100 * invented / named if named else nan,
        recall=100 * covered / there if there else nan,
    )


# -- in words --------------------------------------------------------------------------------------


def length_sentences(lengths: Lengths) -> Iterable[str]:
    """What every method's captions are beside vanilla's, in words, with all numbers."""
    plain = lengths.curves[0]
    whole = {curve.method: curve.whole for curve in lengths.curves}
    for equal in lengths.equal:
        own, cut, other = whole[equal.method], equal.own, equal.vanilla
        ends = "no interval from one image"
        if equal.low is not None and equal.high is not None:
            ends = f"95 % interval {equal.low:+.2f} to {equal.high:+.2f}"
        yield (
            f"{equal.method} writes {own.length:.1f} words, vanilla {plain.whole.length:.1f}. "
            f"At equal length ({cut.length:.1f} words) {cut.chair_s:.1f} % of its captions invent "
            f"something, of vanilla's {other.chair_s:.1f} %: {equal.difference:+.2f} points "
            f"({ends}); CHAIRi {cut.chair_i:.1f} against {other.chair_i:.1f}, recall "
            f"{cut.recall:.1f} against {other.recall:.1f}.{_reading(equal, own, plain)}"
        )


def _reading(equal: Equal, own: Cut, plain: Curve) -> str:
    """What the numbers say about a gain."""
    told = ""
    if own.chair_s < plain.whole.chair_s:
        sure = equal.high is not None and equal.high < 0
        told = (
            " It invents less at equal length, too."
            if sure
            else " At equal length no gain is left that is sure: shorter captions may explain its "
            "lower CHAIR."
        )
    if equal.match is None:
        return told + f" Its recall of {own.recall:.1f} is more than vanilla has at any length."
    return told + (
        f" Vanilla's captions have its recall of {own.recall:.1f} once cut to "
        f"{equal.match.words} words, with CHAIRi {equal.match.chair_i:.1f}; it has "
        f"{own.chair_i:.1f}."
    )
