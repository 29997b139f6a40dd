"""DoLa against the plain model's own hidden states, one prompt at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foveate import FoveateError, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.methods.dola import DoLa
from tests import models, newer
from tests.references import dola as reference
from tests.references.full import difference, generate


def compare(name: str, kind: str, method: DoLa) -> tuple[float, set[int]]:
    """A padded batch of three against the reference; which layers the reference chose."""
    model, inputs = models.build(name), models.inputs(name, kind, batch=3)
    out = generate(model, inputs, method)
    tokens, logits = out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)
    found = method.resolve(anatomy(model))
    worst, layers = 0.0, set()
    for row in range(3):
        prompt = models.inputs(name, kind, row=row)
        values = (found.layers or (0,), method.plausibility, method.strength)
        expected, chosen = reference.run(model, prompt, tokens[row, :-1], *values)
        worst = max(worst, difference(logits[row], expected))
        layers |= set(chosen)
    return worst, layers


@pytest.mark.parametrize("kind", ["image", "images", "mixed", "text"])
def test_prefill_and_decode_equal_the_reference_on_every_family(family: str, kind: str) -> None:
    every = tuple(range(models.build(family).get_decoder().config.num_hidden_layers))
    worst, layers = compare(family, kind, DoLa(layers=every))
    # Gemma3 scales its embeddings, and unembedded without the norm they are eight times larger
    assert worst < (5e-5 if family in newer.FAMILIES else 2e-5 if family == "gemma3" else 1e-5)
    assert len(layers) > 1, "samples and steps choose for themselves"


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"bucket": "high"},
        {"plausibility": 0.0},
        {"plausibility": 1.0},
        {"strength": 0.4},
        {"strength": 0.0},
        {"layers": (2,)},
        {"layers": (3, 0, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    assert compare(name, "mixed", DoLa(**parameters))[0] < 1e-5


def fake(depth: int, tied: bool) -> Any:
    """What `resolve` asks of a model."""
    return SimpleNamespace(depth=depth, tied=tied, kind="fake", layer_kinds=("full",) * depth)


def test_the_buckets_are_the_published_ones_and_transformers_for_other_depths() -> None:
    assert DoLa().resolve(fake(32, False)).layers == tuple(range(0, 15, 2))
    assert DoLa(bucket="high").resolve(fake(32, False)).layers == tuple(range(16, 31, 2))
    assert DoLa().resolve(fake(32, True)).layers == tuple(range(2, 15, 2))
    assert DoLa().resolve(fake(60, False)).layers == tuple(range(0, 20, 2))
    assert DoLa(bucket="high").resolve(fake(60, False)).layers == tuple(range(40, 60, 2))
    assert DoLa(layers=(5, 0)).resolve(fake(32, True)).layers == (0, 5), "literal"
    for depth in range(1, 70):
        for tied in (False, True):
            found = {
                "low": list(DoLa(bucket="low").resolve(fake(depth, tied)).layers or ()),
                "high": list(DoLa(bucket="high").resolve(fake(depth, tied)).layers or ()),
            }
            assert found == reference.buckets(depth, tied)


def test_a_layer_that_does_not_exist_is_refused_and_a_sliding_one_is_not() -> None:
    assert DoLa(layers=(0,)).resolve(anatomy(models.build("gemma3"))).layers == (0,)
    with pytest.raises(FoveateError, match="layer 6 does not exist"):
        DoLa(layers=(6,)).resolve(anatomy(models.build("llava")))


def test_rare_tokens_do_not_spoil_the_choice() -> None:
    """Probabilities below the smallest float32 count as nothing, not as NaN."""
    method = DoLa(layers=(0, 1), plausibility=0.0)
    ctx = SimpleNamespace(
        plan=SimpleNamespace(unembed=lambda hidden: hidden),
        memory={"entering 0": torch.eye(4)[:1], "entering 1": torch.eye(4)[:1] * 200},
    )
    logits = torch.tensor([[0.0, 150.0, -150.0, 0.0]])
    out = method.logits(logits, None, ctx)  # type: ignore[arg-type]
    assert out.isfinite().all()
    far = logits.log_softmax(-1) - torch.tensor([[200.0, 0, 0, 0]]).log_softmax(-1)
    assert torch.allclose(out, far)


def test_clvs_changes_the_layers_that_are_contrasted() -> None:
    """Both predictions come from the edited model: last and early states of CLVS."""
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    with torch.no_grad(), enhance(model, "clvs(smoothing=0.3)"):
        out = model(**inputs, output_hidden_states=True)
    with torch.no_grad(), enhance(model, "clvs(smoothing=0.3)", "dola(layers=(5,))"):
        both = model(**inputs).logits[:, -1]
    own = out.logits[:, -1].log_softmax(-1)
    early = model.lm_head(out.hidden_states[5][:, -1]).log_softmax(-1)
    expected = (own - early).masked_fill(own.exp() < 0.1 * own.exp().amax(-1, True), -torch.inf)
    assert difference(both, expected) < 1e-5


def test_after_vcd_only_tokens_that_it_left_take_part() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    with torch.no_grad(), enhance(model, "vcd"):
        left = model(**inputs).logits[:, -1].isfinite()
    with torch.no_grad(), enhance(model, "vcd+dola(layers=(1,2,3),plausibility=0.0)"):
        out = model(**inputs).logits[:, -1]
    assert torch.equal(out.isfinite(), left)
    assert not out.isnan().any()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bucket": "middle"}, "bucket must be 'low' or 'high'"),
        ({"plausibility": 1.1}, "plausibility must lie between 0 and 1"),
        ({"strength": -1.0}, "strength must be 0 or more"),
        ({"layers": ()}, "layers must name at least one"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        DoLa(**parameters)
