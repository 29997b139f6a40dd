"""The best setting of a sweep: chosen on half of the images, checked on the other half."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pytest

from foveate.base import stats
from foveate.evaluation.benchmark import Benchmark, EvalRecord, Sample, percent
from foveate.evaluation.choice import Choice, _halves, choice_sentence, choose
from foveate.evaluation.data import Data
from foveate.evaluation.points import Point


@dataclass(frozen=True)
class Doors(Benchmark):
    """Answers are right or wrong; scores in both directions, and one that may be undefined."""

    def read(self, data: Data) -> Iterator[Sample]:
        yield Sample("all", 0, "0", "A door?", "A door?", "yes")

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        given = [r["answer"] == r["label"] for r in records]
        wrong = percent(not right for right in given)
        rare = math.nan if all(given) else wrong
        return {"all/f1": 100 - wrong, "all/chair_s": wrong, "length": 3.0, "all/rare": rare}

    def table(self, scores: dict[str, float]) -> Any:
        return ["Score", "Value"], [[name, value] for name, value in scores.items()]


Doors.name = "doors"  # after the class: in no registry


def records(right: list[bool], each: int = 2, name: str = "picture") -> list[EvalRecord]:
    """Two questions about each image."""
    return [
        {
            "benchmark": "doors",
            "split": "all",
            "line": line,
            "id": str(line),
            "image": f"{name} {line // each}",
            "question": "A door?",
            "prompt": "A door?",
            "label": "yes",
            "meta": {},
            "method": "",
            "answer": "yes" if good else "no",
        }
        for line, good in enumerate(right)
    ]


def chosen(
    plain: list[bool],
    settings: dict[float, list[bool]],
    metric: str = "accuracy",
    default: float = 0.8,
    seed: int = 0,
) -> tuple[Choice | None, str]:
    points = [Point(f"clvs({value})", (value,)) for value in settings]
    told = {f"clvs({value})": records(right) for value, right in settings.items()}
    return choose(points, records(plain), told, Doors(), metric, (default,), seed)


def noise(seed: int, count: int = 80, share: float = 0.5) -> list[bool]:
    rng = random.Random(seed)
    return [rng.random() < share for _ in range(count)]


def test_every_number_is_that_of_counting_by_hand() -> None:
    plain, settings = noise(0), {0.1: noise(1, share=0.6), 0.5: noise(2, share=0.9), 0.8: noise(3)}
    choice, why = chosen(plain, settings)
    assert choice is not None
    assert why == ""
    images = [r["image"] for r in records(plain)]
    first, second = _halves(images, 0)
    assert not first & second
    assert first | second == set(images)
    assert (choice.images, choice.held_out_images) == (len(first), len(second)) == (20, 20)

    def mean(right: list[bool], half: Any) -> float:
        return 100 * fmean(r for r, image in zip(right, images, strict=True) if image in half)

    lead = {value: mean(right, first) for value, right in settings.items()}
    best = max(lead, key=lambda value: lead[value])
    assert (choice.values, choice.method) == ((best,), f"clvs({best})") == ((0.5,), "clvs(0.5)")
    assert (choice.value, choice.vanilla) == pytest.approx((lead[best], mean(plain, first)))
    held = choice.held_out
    assert held.value == pytest.approx(mean(settings[best], second))
    assert choice.held_out_vanilla == pytest.approx(mean(plain, second))
    pairs = [
        (100.0 * (a - b), image)
        for a, b, image in zip(settings[best], plain, images, strict=True)
        if image in second
    ]
    assert held.difference == pytest.approx(fmean(change for change, _ in pairs))
    assert (held.low, held.high) == stats.interval(*zip(*pairs, strict=True))
    assert held.gained == sum(change > 0 for change, _ in pairs)
    assert held.p == held.corrected == stats.mcnemar(held.gained, held.lost or 0)
    assert choice.verdict == "better"
    told = choice_sentence(choice, "accuracy", "%", 2)
    assert told.startswith("Best: clvs(0.5), chosen on 40 questions about 20 images (accuracy ")
    assert f"it is better than vanilla: {held.difference:+.2f} points (95 % interval " in told


def test_the_split_depends_on_seed_and_names_alone() -> None:
    images = [f"{i}.jpg" for i in range(101)]
    first, second = _halves(images, 0)
    assert (len(first), len(second)) == (50, 51)
    shuffled = [*images, *images]
    random.Random(1).shuffle(shuffled)
    assert _halves(shuffled, 0) == (first, second)
    assert _halves(images, 1) != (first, second)
    fewer = _halves(images[:60], 0)[0]
    assert len(fewer & first) > 20, "most images keep their half when others are left out"


def test_luck_is_not_called_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 settings that are all as good as vanilla, the best one leads by luck."""
    quick = functools.partial(stats.interval, resamples=200)
    monkeypatch.setattr(stats, "interval", quick)
    monkeypatch.setattr(stats, "holm", list)  # statsmodels' collects garbage every time
    better, leads, gains = 0, [], []
    for run in range(40):
        settings = {n / 10: noise(1000 * run + n) for n in range(1, 25)}
        choice, _ = chosen(noise(1000 * run), settings)
        assert choice is not None
        better += choice.verdict == "better"
        leads.append(choice.value - choice.vanilla)
        gains.append(choice.held_out.difference or 0.0)
    assert better <= 4, "as often as chance allows"
    assert fmean(leads) > 10, "it looks good where it was chosen"
    assert abs(fmean(gains)) < 4, "and is not elsewhere"


def test_a_setting_that_hurts_is_said_to() -> None:
    plain = noise(5, share=1.0)
    choice, _ = chosen(plain, {0.1: noise(6, share=0.4), 0.8: noise(7, share=0.5)})
    assert choice is not None
    assert choice.verdict == "worse"
    assert "worse than vanilla: take vanilla" in choice_sentence(choice, "accuracy", "%", 1)
    same, _ = chosen(plain, {0.8: plain})
    assert same is not None
    assert same.verdict == "not significant"
    said = choice_sentence(same, "accuracy", "%", 1)
    assert "not better than vanilla: the sweep gives no reason to prefer it: +0.0 points" in said


@pytest.mark.parametrize(("metric", "lower"), [("all/f1", False), ("all/chair_s", True)])
def test_scores_have_their_better_end(metric: str, lower: bool) -> None:
    settings = {0.1: noise(1, share=0.3), 0.5: noise(2, share=0.95)}
    choice, _ = chosen(noise(0), settings, metric)
    assert choice is not None
    assert (choice.values, choice.lower, choice.verdict) == ((0.5,), lower, "better")
    assert choice.held_out.p is None
    assert (choice.held_out.difference or 0.0) * (-1 if lower else 1) > 20
    assert ("lower is better" in choice_sentence(choice, metric, "%", 1)) == lower


def test_of_equally_good_settings_the_default_is_chosen_else_the_first() -> None:
    good = noise(1, share=0.9)
    for default, expected in ((0.5, 0.5), (0.9, 0.1)):
        choice, _ = chosen(noise(0), {0.1: good, 0.5: good, 0.7: noise(2)}, default=default)
        assert choice is not None
        assert choice.values == (expected,)


@pytest.mark.parametrize(
    ("count", "metric", "why"),
    [
        (6, "accuracy", "needs 4 images or more"),
        (80, "length", "length has no better end"),
        (80, "all/rare", "all/rare is not defined on half of the images"),
    ],
)
def test_where_none_can_be_named_a_sentence_says_why(count: int, metric: str, why: str) -> None:
    plain = [True] * count if "rare" in metric else noise(0, count)
    choice, said = chosen(plain, {0.8: noise(1, count)}, metric)
    assert choice is None
    assert why in said
    assert said.startswith("No setting is named the best: ")
    assert said.endswith(".")


def test_without_an_answer_there_is_none() -> None:
    choice, said = chosen(noise(0), {})
    assert choice is None
    assert said == "No setting is named the best: none has answered."
    never, said = chosen(noise(0), {0.8: [True] * 80}, "all/rare")
    assert never is None
    assert said.endswith("all/rare is not defined on half of the images.")
