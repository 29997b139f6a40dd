"""The settings of a sweep against vanilla: a metric, its difference, and whether that is real."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from ..base import stats
from ..base.errors import FoveateError
from .benchmark import Benchmark, EvalRecord, image_of

ACCURACY = "accuracy"
GROUPS = 50  # of images, for the intervals of scores that are not a mean over questions

Records = list[EvalRecord]
ByMethod = dict[str, Records]
T = TypeVar("T")


@dataclass
class Point:
    """One setting against vanilla, on the questions that everyone answered.

    Attributes:
        method: its text form.
        values: of the parameters, in the order of the axes.
        value: the metric, None where nothing can be said.
        difference: from vanilla.
        low, high: ends of the difference's 95 % bootstrap interval; None for fewer than two images.
        gained, lost: answers that score higher, and lower, than vanilla's; None for metrics that
            are not a mean over questions.
        p: McNemar's exact two-sided p.
        corrected: p after Holm's correction for all settings.
    """

    method: str
    values: tuple[Any, ...]
    value: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    gained: int | None = None
    lost: int | None = None
    p: float | None = None
    corrected: float | None = None

    @property
    def apart(self) -> bool:
        """Whether the interval leaves out vanilla."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def measure(answers: Records, b: Benchmark, metric: str) -> float:
    """The metric alone; NaN where it is not defined.

    Args:
        metric: "accuracy", the mean score of single answers, or one of the benchmark's scores.
    """
    if metric == ACCURACY:
        return fmean(100 * b.grade(record) for record in answers)
    return b.score(answers).get(metric, math.nan)


def fill(
    points: list[Point], plain: Records, records: ByMethod, b: Benchmark, metric: str
) -> float:
    """Fill in every point's numbers; returns vanilla's.

    Args:
        points: of methods that are in `records`.
        plain: vanilla's answers. records: those of every method, to the same questions.
        metric: as in `measure`.

    Raises:
        FoveateError: the score is not defined for vanilla's answers.
    """
    if metric == ACCURACY:
        return _fill_accuracy(points, plain, records, b)
    return _fill_score(points, plain, records, b, metric)


def _fill_accuracy(points: list[Point], plain: Records, records: ByMethod, b: Benchmark) -> float:
    """Fill in every point's mean score of single answers; returns vanilla's."""
    images = [image_of(record) for record in plain]
    before = [100 * b.grade(record) for record in plain]
    for point in points:
        after = [100 * b.grade(record) for record in records[point.method]]
        changes = [new - old for new, old in zip(after, before, strict=True)]
        point.value, point.difference = fmean(after), fmean(changes)
        point.low, point.high = stats.interval(changes, images) or (None, None)
        point.gained, point.lost = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
        point.p = stats.mcnemar(point.gained, point.lost)
    corrected = stats.holm([point.p for point in points if point.p is not None])
    for point, p in zip(points, corrected, strict=True):
        point.corrected = p
    return fmean(before)


def _fill_score(
    points: list[Point], plain: Records, records: ByMethod, b: Benchmark, metric: str
) -> float:
    """Fill in every point's score of the benchmark; returns vanilla's."""

    def score(answers: Records) -> float:
        return measure(answers, b, metric)

    whole = score(plain)
    if math.isnan(whole):
        raise FoveateError(
            f"{metric} is not defined for vanilla's {len(plain)} answers: ask more questions, or "
            "choose another --metric."
        )
    parts = _without_each(score, plain)
    for point in points:
        value = score(records[point.method])
        if math.isnan(value):
            continue
        change = value - whole
        without = _without_each(score, records[point.method])
        left = [new - old for new, old in zip(without, parts, strict=True)]
        point.value, point.difference = value, change
        point.low, point.high = _ends(change, left) or (None, None)
    return whole


def intervals(b: Benchmark, answers: Records) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of a benchmark's own scores; a score without one is left out."""
    whole, parts = b.score(answers), _without_each(b.score, answers)
    found = {
        name: _ends(value, [p.get(name, math.nan) for p in parts]) for name, value in whole.items()
    }
    return {name: ends for name, ends in found.items() if ends is not None}


def _ends(value: float, without: list[float]) -> tuple[float, float] | None:
    """The 95 % interval of a score, or of a difference, from what it is `_without_each` group.

    How it changes when a group is missing is what that group contributes: the jackknife's
    pseudo-values (Tukey 1958). We resample these instead of single questions where a score is not
    a mean over questions (F1, pairs that must both be right, CHAIR).
    """
    if not without or any(map(math.isnan, [value, *without])):
        return None
    middle = fmean(without)
    pseudo = [value + (len(without) - 1) * (middle - part) for part in without]
    return stats.interval(pseudo, range(len(pseudo)))


def _without_each(measure: Callable[[Records], T], records: Records) -> list[T]:
    """The score without one group of images, for each of up to `GROUPS` groups drawn at random."""
    images = list(dict.fromkeys(map(image_of, records)))
    count = min(len(images), GROUPS)
    if count < 2:
        return []
    random.Random(0).shuffle(images)
    group = {image: number % count for number, image in enumerate(images)}
    return [measure([r for r in records if group[image_of(r)] != g]) for g in range(count)]
