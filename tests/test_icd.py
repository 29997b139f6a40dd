"""ICD: a second stream of longer or other text, against two whole plain runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import VLM, FoveateError, enhance, prefill
from foveate.backends.transformers.compat import cache_of, passing
from foveate.core.method import as_stack
from foveate.core.prompt import Prompt
from foveate.methods.icd import ICD
from foveate.scenes import world
from tests import models
from tests.references import icd as reference
from tests.references.full import STEPS, difference, generate

ROUNDING = 2e-5
IDS = (20, 31, 42, 53, 64)


def by_ids(prefix: tuple[int, ...] = IDS, **parameters: Any) -> ICD:
    return ICD(**{"where": "question", "prefix": prefix, **parameters})


def other(name: str, kind: str, row: int, prefix: tuple[int, ...] = IDS) -> dict[str, Tensor]:
    return reference.disturbed(models.inputs(name, kind, row=row), models.IMAGE, prefix)


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_two_plain_runs_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    inputs = models.inputs(family, kind, batch=3)
    out = generate(model, inputs, by_ids())
    tokens, logits = out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)
    for row in range(3):
        prompt = models.inputs(family, kind, row=row)
        expected = reference.run(model, prompt, other(family, kind, row), tokens[row, :-1])
        assert difference(logits[row], expected) < models.rounding(family)


@pytest.mark.parametrize(
    ("parameters", "prefix"),
    [
        ({"alpha": 0.3, "beta": 0.0}, (20,)),
        ({"alpha": 2.0, "beta": 1.0}, IDS * 3),
        ({"alpha": 0.0, "beta": 0.2}, IDS),
        ({}, ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(
    name: str, parameters: dict[str, Any], prefix: tuple[int, ...]
) -> None:
    model, method = models.build(name), by_ids(prefix, **parameters)
    inputs = models.inputs(name, "images", row=1)
    out = generate(model, inputs, method)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] : -1]
    against = other(name, "images", 1, prefix)
    expected = reference.run(model, inputs, against, tokens, method.alpha, method.beta)
    assert difference(torch.cat(out.logits), expected) < ROUNDING


def test_an_empty_prefix_leaves_the_model_under_the_cut() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    plain = torch.stack(generate(model, inputs).logits)
    for method in (by_ids((), beta=0.0), ICD(prefix="", beta=0.0)):
        assert difference(torch.stack(generate(model, inputs, method).logits), plain) < ROUNDING


def test_tokens_put_in_stand_behind_the_last_visual_one() -> None:
    """Of every sample; one without pictures gets padding in front."""
    model, inputs = models.build("qwen2_5_vl"), models.inputs("qwen2_5_vl", "mixed", batch=3)
    seen: list[Prompt] = []

    class Spy(ICD, register=False):
        def contrast(self, prompt: Any, seq: Any) -> Any:
            seen.append(super().contrast(prompt, seq))
            return seen[-1]

    with torch.no_grad(), enhance(model, Spy(**by_ids().parameters())):
        model(**inputs)
    prompt = seen[0]
    assert prompt.ids is not None
    assert torch.equal(prompt.visual, prompt.ids == models.IMAGE)
    if "mm_token_type_ids" in prompt.inputs:  # which earlier releases of transformers do not have
        assert torch.equal(prompt.inputs["mm_token_type_ids"], prompt.visual.long())
    for row in range(3):
        alone = other("qwen2_5_vl", "mixed", row)
        assert prompt.ids[row][prompt.mask[row] == 1].tolist() == alone["input_ids"][0].tolist()
        assert bool((prompt.mask[row].diff() >= 0).all()), "padding comes first"


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_beams_take_both_streams_with_them(name: str) -> None:
    model, method = models.build(name), by_ids(alpha=0.5, beta=0.0)
    inputs = models.inputs(name, "image", batch=2)
    out = generate(model, inputs, method, num_beams=3, output_scores=True)
    assert (out.beam_indices.diff(dim=1) != 0).any(), "no beam took another's place"
    length = inputs["input_ids"].shape[1]
    for row in range(2):
        tokens, alone = out.sequences[row, length:], models.inputs(name, "image", row=row)
        slow = reference.run(model, alone, other(name, "image", row), tokens[:-1], 0.5, 0.0)
        score = slow.log_softmax(-1).gather(1, tokens[:, None]).sum() / STEPS
        assert float(score) == pytest.approx(float(out.sequences_scores[row]), abs=ROUNDING)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_shared_prefix_holds_the_disturbance_of_its_picture(name: str) -> None:
    """And decoding goes on from forks of it, with a longer second stream."""
    from foveate.vlm.prefix import next_position

    model, prefix = models.build(name), models.inputs(name, "prefix")
    suffix, tokens = models.inputs(name, "suffix", row=1)["input_ids"], torch.tensor([40, 41])
    got = []
    with torch.no_grad(), enhance(model, by_ids()):
        cache = prefill(model, prefix)
        place = next_position(model, cache)
        fork = copy.deepcopy(cache)
        for ids in (suffix, *tokens[:, None, None]):
            where = place + torch.arange(ids.shape[1])
            given = {"input_ids": ids, "position_ids": where}
            got.append(model(**given, **passing(model, fork)).logits[0, -1])
            place = place + ids.shape[1]
    whole = models.inputs(name, "shared", row=1)
    expected = reference.run(model, whole, other(name, "shared", 1), tokens)
    assert difference(torch.stack(got), expected) < ROUNDING


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_later_picture_is_disturbed_too(name: str) -> None:
    model, turns = models.build(name), models.conversation(name, "image", alone=True)
    if name == "qwen2_5_vl" and "mm_token_type_ids" not in turns[0]:
        pytest.skip(
            "this transformers needs no token types, by which the reference finds positions"
        )
    first, token, second = turns[0], turns[1], turns[3]
    cache, got = None, []
    whole: dict[str, Any] = {k: v for k, v in first.items() if k != "attention_mask"}
    places = None
    for turn in (token, second):
        whole["input_ids"] = torch.cat([whole["input_ids"], turn["input_ids"]], 1)
    for key in second.keys() & whole.keys() - {"input_ids"}:
        whole[key] = torch.cat([whole[key], second[key]], int(key == "mm_token_type_ids"))
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (whole["input_ids"] == models.IMAGE).long()
        known = {k: v for k, v in whole.items() if k != "pixel_values"}
        places = model.model.get_rope_index(**known)[0]
    done = 0
    with torch.no_grad(), enhance(model, by_ids(beta=0.0)):
        for turn in (first, token, second):
            given = {k: v for k, v in turn.items() if k != "attention_mask"}
            if places is not None:
                given["position_ids"] = places[:, :, done : done + turn["input_ids"].shape[1]]
            out = model(**given, **passing(model, cache), use_cache=True)
            cache, done = cache_of(out), done + turn["input_ids"].shape[1]
            got.append(out.logits[0, -1])
    ids = whole["input_ids"][0].tolist()
    ends = [len(first["input_ids"][0]), len(ids)]
    longer = dict(whole)
    for end in reversed(ends):  # behind the last visual token of each turn with pictures
        last = end - ids[:end][::-1].index(models.IMAGE)
        ids[last:last] = IDS
    longer["input_ids"] = torch.tensor([ids])
    if places is not None:
        longer["mm_token_type_ids"] = (longer["input_ids"] == models.IMAGE).long()
    none = torch.tensor([]).long()
    assert difference(got[-1], reference.run(model, whole, longer, none, 1.0, 0.0)[0]) < ROUNDING


def test_prompts_given_as_embeddings_are_refused() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    kinds = (inputs["input_ids"] == models.IMAGE).long()
    with (
        torch.no_grad(),
        enhance(model, by_ids()),
        pytest.raises(FoveateError, match="given as embeddings: pass input_ids"),
    ):
        model(inputs_embeds=embeds, mm_token_type_ids=kinds)


# -- by text, through the front door ---------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


def pictures(count: int) -> list[Any]:
    return [world.draw(world.sample(seed)) for seed in range(7, 7 + count)]


TEXT = "You are confused."


def expected(vlm: VLM, image: Any, question: str, where: str, tokens: Tensor) -> Tensor:
    """The reference's logits for a question of the front door."""
    chat = vlm.chat([image], question, None)
    against = vlm.chat([image], f"{TEXT} {question}", None)
    if where == "system":
        against = vlm.chat([image], question, TEXT)
    prompt, second = (dict(vlm.inputs([one])) for one in (chat, against))
    return reference.run(vlm.model, prompt, second, tokens, 1.0, 0.0)


@pytest.mark.parametrize("where", ["system", "question"])
def test_a_text_disturbs_every_question_of_a_batch(vlm: VLM, where: Any) -> None:
    asked = ["Is there a car?", "How many things are there in this picture?"]
    pairs = list(zip(pictures(2), asked, strict=True))
    method = ICD(prefix=TEXT, where=where, beta=0.0)
    answers = vlm.batch(pairs, method, max_new_tokens=4)
    for (image, question), answer in zip(pairs, answers, strict=True):
        tokens = torch.tensor(vlm.tokenizer.convert_tokens_to_ids(list(answer.tokens)))
        ids = vlm.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor(ids[: len(answer.tokens)])
        slow = expected(vlm, image, question, answer.chat.notes["prefix"], tokens[:0])[0]
        best = slow.softmax(-1).max()
        assert answer.probabilities[0] == pytest.approx(float(best), abs=1e-5)
        assert answer.chat.text == question
        alone = vlm.ask(image, question, method, max_new_tokens=4)
        assert alone.tokens == answer.tokens
        assert alone.probabilities == pytest.approx(answer.probabilities, abs=1e-5)
        assert "".join(vlm.stream(image, question, method, max_new_tokens=4)) == alone.text


def test_a_template_without_system_text_gets_the_prefix_before_the_question(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,), plain = pictures(1), vlm.prompt

    def prompt(chat: Any) -> str:
        if chat.system:
            raise FoveateError("The chat template of pocket drops system prompts.")
        return plain(chat)

    monkeypatch.setattr(vlm, "prompt", prompt)
    answer = vlm.ask(image, "Is there a car?", ICD(prefix=TEXT), max_new_tokens=1)
    assert answer.chat.notes["prefix"] == "question"
    assert answer.chat.second.text == f"{TEXT} Is there a car?"


def test_a_text_is_refused_without_the_front_door() -> None:
    for method in ("icd", "icd(where=question, prefix='You are confused.')"):
        with (
            pytest.raises(FoveateError, match=r"changes the prompt .* use VLM.load"),
            enhance(models.build("llava"), method),
        ):
            pass


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -0.1}, "alpha must be 0 or more"),
        ({"beta": 1.5}, "beta must lie between 0 and 1"),
        ({"prefix": (1, 2)}, "token ids stand behind the image: pass where='question'"),
        ({"prefix": (-1,), "where": "question"}, "token ids must be 0 or more"),
        ({"where": "image"}, "where must be"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        ICD(**parameters)


def test_a_stack_with_another_owner_of_the_second_stream_is_refused() -> None:
    with pytest.raises(FoveateError, match="both want the second stream"):
        as_stack("icd+vcd")
