"""RITUAL: both streams against whole plain runs, the six transforms, and shared prefixes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import VLM, FoveateError, Method, enhance
from foveate.backends.transformers.enhance import attach
from foveate.base.perturb import own_generator, registry
from foveate.core.method import as_stack, parse
from foveate.methods.ritual import RITUAL, SIX
from foveate.vlm.chat import Chat
from foveate.vlm.prefix import ask_together, prepare
from tests import models, tiny
from tests.references import ritual as reference
from tests.references.full import STEPS, difference

ROUNDING = 2e-5  # of l + alpha l'
SIZES = {"llava": (80, 64), "llava_next": (128, 64), "gemma3": (90, 60), "idefics3": (64, 64)}


def picture(seed: int = 0, width: int = 80, height: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)


def changed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with other pixels; padding, which is 0, stays."""
    if "pixel_values" not in inputs:
        return inputs
    return inputs | {"pixel_values": (3 * inputs["pixel_values"]).sin()}


def generate(model: Any, inputs: dict[str, Tensor], method: Method, **options: Any) -> Any:
    """What is written with a changed picture beside every picture."""
    other = {k: v for k, v in changed(inputs).items() if k == "pixel_values"}
    notes: list[dict[str, Any]] = [{} for _ in inputs["input_ids"]]
    settings = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), attach(model, (method,), notes=notes, contrast=other or None):
        return model.generate(**inputs, **settings | options)


def disagreement(name: str, kind: str, method: Any, rows: int = 3, **reads: Any) -> float:
    """Largest difference between a padded batch and every prompt of it by itself, slowly."""
    model, inputs = models.build(name), models.inputs(name, kind, batch=rows)
    out = generate(model, inputs, method)
    tokens, logits = out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)
    worst = 0.0
    for row in range(rows):
        prompt = models.inputs(name, kind, row=row)
        options = (tokens[row, :-1], method.alpha, method.beta)
        slow = reference.run(model, prompt, changed(prompt), *options, **reads)
        worst = max(worst, difference(logits[row], slow))
    return worst


# -- the second stream -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prompt_and_decode_steps_equal_two_plain_runs_on_every_family(
    family: str, kind: str
) -> None:
    assert disagreement(family, kind, RITUAL()) < ROUNDING


@pytest.mark.parametrize(
    "parameters",
    [{"alpha": 0.5, "beta": 0.0}, {"alpha": 1.0, "beta": 1.0}, {"alpha": 0.0, "beta": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    assert disagreement(name, "images", RITUAL(**parameters), rows=2) < ROUNDING


def test_beams_keep_their_streams() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=2)
    method = RITUAL(beta=0.0)
    out = generate(model, inputs, method, num_beams=3, max_new_tokens=6, output_scores=True)
    assert (out.beam_indices.diff(dim=1) != 0).any(), "no beam took another's place"
    for row, written in enumerate(out.sequences[:, inputs["input_ids"].shape[1] :]):
        prompt = models.inputs("llava", row=row)
        slow = reference.run(model, prompt, changed(prompt), written[:-1], 3.0, 0.0)
        score = slow.log_softmax(-1).gather(1, written[:, None]).mean().item()
        assert score == pytest.approx(out.sequences_scores[row].item(), abs=1e-4)


def test_the_same_picture_only_sharpens() -> None:
    """l' = l gives (1 + alpha) l, whose best token is the plain one."""
    vlm, question = tiny.vlm(), "is there a cat ?"
    plain = vlm.ask(picture(), question, max_new_tokens=6)
    same = vlm.ask(picture(), question, "ritual(transform=identity)", max_new_tokens=6)
    assert same.tokens == plain.tokens
    inputs = models.inputs("llava", batch=2)
    given = {"pixel_values": inputs["pixel_values"]}
    model, method = models.build("llava"), RITUAL(beta=0.0)
    with torch.no_grad():
        expected = 4 * model(**inputs).logits[:, -1]
        with attach(model, (method,), notes=[{}, {}], contrast=given):
            got = model(**inputs).logits[:, -1]
    assert difference(got, expected) < ROUNDING


def test_without_strength_only_the_cut_is_left() -> None:
    vlm = tiny.vlm()
    answer = vlm.ask(picture(), "red", "ritual(alpha=0,beta=0.1)", max_new_tokens=6)
    assert answer.tokens == vlm.ask(picture(), "red", max_new_tokens=6).tokens
    assert answer.chat.contrast is None, "and no second stream"
    neutral = vlm.ask(picture(), "red", "ritual(alpha=0,beta=0)", max_new_tokens=6)
    assert neutral.tokens == answer.tokens


def test_a_prompt_without_a_changed_picture_is_refused() -> None:
    with (
        pytest.raises(FoveateError, match="which needs the processor"),
        enhance(models.build("llava"), "ritual"),
    ):
        pass
    model, inputs = models.build("llava"), models.inputs("llava")
    with (
        torch.no_grad(),
        attach(model, (RITUAL(),), notes=[{}]),
        pytest.raises(FoveateError, match="came without a changed one"),
    ):
        model(**inputs)


# -- the pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_the_second_stream_sees_the_transformed_pictures(name: str) -> None:
    """Every token from two plain runs, of pictures that were transformed by hand."""
    vlm, images = tiny.vlm(name), [picture(0, *SIZES[name]), picture(1, *SIZES[name])]
    method: Any = as_stack("ritual(seed=1)")[0]
    (chat,) = vlm.rewrite([Chat(images, "is there a cat ?")], (method,))
    assert chat.images == images
    assert chat.contrast is not None
    inputs = vlm.inputs([chat])
    other = vlm.inputs([Chat(chat.contrast, chat.text)])
    out = vlm.answer([chat], (method,), STEPS, eos_token_id=None)[0]
    tokens = torch.tensor(vlm.tokenizer.convert_tokens_to_ids(list(out.tokens)))
    slow = reference.run(vlm.model, dict(inputs), dict(other), tokens[:-1], 3.0, 0.1)
    assert slow.argmax(-1).tolist() == tokens.tolist()
    chances = slow.softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert out.probabilities == pytest.approx(chances.tolist(), abs=1e-4)


def test_transforms_are_drawn_uniformly_and_by_the_picture_alone() -> None:
    method = RITUAL()
    names = Counter(method.changed(picture(seed, 12, 10))[1] for seed in range(600))
    assert set(names) == set(SIX)
    spread = math.sqrt(600 / 6 * 5 / 6)
    assert all(abs(n - 100) < 4 * spread for n in names.values())
    vlm = tiny.vlm()
    alone = vlm.rewrite([Chat([picture(1)], "red")], (method,))[0]
    both = vlm.rewrite([Chat([picture(0), picture(1)], "cat")], (method,))[0]
    assert alone.contrast is not None
    assert both.contrast is not None
    assert alone.contrast[0].tobytes() == both.contrast[1].tobytes()
    assert both.notes["transform"][1:] == alone.notes["transform"]
    seeds = {RITUAL(seed=seed).changed(picture())[0].tobytes() for seed in range(12)}
    assert len(seeds) > 4


@pytest.mark.parametrize("name", SIX)
def test_a_named_transform_is_that_of_the_registry(name: str) -> None:
    method = RITUAL(transform=name)
    image, told = method.changed(picture())
    draws = own_generator(picture(), 0)
    (one,) = registry.parse(name)
    assert told == name
    assert image.tobytes() == one(picture(), draws).tobytes()
    assert parse(str(method)) == (method,)


def test_only_the_crop_of_llava_is_a_square() -> None:
    for name in SIZES:
        vlm, image = tiny.vlm(name), picture(0, *SIZES[name])

        def size(transform: str, vlm: VLM = vlm, image: Image.Image = image) -> tuple[int, int]:
            (chat,) = vlm.rewrite([Chat([image], "red")], as_stack(RITUAL(transform=transform)))
            assert chat.contrast is not None
            return chat.contrast[0].size

        assert size("rotate") == image.size
        assert size("crop") == size("grey+crop") == ((336, 336) if name == "llava" else image.size)
        if name == "llava":
            assert size("crop(side=20)") == (20, 20)
        else:
            with pytest.raises(FoveateError, match=r"crop.side=20. gives a picture of another"):
                size("crop(side=20)")


# -- many questions --------------------------------------------------------------------------------


def test_questions_about_one_picture_share_both_prefixes() -> None:
    vlm = VLM.load("pocket", device="cpu")
    stack, images = as_stack("ritual(beta=0.0,transform=rotate)"), [picture(0, 96, 96)]
    asked = ["Is there a car?", "What colour is the dog?", "Describe this image."]
    chats = vlm.rewrite([Chat(images, text) for text in asked], stack)
    prompts = prepare(vlm, chats, stack)
    assert prompts is not None
    together = ask_together(vlm, prompts, stack, max_new_tokens=8, batch_size=2)
    for chat, answer in zip(chats, together, strict=True):
        alone = vlm.answer([chat], stack, 8)[0]
        assert answer.tokens == alone.tokens
        assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-4)
        plain = vlm.answer([Chat(images, chat.text)], (), 8)[0]
        assert answer.probabilities != pytest.approx(plain.probabilities, abs=1e-3)
    own = [*chats[:2], Chat(images, asked[2], contrast=[picture(5, 96, 96)])]
    assert prepare(vlm, own, stack) is None, "different second pictures"
    assert prepare(vlm, [*chats[:2], Chat(images, asked[2])], stack) is None


def test_other_methods_edit_the_true_stream_only() -> None:
    vlm = tiny.vlm()
    stack = as_stack("clvs(smoothing=0.5)", RITUAL(beta=0.0))
    (chat,) = vlm.rewrite([Chat([picture()], "red")], stack)
    assert chat.contrast is not None
    inputs, other = vlm.inputs([chat]), vlm.inputs([Chat(chat.contrast, "red")])
    with torch.no_grad():
        changed_logits = vlm.model(**other).logits[:, -1]
        with enhance(vlm.model, "clvs(smoothing=0.5)"):
            true = vlm.model(**inputs).logits[:, -1]
        with vlm.using(stack, [chat]):
            both = vlm.model(**inputs).logits[:, -1]
    assert difference(both, true + 3 * changed_logits) < ROUNDING


def test_a_second_owner_of_the_second_stream_is_refused() -> None:
    for other in ("vcd", "pai", "agla"):
        with pytest.raises(FoveateError, match="both want the second stream"):
            as_stack("ritual", other)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -0.1}, "alpha must be 0 or more"),
        ({"beta": 1.5}, "beta must lie between 0 and 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"transform": "rotat"}, "did you mean 'rotate'"),
        ({"layers": (1,)}, "ritual acts on no layer"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        tiny.vlm().ask(picture(), "red", RITUAL(**parameters))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_static_cache_and_half_precision(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    method = RITUAL(beta=0.0)
    dynamic = generate(model, inputs, method)
    static = generate(model, inputs, method, cache_implementation="static")
    assert difference(torch.stack(static.logits), torch.stack(dynamic.logits)) < ROUNDING
    half, dtype = models.build(name, dtype=torch.bfloat16), torch.bfloat16
    out = generate(half, models.inputs(name, "mixed", batch=3, dtype=dtype), method)
    assert torch.stack(out.logits).isfinite().all()
