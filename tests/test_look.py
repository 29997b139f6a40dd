"""Reading passes: what they read and what they share, and how the chain of pictures is drawn."""

from __future__ import annotations

import gc
import pickle
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import VLM, FoveateError, Method
from foveate.commands import main
from foveate.core.method import as_stack, registry
from foveate.evaluation.ask import Asker
from foveate.scenes import world
from foveate.vlm.chat import Chat
from foveate.vlm.look import GENERAL, SHORT, Chain, Panel, kept, read, read_with_general, the_image
from tests.references.carve import attention
from tests.test_evaluation import Scenes
from tests.test_evaluation import questions as questions_of

QUESTIONS = ["Is there a car?", GENERAL + SHORT, "Please describe this image in detail."]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [world.draw(world.sample(2_100_000_001))]


def by_hand(vlm: VLM, chat: Chat, steps: int) -> list[torch.Tensor]:
    """(layers, H, N_v) per step: the whole sequence again for every token, full maps."""
    inputs = dict(vlm.inputs([chat]))
    visual = (inputs["input_ids"] == vlm.model.config.image_token_id)[0].nonzero()[:, 0]
    ends, maps = vlm.model.generation_config.eos_token_id, []
    before = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    for _ in range(steps):
        with torch.no_grad():
            out = vlm.model(**inputs, use_cache=False, output_attentions=True)
        maps.append(torch.stack([a[0, :, -1, visual] for a in out.attentions]))
        token = out.logits[:, -1:].argmax(-1)
        if int(token) == ends:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                extra = torch.full_like(token, int(name == "attention_mask"))
                inputs[name] = torch.cat([inputs[name], extra], 1)
    vlm.model.set_attn_implementation(before)
    return maps


@pytest.mark.long
@pytest.mark.parametrize("heads", ["mean", "all"])
@pytest.mark.parametrize("how", ["shared", "alone", "padded"])
def test_rows_are_those_of_running_everything_again(
    vlm: VLM, images: list[Image.Image], heads: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [vlm.chat(images, question, None) for question in QUESTIONS]
    if how == "padded":
        monkeypatch.setattr("foveate.vlm.answering.prepare", lambda *_: None)
    if how == "alone":
        chats = chats[:1]
    layers = (0, 5, 11)
    for chat, reading in zip(
        chats, read(vlm, chats, layers, heads=heads, max_new_tokens=6), strict=True
    ):
        maps = torch.stack(attention(vlm, images[0], chat.text, layers, 6, heads))
        assert reading.layers == layers
        assert reading.weights.shape == maps.shape, "as many steps, the one of </s> included"
        assert (reading.weights - maps).abs().max() < 1e-5
        assert reading.answer.text == vlm.answer([chat], (), 6)[0].text
        assert reading.map(reading.weights).shape[-2:] == (12, 12)
        assert reading.box == (0.0, 0.0, 1.0, 1.0)


def test_steps_end_with_the_answer(vlm: VLM, images: list[Image.Image]) -> None:
    chats = [vlm.chat(images, question, None) for question in QUESTIONS]
    short, _, long = read(vlm, chats, (3,), max_new_tokens=9)
    assert len(short.weights) == len(short.answer.tokens) + 1 < len(long.weights) == 9


def test_one_image_is_looked_at(images: list[Image.Image]) -> None:
    method = Looking()
    assert the_image(method, [Chat(images, "What is it?")]) is images[0]
    with pytest.warns(UserWarning, match="no image, so looking does nothing"):
        assert the_image(method, [Chat([], "What is it?")]) is None
    with pytest.raises(FoveateError, match="looks again at one image, and this prompt has 2"):
        the_image(method, [Chat(images * 2, "What is it?")])


def test_readings_of_an_image_are_kept(vlm: VLM, images: list[Image.Image]) -> None:
    made = []

    def make() -> int:
        made.append(1)
        return len(made)

    same = images[0].copy()
    assert kept(vlm, images[0], ("a",), make) == kept(vlm, same, ("a",), make) == 1
    assert kept(vlm, images[0], ("b",), make) == 2
    other = images[0].copy()
    other.putpixel((0, 0), (1, 2, 3))
    assert kept(vlm, other, ("a",), make) == 3
    for number in range(40):
        kept(vlm, other, (number,), make)
    assert len(vlm.readings) == 32, "the oldest are forgotten"
    assert kept(vlm, images[0], ("a",), make) > 3


def test_what_is_kept_of_a_reading_holds_no_picture(vlm: VLM) -> None:
    vlm.readings.clear()
    images = []
    for number in range(3):
        picture = world.draw(world.sample(2_100_000_001 + number)).resize((1500, 1000))
        images.append(weakref.ref(picture))
        chat = vlm.chat([picture], QUESTIONS[0], None)
        general = read_with_general(vlm, [chat], (3,), GENERAL, SHORT)[1]
        again = read_with_general(vlm, [chat], (3,), GENERAL, SHORT)[1]
        assert again is general
    assert len(vlm.readings) == len(images)
    del picture, chat, general, again
    gc.collect()
    assert [image() for image in images] == [None] * 3, "nothing kept refers to the pictures"
    assert len(pickle.dumps(list(vlm.readings.values()))) < 100_000, "a picture has 4.5 MB"


@pytest.mark.parametrize(
    ("method", "pictures"),
    [
        ("vicrop(window=90)", [1, 2]),  # the image for the reading, then beside its crop
        ("carve(steps=2)", [1, 1]),
        ("laser(floor=60)", [1, 1, 1]),  # the second stream's crop is another picture
        ("laser(floor=60,vat=never)", [1, 1]),
    ],
)
def test_every_pass_prepares_its_pictures_once(
    vlm: VLM, method: str, pictures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    inputs = VLM.inputs

    def counted(self: VLM, chats: list[Chat]) -> Any:
        prepared.extend(len(chat.images) for chat in chats)
        return inputs(self, chats)

    monkeypatch.setattr(VLM, "inputs", counted)
    image = world.draw(world.sample(2_100_000_009), 240)
    vlm.readings.clear()
    for question in ("Is there a car?", "What is red?"):  # the second time a reading is kept
        prepared.clear()
        vlm.ask(image, question, method, max_new_tokens=2)
        assert prepared == pictures


@pytest.mark.parametrize(
    ("methods", "expected"),
    [(["vicrop"], False), (["carve(keep=1)"], True), (["laser", "vanilla"], True)],
)
def test_a_picture_that_no_method_asks_about_is_not_processed(
    vlm: VLM, methods: list[str], expected: bool
) -> None:
    loaded = Asker(vlm, methods).load(questions_of(Scenes())[0])
    assert any(chat == id(loaded.chats[0]) for chat, *_ in vlm._processed) == expected


def test_a_chain_is_drawn_when_somebody_looks() -> None:
    drawn: list[int] = []

    def draw() -> list[Panel]:
        drawn.append(1)
        return [Panel("one", Image.new("RGB", (4, 4)))]

    chain = Chain(draw)
    assert not drawn
    assert chain.panels is chain.panels
    assert drawn == [1]


@dataclass(frozen=True)
class Looking(Method, register=False):
    """Shows the model the left half."""

    name: ClassVar[str] = "looking"
    looks_again: ClassVar[bool] = True
    paper_layers = (20, ..., 25)
    seen: ClassVar[list[Any]] = []

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        Looking.seen.append(self.layers)
        image = the_image(self, chats)
        assert image is not None
        half = image.crop((0, 0, image.width // 2, image.height))
        heat = np.eye(12)
        panels = (
            Panel("the contrast", image, heat, frames=((0.0, 0.0, 0.5, 1.0),)),
            Panel("the crop", half),
        )
        notes = {"crop": [0, 0, *half.size], "chain": Chain(lambda: panels)}
        return [replace(chat, images=[half], notes=notes) for chat in chats]


def test_the_chain_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.classes, "looking", Looking)
    Looking.seen.clear()
    path = tmp_path / "chain.png"
    with pytest.raises(SystemExit, match="0"):
        main(["ask", "demo", "Is there a cup?", "--method", "looking", "--show", str(path)])
    assert f"picture: {path}" in capsys.readouterr().out
    assert Looking.seen == [(7, 8, 9)], "published layers, at their depth of twelve"
    with Image.open(path) as picture:
        blue = np.asarray(picture.convert("RGB"), int) - np.array([0, 0x72, 0xB2])
    assert (abs(blue).sum(-1) < 6).sum() > 300, "the frame of the part that is cut out"


def test_a_model_whose_layout_is_not_known_is_refused() -> None:
    unknown: Any = SimpleNamespace(kind="aya_vision", layer_kinds=(), placed=False)
    with pytest.raises(FoveateError, match="looking has to know where aya_vision's image tokens"):
        Looking().resolve(unknown)


def test_two_methods_that_look_are_refused() -> None:
    with pytest.raises(FoveateError, match="carve and laser both look for a better picture"):
        as_stack("carve+laser")
    assert len(as_stack("carve(keep=1.0)+laser+clvs")) == 3
