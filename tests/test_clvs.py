"""CLVS: the fast path against the slow reference, and the sanity list of its specification."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, Recorder, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of
from foveate.methods.clvs import CLVS
from tests import models
from tests.references import clvs as reference

STEPS = 9  # the prompt's row and eight decode steps

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "strong": {"smoothing": 0.3, "beta": 0.5, "stop_threshold": 0.0},
    "stopping": {"smoothing": 0.4, "stop_threshold": 0.6, "stop_from": 0.25, "top_k": 5},
    "sparse-stop": {"stop_threshold": 0.7, "stop_from": 0.0, "stop_every": 2, "final_norm": True},
    "plain-positions": {"unified_positions": False, "stop_threshold": 0.0},
    "mean": {"pool": "mean", "memory_norm": True, "stop_threshold": 0.0},
    "add": {"mode": "add", "smoothing": 1.6, "stop_threshold": 0.0},
}


def generate(model: Any, inputs: dict[str, Tensor], method: Any, **options: Any) -> Any:
    stack = method if isinstance(method, tuple) else (method,)
    with torch.no_grad(), enhance(model, *stack):
        return model.generate(
            **inputs,
            max_new_tokens=STEPS,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


def expected(model: Any, inputs: dict[str, Tensor], out: Any, **parameters: Any) -> Any:
    method = CLVS(**parameters).resolve(anatomy(model))
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(reference.Parameters)}
    tokens = out.sequences[:, inputs["input_ids"].shape[1] : -1]
    return reference.run(model, inputs, steps=STEPS, tokens=tokens, **values)


def worst(out: Any, steps: Any) -> float:
    pairs = zip(out.logits, steps, strict=True)
    return max((a - s.logits).abs().max().item() for a, s in pairs)


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    inputs = models.inputs(family, kind, batch=3)
    parameters = VARIANTS["strong"]
    out = generate(model, inputs, CLVS(**parameters))
    assert worst(out, expected(model, inputs, out, **parameters)) < 1e-5


def test_a_bos_token_without_an_embedding_does_not_stop_it() -> None:
    model, inputs = models.build("qwen2_5_vl", fresh=True), models.inputs("qwen2_5_vl")
    model.get_decoder().config.bos_token_id = model.get_input_embeddings().num_embeddings
    with enhance(model, CLVS()), torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_equals_the_reference(name: str, variant: str) -> None:
    model, parameters = models.build(name), VARIANTS[variant]
    inputs = models.inputs(name, "images", batch=3)
    out = generate(model, inputs, CLVS(**parameters))
    assert worst(out, expected(model, inputs, out, **parameters)) < 1e-5


def test_the_stopping_variant_stops_some_samples_and_not_others() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    out = generate(model, inputs, CLVS(**VARIANTS["stopping"]))
    steps = expected(model, inputs, out, **VARIANTS["stopping"])
    stopped = {layer for step in steps for layer in step.stopped}
    assert None in stopped
    assert len(stopped) > 1


def test_the_presets_are_the_published_ones() -> None:
    for name, beta in [("llava", 0.8), ("llava_next", 0.7), ("qwen2_5_vl", 0.7), ("gemma3", 0.8)]:
        assert CLVS().resolve(anatomy(models.build(name))).beta == beta
    assert CLVS(beta=0.3).resolve(anatomy(models.build("llava_next"))).beta == 0.3


def record(model: Any, inputs: dict[str, Tensor], method: CLVS) -> Tensor:
    with torch.no_grad(), enhance(model, method, Recorder(heads="all")):
        out = model(**inputs)
    return Recorder.read(out).values[0]


def test_memory_one_keeps_the_first_layers_memory() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    with torch.no_grad(), enhance(model, CLVS(beta=1.0, stop_threshold=0.0)):
        kept = cache_of(model(**inputs)).foveate.memories[0]["M"]
    with (
        torch.no_grad(),
        enhance(model, CLVS(layers=(0, 1), stop_threshold=0.0), Recorder(heads="max")),
    ):
        first = Recorder.read(model(**inputs))
    assert torch.equal(kept[0, 0, 0][first.visual[0]], first.image()[0][0])


def test_smoothing_raises_the_image_share() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    shares = []
    for method in (CLVS(smoothing=1.0), CLVS(smoothing=0.5, stop_threshold=0.0)):
        with torch.no_grad(), enhance(model, method, Recorder()):
            record = Recorder.read(model(**inputs))
        shares.append(torch.stack([image[1:].sum(-1).mean() for image in record.image()]).mean())
    assert shares[1] > shares[0]


def test_threshold_above_one_stops_at_the_first_tested_layer() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    free, short = CLVS(smoothing=0.3, stop_threshold=0.0), (0, 1, 2)  # floor(0.3 * 6) + 1 = 2
    stopped = record(model, inputs, CLVS(smoothing=0.3, stop_threshold=1.1, stop_from=0.3))
    want = record(model, inputs, dataclasses.replace(free, layers=short))
    assert torch.allclose(stopped, want, atol=1e-6)
    later = (stopped - record(model, inputs, free)).abs().amax((0, 2, 3))
    assert later[:3].max() == 0
    assert later[3:].min() > 1e-3


@pytest.mark.parametrize("mode", [True, "visual"])
def test_one_visual_token_has_nothing_to_unify(mode: Any) -> None:
    model = models.build("llava")
    ids = torch.tensor([[1, 30, 31, models.IMAGE, 32, 33, 34]])
    embeds = model.get_input_embeddings()(ids)
    kinds = (ids == models.IMAGE).long()
    outs = []
    for unified in (False, mode):
        method = CLVS(unified_positions=unified, stop_threshold=0.0)
        with torch.no_grad(), enhance(model, method):
            outs.append(model(inputs_embeds=embeds, mm_token_type_ids=kinds).logits)
    assert torch.allclose(outs[0], outs[1], atol=1e-5)


def test_visual_only_unification_moves_the_image_and_not_the_text() -> None:
    """Against plain attention under positions where only the image tokens share one."""
    model, inputs = models.build("llava"), models.inputs("llava", "image")
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1])[None]
    visual = ids == models.IMAGE
    unified = torch.where(visual, positions[visual].min(), positions)
    with torch.no_grad(), enhance(model, Recorder(heads="all", layers=(0,))):
        want = Recorder.read(model(**inputs, position_ids=unified)).values[0]
    method = CLVS(unified_positions="visual", stop_threshold=0.0)
    got = record(model, inputs, method)[:, :1]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"smoothing": 1.5}, "smoothing must lie between 0 and 1"),
        ({"mode": "add", "smoothing": 0.5}, "1 or more with mode='add'"),
        ({"beta": -0.1}, "beta must lie between 0 and 1"),
        ({"top_k": 1}, "top_k must be 2 or more"),
        ({"stop_every": 0}, "stop_every must be 1 or more"),
        ({"pool": "median"}, "pool must be 'max' or 'mean'"),
        ({"smoothing": "high"}, "smoothing must be a number"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        CLVS(**parameters)
