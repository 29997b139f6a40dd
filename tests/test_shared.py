"""Many questions about one image: the same answers as one by one, and what cannot be shared."""

from __future__ import annotations

import random
from typing import Any

import pytest

from foveate import VLM
from foveate.core.method import as_stack, methods
from foveate.scenes import questions, world
from foveate.vlm.chat import Chat
from foveate.vlm.prefix import ask_together, prepare


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


def chats_about(vlm: VLM, seed: int, system: str | None = None) -> list[Chat]:
    scene = world.sample(questions.FIRST_HELD_OUT + seed)
    images = [world.draw(scene)]
    asked = [q.text for q in questions.exam(scene, random.Random(seed))][:6]
    found = [vlm.chat(images, text, system) for text in [*asked, "Describe this image."]]
    for chat in found:
        chat.images = images
    return found


TRAINED = {"cli": "cli(seed=0, start=0.0, summary=image)"}
NAMED = [
    TRAINED.get(name, name)
    for name, cls in methods().items()
    if not {"rewrite", "search"} & cls.stages
]
STACKS = ["vanilla", *(text for text in NAMED if as_stack(text)[0].shares_prefix)]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:var does nothing")
@pytest.mark.parametrize("method", [*STACKS, "clvs+vcd", "tarac+pai(gamma=1)"])
def test_answers_are_those_of_asking_one_by_one(vlm: VLM, method: str) -> None:
    chats, stack = chats_about(vlm, 3), as_stack(method)
    prompts = prepare(vlm, chats, stack)
    assert prompts is not None
    assert prompts.prefix["input_ids"].shape[1] > 144, "the image is in the prefix"
    together = ask_together(vlm, prompts, stack, max_new_tokens=12, batch_size=4)
    for chat, answer in zip(chats, together, strict=True):
        alone = vlm.answer([chat], stack, 12)[0]
        assert answer.tokens == alone.tokens
        assert answer.text == alone.text
        assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        assert (answer.yes is None) == (alone.yes is None)
        assert answer.yes is None or abs(answer.yes - alone.yes) < 1e-5
        assert answer.chat is chat
        assert answer.seconds > 0


def test_a_repetition_penalty_is_applied_as_generate_does(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm.model.generation_config, "repetition_penalty", 1.3)
    chats = chats_about(vlm, 4)
    prompts = prepare(vlm, chats)
    assert prompts is not None
    together = ask_together(vlm, prompts, (), max_new_tokens=12)
    assert [a.text for a in together] == [vlm.answer([c], (), 12)[0].text for c in chats]


def test_what_cannot_be_shared_is_not_prepared(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = chats_about(vlm, 5)
    assert prepare(vlm, chats[:1]) is None
    for alone in set(NAMED) - set(STACKS):
        assert prepare(vlm, chats, as_stack(alone)) is None
    assert {"memvr", "vista"} <= set(NAMED) - set(STACKS)
    assert prepare(vlm, [*chats, chats_about(vlm, 6)[0]]) is None
    text = [Chat([], "Is there a car?"), Chat([], "Is it red?")]
    assert prepare(vlm, text) is None
    clvs: Any = as_stack("clvs")[0]
    monkeypatch.setattr(type(clvs), "shares_prefix", False)
    assert prepare(vlm, chats, (clvs,)) is None
    monkeypatch.undo()
    monkeypatch.setattr(vlm.model.generation_config, "no_repeat_ngram_size", 3)
    assert prepare(vlm, chats) is None


def test_prompts_that_differ_before_the_image_are_not_prepared(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = chats_about(vlm, 7)
    plain = VLM.prompt
    monkeypatch.setattr(VLM, "prompt", lambda self, chat: chat.text[:4] + plain(self, chat))
    assert prepare(vlm, chats) is None


def test_a_question_of_one_token_and_equal_questions(vlm: VLM) -> None:
    images = chats_about(vlm, 8)[0].images
    chats = [Chat(images, "car"), Chat(images, "car"), Chat(images, "Is there a car?")]
    prompts = prepare(vlm, chats)
    assert prompts is not None
    assert all(prompts.suffixes)
    together = ask_together(vlm, prompts, (), max_new_tokens=4)
    assert [a.text for a in together] == [vlm.answer([c], (), 4)[0].text for c in chats]
    same = prepare(vlm, chats[:2])
    assert same is not None
    assert [len(s) for s in same.suffixes] == [1, 1], "a suffix keeps its last token"
