"""AdaptVis: the pass that goes ahead against plain runs, and the scaling against full maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, enhance, prefill
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import passing
from foveate.methods.adaptvis import AdaptVis
from foveate.methods.scalingvis import ScalingVis
from tests import models
from tests.references import adaptvis as reference
from tests.references.full import disagreement


def confidences(name: str, kind: str) -> list[float]:
    """Of the first token of each prompt, by plain runs alone."""
    model, found = models.build(name), []
    for row in range(3):
        with torch.no_grad():
            logits = model(**models.inputs(name, kind, row=row)).logits[0, -1]
        found.append(float(logits.softmax(0).max()))
    return found


def parameters(name: str, kind: str, **changed: Any) -> dict[str, Any]:
    """Some samples are sure and some are not."""
    found = confidences(name, kind)
    threshold = (min(found) + max(found)) / 2
    return {"threshold": threshold, "low": 0.3, "high": 2.0, "decimals": 4, **changed}


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    method = AdaptVis(**parameters(family, kind))
    prompts = [models.inputs(family, kind, row=row) for row in range(3)]
    slow = reference.AdaptVis(model, prompts, **method.resolve(anatomy(model)).parameters())
    assert set(slow.factors) == {0.3, 2.0}
    assert disagreement(method, slow, models.inputs(family, kind, batch=3)) < 1e-5


@pytest.mark.parametrize("changed", [{"decimals": None}, {"layers": (1, 2)}, {"low": 0.0}], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, changed: dict[str, Any]) -> None:
    model, method = models.build(name), AdaptVis(**parameters(name, "image", **changed))
    prompts = [models.inputs(name, "image", row=row) for row in range(3)]
    slow = reference.AdaptVis(model, prompts, **method.resolve(anatomy(model)).parameters())
    assert disagreement(method, slow, models.inputs(name, "image", batch=3)) < 1e-5


def test_a_threshold_beyond_reach_is_scalingvis() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    for threshold, weight in [(1.0, 0.3), (0.0, 2.0)]:
        method = AdaptVis(threshold=threshold, low=0.3, high=2.0)
        with torch.no_grad(), enhance(model, method):
            adaptive = model(**inputs).logits
        with torch.no_grad(), enhance(model, ScalingVis(weight=weight)):
            assert torch.equal(model(**inputs).logits, adaptive)


def test_the_confidence_is_rounded_as_published() -> None:
    logits = torch.tensor([[0.396, 0.604], [0.394, 0.606]]).log()
    assert AdaptVis(threshold=0.6).weight(logits).tolist() == [1.5, 1.5]
    assert AdaptVis(threshold=0.605).weight(logits).tolist() == [0.5, 1.5]
    assert AdaptVis(threshold=0.605, decimals=None).weight(logits).tolist() == [0.5, 1.5]
    assert AdaptVis(threshold=0.61, decimals=None).weight(logits).tolist() == [0.5, 0.5]
    assert AdaptVis(threshold=0.61).weight(logits).tolist() == [0.5, 1.5]


def test_the_pass_ahead_runs_once_per_prompt_and_never_in_decode() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    widths: list[int] = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    )
    with torch.no_grad(), enhance(model, AdaptVis()):
        model.generate(**inputs, max_new_tokens=4)
    hook.remove()
    assert widths == [inputs["input_ids"].shape[1]] * 2 + [1] * 3


def test_a_question_behind_a_shared_prefix_has_its_own_confidence(family: str, model: Any) -> None:
    method = AdaptVis(**parameters(family, "shared"))
    factors: list[Tensor] = []

    class Spy(AdaptVis, register=False):
        def weight(self, logits: Tensor) -> Tensor:
            factors.append(super().weight(logits))
            return factors[-1]

    with torch.no_grad(), enhance(model, Spy(**method.parameters())):
        cache = prefill(model, models.inputs(family, "prefix"))
        assert not factors
        for row in range(3):
            suffix, fork = models.inputs(family, "suffix", row=row), copy.deepcopy(cache)
            positions = cache.foveate.positions
            suffix["position_ids"] = positions.max() + suffix["attention_mask"].cumsum(1)
            if len(positions) == 3:
                suffix["position_ids"] = suffix["position_ids"].expand(3, -1, -1)
            suffix.pop("attention_mask")
            model(**suffix, **passing(model, fork))
    sure = [c >= method.threshold for c in confidences(family, "shared")]
    assert torch.cat(factors).tolist() == pytest.approx([2.0 if s else 0.3 for s in sure])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": 1.5}, "threshold must lie between 0 and 1"),
        ({"low": -0.1}, "low is a factor"),
        ({"high": -0.1}, "high is a factor"),
        ({"decimals": -1}, "decimals must be 0 or more"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        AdaptVis(**parameters)
