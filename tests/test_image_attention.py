"""VAF, TARAC, Devils and ScalingVis: the fast path against slow full maps, and by hand."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, Method, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of, passing
from foveate.core import Rows
from foveate.methods.devils import Devils
from foveate.methods.scalingvis import ScalingVis, scaled
from foveate.methods.tarac import TARAC
from foveate.methods.vaf import VAF
from tests import models
from tests.references import devils, scalingvis, tarac, vaf
from tests.references.full import FullMap, disagreement

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
    assert disagreement(method, slow(model, method), inputs) < 1e-5


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, method: Method) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    assert disagreement(method, slow(model, method), inputs) < 1e-5


def pieces(name: str, second: str) -> list[dict[str, Tensor]]:
    """A conversation of padded batches: pictures, two tokens, another turn, two tokens."""
    # Qwen works positions out from all pictures of a sample in a row, not turn by turn
    batch = 1 if second == "image" and name.startswith("qwen") else 3
    tokens = [{"input_ids": torch.tensor([[40 + i], [50 + i], [60 + i]])[:batch]} for i in range(4)]
    first, more = (models.inputs(name, kind, batch=batch) for kind in ("mixed", second))
    return [first, *tokens[:2], more, *tokens[2:]]


@pytest.mark.parametrize(
    "method", [*METHODS, TARAC(beta=2.0, alpha=0.9, normalise=True)], ids=lambda m: m.name
)
@pytest.mark.parametrize("second", ["suffix", "image"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_second_turn_equals_the_reference(name: str, method: Method, second: str) -> None:
    model = models.build(name)
    talk, reference = pieces(name, second), slow(model, method)
    want, masks, places = [], [], []
    for piece in talk:
        want.append(reference.forward(dict(piece)).logits)
        masks.append(reference.seen["attention_mask"])
        places.append(reference.positions[..., -piece["input_ids"].shape[1] :])
    cache = None
    with torch.no_grad(), enhance(model, method):
        for piece, mask, place, logits in zip(talk, masks, places, want, strict=True):
            position_ids = place if len(place) == 3 else place[0]
            given = piece | {"attention_mask": mask, "position_ids": position_ids}
            out = model(**given, **passing(model, cache), use_cache=True)
            cache = cache_of(out)
            assert (out.logits[:, -1] - logits).abs().max() < 1e-5


@pytest.mark.parametrize("pool", ["max", "head"])
def test_the_memory_of_tarac_follows_beams(family: str, model: Any, pool: Any) -> None:
    method = TARAC(beta=2.0, alpha=1.0, pool=pool)
    inputs, steps = models.inputs(family, "image", batch=2), 8
    with torch.no_grad(), enhance(model, method):
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            num_beams=4,
            return_dict_in_generate=True,
            output_scores=True,
        )
    length = inputs["input_ids"].shape[1]
    for row, tokens in enumerate(out.sequences[:, length:]):
        alone = models.inputs(family, "image", row=row)
        done = slow(model, method).run(alone, steps, tokens=tokens[None, :-1])
        chances = [s.logits.log_softmax(-1)[0, t] for s, t in zip(done, tokens, strict=True)]
        assert (sum(chances) / steps - out.sequences_scores[row]).abs() < 1e-5
    assert (out.beam_indices.diff(dim=1) != 0).any()


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
