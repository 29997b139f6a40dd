"""ONLY against slow full maps, what its equations imply, and the decoders that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate import FoveateError, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of
from foveate.methods.only import ONLY
from tests import models
from tests.references import only as reference
from tests.references.full import difference, disagreement, generate

ROUNDING = 2e-5  # the contrast multiplies that of l and l~
READ = ONLY(layers=(2,), gamma=1.0)


def slow(model: Any, method: ONLY, **more: Any) -> reference.ONLY:
    return reference.ONLY(model, **method.resolve(anatomy(model)).parameters(), **more)


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    method = slow(model, READ)
    assert disagreement(READ, method, models.inputs(family, kind, batch=3)) < ROUNDING
    assert len(set(method.silenced)) > 1, "samples and steps choose for themselves"


@pytest.mark.parametrize(
    "method",
    [
        ONLY(),
        ONLY(layers=(5,)),
        ONLY(gamma=0.0, beta=0.0),
        ONLY(gamma=2.1, alpha_pos=0.5, beta=0.01),
        ONLY(gamma=0.9, alpha_neg=0.0),
        ONLY(alpha_pos=0.0, alpha_neg=0.0, beta=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, method: ONLY) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    assert disagreement(method, slow(model, method), inputs) < ROUNDING


def test_the_distance_decides_the_sign_for_every_sample_and_step() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    for gamma, expected in [(0.0, {False}), (2.1, {True}), (0.8, {False, True})]:
        method = ONLY(gamma=gamma)
        found = slow(model, method)
        assert disagreement(method, found, inputs) < ROUNDING
        assert set(found.signs) == expected


def test_the_first_column_in_the_statistics_would_be_seen() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    wrong = slow(model, READ, keep_first=False)
    assert disagreement(READ, wrong, inputs) > 1e-2


def test_the_models_own_pass_is_only_read() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    tokens: list[Any] = []
    for stack in ((), (ONLY(alpha_pos=0.0, alpha_neg=1e-9, beta=0.0),)):
        out = generate(model, inputs, *stack, max_new_tokens=3)
        tokens.append((torch.stack(out.logits), cache_of(out).layers))
    (plain, before), (read, after) = tokens
    assert difference(plain, read) < 1e-5
    for a, b in zip(before, after, strict=True):
        assert difference(a.keys, b.keys) < 1e-5
        assert difference(a.values, b.values) < 1e-5


def test_the_cut_alone_reads_no_layer() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    cut = ONLY(alpha_pos=0.0, alpha_neg=0.0, beta=0.3)
    assert not any(cut.wants(stage) for stage in ("before", "weights"))
    with torch.no_grad():
        own = model(**inputs).logits[:, -1]
        with enhance(model, cut):
            got = model(**inputs).logits[:, -1]
    p = own.softmax(-1)
    assert torch.equal(got, own.masked_fill(p < 0.3 * p.amax(-1, keepdim=True), -torch.inf))


# -- parts of a layer ------------------------------------------------------------------------------


def test_the_parts_of_a_layer_are_those_that_it_uses(family: str, model: Any) -> None:
    """On a layer's own inputs they give what its modules gave in the model's pass."""
    layer = model.get_decoder().layers[1]
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda module, args, out: seen.update({name: (args, out)})

    parts = {"norm": layer.input_layernorm, "output": layer.self_attn.o_proj, "mlp": layer.mlp}
    hooks = [module.register_forward_hook(note(name)) for name, module in parts.items()]
    gemma = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    hooks.append(gemma.register_forward_hook(note("second")))
    with torch.no_grad():
        model(**models.inputs(family))
    for hook in hooks:
        hook.remove()
    block = anatomy(model).block(1)
    heads = anatomy(model).heads
    (x,), normed = seen["norm"]
    assert torch.equal(block.norm(x), normed)
    (x,), out = seen["output"]
    assert torch.equal(block.output(x.unflatten(-1, (heads, -1))), out)
    (x,), _ = seen["second"]
    assert torch.equal(block.feed_forward(x), seen["mlp"][1])


class _Sparse(nn.Module):
    """A feed-forward part that returns its router's logits, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x[..., :2]


def test_other_layers_are_refused_and_experts_are_not() -> None:
    model: Any = models.build("llava", fresh=True)
    layer = model.get_decoder().layers[-1]
    layer.mlp = _Sparse()
    x = torch.randn(2, 1, 64)
    expected = 2 * layer.post_attention_layernorm(x)
    assert torch.equal(anatomy(model).block(5).feed_forward(x), expected)
    projection = layer.self_attn.q_proj
    layer.self_attn.q_proj = nn.Linear(64, 128)  # half of it a gate
    with pytest.raises(FoveateError, match="not attention and then a feed-forward part"):
        anatomy(model).block(5)
    layer.self_attn.q_proj = projection
    del layer.post_attention_layernorm  # both parts behind one norm
    with (
        pytest.raises(FoveateError, match=r"^The layers .* use another method\.$"),
        enhance(model, "only"),
    ):
        pass
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_where_the_published_layer_slides_another_has_to_be_named() -> None:
    gemma = models.build("gemma3")
    with (
        pytest.raises(FoveateError, match=r"choose among 2, 5 with layers=\(N,\)"),
        enhance(gemma, "only"),
    ):
        pass


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gamma": -0.1}, "gamma must lie between 0 and 100"),
        ({"alpha_pos": -1.0}, "alpha_pos must lie between 0 and 100"),
        ({"alpha_neg": float("inf")}, "alpha_neg"),
        ({"beta": 1.1}, "beta must lie between 0 and 1"),
        ({"layers": (0, 1)}, "the one layer that is read"),
        ({"layers": ()}, "the one layer that is read"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        ONLY(**parameters)
