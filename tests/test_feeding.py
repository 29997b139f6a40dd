"""The stage `mlp`: what methods get of a feed-forward, where it is found, and that it is called."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import CompileConfig

from foveate import FoveateError, Method, enhance, prefill
from foveate.backends.transformers import compat, heartbeat
from foveate.backends.transformers.compat import passing
from foveate.core import FeedForward
from foveate.methods.vcd import VCD
from tests import models
from tests.references.full import difference

SEEN: list[tuple[str, FeedForward]] = []


@dataclass(frozen=True)
class Scaled(Method):
    """Every row of a feed-forward times a factor."""

    factor: float = 0.5
    needs_image: ClassVar[bool] = False
    name: ClassVar[str] = ""

    def mlp(self, fed: FeedForward, seq: Any) -> Tensor:
        SEEN.append((seq.phase, fed))
        return fed.out * self.factor


def by_hand(
    model: Any, inputs: dict[str, Tensor], layers: tuple[int, ...], factor: float
) -> Tensor:
    """Logits of a plain pass with the feed-forwards scaled by hooks of its own."""
    hooks = [
        model.get_decoder().layers[i].mlp.register_forward_hook(lambda m, a, out: out * factor)
        for i in layers
    ]
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def forward(model: Any, inputs: dict[str, Tensor], *stack: Any, **options: Any) -> Tensor:
    SEEN.clear()
    with torch.no_grad(), enhance(model, *stack):
        return model(**inputs, **options).logits


def test_what_a_method_returns_replaces_the_output_of_every_family(family: str, model: Any) -> None:
    inputs = models.inputs(family, "mixed", batch=3)
    got = forward(model, inputs, Scaled(layers=(1, 3)))
    assert torch.equal(got, by_hand(model, inputs, (1, 3), 0.5))
    assert [fed.layer for _, fed in SEEN] == [1, 3]
    fed = SEEN[0][1]
    shape = (*inputs["input_ids"].shape, model.get_decoder().config.hidden_size)
    assert fed.x.shape == fed.out.shape == shape
    with torch.no_grad():
        assert difference(model.get_decoder().layers[1].mlp(fed.x), fed.out) < 1e-5
    assert torch.equal(fed.valid, inputs["attention_mask"].bool())


def test_hooks_stand_on_the_wanted_layers_only() -> None:
    model = models.build("llava")
    with enhance(model, Scaled(layers=(2,))):
        hooked = [bool(layer.mlp._forward_hooks) for layer in model.get_decoder().layers]
    assert hooked == [i == 2 for i in range(6)]
    assert not any(layer.mlp._forward_hooks for layer in model.get_decoder().layers)


def test_phases_and_padding_of_prefix_prompt_and_decode() -> None:
    model, method = models.build("llava"), Scaled(layers=(0,))
    prefix, suffix = models.inputs("llava", "prefix"), models.inputs("llava", "suffix")
    SEEN.clear()
    with torch.no_grad(), enhance(model, method):
        cache = prefill(model, prefix)
        mask = torch.cat([prefix["attention_mask"], torch.zeros(1, 2).long()], 1)
        mask = torch.cat([mask, suffix["attention_mask"]], 1)
        ids = torch.cat([torch.zeros(1, 2).long(), suffix["input_ids"]], 1)
        model(input_ids=ids, attention_mask=mask, **passing(model, cache))
        model(input_ids=torch.tensor([[40]]), **passing(model, cache))
    assert [phase for phase, _ in SEEN] == ["prefix", "prompt", "decode"]
    assert SEEN[0][1].valid.all()
    assert SEEN[1][1].valid.tolist() == [[False, False] + [True] * suffix["input_ids"].shape[1]]
    assert SEEN[2][1].valid.tolist() == [[True]]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_of_two_streams_in_one_batch_only_the_first_is_edited(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, "image", batch=3)
    plain = forward(model, inputs, VCD(beta=0.0))[:, -1]
    own = forward(model, inputs)[:, -1]
    other = 2 * own - plain  # (1 + 1) l - 1 l'
    mine = by_hand(model, inputs, (1,), 0.5)[:, -1]
    got = forward(model, inputs, VCD(beta=0.0), Scaled(layers=(1,)))[:, -1]
    assert difference(got, 2 * mine - other) < 5e-5
    assert all(len(fed.x) == len(fed.out) == len(fed.valid) == 3 for _, fed in SEEN)


# -- never silent ----------------------------------------------------------------------------------


def test_a_feed_forward_that_is_never_called_is_an_error() -> None:
    model = models.build("llava", fresh=True)
    layer = model.get_decoder().layers[3]
    layer.mlp.forward, old = None, layer.mlp.forward
    layer.mlp.__class__ = type("Renamed", (type(layer.mlp),), {"__call__": lambda self, x: old(x)})
    with pytest.raises(FoveateError, match="the feed-forward of layer 3 was never reached"):
        forward(model, models.inputs("llava"), Scaled(layers=(2, 3)))


def test_a_feed_forward_without_its_layer_is_an_error() -> None:
    model = models.build("llava")
    layer = model.get_decoder().layers[1]
    with enhance(model, Scaled(layers=(1,))), pytest.raises(FoveateError, match="without the cont"):
        layer.mlp(torch.zeros(1, 1, 64))


@pytest.mark.long
def test_a_graph_without_the_feed_forward_is_an_error() -> None:
    """Its call is gone while the step is traced; the notes hold the other layer's."""
    model, inputs = models.build("llava", fresh=True), models.inputs("llava")
    config = CompileConfig(fullgraph=True, backend="eager", dynamic=False)
    config._compile_all_devices = True
    torch._dynamo.reset()
    heartbeat._traced.clear()
    mlp = model.get_decoder().layers[3].mlp
    call = mlp.__call__
    decoding = {"__call__": lambda self, x: call(x) if x.shape[1] > 1 else self.forward(x)}
    mlp.__class__ = type("Renamed", (type(mlp),), decoding)
    options = {"cache_implementation": "static", "compile_config": config}
    with (
        pytest.raises(FoveateError, match="graph never reaches the feed-forward of layer 3"),
        torch.no_grad(),
        enhance(model, Scaled(layers=(2, 3))),
    ):
        model.generate(**inputs, max_new_tokens=4, **options)
    noted = next(iter(heartbeat._traced.values()))
    assert {layer for station, layer in noted if station == "feed-forward"} == {2}


# -- where it is found -----------------------------------------------------------------------------


class Mixture(nn.Module):
    """Returns a tuple, flat, as some mixtures of experts do."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return self.dense(hidden_states).flatten(0, 1), "router"


def test_a_mixture_that_returns_a_flat_tuple_is_edited() -> None:
    model, inputs = models.build("llava", fresh=True), models.inputs("llava", batch=3)
    want = by_hand(model, inputs, (2,), 0.5)
    layer = model.get_decoder().layers[2]
    layer.feed_forward = Mixture(layer.mlp)
    del layer.mlp

    def call(x: Tensor) -> Tensor:  # as such a layer does
        out, router = layer.feed_forward(hidden_states=x)
        assert router == "router"
        return out.view(x.shape)

    layer.__dict__["mlp"] = call
    assert torch.equal(forward(model, inputs, Scaled(layers=(2,))), want)


def test_the_sum_of_experts_and_a_shared_part_is_edited_as_one() -> None:
    model, inputs = models.build("llava", fresh=True), models.inputs("llava", batch=3)
    layer = model.get_decoder().layers[2]
    layer.block_sparse_moe, layer.shared_mlp = layer.mlp, nn.Linear(64, 64)
    del layer.mlp
    layer.__dict__["mlp"] = lambda x: layer.block_sparse_moe(x) + layer.shared_mlp(x)
    got = forward(model, inputs, Scaled(layers=(2,)))
    layer.__dict__["mlp"] = lambda x: 0.5 * (layer.block_sparse_moe(x) + layer.shared_mlp(x))
    with torch.no_grad():
        assert difference(got, model(**inputs).logits) < 1e-5


def test_a_layer_without_a_known_feed_forward_is_refused() -> None:
    model = models.build("llava", fresh=True)
    layers = model.get_decoder().layers
    del layers[2].mlp
    with pytest.raises(FoveateError, match=r"^Layer 2 of .* has no feed-forward .*\.$"):
        forward(model, models.inputs("llava"), Scaled())
    part = nn.Linear(2, 2)
    assert compat.feed_forward(SimpleNamespace(mlp=part)) == (part,)  # type: ignore[arg-type]
    two = SimpleNamespace(mlp=part, experts=part)  # Gemma 4: normed apart
    assert compat.feed_forward(two) == ()  # type: ignore[arg-type]
    assert compat.feed_forward(SimpleNamespace(mlp=part, ffn=part)) == ()  # type: ignore[arg-type]
