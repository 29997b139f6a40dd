"""SPIN against slow full maps, and the properties that its equations imply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, Recorder, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.methods.spin import SPIN
from tests import models
from tests.references import spin as reference
from tests.references.full import disagreement

HALF = SPIN(**SPIN.example)


def slow(model: Any, method: SPIN) -> reference.SPIN:
    return reference.SPIN(model, **method.resolve(anatomy(model)).parameters())


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    method = slow(model, HALF)
    assert disagreement(HALF, method, models.inputs(family, kind, batch=3)) < 1e-5
    assert len(set(method.suppressed)) > 1, "samples, layers and steps rank for themselves"


@pytest.mark.parametrize(
    "method",
    [
        SPIN(),
        SPIN(keep=0.74, scale=0.3),
        SPIN(keep=0.0, scale=0.5),
        SPIN(keep=0.5, rank_by="weights"),
        SPIN(keep=0.5, layers=(0, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, method: SPIN) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    assert disagreement(method, slow(model, method), inputs) < 1e-5


def rows(inputs: dict[str, Tensor], *stack: Any) -> Tensor:
    """(B, H, K): weights of the prompt's last row in layer 0 of LLaVA."""
    model = models.build("llava")
    with torch.no_grad(), enhance(model, *stack, Recorder(heads="all", layers=(0,))):
        return Recorder.read(model(**inputs)).values[0][:, 0]


@pytest.mark.parametrize(("keep", "stay"), [(0.24, 0), (0.25, 1), (0.74, 2), (0.95, 3)])
def test_the_share_of_heads_that_stay_is_truncated(keep: float, stay: int) -> None:
    inputs = models.inputs("llava", batch=3)
    plain, edited = rows(inputs), rows(inputs, SPIN(keep=keep, scale=0.25))
    kept = torch.isclose(edited, plain).all(-1)
    assert (kept.sum(1) == stay).all()
    assert torch.allclose(edited[~kept], plain[~kept] * 0.25), "the whole row, text as well"


def test_scores_and_weights_rank_differently() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    by_weights = slow(model, SPIN(keep=0.5, rank_by="weights"))
    assert disagreement(SPIN(keep=0.5), by_weights, inputs) > 1e-2


def test_without_others_to_suppress_it_is_the_plain_model() -> None:
    assert SPIN(keep=1.0).is_neutral
    assert SPIN(scale=1.0).is_neutral
    assert not SPIN().is_neutral


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 1.1}, "keep must lie between 0 and 1"),
        ({"scale": -0.1}, "scale must lie between 0 and 1"),
        ({"scale": float("inf")}, "scale"),
        ({"rank_by": "values"}, "rank_by must be 'scores' or 'weights'"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        SPIN(**parameters)
