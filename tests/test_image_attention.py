"""VAF, TARAC, Devils and ScalingVis: the fast path against slow full maps, and by hand."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, Method
from foveate.backends.transformers.anatomy import anatomy
from foveate.core import Rows
from foveate.methods.devils import Devils
from foveate.methods.scalingvis import ScalingVis, scaled
from foveate.methods.tarac import TARAC
from foveate.methods.vaf import VAF
from tests import models
from tests.references import devils, scalingvis, tarac, vaf
from tests.references.full import (
    FullMap,
    disagreement,
    disagreement_in_beams,
    disagreement_in_turns,
)

REFERENCES: dict[type[Method], type[FullMap]] = {
    VAF: vaf.VAF,
    TARAC: tarac.TARAC,
    Devils: devils.Devils,
    ScalingVis: scalingvis.ScalingVis,
}
METHODS = [cls(**cls.example) for cls in REFERENCES]
VARIANTS = [cls() for cls in REFERENCES] + [
    VAF(enhance=1.5, suppress=0.5, mode="abs"),
    VAF(enhance=0.2, suppress=1.0, layers=(0, 3)),
    TARAC(beta=2.0, pool="mean"),
    TARAC(beta=2.0, pool="head"),
    TARAC(beta=2.0, inject="previous"),
    TARAC(beta=2.0, alpha=0.9, normalise=True),
    TARAC(beta=2.0, alpha=1.0, normalise=True, pool="head", inject="previous", layers=(1, 2)),
    TARAC(beta=2.0, alpha=0.0),
    Devils(alpha=3.0, layers=(0,)),
    ScalingVis(weight=0.5),
    ScalingVis(weight=0.0, layers=(1, 2)),
]


def slow(model: Any, method: Method) -> Any:
    return REFERENCES[type(method)](model, **method.resolve(anatomy(model)).parameters())


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str, method: Method
) -> None:
    inputs = models.inputs(family, kind, batch=3)
    assert disagreement(method, slow(model, method), inputs) < models.rounding(family) / 2


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, method: Method) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    assert disagreement(method, slow(model, method), inputs) < 1e-5


@pytest.mark.parametrize(
    "method", [*METHODS, TARAC(beta=2.0, alpha=0.9, normalise=True)], ids=lambda m: m.name
)
@pytest.mark.parametrize("second", ["suffix", "image"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_second_turn_equals_the_reference(name: str, method: Method, second: str) -> None:
    talk = models.conversation(name, second)
    assert disagreement_in_turns(method, slow(models.build(name), method), talk)[0] < 1e-5


@pytest.mark.parametrize("pool", ["max", "head"])
def test_the_memory_of_tarac_follows_beams(family: str, model: Any, pool: Any) -> None:
    method = TARAC(beta=2.0, alpha=1.0, pool=pool)
    alone = [models.inputs(family, row=row) for row in range(2)]
    together = models.inputs(family, batch=2)
    assert disagreement_in_beams(method, lambda: slow(model, method), together, alone) < 1e-5


# -- by hand -----------------------------------------------------------------------------------

Z = torch.tensor([[1.0, -1.0, 2.0, -3.0, 0.5], [3.0, 1.0, -4.0, 1.0, 0.5]])[None, :, None]


def rows(x: Tensor, memory: dict[str, Any] | None = None) -> Any:
    """Two heads, one row: two system columns, two visual ones, one of text."""
    return SimpleNamespace(
        x=x,
        layer=3,
        over_heads=functools.partial(Rows.over_heads, None),
        memory={} if memory is None else memory,
        visual=torch.tensor([[False, False, True, True, False]]),
        system=torch.tensor([[True, True, False, False, False]]),
    )


def test_multiplying_lowers_negative_scores_and_abs_never_does() -> None:
    scaled_up = VAF(enhance=2.0, suppress=0.5).scores(rows(Z))[0, :, 0]
    assert scaled_up.tolist() == [[0.5, -0.5, 4.0, -6.0, 0.5], [1.5, 0.5, -8.0, 2.0, 0.5]]
    raised = VAF(enhance=2.0, suppress=0.5, mode="abs").scores(rows(Z))[0, :, 0]
    assert raised.tolist() == [[0.5, -1.5, 4.0, 0.0, 0.5], [1.5, 0.5, 0.0, 2.0, 0.5]]


def test_devils_adds_the_heads_mean_magnitude() -> None:
    edited = Devils(alpha=0.5).scores(rows(Z))[0, :, 0]
    assert edited.tolist() == [[1.0, -1.0, 3.5, -2.0, 0.5], [3.0, 1.0, -2.5, 2.0, 0.5]]


def test_scalingvis_takes_a_weight_per_sample() -> None:
    edited = ScalingVis(weight=0.5).scores(rows(Z))[0, :, 0]
    assert edited.tolist() == [[1.0, -1.0, 1.0, -1.5, 0.5], [3.0, 1.0, -2.0, 0.5, 0.5]]
    assert scaled(rows(Z), torch.tensor([0.5]))[0, :, 0].equal(edited)


def test_tarac_accumulates_what_the_row_was_before_the_injection() -> None:
    """The first step is the published one-token form; the second adds half of the first."""
    a = torch.tensor([[0.1, 0.1, 0.2, 0.4, 0.2], [0.3, 0.1, 0.4, 0.0, 0.2]])[None, :, None]
    memory: dict[str, Any] = {}
    first = TARAC().weights(rows(a, memory=memory))[0, :, 0]
    # the larger of both heads is (0.4, 0.4); half of it is added, and 1.4 is the new sum
    want = torch.tensor([[0.1, 0.1, 0.4, 0.6, 0.2], [0.3, 0.1, 0.6, 0.2, 0.2]]) / 1.4
    assert torch.allclose(first, want)
    second = TARAC().weights(rows(a, memory=memory))[0, :, 0]
    want = torch.tensor([[0.1, 0.1, 0.5, 0.7, 0.2], [0.3, 0.1, 0.7, 0.3, 0.2]]) / 1.6
    assert torch.allclose(second, want)


@pytest.mark.parametrize(
    ("cls", "parameters", "message"),
    [
        (VAF, {"enhance": -1.0}, "enhance is a factor and must be 0 or more"),
        (VAF, {"suppress": -1.0}, "suppress is a factor and must be 0 or more"),
        (VAF, {"mode": "add"}, "mode must be 'multiply' or 'abs'"),
        (TARAC, {"beta": -0.5}, "beta must be 0 or more"),
        (TARAC, {"alpha": 1.5}, "alpha must lie between 0 and 1"),
        (Devils, {"alpha": -0.5}, "alpha must be 0 or more"),
        (ScalingVis, {"weight": -1.0}, "weight is a factor and must be 0 or more"),
    ],
)
def test_senseless_parameters_are_refused(
    cls: type[Method], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(FoveateError, match=message):
        cls(**parameters)
