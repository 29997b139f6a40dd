"""The best setting of a sweep, chosen on some images and checked on the others.

The best of many settings looks better than it is: part of its lead is luck. So the images are split
in two halves, once. One half chooses, the other one, which had no say, is where the gain is
measured.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ..base import stats
from ..base.errors import FoveateError
from .benchmark import Benchmark, image_of
from .points import ACCURACY, ByMethod, Point, Records, fill, measure

LOWER = ("chair", "chair_s", "chair_i", "hal", "cog")  # scores that are better when lower
NEITHER = ("length", "yes_ratio", "label_yes_ratio")  # and those that have no better end


@dataclass
class Choice:
    """The setting that one half of the images chose, and what the other half says about it.

    Attributes:
        method, values: the setting, as in `Point`.
        value, vanilla: the metric on the half that chose; too good, as it chose by them.
        questions, images: in that half.
        held_out: the setting on the other half, against vanilla, whose metric there is
            `held_out_vanilla`; one test, so `corrected` is p.
        held_out_questions, held_out_images: in that half.
        lower: whether lower is better.
        verdict: "better" or "worse" than vanilla on the other half, or "not significant".
    """

    method: str
    values: tuple[Any, ...]
    value: float
    vanilla: float
    questions: int
    images: int
    held_out: Point
    held_out_vanilla: float
    held_out_questions: int
    held_out_images: int
    lower: bool
    verdict: str


def choose(
    points: list[Point],
    plain: Records,
    records: ByMethod,
    b: Benchmark,
    metric: str,
    defaults: tuple[Any, ...],
    seed: int,
) -> tuple[Choice | None, str]:
    """The best setting, or None and why there is none.

    Of equally good settings the default is chosen, else the first one.

    Args:
        points: the settings that answered.
        plain: vanilla's answers. records: those of every setting, to the same questions.
        metric: as in `points.fill`.
        defaults: the parameters' values without the sweep.
        seed: of the split, which depends on it and on the images' names alone.
    """
    name = metric.rpartition("/")[2]
    if name in NEITHER:
        return None, f"No setting is named the best: {metric} has no better end."
    if not points:
        return None, "No setting is named the best: none has answered."
    halves = _halves([image_of(record) for record in plain], seed)
    if min(map(len, halves)) < 2:
        return None, (
            "No setting is named the best: choosing on one half of the images and checking on the "
            "other needs 4 images or more."
        )
    parts = [
        (
            [r for r in plain if image_of(r) in half],
            {m: [r for r in rows if image_of(r) in half] for m, rows in records.items()},
        )
        for half in halves
    ]
    lower, (deciding, answers) = name in LOWER, parts[0]
    values = [measure(answers[point.method], b, metric) for point in points]
    vanilla = measure(deciding, b, metric)
    known = [(v, p) for v, p in zip(values, points, strict=True) if not math.isnan(v)]
    if not known or math.isnan(vanilla):
        return None, f"No setting is named the best: {metric} is not defined on half of the images."
    sign = -1 if lower else 1
    value, best = max(known, key=lambda p: (round(sign * p[0], 9), p[1].values == defaults))
    checked = Point(best.method, best.values)
    try:
        held_out_vanilla = fill([checked], *parts[1], b, metric)
    except FoveateError as error:
        return None, f"No setting is named the best: {error}"
    if checked.value is None:
        return None, f"No setting is named the best: {metric} is not defined on half of the images."
    return Choice(
        method=best.method,
        values=best.values,
        value=value,
        vanilla=vanilla,
        questions=len(deciding),
        images=len(halves[0]),
        held_out=checked,
        held_out_vanilla=held_out_vanilla,
        held_out_questions=len(parts[1][0]),
        held_out_images=len(halves[1]),
        lower=lower,
        verdict=_verdict(checked, lower),
    ), ""


def _halves(images: list[Hashable], seed: int) -> tuple[set[Hashable], set[Hashable]]:
    """The images in two halves; of an odd number the second one has one more."""

    def place(image: Hashable) -> bytes:
        return hashlib.sha256(f"{seed} {image}".encode()).digest()

    order = sorted(set(images), key=place)
    return set(order[: len(order) // 2]), set(order[len(order) // 2 :])


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _verdict(point: Point, lower: bool) -> str:
    """Whether the interval leaves out 0, and, for accuracy, McNemar's p is below 0.05, too."""
    ends = None if point.low is None or point.high is None else (point.low, point.high)
    if not stats.significant(0.0 if point.p is None else point.p, ends):
        return "not significant"
    return "better" if (_known(point.difference) < 0) == lower else "worse"


def choice_sentence(choice: Choice, metric: str, unit: str, digits: int) -> str:
    """What was chosen and what the check says, with all numbers."""
    held, said = choice.held_out, {
        "better": "better than vanilla",
        "worse": "worse than vanilla: take vanilla",
        "not significant": "not better than vanilla: the sweep gives no reason to prefer it",
    }[choice.verdict]  # fmt: skip
    unit = "points" if unit == "%" else unit
    ends = "no interval"
    if held.low is not None and held.high is not None:
        ends = f"95 % interval {held.low:+.{digits}f} to {held.high:+.{digits}f}"
    measure = metric if metric == ACCURACY else f"{metric}{', lower is better' * choice.lower}"
    return (
        f"Best: {choice.method}, chosen on {choice.questions} questions about {choice.images} "
        f"images ({measure} {choice.value:.{digits}f}, vanilla {choice.vanilla:.{digits}f}). On "
        f"the other {choice.held_out_questions} questions about {choice.held_out_images} images "
        f"it is {said}: {_known(held.difference):+.{digits}f} {unit} ({ends}), "
        f"{_known(held.value):.{digits}f} against {choice.held_out_vanilla:.{digits}f}."
    )
