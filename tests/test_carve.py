"""CARVE: against whole maps read from the start at every step, and what it shows the model."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from foveate import VLM, FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.core.method import as_stack, parse
from foveate.evaluation.ask import Asker
from foveate.methods.carve import CARVE, LARGEST, extract, on_pixels
from foveate.scenes import questions, world
from foveate.vlm import look
from foveate.vlm.chat import Chat
from foveate.vlm.look import read
from tests import tiny
from tests.references import carve as reference
from tests.references.carve import GENERAL, SUFFIX
from tests.test_evaluation import Scenes
from tests.test_evaluation import questions as units

SIDE = 160
look_at_all = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def pocket() -> VLM:
    return VLM.load("pocket", device="cpu")


@pytest.fixture(autouse=True)
def forget(pocket: VLM) -> None:
    pocket.readings.clear()


def about(seed: int, count: int) -> list[Chat]:
    """Questions about one scene."""
    scene = world.sample(questions.FIRST_HELD_OUT + seed)
    images = [world.draw(scene, SIDE)]
    asked = [q.text for q in questions.exam(scene, random.Random(seed))]
    return [Chat(images, text) for text in asked[:count]]


def rewritten(vlm: VLM, chats: list[Chat], method: CARVE | str) -> list[Chat]:
    return vlm.rewrite(chats, as_stack(method))


def resolved(vlm: VLM, text: str) -> Any:
    return parse(text)[0].resolve(anatomy(vlm.model))


def picture(seed: int, width: int, height: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def found(chat: Chat) -> dict[str, Any]:
    return {k: v for k, v in chat.notes.items() if k != "chain"}


# -- regions ---------------------------------------------------------------------------------------


def test_regions_touch_by_a_side_however_they_wind() -> None:
    heat = torch.full((41, 30), 0.1)
    heat[::2] = 1.0
    heat[1::4, -1] = heat[3::4, 0] = 1.0
    heat[20, 0] = 2.0  # the region with it comes first

    method: Any = CARVE(regions=1, keep=0.6, rank="attention", smallest=0.0)
    mask, counts = method.mask(heat, (30, 41), look_at_all)
    assert counts == [1, 1]
    assert np.array_equal(mask, heat.numpy() > 0.5)
    heat[11] = 0.1
    mask, counts = method.mask(heat, (30, 41), look_at_all)
    assert counts == [2, 1]
    assert not mask[:12].any()
    assert np.array_equal(mask[12:], heat[12:].numpy() > 0.5)
    corners = method.mask(0.1 + torch.eye(5), (5, 5), look_at_all)[1]
    assert corners[0] == 5, "corners do not touch"


# -- from grid to pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "size"), [((24, 24), (97, 61)), ((3, 8), (300, 40)), ((9, 1), (8, 8))]
)
@pytest.mark.parametrize("time", ["full", "start", "end"])
def test_fusing_on_the_grid_is_fusing_at_every_pixel(
    grid: tuple[int, int], size: tuple[int, int], time: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    asked, general = torch.rand(2, 5, 3, *grid, generator=generator) ** 3
    asked = asked[:4]  # the shorter one decides
    fused = CARVE(time=time).contrast_map(asked, general)
    fast, corner = on_pixels(fused, size, look_at_all)
    flat = [list(maps.flatten(2)) for maps in (asked, general)]
    slow = reference.contrast(flat[0], flat[1], grid, size, time)
    assert corner == (0, 0)
    assert np.abs(fast - slow).max() < 1e-6 * slow.max()


@pytest.mark.parametrize("size", [(33, 64), (8, 8), (333, 211)])
def test_on_the_whole_image_it_is_interpolate(size: tuple[int, int]) -> None:
    heat = torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
    slow = interpolate(heat[None, None], size[::-1], mode="bilinear", align_corners=False)[0, 0]
    assert np.allclose(on_pixels(heat, size, look_at_all)[0], slow.numpy(), atol=1e-6)


def test_pixels_that_the_grid_does_not_cover_are_left_out() -> None:
    heat = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    crop, corner = on_pixels(heat, (40, 20), (0.25, 0.0, 0.75, 1.0))  # the middle square
    assert (crop.shape, corner) == ((20, 20), (10, 0))
    assert np.allclose(crop, on_pixels(heat, (20, 20), look_at_all)[0], atol=1e-6)
    padded, corner = on_pixels(heat, (40, 20), (0.0, -0.5, 1.0, 1.5))  # a letterbox
    assert (padded.shape, corner) == ((20, 40), (0, 0))
    assert np.allclose(padded, on_pixels(heat, (40, 40), look_at_all)[0][10:30], atol=1e-6)
    ramp = torch.arange(4.0).expand(4, 4)
    odd, corner = on_pixels(ramp, (25, 20), (0.1, 0.0, 0.9, 1.0))  # from the middle of a pixel on
    assert (odd.shape, corner) == ((20, 20), (2, 0))
    assert np.allclose(odd, (np.arange(20) / 5 - 0.5).clip(0, 3), atol=1e-5)


def test_a_centre_crop_keeps_only_what_was_seen() -> None:
    method: Any = CARVE(regions=1, keep=0.3, rank="attention", smallest=0.0)
    heat = torch.ones(6, 6)
    heat[0, 0] = 50
    mask, counts = method.mask(heat, (90, 30), (1 / 3, 0.0, 2 / 3, 1.0))
    assert mask.shape == (30, 90)
    assert counts == [1, 1]
    assert mask[0, 30]
    assert not mask[:, :30].any()
    assert not mask[:, 60:].any()


# -- time, ratio -----------------------------------------------------------------------------------


def maps(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_later_steps_weigh_more() -> None:
    asked, general = maps(1, 2, 3), maps(1, 1, 1)

    def fused(other: Tensor = general, **options: Any) -> float:
        return CARVE(**options).contrast_map(asked, other).item()

    assert fused(time="full") == pytest.approx(1 + 2 * 2 + 3 * 3)
    assert fused(time="start") == pytest.approx(1)
    assert fused(time="end") == pytest.approx(3)
    shorter = maps(1, 0.5)
    assert fused(shorter, time="full") == pytest.approx(1 + 2 * 4)
    assert fused(shorter, time="end") == pytest.approx(4), "the last that both have"


def test_the_ratio_has_a_floor() -> None:
    asked, general = maps(0.5), maps(0.0)
    assert CARVE(time="full").contrast_map(asked, general).item() == pytest.approx(0.5e8)
    one = CARVE(time="full", ratio_floor=0.1).contrast_map(asked, general)
    assert one.item() == pytest.approx(5)


def test_start_is_full_where_one_token_is_generated() -> None:
    asked, general = torch.rand(2, 1, 6, 5, 5, generator=torch.Generator().manual_seed(2))
    full = CARVE(time="full").contrast_map(asked, general)
    for time in ("start", "end"):
        assert torch.equal(CARVE(time=time).contrast_map(asked, general), full)  # type: ignore[arg-type]


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("text", "number", "rank", "smallest"),
    [
        ("carve", 2, "attention", 0.0),
        ("carve(regions=1)", 1, "attention", 0.0),
        ("carve(variant=released)", "released", "attention", 0.0),
        ("carve(variant=released,keep=0.6)", "released", "attention", 0.0),
        ("carve(version=v1)", 2, "all", 0.001),
        ("carve(version=v2)", 2, "area", 0.0),
        ("carve(version=v3)", 2, "attention", 0.0),
        ("carve(version=v1,smallest=0.05)", 2, "all", 0.05),
    ],
)
def test_every_variant_keeps_the_pixels_of_the_reference(
    pocket: VLM, text: str, number: Any, rank: str, smallest: float, seed: int
) -> None:
    method = resolved(pocket, text)
    heat = torch.tensor(np.random.default_rng(seed).gamma(0.3, size=(12, 9)), dtype=torch.float32)
    mask, counts = method.mask(heat, (70, 50), look_at_all)
    fine = on_pixels(heat, (70, 50), look_at_all)[0]
    assert np.array_equal(mask, reference.select(fine, method.keep, number, rank, smallest))
    assert counts[0] >= counts[1] >= 1


def test_settings_are_those_of_variant_and_version_unless_given(pocket: VLM) -> None:
    def settings(text: str) -> tuple[Any, ...]:
        m = resolved(pocket, text)
        return m.final_input, m.regions, m.keep, m.time, m.rank, m.smallest

    assert settings("carve") == ("refined", 2, 0.4, "full", "attention", 0.0)
    released = ("both", "released", 0.2)
    assert settings("carve(variant=released)") == (*released, "full", "attention", 0.0)
    assert settings("carve(variant=released,version=v1)") == (*released, "start", "all", 0.001)
    assert settings("carve(version=v2)")[3:] == ("start", "area", 0.0)
    assert settings("carve(version=v3)")[3:] == ("start", "attention", 0.0)
    given = "carve(variant=released,version=v1,final_input=refined,regions=3,keep=0.5,time=end)"
    assert settings(given) == ("refined", 3, 0.5, "end", "all", 0.001)
    assert resolved(pocket, "carve").layers == (7, 8, 9), "20 to 25 of 32, on 12 layers"
    assert resolved(pocket, "carve(layers=(3,11))").layers == (3, 11)


def test_a_model_whose_published_layers_slide_is_told_to_choose() -> None:
    vlm = tiny.vlm("gemma3")
    with pytest.raises(FoveateError, match=r"carve has nothing .* sliding_attention.* layers=\(N,"):
        resolved(vlm, "carve")
    assert resolved(vlm, "carve(layers=(2,))").layers == (2,)


def test_a_level_map_keeps_nothing_and_rounding_chooses_no_region() -> None:
    method: Any = CARVE(regions=2, keep=0.4, rank="attention", smallest=0.0)
    noise = 1 + 1e-6 * torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    assert not method.mask(torch.ones(12, 12), (40, 30), look_at_all)[0].any()
    assert not method.mask(noise, (40, 30), look_at_all)[0].any()
    assert not method.mask(torch.zeros(12, 12), (40, 30), look_at_all)[0].any()
    noise[11, 0] = 5
    mask, counts = method.mask(noise, (240, 240), look_at_all)
    assert counts == [1, 1]
    assert mask[-1, 0], "all of it lies in one corner"
    assert not mask[:180].any()
    assert not mask[:, 60:].any()


def test_large_images_take_few_bytes_per_pixel() -> None:
    method: Any = CARVE(regions=2, keep=0.4, rank="attention", smallest=0.0)
    heat = torch.rand(24, 24, generator=torch.Generator().manual_seed(0))
    tracemalloc.start()
    method.mask(heat, (2000, 1500), look_at_all)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15 * 2000 * 1500


# -- the new picture -------------------------------------------------------------------------------


def test_the_rest_is_black_and_the_crop_is_magnified() -> None:
    image = picture(0, 60, 40)
    mask = np.zeros((40, 60), bool)
    mask[5:15, 10:20] = mask[12:25, 15:40] = True
    box, new = extract(image, mask)
    assert box == (10, 5, 40, 25)
    assert new.size == (60, 40), "twice as large"
    expected_box, expected = reference.extract(image, mask)
    assert list(box) == expected_box
    assert new.tobytes() == expected.tobytes()
    flat = extract(Image.new("RGB", (60, 40), "white"), mask)[1]
    assert flat.getpixel((1, 1)) == (255, 255, 255)
    assert flat.getpixel((58, 1)) == (0, 0, 0)


def test_narrow_crops_stay_of_a_reasonable_size() -> None:
    image, mask = picture(0, 400, 300), np.zeros((300, 400), bool)
    mask[:, 200] = True
    new = extract(image, mask)[1]
    assert new.width * new.height <= LARGEST * 1.02 * 400 * 300
    dot = np.zeros((8, 8), bool)
    dot[4, 3] = True
    assert extract(picture(0, 8, 8), dot)[1].size == (8, 8)


# -- against the reference, on models --------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_on_the_pocket_model_it_is_the_reference(pocket: VLM, count: int) -> None:
    chats, method = about(3, count), resolved(pocket, "carve(steps=6)")
    image, grid = chats[0].images[0], (12, 12)
    general = reference.attention(pocket, image, GENERAL + SUFFIX, method.layers, 6)
    asked = [Chat(chats[0].images, chat.text + SUFFIX) for chat in chats]
    readings = read(pocket, asked, method.layers, max_new_tokens=6)
    new = rewritten(pocket, chats, "carve(steps=6)")
    for chat, question, reading in zip(new, asked, readings, strict=True):
        slow = reference.attention(pocket, image, question.text, method.layers, 6)
        assert reading.weights.shape == (len(slow), 3, 144)
        assert (reading.weights - torch.stack(slow)).abs().max() < 1e-5
        heat = reference.contrast(slow, general, grid, image.size)
        mask = reference.select(heat, 0.4, 2)
        box, refined = reference.extract(image, mask)
        assert chat.notes["crop"] == box
        assert chat.notes["kept"] == pytest.approx(mask.mean(), abs=1e-3)
        assert chat.notes["steps"] == min(len(slow), len(general))
        (shown,) = chat.images
        assert shown.size == refined.size
        assert np.abs(np.asarray(shown, int) - np.asarray(refined, int)).mean() < 0.5


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "idefics3"])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_are_those_of_running_everything_again(
    family: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = tiny.vlm(family)
    if not shared:  # a setting that only `generate` applies, and that changes nothing
        monkeypatch.setattr(vlm.model.generation_config, "min_length", 1)
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [-1])
    image, layers = picture(1, 32, 32), (2, 5) if family == "gemma3" else (2, 3)
    chats = [Chat([image], text) for text in ("Is there a cat?", "w40 w41 w42 w43 w44", "red")]
    for chat in chats:
        chat.images = chats[0].images
    readings = read(vlm, chats, layers, max_new_tokens=4)
    for chat, reading in zip(chats, readings, strict=True):
        slow = reference.attention(vlm, image, chat.text, layers, 4)
        assert reading.weights.shape[0] == 4
        assert (reading.weights - torch.stack(slow)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_questions_together_are_questions_one_by_one_on_any_path(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("Is there a cat?", "w40 w41 w42 w43 w44", "red")
    image, crops = picture(2, 40, 30), []
    for settings, alone in itertools.product([None, 1], [False, True]):
        vlm = tiny.vlm(family)
        monkeypatch.setattr(vlm.model.generation_config, "min_length", settings)
        chats = [Chat([image], text) for text in texts]
        groups = [[chat] for chat in chats] if alone else [chats]
        for chat in chats:
            chat.images = chats[0].images
        new = [chat for group in groups for chat in rewritten(vlm, group, "carve(steps=4)")]
        assert [chat.text for chat in new] == list(texts), "the suffix is for reading only"
        crops.append([found(chat) for chat in new])
    assert all(crop == crops[0] for crop in crops)


# -- passes ----------------------------------------------------------------------------------------


def test_the_general_instruction_is_read_once_per_image(
    pocket: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def counted(vlm: VLM, chats: list[Chat], *rest: Any, **options: Any) -> Any:
        asked.append([chat.text for chat in chats])
        return read(vlm, chats, *rest, **options)

    monkeypatch.setattr(look, "read", counted)
    chats = about(4, 3)
    together = rewritten(pocket, chats[:2], "carve(steps=3)")
    later = rewritten(pocket, chats[:1], "carve(steps=3,keep=0.2)")
    expected = [chat.text + SUFFIX for chat in chats]
    assert asked == [[GENERAL + SUFFIX, *expected[:2]], expected[:1]]
    assert later[0].notes["crop"] != together[0].notes["crop"]
    again = rewritten(pocket, chats[:1], "carve(steps=3)")[0]
    assert found(again) == found(together[0]), "the kept pass gives the same crop"
    asked.clear()
    rewritten(pocket, chats[:1], "carve(steps=3,layers=(2,))")
    rewritten(pocket, about(5, 1), "carve(steps=3)")
    assert [len(texts) for texts in asked] == [2, 2], "other layers, another image"


def test_the_suffix_is_appended_once(pocket: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(vlm: VLM, chats: list[Chat], *rest: Any, **options: Any) -> Any:
        asked.extend(chat.text for chat in chats)
        return read(vlm, chats, *rest, **options)

    monkeypatch.setattr(look, "read", noted)
    images = [world.draw(world.sample(1), SIDE)]
    texts = ["What is red?", "What is red?" + SUFFIX, "Is it red? Answer with yes or no."]
    rewritten(pocket, [Chat(images, text) for text in texts], "carve(steps=1,instruction='Look.')")
    assert asked == ["Look." + SUFFIX, *[texts[0] + SUFFIX] * 2, texts[2] + SUFFIX]
    asked.clear()
    rewritten(pocket, [Chat(images, texts[0])], "carve(steps=1,suffix='')")
    assert asked == [GENERAL, texts[0]]


def test_start_reads_one_step(pocket: VLM) -> None:
    chat = rewritten(pocket, about(6, 1), "carve(time=start)")[0]
    assert chat.notes["steps"] == 1
    one = rewritten(pocket, about(6, 1), "carve(time=full,steps=1)")[0]
    assert found(one) == found(chat)


# -- what the model is shown -----------------------------------------------------------------------


def test_keeping_everything_gives_the_original_back(pocket: VLM) -> None:
    chats = about(7, 2)
    for text in ("carve(keep=1)", "carve(keep=1,variant=released,final_input=refined)"):
        new = rewritten(pocket, chats, text)
        assert all(a.images is b.images for a, b in zip(new, chats, strict=True))
        assert all(chat.notes.get("kept", 1) == 1 for chat in new)
        one, plain = (pocket.answer(c, (), 4)[0] for c in (new[:1], chats[:1]))
        assert (one.tokens, one.probabilities) == (plain.tokens, plain.probabilities)
    both = rewritten(pocket, chats, "carve(keep=1,variant=released)")
    assert all(chat.images == [chats[0].images[0]] * 2 for chat in both)
    heat = torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    method: Any = CARVE(keep=1.0, regions=2, rank="attention", smallest=0.0)
    assert method.mask(heat, (50, 40), look_at_all)[0].all(), "the rule itself says the same"


def test_the_general_instruction_itself_is_asked_about_the_whole_image(pocket: VLM) -> None:
    images = about(8, 1)[0].images
    chats = [Chat(images, GENERAL), Chat(images, GENERAL + SUFFIX), Chat(images, "What is red?")]
    new = rewritten(pocket, chats, "carve(steps=8)")
    assert [chat.notes["crop"] == [0, 0, SIDE, SIDE] for chat in new] == [True, True, False]
    assert [chat.notes["kept"] == 1 for chat in new] == [True, True, False]
    assert [chat.notes["regions"][1] for chat in new[:2]] == [0, 0]
    assert new[0].images is images
    layers = resolved(pocket, "carve").layers
    reading = read(pocket, [Chat(images, GENERAL + SUFFIX)] * 2, layers, max_new_tokens=8)
    ratio = reading[0].weights / (reading[1].weights + 1e-8)
    assert (ratio - 1).abs().max() < 1e-2, "the floor alone keeps it from 1"


def test_the_released_code_shows_both_pictures(pocket: VLM) -> None:
    chats = about(9, 1)
    (chat,) = rewritten(pocket, chats, "carve(variant=released,steps=2)")
    original, refined = chat.images
    assert original is chats[0].images[0]
    assert max(refined.width / SIDE, refined.height / SIDE) >= 1
    assert chat.text == chats[0].text


def test_the_chain_shows_every_step(pocket: VLM) -> None:
    chat = rewritten(pocket, about(3, 1), "carve(steps=2)")[0]
    panels = chat.notes["chain"].panels
    assert len(panels) == 5
    assert [panel.heat is not None for panel in panels] == [True, True, True, False, False]
    assert all(p.heat.shape == (12, 12) and (p.heat >= 0).all() for p in panels[:3])
    crop = [edge * SIDE for edge in panels[3].frames[0]]
    assert crop == pytest.approx(chat.notes["crop"])
    assert panels[4].image is chat.images[-1]


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (400, 8), (8, 300), (333, 111)])
def test_small_and_narrow_images(pocket: VLM, size: tuple[int, int]) -> None:
    chat = rewritten(pocket, [Chat([picture(3, *size)], "What is red?")], "carve(steps=1)")[0]
    left, top, right, bottom = chat.notes["crop"]
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    (refined,) = chat.images
    assert refined.width * refined.height <= LARGEST * 1.1 * size[0] * size[1]


def test_a_uniform_image_is_asked_about_like_any_other(pocket: VLM) -> None:
    images = [Image.new("RGB", (SIDE, SIDE), "grey")]
    answer = pocket.answer(
        rewritten(pocket, [Chat(images, "What is red?")], "carve(steps=2)"), (), 4
    )[0]
    assert answer.text


def test_no_image_and_several(pocket: VLM) -> None:
    chats = [Chat([], "What is red?")]
    with pytest.warns(UserWarning, match=r"no image, so carve does nothing"):
        assert rewritten(pocket, chats, "carve") == chats
    with pytest.raises(FoveateError, match="carve looks again at one image"):
        rewritten(pocket, [Chat([picture(0, 9, 9)] * 2, "What?")], "carve")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("carve(keep=0)", "keep must lie above 0, up to 1"),
        ("carve(keep=1.5)", "keep must lie above 0, up to 1"),
        ("carve(regions=0)", "regions must be 1 or more"),
        ("carve(regions=best)", "regions must be a whole number or 'released' or None"),
        ("carve(smallest=2)", "smallest must lie between 0 and 1"),
        ("carve(ratio_floor=0)", "ratio_floor must be above 0"),
        ("carve(steps=0)", "steps must be 1 or more"),
        ("carve(instruction='')", "instruction must not be empty"),
    ],
)
def test_parameters_out_of_range(text: str, why: str) -> None:
    with pytest.raises(FoveateError, match=why):
        parse(text)


# -- together with others --------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["carve(steps=2)+clvs", "clvs+carve(steps=2)"])
def test_the_refined_picture_is_answered_with_the_other_method(pocket: VLM, stack: str) -> None:
    chats = about(3, 2)
    image, text = chats[0].images[0], "Describe this image."
    answer = pocket.ask(image, text, stack, max_new_tokens=8)
    alone = pocket.ask(image, text, "carve(steps=2)", max_new_tokens=8)
    assert found(answer.chat) == found(alone.chat), "reading passes run plain"
    (refined,) = answer.chat.images
    assert refined.tobytes() == alone.chat.images[0].tobytes()
    by_hand = pocket.ask(refined, text, "clvs", max_new_tokens=8)
    assert (answer.tokens, answer.probabilities) == (by_hand.tokens, by_hand.probabilities)
    assert answer.probabilities != pytest.approx(alone.probabilities, abs=1e-4)
    batch = pocket.batch([(image, chats[0].text), (image, text)], stack, max_new_tokens=8)
    assert batch[1].tokens == answer.tokens


def test_grouped_questions_are_answered_as_one_by_one(pocket: VLM) -> None:
    unit = units(Scenes())[0]
    shared, alone = (
        Asker(pocket, ["carve(steps=2)"]),
        Asker(pocket, ["carve(steps=2)"], share=False),
    )
    together = shared.answer(shared.load(unit), "carve(steps=2)")
    pocket.readings.clear()
    singly = [r for q in unit for r in alone.answer(alone.load([q]), "carve(steps=2)")]
    assert [r["error"] for r in together] == [None] * len(unit)
    assert [r["answer"] for r in together] == [r["answer"] for r in singly]
    assert [r["notes"] for r in together] == [r["notes"] for r in singly]
    assert set(together[0]["notes"]) == {"crop", "kept", "regions", "steps"}
    yes = [[r["yes"] for r in records] for records in (together, singly)]
    assert yes[0] == pytest.approx(yes[1], abs=1e-4)
