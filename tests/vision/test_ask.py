"""`VLM` asks through the families' real image processors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveate.base.errors import FoveateError
from foveate.core.method import as_stack
from foveate.core.visual import visual_mask, visual_token_ids
from foveate.vlm.answering import answer_all, complete
from foveate.vlm.chat import Answer, Chat
from foveate.vlm.prefix import ask_together, prepare
from foveate.vlm.vlm import VLM
from tests.vision.families import picture, vlm

pytest.importorskip("torchvision", reason="torchvision has an environment of its own: test-vision")

QUESTIONS = ["Is there a cat?", "What is in the picture?", "Is the single frame red?"]
SIZES = [(40, 30), (9, 70), (200, 20)]
# one pixel; the longest and thinnest that is read; eight megapixels; a line; smaller than a token
SHAPES = [(1, 1), (20, 4000), (4000, 20), (3264, 2448), (30, 1), (5, 3)]


def same(mine: Answer, other: Answer) -> bool:
    """Whether two answers are one, up to rounding."""
    if mine.text != other.text:
        return False
    probabilities = (torch.tensor(answer.probabilities) for answer in (mine, other))
    return torch.allclose(*probabilities, atol=1e-4)


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_a_picture_of_any_shape_is_seen(model: VLM, size: tuple[int, int]) -> None:
    image = picture(*size)
    plain = model.ask(image, QUESTIONS[0], max_new_tokens=2)
    edited = model.ask(image, QUESTIONS[0], "vaf(enhance=4.0)", max_new_tokens=2, record=True)
    assert edited.tokens
    assert plain.probabilities != edited.probabilities
    inputs = model.processed(edited.chat)
    seen = visual_mask(visual_token_ids(model.model.config), inputs["input_ids"])
    assert edited.record is not None
    assert edited.record.image(0)[0].shape[-1] == int(seen.sum()) > 0


def test_a_picture_that_is_too_thin_is_refused_in_one_sentence(model: VLM) -> None:
    with pytest.raises(FoveateError, match=r"10 x 4000 pixels.*the limit is 200 times") as refused:
        model.ask(picture(10, 4000), QUESTIONS[0])
    assert "\n" not in str(refused.value)


def test_a_processor_that_refuses_a_picture_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's has a limit of its own, which our limit keeps users from; so the limit is lifted."""
    monkeypatch.setattr("foveate.base.images.RATIO", 1000)
    sentence = "This model's processor refuses the input: .*aspect ratio"
    for name in ("qwen2_5_vl", "qwen3_vl"):
        with pytest.raises(FoveateError, match=sentence):
            vlm(name).ask(picture(10, 4000), QUESTIONS[0])


@pytest.mark.parametrize("method", ["vanilla", "clvs(smoothing=0.4)", "vaf"])
def test_a_batch_of_shapes_answers_as_one_by_one(model: VLM, method: str) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    pairs = list(zip(images, QUESTIONS, strict=True))
    together = model.batch(pairs, method, max_new_tokens=4)
    alone = [model.ask(*pair, method, max_new_tokens=4) for pair in pairs]
    assert all(map(same, together, alone))


def test_no_two_and_one_picture_are_asked_together(model: VLM) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    groups = [images[:2], [], images[2:]]
    chats = [model.chat(*pair, None) for pair in zip(groups, QUESTIONS, strict=True)]
    with pytest.warns(UserWarning, match="has no image"):
        together = complete(answer_all(model, chats, as_stack("vaf"), 3))
    with pytest.warns(UserWarning, match="has no image"):
        alone = [model.answer([chat], as_stack("vaf"), 3)[0] for chat in chats]
    assert all(map(same, together, alone))


@pytest.mark.parametrize("method", ["vanilla", "vaf", "vcd(noise_step=400)"])
def test_questions_share_the_picture(model: VLM, method: str) -> None:
    image, stack = picture(40, 30), as_stack(method)
    chats = [Chat([image], question) for question in QUESTIONS]
    prompts = prepare(model, chats, stack)
    assert prompts is not None
    together = ask_together(model, prompts, stack, 4)
    alone = [model.ask(image, question, method, max_new_tokens=4) for question in QUESTIONS]
    assert all(map(same, together, alone))


def test_two_pictures_keep_their_order(model: VLM) -> None:

    one, two = picture(40, 30, 1), picture(30, 40, 2)
    here = model.processed(Chat([one, two], QUESTIONS[0]))
    there = model.processed(Chat([two, one], QUESTIONS[0]))
    ids = visual_token_ids(model.model.config)
    counts = [int(visual_mask(ids, inputs["input_ids"]).sum()) for inputs in (here, there)]
    assert counts[0] == counts[1] > 0
    answers = [
        model.ask(images, QUESTIONS[0], max_new_tokens=2) for images in ([one, two], [two, one])
    ]
    assert answers[0].probabilities != answers[1].probabilities


def test_a_saved_folder_is_loaded(model: VLM, tmp_path: Path) -> None:
    """Transformers finds the same processors again, by their names."""
    model.model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = VLM.load(tmp_path, device="cpu")
    image = picture(40, 30)
    pixels = [
        {k: v for k, v in each.inputs([Chat([image], QUESTIONS[0])]).items() if "pixel" in k}
        for each in (loaded, model)
    ]
    assert pixels[0].keys() == pixels[1].keys() != set()
    assert all(torch.equal(pixels[0][name], pixels[1][name]) for name in pixels[0])
    assert loaded.ask(image, QUESTIONS[0], "vaf", max_new_tokens=2).tokens
