"""VCD: the second stream against two whole plain runs, and what its noise must not depend on."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, enhance
from foveate.backends.transformers.compat import cache_of, passing
from foveate.methods.vcd import VCD
from tests import models
from tests.references import vcd as reference
from tests.references.full import STEPS, difference, generate

ROUNDING = 2e-5  # (1 + alpha) l - alpha l' triples that of l and l'


def noised(name: str, kind: str, step: int = 500, seed: int = 0, **rows: int) -> dict[str, Tensor]:
    """Inputs whose pictures were noised one by one, before they met in a prompt or a batch."""
    original, restart = models._picture, name in ("smolvlm", "idefics2", "idefics3", "llama4")

    def picture(name: str, shape: str, alone: bool) -> Any:
        tokens, tensors = original(name, shape, alone)
        return tokens, reference.noised(tensors, step, seed, restart)

    with mock.patch.object(models, "_picture", picture):
        return models.inputs(name, kind, **rows)


def seen(model: Any, inputs: dict[str, Tensor], method: VCD) -> dict[str, Any]:
    """What the second stream of a prompt is given."""
    noisy: dict[str, Any] = {}

    class Spy(VCD, register=False):
        def contrast(self, prompt: Any, seq: Any) -> Any:
            other = super().contrast(prompt, seq)
            if other is not None:
                noisy.update(models.as_inputs(other))
            return other

    with torch.no_grad(), enhance(model, Spy(**method.parameters())):
        model(**inputs)
    return noisy


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_two_plain_runs_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    inputs = models.inputs(family, kind, batch=3)
    out = generate(model, inputs, VCD())
    tokens, logits = out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)
    for row in range(3):
        prompt, noisy = models.inputs(family, kind, row=row), noised(family, kind, row=row)
        expected = reference.run(model, prompt, noisy, tokens[row, :-1])
        assert difference(logits[row], expected) < models.rounding(family)


@pytest.mark.parametrize(
    "parameters",
    [
        {"alpha": 0.3, "beta": 0.0},
        {"alpha": 2.0, "beta": 1.0},
        {"alpha": 0.0, "beta": 0.2},
        {"noise_step": 0, "seed": 7},
        {"noise_step": 999, "beta": 0.001},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    model, method = models.build(name), VCD(**parameters)
    inputs = models.inputs(name, "images", row=1)
    out = generate(model, inputs, method)
    noisy = noised(name, "images", method.noise_step, method.seed, row=1)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] : -1]
    expected = reference.run(model, inputs, noisy, tokens, method.alpha, method.beta)
    assert difference(torch.cat(out.logits), expected) < ROUNDING


# -- the noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_the_noise_of_a_picture_is_the_same_in_any_batch_and_prompt(
    family: str, model: Any, kind: str
) -> None:
    inputs = models.inputs(family, kind, batch=3)
    got, expected = seen(model, inputs, VCD()), noised(family, kind, batch=3)
    assert set(got) == set(inputs)
    for key, value in expected.items():
        if key == "pixel_values":
            assert torch.allclose(got[key], value, atol=1e-6)
            assert torch.equal(got[key] == 0, value == 0), "padding stays zero"
        else:
            assert torch.equal(got[key], value)
    rows = [models.inputs(family, kind, row=row) for row in range(3)]
    pixels = [seen(model, x, VCD())["pixel_values"] for x in rows if "pixel_values" in x]
    together = got["pixel_values"]
    if "target_sizes" in inputs:  # one long picture: columns first
        *pixels, together = (p.transpose(1, 3) for p in [*pixels, together])
    alone = torch.cat([p[p != 0] for p in pixels])
    assert torch.equal(together[together != 0], alone), "bit-equal, whatever the batch"


def test_one_picture_in_a_batch_of_two_prompts(family: str) -> None:
    """Its pixels and its size have one row, as what holds for all prompts has, and are doubled."""
    model = models.build(family)
    pair, alone = models.inputs(family, "mixed", batch=2), models.inputs(family, "mixed")
    with torch.no_grad(), enhance(model, VCD(**VCD.example)):
        both, one = model(**pair).logits[0, -1], model(**alone).logits[0, -1]
    assert torch.allclose(both, one, atol=1e-3)


def test_the_schedule_is_the_published_one() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    epsilon = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    for step, signal, strength in [(500, 0.86302, 0.50517), (999, 0.28504, 0.95851)]:
        assert reference.levels(step) == pytest.approx((signal, strength), abs=1e-5)
        got = seen(model, inputs, VCD(noise_step=step))["pixel_values"]
        expected = signal * inputs["pixel_values"] + strength * epsilon
        assert torch.allclose(got, expected, atol=1e-4)


def test_the_seed_decides_the_noise_and_the_global_generator_does_not() -> None:
    model, inputs = models.build("internvl"), models.inputs("internvl", batch=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = seen(model, inputs, VCD())["pixel_values"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(seen(model, inputs, VCD())["pixel_values"], first)
    assert not torch.equal(seen(model, inputs, VCD(seed=1))["pixel_values"], first)


@pytest.mark.parametrize("name", ["internvl", "llava_next"])
def test_tiles_of_one_picture_get_independent_noise(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, row=0)
    got = seen(model, inputs, VCD())["pixel_values"]
    noise = (got - reference.levels(500)[0] * inputs["pixel_values"]).flatten(0, -4)
    assert len(noise) == 3
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    assert not torch.allclose(noise[1], noise[2], atol=0.1)


def test_frames_of_a_qwen_video_differ_and_those_of_a_still_do_not() -> None:
    model = models.build("qwen2_vl")
    inputs = models.inputs("qwen2_vl", row=2)
    kept = reference.levels(500)[0] * inputs["pixel_values"]
    frames = (seen(model, inputs, VCD())["pixel_values"] - kept).view(-1, 3, 2, 16)
    assert torch.allclose(frames[:, :, 0], frames[:, :, 1], atol=1e-6)
    ids = inputs["input_ids"].clone()
    ids[ids == models.IMAGE] = models.VIDEO
    video = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == models.VIDEO).long() * 2,
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
    }
    frames = (seen(model, video, VCD())["pixel_values_videos"] - kept).view(-1, 3, 2, 16)
    assert not torch.allclose(frames[:, :, 0], frames[:, :, 1], atol=0.1)


def test_half_precision_pixels_get_the_noise_of_full_ones() -> None:
    model, inputs = models.build("llava", dtype=torch.bfloat16), models.inputs("llava", batch=2)
    pixels = inputs["pixel_values"].bfloat16()
    got = seen(model, {**inputs, "pixel_values": pixels}, VCD())["pixel_values"]
    full = seen(models.build("llava"), {**inputs, "pixel_values": pixels.float()}, VCD())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, full["pixel_values"].bfloat16())


def test_tokens_of_a_picture_without_pixels_are_refused() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    ids = inputs.pop("input_ids")
    inputs.pop("pixel_values")
    kinds = (ids == models.IMAGE).long()
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad(), enhance(model, VCD()), pytest.raises(FoveateError, match="pixel_values"):
        model(inputs_embeds=embeds, mm_token_type_ids=kinds, **inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minicpmv4_6", "molmo2"])
def test_pictures_that_cannot_be_repeated_have_no_beams(name: str) -> None:
    if name not in models.FAMILIES:
        pytest.skip("this transformers has no such model")
    with enhance(models.build(name), VCD()), pytest.raises(FoveateError, match="out num_beams"):
        models.build(name).generate(**models.inputs(name), num_beams=2, max_new_tokens=2)


# -- decoding --------------------------------------------------------------------------------------


def test_greedy_generation_uses_the_contrast_before_processors_and_warpers() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    out = generate(model, inputs, VCD(beta=0.0), output_scores=True)
    plain = generate(model, inputs, output_scores=True)
    assert torch.equal(out.sequences[:, -STEPS:], torch.stack(out.logits, 1).argmax(-1))
    assert not torch.equal(out.sequences, plain.sequences)
    banned = out.logits[0].argmax(-1).tolist()
    again = generate(model, inputs, VCD(beta=0.0), suppress_tokens=banned, output_scores=True)
    assert torch.equal(again.logits[0], out.logits[0])
    assert again.scores[0][:, banned].isinf().all()


def test_sampling_draws_plausible_tokens_only() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    plain = generate(model, inputs).logits[0].softmax(-1)
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 32, "top_k": 0}
    first = generate(model, inputs, VCD(alpha=0.5, beta=0.1), **options).sequences[:, -STEPS]
    assert len(set(first.tolist())) > 1
    assert (plain[0, first] >= 0.1 * plain.max()).all()


@pytest.mark.parametrize("second", ["suffix", "image"])
@pytest.mark.parametrize("name", ["llava", "internvl", "mistral3"])
def test_a_second_turn_is_contrasted_like_one_long_prompt(name: str, second: str) -> None:
    """Attention is untouched, so what was read in pieces equals what is read at once."""
    model, cache, longer = models.build(name), None, {}
    pieces = [models.inputs(name, "image", row=1), models.inputs(name, second, row=2)]
    noisy = [noised(name, "image", row=1), noised(name, second, row=2)]
    token = torch.tensor([50])
    with torch.no_grad(), enhance(model, VCD()):
        for piece in (pieces[0], {"input_ids": token[None]}, pieces[1]):
            given = {k: v for k, v in piece.items() if k != "attention_mask"}
            out = model(**given, **passing(model, cache), use_cache=True)
            cache = cache_of(out)
    for kind, (first, last) in {"true": pieces, "noisy": noisy}.items():
        ids = torch.cat([first["input_ids"], token[None], last["input_ids"]], 1)
        longer[kind] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for key in first.keys() - longer[kind].keys():
            parts = [first[key], last[key]] if key in last else [first[key]]
            longer[kind][key] = models._cat(parts)
    expected = reference.run(model, longer["true"], longer["noisy"], token[:0])
    assert difference(out.logits[:, -1], expected) < ROUNDING


def test_clvs_edits_the_true_stream_and_leaves_the_noised_one_plain() -> None:
    name = "llava"
    model, inputs = models.build(name), models.inputs(name, "images", batch=3)
    noisy = noised(name, "images", batch=3)
    with torch.no_grad():
        other = model(**noisy).logits[:, -1]
        with enhance(model, "clvs(smoothing=0.5)"):
            true = model(**inputs).logits[:, -1]
        with enhance(model, "clvs(smoothing=0.5)", VCD()):
            both = model(**inputs).logits[:, -1]
    expected = [reference.contrasted(a, b, 1.0, 0.1) for a, b in zip(true, other, strict=True)]
    assert difference(both, torch.stack(expected)) < ROUNDING


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -0.1}, "alpha must be 0 or more"),
        ({"beta": 1.5}, "beta must lie between 0 and 1"),
        ({"noise_step": 1000}, "noise_step must lie between 0 and 999"),
        ({"noise_step": 0.5}, "noise_step must be a whole number"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        VCD(**parameters)
