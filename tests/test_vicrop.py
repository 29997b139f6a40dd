"""ViCrop: maps and crops against full maps and plain loops, and what the model is shown then."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import VLM, FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.base.journal import Journal
from foveate.benchmarks.pocket import PocketBench
from foveate.core.method import as_stack
from foveate.evaluation.ask import Plan, evaluate
from foveate.evaluation.run import key
from foveate.families.layout import together
from foveate.methods.vicrop import ViCrop, window_search
from foveate.scenes import questions, world
from foveate.vlm import look
from foveate.vlm.chat import Chat
from tests import tiny
from tests.references import vicrop as reference

RATIOS = ViCrop().ratios
PUBLISHED = "Write a general description of the image."
SUFFIX = " Answer the question using a single word or phrase."
ASKED = ["w40 w41 w42", "red", "Is there a cat?"]
WINDOWS = {"llava": 12, "llava_next": 8, "gemma3": 14, "idefics3": 10}  # on pictures of 40 x 30


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def about(image: Image.Image, texts: list[str]) -> list[Chat]:
    images = [image]
    return [Chat(images, text) for text in texts]


def rewritten(vlm: VLM, chats: list[Chat], method: str) -> list[Chat]:
    return vlm.rewrite(chats, as_stack(method))


@pytest.fixture(scope="module")
def pocket() -> VLM:
    return VLM.load("pocket", device="cpu")


@pytest.fixture(scope="module")
def small() -> VLM:
    return tiny.vlm()


# -- the window ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_the_window_search_equals_plain_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(24, 24), (12, 12), (7, 13), (16, 5), (1, 9), (3, 3)]
    rows, cols = shapes[seed % len(shapes)]
    size = (int(rng.integers(90, 1200)), int(rng.integers(90, 1200)))
    heat = rng.gamma(0.5, size=(rows, cols))
    window = int(max(size[0] / cols, size[1] / rows) * rng.uniform(1, 4)) + 1
    slow = reference.window_search(heat, size, window, RATIOS)
    assert window_search(heat, size, window, RATIOS) == slow


def test_ties_go_to_the_first_place_and_the_smallest_window() -> None:
    even = np.ones((12, 12))
    assert window_search(even, (768, 768), 336, RATIOS) == (0, 0, 336, 336)
    assert window_search(0.1 * even, (768, 768), 336, RATIOS) == (0, 0, 336, 336)
    twice = np.zeros((12, 12))
    twice[[1, 10], [10, 1]] = 1.0  # columns come before rows
    crop = window_search(twice, (768, 768), 128, (1.0,))
    assert crop == reference.window_search(twice, (768, 768), 128, (1.0,))
    assert crop[0] < 384 < crop[1]


def test_all_attention_in_one_corner_is_cropped_there() -> None:
    corner = np.zeros((12, 12))
    corner[11, 0] = 1.0
    assert window_search(corner, (768, 768), 336, RATIOS) == (0, 432, 336, 768)


def test_crops_lie_on_the_image_and_are_square_where_it_is_large_enough() -> None:
    rng = random.Random(0)
    for _ in range(300):
        size = rng.choice([(800, 100), (100, 800), (300, 200), (1000, 999), (5, 4000)])
        shape = rng.choice([(24, 24), (3, 24), (24, 3), (1, 1), (2, 40)])
        heat = np.random.default_rng(rng.randrange(10**6)).random(shape)
        window = rng.choice([2, 90, 224, 336])
        box = rng.choice([(0.0, 0.0, 1.0, 1.0), (0.2, 0.0, 0.8, 1.0), (0.0, -1.5, 1.0, 2.5)])
        left, top, right, bottom = window_search(heat, size, window, RATIOS, box)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        if (left, top, right, bottom) != (0, 0, *size):
            sides = {int(window * ratio // 2) * 2 for ratio in RATIOS}
            assert any((right - left, bottom - top) == (min(s, size[0]), min(s, size[1]))
                       for s in sides)  # fmt: skip


def test_a_map_of_a_part_of_the_image_is_cropped_where_it_lies() -> None:
    heat = np.zeros((10, 10))
    heat[5, 4] = 1.0
    alone = window_search(heat, (100, 100), 20, RATIOS)
    left, top, right, bottom = alone
    middle = window_search(heat, (200, 100), 20, RATIOS, (0.25, 0.0, 0.75, 1.0))
    assert middle == (left + 50, top, right + 50, bottom)


def test_padding_beside_the_image_takes_no_part() -> None:
    rng = np.random.default_rng(1)
    heat = rng.random((10, 10))
    within = heat[3:7]  # rows of 10 pixels over an image of 40, in a square of 100
    heat[[0, 9]] += 100.0
    crop = window_search(heat, (100, 40), 20, RATIOS, (0.0, -0.75, 1.0, 1.75))
    assert crop == window_search(within, (100, 40), 20, RATIOS)


# -- maps and crops of models ----------------------------------------------------------------------


@pytest.mark.parametrize("name", WINDOWS)
def test_maps_and_crops_equal_the_reference_on_every_family(name: str) -> None:
    vlm, image, window = tiny.vlm(name), picture(0), WINDOWS[name]
    method: Any = ViCrop(window=window).resolve(anatomy(vlm.model))
    found = rewritten(vlm, about(image, ASKED), f"vicrop(window={window})")
    where, (layer,) = vlm.grids(Chat([image], "red")), method.layers
    looks = set()
    for text, chat in zip(ASKED, found, strict=True):
        rows = [reference.attention(vlm, image, t + SUFFIX, layer) for t in (text, PUBLISHED)]
        maps = [together(where, torch.tensor(row))[0].numpy() for row in rows]
        general, asked, quotient = (panel.heat for panel in chat.notes["chain"].panels[:3])
        assert np.abs(asked - maps[0]).max() < 1e-5
        assert np.abs(general - maps[1]).max() < 1e-5
        relative = maps[0] / maps[1]
        assert np.abs(quotient / quotient.max() - relative / relative.max()).max() < 1e-5
        assert chat.notes["crop"] == list(
            reference.window_search(relative, image.size, window, RATIOS)
        )
        looks.add(asked.tobytes())
    assert len(looks) == len(ASKED), "every question has a map of its own"


def scene_chats(seed: int = 3) -> tuple[world.Scene, list[Chat]]:
    scene = world.sample(questions.FIRST_HELD_OUT + seed)
    asked = [q.text for q in questions.exam(scene, random.Random(seed))][:5]
    return scene, about(world.draw(scene), [*asked, "What is printed on the cup?"])


def test_the_pocket_models_crops_equal_the_reference(pocket: VLM) -> None:
    _, chats = scene_chats()
    found = rewritten(pocket, chats, "vicrop")
    for before, chat in zip(chats[:3], found[:3], strict=True):
        heat = reference.relative(pocket, before.images[0], before.text, 14 * 12 // 32, SUFFIX)
        heat = heat.reshape(12, 12)
        quotient = chat.notes["chain"].panels[2].heat
        assert np.abs(quotient / quotient.max() - heat / heat.max()).max() < 1e-5
        assert chat.notes["crop"] == list(reference.window_search(heat, (768, 768), 336, RATIOS))


def test_what_the_model_is_shown(pocket: VLM) -> None:
    _, chats = scene_chats()
    image = chats[0].images[0]
    both = rewritten(pocket, chats, "vicrop")
    only = rewritten(pocket, chats, "vicrop(final_input=crop)")
    for before, chat, alone in zip(chats, both, only, strict=True):
        left, top, right, bottom = chat.notes["crop"]
        assert alone.notes["crop"] == chat.notes["crop"]
        assert chat.images[0] is image
        assert [i.size for i in chat.images[1:]] == [(right - left, bottom - top)]
        assert np.array_equal(chat.images[1], np.asarray(image)[top:bottom, left:right])
        assert [i.tobytes() for i in alone.images] == [chat.images[1].tobytes()]
        assert (chat.text, chat.system) == (before.text, before.system)
        panels = chat.notes["chain"].panels
        assert panels[2].frames == ((left / 768, top / 768, right / 768, bottom / 768),)
        assert panels[3].image is chat.images[1]
    crops: dict[Any, Image.Image] = {}
    for chat in both:  # equal crops are one picture, so that their questions share its prefix
        assert crops.setdefault(tuple(chat.notes["crop"]), chat.images[1]) is chat.images[1]


@pytest.mark.long
@pytest.mark.parametrize("method", ["vicrop", "vicrop(final_input=crop)+clvs"])
def test_questions_of_one_image_together_are_those_asked_one_by_one(
    pocket: VLM, method: str
) -> None:
    _, chats = scene_chats(5)
    pairs: list[Any] = [(chats[0].images[0], chat.text) for chat in chats]
    group = pocket.batch(pairs, method, max_new_tokens=8)
    for (image, text), answer in zip(pairs, group, strict=True):
        pocket.readings.clear()
        alone = pocket.ask(image, text, method, max_new_tokens=8)
        assert answer.text == alone.text
        assert answer.chat.notes["crop"] == alone.chat.notes["crop"]
        assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_it_composes_with_a_method_that_edits_attention(pocket: VLM) -> None:
    _, (chat, *_) = scene_chats(6)
    shown = rewritten(pocket, [chat], "vicrop")[0].images
    answer = pocket.ask(chat.images[0], chat.text, "vicrop+clvs")
    by_hand = pocket.ask(shown, chat.text, "clvs")
    assert answer.text == by_hand.text
    assert answer.probabilities == pytest.approx(by_hand.probabilities, abs=1e-6)
    plain = pocket.ask(shown, chat.text)
    assert answer.probabilities != pytest.approx(plain.probabilities, abs=1e-4)


def test_the_general_pass_runs_once_per_image(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    read = look.read

    def watched(vlm: VLM, chats: list[Chat], *args: Any, **options: Any) -> Any:
        asked.append([chat.text for chat in chats])
        return read(vlm, chats, *args, **options)

    monkeypatch.setattr(look, "read", watched)
    small.readings.clear()
    first = rewritten(small, about(picture(3), ASKED), "vicrop(window=12)")
    again = rewritten(small, about(picture(3), [ASKED[1] + SUFFIX]), "vicrop(window=12)")
    rewritten(small, about(picture(4), ["red"]), "vicrop(window=12,suffix='',instruction='w50')")
    assert asked == [
        [PUBLISHED + SUFFIX, *(text + SUFFIX for text in ASKED)],
        [ASKED[1] + SUFFIX],
        ["w50", "red"],
    ]
    assert again[0].notes["crop"] == first[1].notes["crop"]


def test_an_evaluation_keeps_the_crop_in_its_records(pocket: VLM, tmp_path: Path) -> None:
    bench = PocketBench(categories=("print",), questions=2)
    evaluate(Plan([bench], ["vicrop"], tmp_path), pocket)
    rows = [r for r in Journal(tmp_path / "records.jsonl", key).rows.values() if "notes" in r]
    assert len(rows) == 4
    for row in rows:
        assert row["answer"]
        assert list(row["notes"]) == ["crop"]
        assert len(row["notes"]["crop"]) == 4


# -- degenerate input ------------------------------------------------------------------------------


def test_an_image_smaller_than_the_window_is_asked_about_as_it_is(pocket: VLM) -> None:
    chats = about(world.draw(world.sample(2), 300), ["What is printed on the cup?", "Why?"])
    for method in ("vicrop", "vicrop(final_input=crop)"):
        for before, chat in zip(chats, rewritten(pocket, chats, method), strict=True):
            assert chat.images is before.images
            assert chat.notes["crop"] == [0, 0, 300, 300]
            assert len(chat.notes["chain"].panels) == 3


def test_a_question_that_is_the_general_instruction_is_asked_as_it_is(small: VLM) -> None:
    texts = [PUBLISHED, PUBLISHED + SUFFIX, "red"]
    same, suffixed, other = rewritten(small, about(picture(5), texts), "vicrop(window=12)")
    assert len(same.images) == len(suffixed.images) == 1
    assert same.notes["crop"] == suffixed.notes["crop"] == [0, 0, 40, 30]
    assert len(other.images) == 2


def test_a_uniform_image_and_a_panorama_get_a_defined_crop(small: VLM) -> None:
    for image in (Image.new("RGB", (64, 48), "gray"), picture(6, 160, 20), picture(7, 20, 160)):
        (chat,) = rewritten(small, about(image, ["red"]), "vicrop(window=12)")
        left, top, right, bottom = chat.notes["crop"]
        assert (right - left, bottom - top) in {
            (min(s, image.width), min(s, image.height)) for s in (12, 14, 16, 18, 20, 22, 24)
        }


def test_no_image_and_several(small: VLM) -> None:
    with pytest.warns(UserWarning, match="no image, so vicrop does nothing"):
        assert small.ask([], "red", "vicrop").text == small.ask([], "red").text
    with pytest.raises(FoveateError, match="one image, and this prompt has 2"):
        small.ask([picture(0), picture(1)], "red", "vicrop")


def test_pictures_for_a_second_stream_are_cropped_along(small: VLM) -> None:
    chat = Chat([picture(0)], "red", contrast=[picture(1)])
    (found,) = rewritten(small, [chat], "vicrop(window=12)")
    assert found.contrast is not None
    assert [i.size for i in found.contrast] == [i.size for i in found.images]
    assert found.contrast[1].tobytes() == picture(1).crop(tuple(found.notes["crop"])).tobytes()


def test_layers_and_window_of_the_published_models(small: VLM, pocket: VLM) -> None:
    def resolved(vlm: VLM, kind: str, depth: int, **changed: Any) -> Any:
        config = vlm.model.config
        text = vlm.model.get_decoder().config
        before = (config.model_type, text.num_hidden_layers, getattr(text, "layer_types", None))
        config.model_type, text.num_hidden_layers = kind, depth
        text.layer_types = ["full_attention"] * depth
        try:
            return ViCrop(**changed).resolve(anatomy(vlm.model))
        finally:
            config.model_type, text.num_hidden_layers, text.layer_types = before

    for kind, depth, layer, window in [
        ("llava", 32, 14, 336),
        ("qwen2_5_vl", 36, 22, 224),
        ("qwen2_5_vl", 28, 22, 224),
        ("qwen2_vl", 28, 14, 224),
        ("llava", 24, 10, 336),
        ("internvl", 40, 14, 336),
    ]:
        method = resolved(small, kind, depth)
        assert (method.layers, method.window) == ((layer,), window)
    assert resolved(small, "llava", 32, layers=(3, 5), window=100).layers == (3, 5)
    assert ViCrop().resolve(anatomy(pocket.model)).layers == (5,)


def test_several_layers_are_averaged(small: VLM) -> None:
    image = picture(8)
    (chat,) = rewritten(small, about(image, ["red"]), "vicrop(window=12,layers=(1,4))")
    rows = [reference.attention(small, image, "red" + SUFFIX, layer) for layer in (1, 4)]
    expected = (rows[0] + rows[1]).reshape(4, 4) / 2
    assert np.abs(chat.notes["chain"].panels[1].heat - expected).max() < 1e-5


def test_a_model_whose_published_layer_slides_wants_to_be_told_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = tiny.vlm("gemma3")
    config = vlm.model.get_decoder().config
    kinds = ["full_attention" if layer == 5 else "sliding_attention" for layer in range(6)]
    monkeypatch.setattr(config, "layer_types", kinds)
    with pytest.raises(
        FoveateError, match=r"vicrop has nothing .* sliding_attention.* with layers="
    ):
        rewritten(vlm, about(picture(0), ["red"]), "vicrop(window=14)")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"window": 1}, "window must be 2 pixels or more"),
        ({"ratios": ()}, "ratios must be positive and rise"),
        ({"ratios": (1.2, 1.0)}, "ratios must be positive and rise"),
        ({"ratios": (0.0, 1.0)}, "ratios must be positive and rise"),
        ({"instruction": " "}, "instruction must not be empty"),
        ({"final_input": "all"}, "final_input must be 'both' or 'crop'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        ViCrop(**parameters)
