"""pocket-bench: its questions against the scenes, its negatives against the habit, its scores."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import re
from collections import Counter
from itertools import pairwise, product
from math import isnan
from typing import Any

import numpy as np
import pytest

from foveate import FoveateError
from foveate.benchmarks.pocket import CATEGORIES, HABITS, TASKS, YES_NO, PocketBench
from foveate.evaluation.benchmark import EvalRecord, Problems, Sample, parse
from foveate.insight.heads import FIRST_SCENE as FIRST_OF_HEADS
from foveate.pocket.exam import EXAM_SEED
from foveate.scenes import lessons, questions, world
from foveate.scenes.world import COLORS, KINDS, PATTERNS, SIZES, Scene, Thing
from tests.goldens import records


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return PocketBench().samples()


def scene_of(sample: Sample) -> Scene:
    habit, _, seed = str(sample.image_name).rpartition("-")
    return sampled(int(seed), habit)


sampled = functools.cache(world.sample)


def content(found: list[Sample]) -> dict[tuple[str, int], list[Any]]:
    """What is asked about what, by split and line."""
    return {(s.split, s.line): [s.id, s.image_name, s.prompt, s.label, s.meta] for s in found}


def of(samples: list[Sample], *categories: str) -> list[Sample]:
    return [s for s in samples if s.meta["category"] in categories]


# -- the list of questions -------------------------------------------------------------------------


def test_questions_are_the_same_on_every_machine_and_need_no_drawing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw(*_: Any) -> None:
        raise AssertionError("a picture was drawn")

    monkeypatch.setattr(world, "draw", draw)
    first = PocketBench().samples()[:400]
    text = json.dumps(sorted(content(first).items()))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest[:16] == "4040a2a0abc670c6"


def test_every_split_has_its_questions_in_order(samples: list[Sample]) -> None:
    problems = Problems()
    assert content(PocketBench().samples(problems=problems)) == content(samples)
    assert not problems  # repeated ids, for one
    for category in CATEGORIES:
        for habit in HABITS:
            split = [s for s in samples if s.split == f"{category}/{habit}"]
            assert [s.line for s in split] == list(range(200))
            assert all(str(s.image_name).startswith(f"{habit}-") for s in split)
            assert scene_of(split[0]).habit == habit
    assert len(samples) == 200 * len(CATEGORIES) * len(HABITS)


def test_half_of_the_labels_are_yes_and_pairs_lie_side_by_side(samples: list[Sample]) -> None:
    for category in YES_NO:
        asked = of(samples, category)
        assert Counter(s.label for s in asked) == {"yes": 200, "no": 200}
        for habit in HABITS:
            split = [s for s in asked if s.split == f"{category}/{habit}"]
            for yes, no in zip(split[::2], split[1::2], strict=True):
                assert (yes.label, no.label) == ("yes", "no")
                assert yes.image_name == no.image_name
                assert yes.question != no.question
    tasks = Counter(s.meta["topic"] for s in of(samples, "pairs"))
    assert set(tasks) == set(TASKS)
    assert min(tasks.values()) >= 90
    assert sum(s.label == "one" for s in of(samples, "number")) == 200
    assert max(Counter(s.label for s in of(samples, "print")).values()) <= 60  # of 400


def test_a_scene_is_asked_many_questions(samples: list[Sample]) -> None:
    images = Counter(s.image_name for s in samples)
    assert max(images.values()) == 17
    assert len(samples) / len(images) > 8
    in_order = [s.image_name for s in samples]
    assert sum(a != b for a, b in pairwise(in_order)) == len(images) - 1


def test_more_questions_and_fewer_categories_change_no_question(samples: list[Sample]) -> None:
    few = PocketBench(categories=("print", "pairs"), questions=20).samples()
    assert {s.split for s in few} == {f"{c}/{h}" for c in ("print", "pairs") for h in HABITS}
    assert len(few) == 80
    assert all(content(samples)[key] == value for key, value in content(few).items())
    assert {s.meta["category"] for s in samples[:80]} == set(CATEGORIES)
    other = PocketBench(categories=("print",), questions=20, seed=1).samples()
    assert not {s.image_name for s in other} & {s.image_name for s in samples}


def test_length_limits_and_the_suffix_reach_the_samples() -> None:
    bench = PocketBench(questions=2, word_tokens=3, max_new_tokens=99, suffix=" One word.")
    limits = {
        s.meta["category"]: s.meta.get("max_new_tokens", bench.max_new_tokens)
        for s in bench.samples()
    }
    assert limits == {**dict.fromkeys(CATEGORIES, 3), "captions": 99}
    assert all(s.prompt == s.question + " One word." for s in bench.samples())
    assert parse(str(bench)) == (bench,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": ()}, "at least one category"),
        ({"categories": ("existence",)}, "categories must be a tuple of 'existence-random' or"),
        ({"questions": 7}, "must be an even number"),
        ({"questions": 0}, "must be an even number"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"word_tokens": 0}, "word_tokens must be 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        PocketBench(**options)


# -- the scenes ------------------------------------------------------------------------------------


def test_no_scene_was_seen_in_training_in_exams_or_in_the_search_for_heads() -> None:
    seeds = {
        scene_of(s).seed for k in (0, 1, 9) for s in PocketBench(questions=20, seed=k).samples()
    }
    trained = lessons.Pool("", 30_000, 14_000)  # type: ignore[arg-type]
    assert max(trained.view(item)[0].seed for item in (29_999, 43_999)) < FIRST_OF_HEADS
    assert FIRST_OF_HEADS + 1_000_000 < questions.FIRST_HELD_OUT < EXAM_SEED
    assert min(seeds) > EXAM_SEED + 400 * 1_000_003  # hundreds of exams, by their seeds


def test_pictures_are_drawn_when_asked_for(samples: list[Sample]) -> None:
    sample = pickle.loads(pickle.dumps(samples[0]))  # workers of another process get it
    image = sample.load()
    assert (image.size, image.mode) == ((768, 768), "RGB")
    assert np.array_equal(np.asarray(image), np.asarray(world.draw(scene_of(sample), 768)))


# -- the truth -------------------------------------------------------------------------------------


def asked_kinds(text: str) -> list[str]:
    """The kinds of things in a question, in its order, plurals read as one of them."""
    words = [w for w in re.findall(r"[a-z]+", text.lower()) if w not in ("image", "picture")]
    return [k for w in words for k in KINDS if w in (k, questions.plural(k))]


def only(scene: Scene, kind: str) -> Thing:
    (thing,) = (t for t in scene.things if t.kind == kind)
    return thing


def is_true(text: str, scene: Scene) -> bool:
    """Whether a yes/no question holds, read from its words and nothing else."""
    kinds, words = asked_kinds(text), re.findall(r"[a-z]+", text.lower())
    there = Counter(t.kind for t in scene.things)
    if values := [w for w in words if w in (*COLORS, *PATTERNS, *SIZES)]:
        thing = only(scene, kinds[0])
        return values[0] in (thing.color, thing.pattern, thing.size)
    if len(kinds) == 2:
        first, second = (only(scene, kind) for kind in kinds)
        (side,) = {"left", "right", "above", "below"} & set(words)
        return {
            "left": first.x < second.x,
            "right": first.x > second.x,
            "above": first.y < second.y,
            "below": first.y > second.y,
        }[side]
    if half := {"left", "right", "top", "bottom"} & set(words):
        thing = only(scene, kinds[0])
        return {
            "left": thing.x < 0.5,
            "right": thing.x > 0.5,
            "top": thing.y < 0.5,
            "bottom": thing.y > 0.5,
        }[half.pop()]
    numbers = [w for w in words if w in questions.NUMBERS]
    return there[kinds[0]] == questions.NUMBERS.index(numbers[0]) if numbers else kinds[0] in there


def test_yes_and_no_agree_with_the_scene(samples: list[Sample]) -> None:
    for sample in of(samples, *YES_NO):
        assert is_true(sample.question, scene_of(sample)) == (sample.label == "yes"), sample


def test_numbers_prints_and_captions_agree_with_the_scene(samples: list[Sample]) -> None:
    for sample in of(samples, "number", "print", "captions"):
        scene, kinds = scene_of(sample), asked_kinds(sample.question)
        if sample.meta["category"] == "number":
            count = sum(t.kind == kinds[0] for t in scene.things)
            assert sample.label == questions.NUMBERS[count]
        elif sample.meta["category"] == "print":
            thing = only(scene, kinds[0])
            assert sample.label == thing.print.lower() != ""
            ((left, top, right, bottom),) = sample.meta["boxes"]
            assert [left, top] == pytest.approx([768 * side for side in thing.box[:2]], abs=1)
            assert [right, bottom] == pytest.approx([768 * side for side in thing.box[2:]], abs=1)
            assert 0 <= left < right <= 768
            assert 0 <= top < bottom <= 768
        else:
            assert sample.label == sorted({t.kind for t in scene.things})


def test_popular_and_adversarial_negatives_are_what_the_training_scenes_make_them(
    samples: list[Sample],
) -> None:
    training = [{t.kind for t in world.sample(seed, "with").things} for seed in range(2000)]
    shown = Counter(kind for kinds in training for kind in kinds)
    together = Counter(pair for kinds in training for pair in product(kinds, kinds))

    def beside(kind: str, there: set[str]) -> float:
        """The share of the scenes with each thing that is there that show `kind` too."""
        return sum(together[kind, other] / shown[other] for other in there) / len(there)

    for habit in HABITS:
        frequency: dict[str, float] = {}
        company: dict[str, float] = {}
        for kind_of_negative in ("random", "popular", "adversarial"):
            split = f"existence-{kind_of_negative}/{habit}"
            negatives = [s for s in samples if s.split == split and s.label == "no"]
            kinds = [asked_kinds(s.question)[0] for s in negatives]
            there = [{t.kind for t in scene_of(s).things} for s in negatives]
            frequency[kind_of_negative] = sum(shown[k] for k in kinds) / len(kinds)
            company[kind_of_negative] = sum(map(beside, kinds, there)) / len(kinds)
            absent = [[k for k in KINDS if k not in seen] for seen in there]
            if kind_of_negative == "popular":
                for kind, left in zip(kinds, absent, strict=True):
                    more = [k for k in left if world.frequency(k) > world.frequency(kind)]
                    assert len(more) < 6
            if kind_of_negative == "adversarial":
                for sample, kind, left in zip(negatives, kinds, absent, strict=True):
                    themes = Counter(KINDS[t.kind].theme for t in scene_of(sample).things)
                    more = [k for k in left if themes[KINDS[k].theme] > themes[KINDS[kind].theme]]
                    assert len(more) < 3
            if kind_of_negative == "random":
                assert set(kinds) == set(KINDS)
        assert frequency["popular"] > 1.15 * frequency["random"]
        # against the habit a scene mixes all themes, so that nothing belongs there much more
        least = {"with": 2.0, "against": 1.2}[habit]
        assert company["adversarial"] > least * company["random"]
        assert company["adversarial"] > 1.1 * company["popular"]


# -- scores ----------------------------------------------------------------------------------------


def record(split: str, line: int, label: Any, answer: str | None) -> EvalRecord:
    category, habit = split.split("/")
    meta = {"category": category, "habit": habit, "topic": ""}
    return {"split": split, "line": line, "id": "", "label": label, "answer": answer, "meta": meta}


def test_yes_and_no_by_hand() -> None:
    answers = ["yes", "Yes.", "no", "yes", "no", "a cup", None, "no"]
    given = [
        record("attribute/with", i, ("yes", "no")[i % 2], a) for i, a in enumerate(answers)
    ]  # yes: hit, missed, missed, lost; no: false, false, unread, rejected
    scores = PocketBench().score(reversed(given))
    assert scores == {
        "attribute/with/accuracy": pytest.approx(100 * 2 / 7),
        "attribute/with/precision": pytest.approx(100 / 3),
        "attribute/with/recall": pytest.approx(100 / 3),
        "attribute/with/f1": pytest.approx(100 / 3),
        "attribute/with/yes_ratio": pytest.approx(100 * 3 / 7),
    }
    assert [PocketBench().correct(r) for r in given] == [1, 0, 0, 0, 0, 0, None, 1]
    assert PocketBench().notes(given) == [
        "1 of 8 questions have no answer and are left out.",
        "1 of 7 answers to yes/no questions say neither and count as wrong, such as 'a cup'.",
    ]
    silent = PocketBench().score([record("relation/against", 0, "yes", "no")])
    assert isnan(silent["relation/against/precision"])


def test_pairs_need_both_answers() -> None:
    answers = ["yes", "no", "yes", "yes", "no", "no", "yes", None]
    given = [record("pairs/with", i, ("yes", "no")[i % 2], a) for i, a in enumerate(answers)]
    assert PocketBench().score(reversed(given)) == {
        "pairs/with/acc": pytest.approx(100 * 5 / 7),
        "pairs/with/acc+": pytest.approx(25),
        "pairs/with/score": pytest.approx(100 * 5 / 7 + 25),
    }


def test_numbers_and_print_must_be_the_label() -> None:
    told = [("two", "two"), ("two", "2"), ("two", "Two."), ("two", "one two"), ("one", "")]
    given = [record("number/with", i, label, answer) for i, (label, answer) in enumerate(told)]
    assert [PocketBench().correct(r) for r in given] == [1, 1, 1, 0, 0]
    assert PocketBench().score(given) == {"number/with/accuracy": pytest.approx(60)}
    told = [("e", "E"), ("e", '"e"'), ("4", "4"), ("4", "four"), ("k", "the letter k")]
    given = [record("print/against", i, label, answer) for i, (label, answer) in enumerate(told)]
    assert [PocketBench().correct(r) for r in given] == [1, 1, 1, 0, 0]
    assert PocketBench().notes(given) == []


def test_captions_by_hand() -> None:
    captions = [
        (
            ["boat", "cup", "fish", "sun"],
            "there are three fish, a red boat and a hat. the fish ...",
        ),
        (["key"], "A KEY and two keys"),
        (["lamp", "star"], "nothing at all"),
        (["car"], None),
    ]
    given = [record("captions/with", i, *told) for i, told in enumerate(captions)]
    assert [PocketBench().correct(r) for r in given] == [0, 1, 1, None]
    scores = PocketBench().score(given)
    assert scores == {  # named: fish, boat, hat, fish; key, key; nothing
        "captions/with/chair": pytest.approx(100 / 6),
        "captions/with/cover": pytest.approx(100 * 3 / 7),
        "captions/with/hal": pytest.approx(100 / 3),
        "captions/with/length": pytest.approx((13 + 5 + 3) / 3),
    }
    assert isnan(PocketBench().score(given[2:])["captions/with/chair"])


def test_the_table_has_both_habits_side_by_side(samples: list[Sample]) -> None:
    bench = PocketBench(questions=10)
    few = bench.samples()
    scores = bench.score(records(few, [_right(s) for s in few]))
    heads, rows = bench.table(scores)
    assert [row[0] for row in rows] == [
        "Existence, random",
        "Existence, popular",
        "Existence, adversarial",
        "Attribute",
        "Relation",
        "Pairs",
        "Pairs, both right",
        "Number",
        "Print",
        "Captions, CHAIR",
        "Captions, Cover",
        "Captions, Hal",
    ]
    assert heads[1:3] == ["with the habit", "with, F1"]
    assert rows[3] == ["Attribute", 100, 100, 50, 100, 100, 50]
    assert rows[7] == ["Number", 100, "", "", 100, "", ""]
    assert [row[1] for row in rows[-3:]] == [0, 100, 0]
    half = {k: v for k, v in scores.items() if "/with/" in k}
    assert bench.table(half)[1][0] == ["Existence, random", 100, 100, 50, "", "", ""]
    assert bench.table({})[1] == []
    assert bench.score([]) == {}


def _right(sample: Sample) -> str:
    label = sample.label
    return ", ".join(label) if isinstance(label, list) else label
