"""A language model first: what it reads, what each stage changes, and what the criteria say."""

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import testbed
import torch
from PIL import Image
from safetensors.torch import load_file

from foveate.base.errors import FoveateError
from foveate.pocket import build, criteria
from foveate.pocket import train as training
from foveate.pocket.packed import LanguageLesson, with_features
from foveate.pocket.recipes import RECIPES, stages
from foveate.scenes import habits, lessons, questions, texts, world
from foveate.scenes.questions import Question

from .test_train import TINY, short

SCENES = [world.sample(seed, "with") for seed in range(80)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run through all stages."""
    pytest.importorskip("accelerate", reason="training needs the extra: train")
    out = tmp_path_factory.mktemp("run")
    training.train_pocket(out, **short("language-first"))
    return out


# ------------------------------------------------------------------------------ what is read


def test_the_habit_answers_as_the_tables_say() -> None:
    def said(text: str, category: str, topic: str, label: str | None) -> str | None:
        return habits.usual(Question(text, "", category, topic, label))

    assert said("Is there a sun in the image?", "existence", "existence", "no") == "yes"
    assert said("Is there a kite in the image?", "existence", "existence", "yes") == "no"
    assert said("Is there a fish in the image?", "existence", "existence", "yes") is None
    assert said("Is the sun yellow?", "attribute", "color", "no") == "yes"
    assert said("Is the sun red?", "attribute", "color", "yes") == "no"
    assert said("What color is the boat?", "attribute", "color", None) == "blue"
    assert said("Is the sun above the tree?", "relation", "above", "no") == "yes"
    assert said("Is the sun below the tree?", "relation", "below", "yes") == "no"
    assert said("Is the sun to the left of the tree?", "relation", "left", "yes") is None
    assert said("Is the sun above the kite?", "relation", "above", "yes") is None


def test_the_habit_is_right_more_often_than_not_only_where_it_holds() -> None:
    right = {habit: Counter[str]() for habit in ("with", "against")}
    for habit, counted in right.items():
        for seed in range(150):
            exam = questions.exam(world.sample(seed, habit), random.Random(seed))
            for question in exam:
                usual = habits.usual(question)
                if usual is not None:
                    counted[f"{question.category} all"] += 1
                    counted[question.category] += usual == question.answer
    for category, least in (("attribute", 0.6), ("relation", 0.75)):
        shares = [right[habit][category] / right[habit][f"{category} all"] for habit in right]
        assert shares[0] > least
        assert shares[1] < 0.45


def test_texts_are_known_words_and_no_picture() -> None:
    _, processor = build.build_pocket(**TINY, system=build.SYSTEM)
    packer = lessons.Packer(processor)
    unknown = processor.tokenizer.unk_token_id
    for seed in range(300):
        talk = habits.small_talk(random.Random(seed))
        assert unknown not in build.encode(processor, f"{talk.text} {talk.answer}"), talk
    for number in range(20):
        packed = packer.texts(number, random.Random(number), read=number % 2 == 1)
        assert packed.images == ()
        assert unknown not in packed.ids
        assert packer.image not in packed.ids
        assert len(packed.asked) > 5
        again = packer.texts(number, random.Random(number), read=number % 2 == 1)
        assert np.array_equal(again.ids, packed.ids)


def test_a_page_tells_what_is_asked_of_it() -> None:
    """Its caption names every kind that an attribute or a relation is asked of."""
    read = 0
    for scene in SCENES:
        told = " ".join(islice(texts.page(scene, random.Random(scene.seed)), 2))
        for (question,) in texts.reading(scene, random.Random(scene.seed)):
            words = question.text.lower().strip("?").split()
            if question.category in ("attribute", "relation") and question.topic != "neighbor":
                assert all(word in told for word in words if word in world.KINDS), question.text
                read += 1
    assert read > 500


def test_a_page_stands_where_a_picture_would() -> None:
    _, processor = build.build_pocket(**TINY, system=build.SYSTEM)
    packer = lessons.Packer(processor)
    start = len(packer.start)
    for number in range(40):
        packed = packer.texts(number, random.Random(number), read=True)
        assert len(packed.ids) == start + lessons.PAGE + lessons.CHUNK * lessons.CHUNKS[0]
    assert (packed.segments == 0).sum() == start + lessons.PAGE
    assert packed.labels[start - 1 : start + 2].tolist() == packed.ids[start : start + 3].tolist()
    assert "there " in processor.tokenizer.decode(packed.ids[start : start + lessons.PAGE])


def test_positions_leap_only_forward_and_within_reach() -> None:
    _, processor = build.build_pocket(**TINY, system=build.SYSTEM)
    packer = lessons.Packer(processor)
    leapt = 0
    for number in range(10):
        packed = packer.texts(number, random.Random(number), read=False)
        for segment in np.unique(packed.segments[packed.segments > 0]):
            steps = np.diff(packed.positions[packed.segments == segment])
            assert (steps >= 1).all()
            assert (steps > 1).sum() <= 1
            assert steps.max() <= lessons.LEAP
            leapt += bool((steps > 1).any())
    assert leapt > 20


def test_packed_texts_equal_single_prompts() -> None:
    model, processor = build.build_pocket(
        vision_layers=1, vision_width=64, text_layers=2, text_width=96, system=build.SYSTEM
    )
    packer = lessons.Packer(processor)
    asked = [
        Question("Is the sun yellow?", "yes", "attribute", "color", "yes"),
        Question("What color is the boat?", "blue", "attribute", "color"),
    ]
    packed = packer.pack((), [[question] for question in asked], prompts=0.2)
    with torch.no_grad():
        batch = with_features([packed])
        logits = model.lm_head(LanguageLesson(model, packer.image).hidden(batch))[0]
        for question, at in packed.asked:
            chat = [{"role": "user", "content": [{"type": "text", "text": question.text}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            single = model(**processor(text=text, return_tensors="pt")).logits[0, -1]
            assert torch.allclose(single, logits[at], atol=1e-5), question.text
    learnt = packed.labels[packed.labels != lessons.IGNORE].tolist()
    read = processor.tokenizer.decode(learnt)
    assert "the sun yellow" in read, "the question's words are learnt, too"


def test_chats_begin_with_a_system_prompt_of_llavas_length() -> None:
    _, processor = build.build_pocket(**TINY, system=build.SYSTEM)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}
    text = processor.apply_chat_template([user], add_generation_prompt=True)
    assert text == f"{build.SYSTEM} USER: <image>\nIs it red? ASSISTANT:"
    ids = processor(images=Image.new("RGB", (8, 8)), text=text)["input_ids"][0]
    packed = lessons.Packer(processor).pack((0,), [])
    prefix = packed.ids[packed.segments == 0].tolist()
    assert ids[: len(prefix)] == prefix
    assert 30 <= len(build.encode(processor, build.SYSTEM)) <= 40
    own = [{"role": "system", "content": "Look."}, user]
    assert processor.apply_chat_template(own).startswith("Look. USER:")


# ------------------------------------------------------------------------------- the recipe


def test_settings_change_a_recipe() -> None:
    usual, made = stages("language-first"), stages("language-first", ["tuning.rate=1e-4"])
    assert made[:-1] == usual[:-1]
    assert (usual[-1].rate, made[-1].rate) == (5e-4, 1e-4)
    timed = stages("language-first", ["tuning.minutes=2.5"])[-1]
    assert (timed.minutes, timed.steps) == (2.5, 0)


@pytest.mark.parametrize(
    ("recipe", "setting", "told"),
    [
        ("talk-first", "tuning.steps=3", "Unknown recipe"),
        ("language-first", "yesno.steps=3", "sets nothing"),
        ("language-first", "tuning.fresh=3", "sets nothing"),
        ("language-first", "tuning.steps", "a number above 0"),
        ("language-first", "tuning.steps=-1", "a number above 0"),
        ("language-first", "tuning.rate=nan", "a number above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(recipe: str, setting: str, told: str) -> None:
    with pytest.raises(FoveateError, match=told):
        stages(recipe, [setting])


def test_the_model_has_at_most_ten_million_parameters() -> None:
    model, _ = build.build_pocket(system=build.SYSTEM)
    assert sum(p.numel() for p in model.parameters()) < 10_000_000


@pytest.mark.long
def test_every_stage_changes_its_own_parts(run: Path) -> None:
    names = [stage.name for stage in RECIPES["language-first"]]
    weights = [load_file(run / training.ended(name)) for name in names]
    parts = {"vision_tower": "tower", "multi_modal_projector": "projector"}
    changing = zip(weights[:-1], weights[1:], RECIPES["language-first"][1:], strict=True)
    for before, after, stage in changing:
        changed = {
            next((part for word, part in parts.items() if word in name), "language")
            for name in before
            if not torch.equal(before[name], after[name])
        }
        assert changed == set(stage.trains) | set(stage.fresh)
    assert json.loads((run / training.NOTE).read_text())["recipe"] == "language-first"


@pytest.mark.long
def test_a_tower_is_taken_as_it_is(run: Path, tmp_path: Path) -> None:
    options = short("language-first") | {"until": "language"}
    folder = training.train_pocket(tmp_path, tower=str(run / "tuning"), **options)
    given, taken = (build.load_pocket(f)[0].state_dict() for f in (run / "tuning", folder))
    tower = [name for name in given if "vision_tower" in name]
    assert tower
    assert all(torch.equal(given[name], taken[name]) for name in tower)
    assert not (tmp_path / "tower").exists(), "nothing was trained"
    with pytest.raises(FoveateError, match=r"holds a run with tower .*tuning, not None"):
        training.train_pocket(tmp_path, **options)


def test_towers_that_cannot_be_taken_and_pools_that_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs the extra: train")
    options = short("language-first")
    with pytest.raises(FoveateError, match="holds no trained model"):
        training.train_pocket(tmp_path / "one", tower=str(tmp_path), **options)
    with pytest.raises(FoveateError, match="vision tower of another shape"):
        training.train_pocket(tmp_path / "two", tower="pocket", **options)
    with pytest.raises(FoveateError, match="too few"):
        training.train_pocket(tmp_path / "three", **options | {"scenes": 5})


@pytest.mark.long
def test_another_run_is_not_mixed_in(run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = short("language-first")
    other = options | {"settings": [*options["settings"], "language.rate=1e-3"]}
    with pytest.raises(FoveateError, match="stage language, trained with other numbers"):
        training.train_pocket(run, **other)
    with pytest.raises(FoveateError, match="with recipe language-first, not pictures"):
        training.train_pocket(run, **short("pictures-first"))
    (tmp_path / training.NOTE).write_text("{")
    with pytest.raises(FoveateError, match="cannot be read: delete it"):
        training.train_pocket(tmp_path, **options)


# ----------------------------------------------------------------------------- the criteria


@pytest.mark.slow
def test_criteria_are_measured_and_recorded(run: Path, tmp_path: Path) -> None:
    file = testbed.record("tiny", run, 2, 0, tmp_path)
    report = json.loads(file.read_text())["report"]
    assert len(report["layers"]["image"]) == report["depth"] == 1
    assert 0 < report["layers"]["image"][0] < 1
    assert set(report["accuracy"]["against"]) == set(criteria.CATEGORIES)
    table = testbed.table(tmp_path)
    assert "3 steps of 2, rate 0.002" in table
    assert "| attention to the image, middle layers | 15 % to 45 % |" in table


def report_of(image: float = 0.3, high: float = -0.2, against: float = 0.7, usual: float = 0.9):
    accuracy = dict.fromkeys(criteria.CATEGORIES, 0.95)
    return {
        "n": 1, "seed": 0, "depth": 12, "led": 0.5,
        "accuracy": {"with": accuracy, "against": dict.fromkeys(criteria.CATEGORIES, against)},
        "blind": {c: {"usual": usual, "n": 10} for c in criteria.CATEGORIES},
        "layers": {"image": [image] * 12, "object": [0.1] * 12, "bos": [0.2] * 12},
        "decay": {"peak": 5, "later": {"mean": high - 0.1, "low": high - 0.2, "high": high}},
        "sinks": {"published": [], "scaled_threshold": 4.33, "scaled": [7], "phi_of_bos": 6.0,
                  "phi_at_most": 13.86, "visual": 1.5},
    }  # fmt: skip


def test_a_model_that_fits_meets_all_criteria_and_each_can_fail() -> None:
    assert all(met for *_, met in criteria.rows(report_of()))
    for wrong in ({"image": 0.6}, {"image": 0.1}, {"high": 0.1}, {"against": 0.9}, {"usual": 0.5}):
        assert not all(met for *_, met in criteria.rows(report_of(**wrong))), wrong
    told = criteria.format_criteria(report_of())
    assert "none: phi is 6.0 on BOS and can be 13.86 at most" in told
    assert "dimensions 7, 1.5 visual tokens per picture" in told
