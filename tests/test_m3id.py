"""M3ID: a guidance that grows with every token, against whole runs without the picture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from foveate import FoveateError, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of, passing
from foveate.methods.clvs import CLVS
from foveate.methods.m3id import M3ID
from foveate.methods.pai import PAI
from tests import models
from tests.references import clvs
from tests.references import m3id as reference
from tests.references.full import STEPS, difference, generate
from tests.references.vcd import plain

ROUNDING = 2e-5


def disagreement(name: str, kind: str, method: M3ID, batch: int = 3, first: int = 0) -> float:
    """Largest difference to the reference over the prompt and eight decode steps."""
    model, inputs = models.build(name), models.inputs(name, kind, batch=batch, row=first)
    out = generate(model, inputs, method)
    tokens, logits = out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)
    worst = 0.0
    for row in range(batch):
        prompt = models.inputs(name, kind, row=first + row)
        parameters = {k: v for k, v in method.parameters().items() if k != "layers"}
        slow = reference.run(model, prompt, tokens[row, :-1], **parameters)
        worst = max(worst, difference(logits[row], slow))
    return worst


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(family: str, kind: str) -> None:
    assert disagreement(family, kind, M3ID(forgetting=0.1)) < models.rounding(family)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"first_step": 0},
        {"forgetting": 0.1, "beta": 0.0, "first_step": 5},
        {"forgetting": 0.1, "confidence": 0.1},
        {"forgetting": 0.2, "confidence": 0.0, "beta": 0.3},
        {"forgetting": 0.0},
        {"beta": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    assert disagreement(name, "images", M3ID(**parameters)) < ROUNDING


def test_the_gate_lets_some_samples_and_steps_pass_and_not_others() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    free = generate(model, inputs, M3ID(forgetting=0.3, beta=0.0))
    gated = generate(model, inputs, M3ID(forgetting=0.3, beta=0.0, confidence=0.1))
    same = (free.logits[0] == gated.logits[0]).all(-1)
    assert same.any()
    assert not same.all()


def test_without_forgetting_are_the_models_own_log_probabilities() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    plainly = generate(model, inputs).logits[0].log_softmax(-1)
    for method in (M3ID(forgetting=0.0, beta=1e-9), M3ID(first_step=0, beta=0.0)):
        with torch.no_grad(), enhance(model, method):
            assert difference(model(**inputs).logits[:, -1], plainly) < ROUNDING


def test_no_answer_is_so_long_that_numbers_end() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    with torch.no_grad(), enhance(model, M3ID(forgetting=1.0, first_step=10**9)):
        last = model(**inputs).logits[:, -1]
    assert not last.isnan().any()
    assert last.amax(-1).isfinite().all()


def test_a_step_equals_pai_guidance_of_the_same_strength() -> None:
    """q + gamma (p - q) is p + (gamma - 1) (p - q)."""
    model, inputs = models.build("qwen2_5_vl"), models.inputs("qwen2_5_vl", batch=3)
    for first in (1, 4):
        pai = PAI(alpha=0.0, gamma=math.exp(0.2 * first), plausibility=0.1)
        with torch.no_grad(), enhance(model, pai):
            expected = model(**inputs).logits[:, -1]
        with torch.no_grad(), enhance(model, M3ID(forgetting=0.2, first_step=first)):
            assert difference(model(**inputs).logits[:, -1], expected) < ROUNDING


def test_a_second_turn_counts_on() -> None:
    model, method = models.build("llava"), M3ID(forgetting=0.2, beta=0.0)
    first, second = models.inputs("llava", "image"), models.inputs("llava", "suffix", row=1)
    token = torch.tensor([[40]])
    with torch.no_grad(), enhance(model, method):
        cache = cache_of(model(**first))
        model(input_ids=token, **passing(model, cache))
        got = model(input_ids=second["input_ids"], **passing(model, cache)).logits[0, -1]
    after = torch.cat([token, second["input_ids"]], 1)[0]
    ids = first["input_ids"][0]
    own = plain(model, first, after)
    unseen = plain(model, {"input_ids": ids[ids != models.IMAGE][None]}, after)
    assert difference(got, reference.guided(own, unseen, 2, 0.2, beta=0.0)) < ROUNDING


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_beams_take_the_count_and_both_streams_with_them(name: str) -> None:
    model, method = models.build(name), M3ID(forgetting=0.2, beta=0.0)
    inputs = models.inputs(name, "image", batch=2)
    out = generate(model, inputs, method, num_beams=3, output_scores=True)
    assert (out.beam_indices.diff(dim=1) != 0).any(), "no beam took another's place"
    length = inputs["input_ids"].shape[1]
    for row in range(2):
        tokens, alone = out.sequences[row, length:], models.inputs(name, "image", row=row)
        slow = reference.run(model, alone, tokens[:-1], forgetting=0.2, beta=0.0)
        score = slow.log_softmax(-1).gather(1, tokens[:, None]).sum() / STEPS
        assert float(score) == pytest.approx(float(out.sequences_scores[row]), abs=ROUNDING)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_clvs_edits_the_stream_with_the_picture_alone(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, "images", batch=3)
    smooth = CLVS(smoothing=0.5, beta=0.7, stop_threshold=0.0)
    out = generate(model, inputs, smooth, M3ID(forgetting=0.1))
    written = out.sequences[:, inputs["input_ids"].shape[1] :]
    slowly = clvs.Reference(model, clvs.Parameters(smoothing=0.5, beta=0.7, stop_threshold=0.0))
    steps = slowly.run(inputs, STEPS, tokens=written[:, :-1])
    for row in range(3):
        ids = models.inputs(name, "images", row=row)["input_ids"][0]
        text = {"input_ids": ids[ids != models.IMAGE][None]}
        for count in range(STEPS):
            unseen = plain(model, text, written[row, :count])
            want = reference.guided(steps[count].logits[row], unseen, count, 0.1)
            assert difference(out.logits[count][row], want) < ROUNDING


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"forgetting": -0.1}, "forgetting must lie between 0 and 1"),
        ({"beta": 1.5}, "beta must lie between 0 and 1"),
        ({"confidence": 2.0}, "confidence must lie between 0 and 1"),
        ({"first_step": -1}, "first_step must be 0 or more"),
        ({"layers": (1,)}, "acts on no layer"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        M3ID(**parameters).resolve(anatomy(models.build("llava")))
