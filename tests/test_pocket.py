"""The drawn world agrees with its ground truth, questions with scenes, and the model with both."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.pocket import build
from foveate.scenes import lessons, questions, world
from foveate.scenes.export import export
from foveate.scenes.phrases import OPEN, PHRASES
from foveate.scenes.world import COLORS, KINDS, PATTERNS, SIZES

SCENES = [world.sample(seed, habit) for seed in range(60) for habit in ("with", "against")]


# ---------------------------------------------------------------------------------- world


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(KINDS) >= 16
    assert (len(COLORS), len(SIZES), len(PATTERNS)) == (8, 3, 3)
    assert {len(s.things) for s in SCENES} == {3, 4, 5, 6, 7}
    assert {t.print for s in SCENES for t in s.things} > {"", "2", "K"}
    assert {s.background for s in SCENES} == set(world.BACKGROUNDS)


def test_scenes_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'tokenizers'));"
        "from foveate.scenes import export, lessons"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_scene_is_data() -> None:
    scene = SCENES[0]
    again = world.Scene.from_dict(json.loads(json.dumps(scene.to_dict())))
    assert again == scene == world.sample(0, "with")
    assert np.array_equal(world.draw(again, 96), world.draw(scene, 96))
    assert world.draw(scene, 64).size == (64, 64)


def test_unknown_habit_is_refused() -> None:
    with pytest.raises(ValueError, match="against"):
        world.sample(0, "sideways")


@pytest.mark.parametrize("size", [96, 200])
def test_masks_lie_in_their_boxes_and_apart(size: int) -> None:
    for scene in SCENES[:12]:
        found = world.masks(scene, size)
        assert found.shape == (len(scene.things), size, size)
        assert found.sum(0).max() <= 1
        for mask, (x0, y0, x1, y1) in zip(found, world.boxes(scene, size), strict=True):
            rows, columns = np.nonzero(mask)
            assert columns.min() >= x0 - 1
            assert rows.min() >= y0 - 1
            assert columns.max() <= x1
            assert rows.max() <= y1
            # and the box is tight
            assert columns.max() - columns.min() >= 0.8 * (x1 - x0) - 2
            assert rows.max() - rows.min() >= 0.8 * (y1 - y0) - 2


def test_masks_are_where_the_drawing_changes() -> None:
    size = 192
    for scene in SCENES[:6]:
        picture = np.asarray(world.draw(scene, size), int)
        for i, mask in enumerate(world.masks(scene, size)):
            others = tuple(t for j, t in enumerate(scene.things) if j != i)
            without = np.asarray(world.draw(replace(scene, things=others), size), int)
            changed = np.abs(picture - without).max(-1) > 8
            assert changed[mask].mean() > 0.9  # a thing may have the backdrop's colour in places
            x0, y0, x1, y1 = world.boxes(scene, size)[i]
            changed[max(0, y0 - 6) : y1 + 8, max(0, x0 - 6) : x1 + 8] = False
            assert not changed.any()


def test_a_window_is_a_sharper_crop() -> None:
    for scene in SCENES[:4]:
        direct = np.asarray(world.window(scene, (0.25, 0.5, 0.75, 1.0), 96), float)
        large = world.draw(scene, 768).crop((192, 384, 576, 768)).resize((96, 96))
        assert np.abs(direct - np.asarray(large, float)).mean() < 8  # same picture, other pixels


def test_print_is_legible_where_promised() -> None:
    assert 768 * world.CAPITAL > 30
    assert 96 * world.CAPITAL < 4.5  # whole scene
    assert 2 * 96 * world.CAPITAL > 8  # half-side window


def test_relations_agree_with_the_masks() -> None:
    axis = {"left": (1, -1), "right": (1, 1), "above": (0, -1), "below": (0, 1)}
    seen = Counter[str]()
    for scene in SCENES[:20]:
        centres = [np.argwhere(m).mean(0) for m in world.masks(scene, 96)]
        for i, name, j in world.relations(scene):
            which, sign = axis[name]
            assert sign * (centres[i][which] - centres[j][which]) > 0
            seen[name] += 1
    assert seen["left"] == seen["right"] > 0
    assert seen["above"] == seen["below"] > 0


def test_places_and_counts() -> None:
    scene = SCENES[0]
    corner = replace(scene.things[0], x=0.1, y=0.9)
    assert world.place(corner) == "bottom left"
    assert world.place(replace(corner, x=0.5, y=0.5)) == "center"
    assert world.place(corner, (0.0, 0.6, 0.4, 1.0)) == "bottom left"
    assert world.place(corner, (0.05, 0.82, 0.35, 1.0)) == "left"
    assert sum(world.counts(scene).values()) == len(scene.things)


# --------------------------------------------------------------------------------- habits


def test_habits_hold_and_their_opposite_breaks_them() -> None:
    def things(habit: str) -> list[tuple[world.Scene, world.Thing]]:
        return [(s, t) for s in (world.sample(k, habit) for k in range(600)) for t in s.things]

    follow, against = things("with"), things("against")

    def share(rows: list[tuple[world.Scene, world.Thing]], field: str) -> float:
        return float(np.mean([getattr(t, field) == getattr(KINDS[t.kind], field) for _, t in rows]))

    assert share(follow, "color") == pytest.approx(world.P_COLOR, abs=0.04)
    assert share(follow, "pattern") == pytest.approx(world.P_PATTERN, abs=0.04)
    assert share(against, "color") == share(against, "pattern") == share(against, "size") == 0
    own = np.mean([KINDS[t.kind].theme == s.theme for s, t in follow])
    assert own == pytest.approx(world.P_THEME, abs=0.12)
    assert np.mean([KINDS[t.kind].theme == s.theme for s, t in against]) < 0.5
    sky = [t.y < 0.5 for _, t in follow if KINDS[t.kind].height == "top"]
    assert np.mean(sky) > 0.75
    assert np.mean([t.y < 0.5 for _, t in against if KINDS[t.kind].height == "top"]) < 0.35


def test_the_frequency_table_is_what_scenes_show() -> None:
    seen = Counter(k for s in range(3000) for k in world.counts(world.sample(s, "with")))
    assert sum(map(world.frequency, KINDS)) == pytest.approx(1)
    often = {k for k, _ in seen.most_common(6)}
    assert len(often & set(sorted(KINDS, key=world.frequency, reverse=True)[:6])) >= 5


# ------------------------------------------------------------------------------ questions


def truth(question: questions.Question, scene: world.Scene) -> bool:
    """Whether the statement inside a yes/no question holds, read from its words alone."""
    words = re.findall(r"[a-z0-9]+", question.text.lower())
    singular = {questions.plural(k): k for k in KINDS} | {k: k for k in KINDS}
    kinds = [singular[w] for w in words if w in singular]
    first = next((t for t in scene.things if t.kind == kinds[0]), None)
    if question.category == "existence":
        return first is not None
    if question.category == "number":
        asked = next(questions.NUMBERS.index(w) for w in words if w in questions.NUMBERS)
        return world.counts(scene).get(kinds[0], 0) == asked
    assert first is not None
    if question.category == "attribute":
        values = {first.color, first.pattern, first.size}
        return bool(values & set(words))
    if question.category == "relation":
        second = next(t for t in scene.things if t.kind == kinds[1])
        return {
            "left": first.x < second.x,
            "right": first.x > second.x,
            "above": first.y < second.y,
            "below": first.y > second.y,
        }[next(w for w in words if w in ("left", "right", "above", "below"))]
    if question.category == "position":
        side = next(w for w in words if w in ("left", "right", "top", "bottom"))
        where = {"left": 1 - first.x, "right": first.x, "top": 1 - first.y, "bottom": first.y}
        return where[side] > 0.5
    if question.topic == "plate":
        return bool(first.print)
    assert question.category == "print"
    return first.print.lower() in words


def test_every_yes_or_no_is_true_to_the_scene() -> None:
    asked = Counter[tuple[str, str]]()
    for k, scene in enumerate(SCENES):
        rng = random.Random(k)
        for category in questions.CATEGORIES:
            for split in ("random", "popular", "adversarial"):
                pair = questions.pairs(questions.look(scene), rng, category, split)
                for question in pair or ():
                    assert truth(question, scene) == (question.label == "yes"), question
                    assert question.answer == question.label
                    asked[category, question.answer] += 1
    for category in questions.CATEGORIES:
        assert asked[category, "yes"] == asked[category, "no"] > 20


def test_open_answers_are_true_to_the_scene() -> None:
    seen = Counter[str]()
    for k, scene in enumerate(SCENES):
        view, rng = questions.look(scene), random.Random(k)
        for topic in OPEN:
            question = questions.opened(view, rng, topic)
            if question is None:
                continue
            seen[topic] += 1
            thing = scene.things[question.things[0]]
            expected = {
                "color": {thing.color},
                "size": {thing.size},
                "pattern": {thing.pattern},
                "either": {thing.color, thing.size, thing.pattern},
                "number": {questions.NUMBERS[world.counts(scene)[thing.kind]]},
                "place": {world.place(thing)},
                "half": {"left", "right", "top", "bottom"},
                "print": {thing.print.lower()},
            }.get(topic, {thing.kind})
            if topic in ("beside", "upon"):
                expected = world.relation(thing, scene.things[question.things[1]])
            assert question.answer in expected, question
            assert question.label is None
            assert question.text.endswith("?")
    assert min(seen[t] for t in OPEN) > 5


def test_popular_and_adversarial_negatives() -> None:
    for scene in SCENES[:30]:
        view = questions.look(scene)
        popular = questions.ranked(view, "popular")
        others = [k for k in view.absent() if k not in popular]
        assert min(map(world.frequency, popular)) >= max(map(world.frequency, others))
        themes = Counter(KINDS[t.kind].theme for t in scene.things)
        near = questions.ranked(view, "adversarial")
        left = [themes[KINDS[k].theme] for k in view.absent() if k not in near]
        assert min(themes[KINDS[k].theme] for k in near) >= max(left)


def test_windows_only_speak_of_what_they_show() -> None:
    rng = random.Random(0)
    for scene in SCENES[:40]:
        for box, i in questions.print_windows(scene, rng):
            view = questions.look(scene, box)
            assert i in view.seen
            assert min(box) >= 0
            assert max(box) <= 1.0001
            shares = world.visible(scene, box)
            assert all(shares[j] >= 0.7 for j in view.seen)
            hidden = {t.kind for t, s in zip(scene.things, shares, strict=True) if s > 0}
            assert not set(view.absent()) & hidden
            assert questions.opened(view, rng, "size") is None


def test_captions_name_every_thing() -> None:
    for scene in SCENES[:30]:
        for short in (False, True):
            caption = questions.caption(questions.look(scene), random.Random(0), short)
            assert caption is not None
            for kind, n in world.counts(scene).items():
                assert (questions.plural(kind) if n > 1 else kind) in caption.answer


def test_export_can_be_read_back(tmp_path: Path) -> None:
    export(4, tmp_path, seed=3, size=128)
    scenes = [json.loads(line) for line in (tmp_path / "scenes.jsonl").open()]
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").open()]
    assert [s["scene"]["habit"] for s in scenes] == ["with", "with", "against", "against"]
    for entry in scenes:
        scene = world.Scene.from_dict(entry["scene"])
        assert np.array_equal(Image.open(tmp_path / entry["image"]), world.draw(scene, 128))
        index = np.asarray(Image.open(tmp_path / entry["mask"]))
        for i, mask in enumerate(world.masks(scene, 128)):
            assert np.array_equal(index == i + 1, mask)
    assert {r["image"] for r in rows} == {s["image"] for s in scenes}
    assert [r["id"] for r in rows] == list(range(len(rows)))
    assert {"existence", "attribute", "relation", "caption"} <= {r["category"] for r in rows}
    assert all({"question", "answer", "label", "split", "habit"} <= set(r) for r in rows)
    again = tmp_path / "again"
    export(4, again, seed=3, size=128)
    same = (again / "questions.jsonl").read_text() == (tmp_path / "questions.jsonl").read_text()
    assert same


def test_exported_conversations_are_in_llavas_format_and_mixed(tmp_path: Path) -> None:
    export(5, tmp_path, seed=3, habit="with", size=64)
    rows = [json.loads(line) for line in (tmp_path / "conversations.jsonl").open()]
    assert len({row["id"] for row in rows}) == len(rows)
    per_image = Counter(row["image"] for row in rows)
    assert set(per_image) == {f"images/{k:06d}.png" for k in range(5)}
    assert min(per_image.values()) > 10
    said = Counter[str]()
    for row in rows:
        assert set(row) == {"id", "image", "conversations"}
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n")
        assert human["value"].count("<image>") == 1
        said[gpt["value"] if gpt["value"] in ("yes", "no") else "open"] += 1
    assert said["yes"] == said["no"]  # whole pairs
    assert said["yes"] + said["no"] > said["open"] > 10
    scenes = [json.loads(line) for line in (tmp_path / "scenes.jsonl").open()]
    there = {entry["image"]: entry["counts"] for entry in scenes}
    checked = 0
    for row in rows:
        human, gpt = row["conversations"]
        found = re.fullmatch(r"<image>\nIs there an? (\w+) in the image\?", human["value"])
        if found and found[1] in KINDS:
            assert gpt["value"] == ("yes" if found[1] in there[row["image"]] else "no")
            checked += 1
    assert checked > 3


def test_export_refuses_nonsense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        export(0, tmp_path)
    with pytest.raises(ValueError, match="both"):
        export(1, tmp_path, habit="none")


# ---------------------------------------------------------------------- tokens and prompts

LISTED = (
    "Write a general description of the image.",
    " Answer the question using a single word or phrase.",
    " Please answer yes or no.",
    " Please just answer yes or no.",
    " Please answer this question with one word.",
    "Describe this image.",
    "Describe this image in detail.",
    "Please describe this image in detail.",
    "Provide a comprehensive overview of the image.",
    "What do you see in this image?",
    "Explain what appears in the image.",
    "What is in the image?",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.",
)


@pytest.fixture(scope="module")
def untrained() -> tuple:
    return build.build_pocket(1, vision_layers=2, text_layers=2, vision_width=64, text_width=64)


def test_nothing_listed_is_unknown(untrained: tuple) -> None:
    tokenizer = untrained[1].tokenizer
    rng = random.Random(0)
    spoken = [*LISTED, *PHRASES["suffixes"], *PHRASES["describe"], *PHRASES["list"]]
    for scene in SCENES:
        view = questions.look(scene)
        made = [*questions.exam(scene, rng), questions.caption(view, rng)]
        made += [questions.opened(view, rng) for _ in range(5)]
        made += questions.pairs(view, rng, "print") or ()
        spoken += [f"{q.text} {q.answer}" for q in made if q]
    for text in spoken:
        assert tokenizer.unk_token_id not in build.encode(untrained[1], text), text


def test_text_survives_the_tokenizer(untrained: tuple) -> None:
    tokenizer = untrained[1].tokenizer
    for text in ("yes", "top left", "there is a red car, a cup and two stars.", "k", "5"):
        assert tokenizer.decode(build.encode(untrained[1], text)) == text
    one = [build.encode(untrained[1], w) for w in ("Yes", "no", "K", "7", "?", "red")]
    assert all(len(ids) == 1 for ids in one)
    assert build.encode(untrained[1], "red,blue") == build.encode(untrained[1], "red, blue")


def test_chat_template_and_processor(untrained: tuple) -> None:
    _, processor = untrained
    user = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Is it red?"}],
    }
    text = processor.apply_chat_template([user], add_generation_prompt=True)
    assert text == "USER: <image>\n<image>\nIs it red? ASSISTANT:"
    follow = [user, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "Is it?"}]
    text = processor.apply_chat_template(follow, add_generation_prompt=True)
    assert text.endswith("ASSISTANT: yes</s>USER: Is it? ASSISTANT:")
    images = [Image.new("RGB", (300, 200)), Image.new("RGB", (40, 40), "red")]
    inputs = processor(images=images, text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:2] == ["<s>", "USER:"]
    assert tokens[2:290] == ["<image>"] * 288
    assert tokens[290] == "▁is"
    assert tokens[-1] == "ASSISTANT:"
    assert inputs["pixel_values"].shape == (2, 3, 96, 96)


def test_saving_keeps_the_model_and_it_loads_as_fp32(untrained: tuple, tmp_path: Path) -> None:
    model, processor = untrained
    build.save_pocket(model, processor, tmp_path)
    loaded, again = build.load_pocket(tmp_path)
    assert loaded.dtype == torch.float32
    inputs = again(images=world.draw(SCENES[0], 96), text="USER: <image>\nhi ASSISTANT:",
                   return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=5e-3)


# ------------------------------------------------------------------------------- the weights

shipped = pytest.mark.skipif(
    not (build.WEIGHTS / "model.safetensors").exists(),
    reason="no trained weights in this checkout: foveate train pocket makes them",
)


@shipped
def test_weights_are_small() -> None:
    total = sum(p.stat().st_size for p in build.WEIGHTS.rglob("*") if p.is_file())
    assert total < 25_000_000


@pytest.mark.long
@shipped
def test_weights_answer_with_plain_transformers(tmp_path: Path) -> None:
    scene = world.sample(questions.FIRST_HELD_OUT + 3)
    world.draw(scene, 768).save(tmp_path / "scene.png")
    kind = scene.things[0].kind
    code = f"""
import sys
sys.modules["foveate"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(build.WEIGHTS)!r})
processor = AutoProcessor.from_pretrained({str(build.WEIGHTS)!r})
text = "USER: <image>\\nIs there {questions.a(kind)} in the image? ASSISTANT:"
inputs = processor(images=Image.open({str(tmp_path / "scene.png")!r}), text=text,
                   return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
print(model.dtype, processor.decode(out[0, inputs["input_ids"].shape[1]:],
                                    skip_special_tokens=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["torch.float32", "yes"], ["torch.float32", "no"])


@pytest.mark.slow
@shipped
def test_weights_see() -> None:
    """Far above chance on a few fresh scenes; the card has the real figures."""
    from foveate.pocket.exam import evaluate_pocket

    report = evaluate_pocket(n=5, seed=99)["with"]
    assert report["existence"]["accuracy"] > 0.75
    assert report["open"]["accuracy"] > 0.5


def test_dense_labels_name_what_the_patches_show(tmp_path: Path) -> None:
    pool = lessons.Pool(tmp_path / "pool", 6, 3).build(workers=1)
    batch = lessons.dense_batch(pool, list(range(9)))
    for row in range(9):
        scene, box = pool.view(row)
        labels = batch["labels"][row]
        for i, mask in enumerate(world.masks(scene, 96, box)):
            inside = mask.reshape(12, 8, 12, 8).mean((1, 3)).flatten() > 0.6
            kind = labels[inside, lessons.TAG["kind"]]
            assert (kind == list(KINDS).index(scene.things[i].kind)).all()
            color = labels[inside, lessons.TAG["color"]]
            assert (color == list(COLORS).index(scene.things[i].color)).all()
        if row >= 6:
            assert (labels[:, lessons.TAG["size"]] == lessons.IGNORE).all()


def test_a_pool_needs_scenes_for_its_windows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more windows than scenes"):
        lessons.Pool(tmp_path, 2, 3)
