"""Changes that a release of transformers could make, simulated: each one raises its sentence.

None of them raises by itself in transformers; without the checks the answers would look plausible
and be the plain model's, or wrong.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.masking_utils import AttentionMaskInterface

from foveate import FoveateError, Recorder, enhance, prefill
from foveate.backends.transformers import compat, heartbeat
from foveate.backends.transformers.compat import cache_argument, cache_of, passing
from foveate.methods.clvs import CLVS
from foveate.methods.dola import DoLa
from foveate.vlm.prefix import next_position, suffix_batch
from tests import models

FREE = CLVS(smoothing=0.4, stop_threshold=0.0)


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> Any:
    """A model of its own that a test may break."""
    found = models.build(request.param, fresh=True)
    found.family = request.param
    return found


def inputs(model: Any, kind: str = "image", **options: int) -> dict[str, Tensor]:
    return models.inputs(model.family, kind, **options)


def changed(model: Any, **attributes: Any) -> Any:
    """The model with another forward, or whatever else of its class, as a release would have it."""
    model.__class__ = type("Upstream", (type(model),), attributes)
    return model


@torch.no_grad()
def generate(model: Any, *, method: Any = FREE, batch: int = 1, **options: Any) -> Any:
    with enhance(model, method):
        return model.generate(**inputs(model, batch=batch), max_new_tokens=4, **options)


# -- the cache -------------------------------------------------------------------------------------


def test_a_renamed_argument_is_refused_at_the_door(model: Any) -> None:
    kind, known = type(model), cache_argument(model)

    def forward(self: Any, kv_store: Any = None, **kwargs: Any) -> Any:
        return kind.forward(self, **{known: kv_store}, **kwargs)

    changed(model, forward=forward)
    with pytest.raises(FoveateError, match=r"Upstream takes its KV cache.*names none"):
        generate(model)


def test_two_arguments_for_the_cache_are_refused_at_the_door(model: Any) -> None:
    kind = type(model)

    def forward(self: Any, cache: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        return kind.forward(self, **passing(kind, cache or past_key_values), **kwargs)

    changed(model, forward=forward)
    with pytest.raises(FoveateError, match="it names cache and past_key_values"):
        generate(model)


def _renaming_caller(model: Any, drop: tuple[str, ...] = ()) -> Any:
    """`generate` gives the cache under a new name; the old one stays in the signature for a while.

    That is what 5.24 did.
    """
    kind, known = type(model), cache_argument(model)

    def prepare(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared = kind.prepare_inputs_for_generation(self, *args, **kwargs)
        prepared["kv_store"] = prepared.pop(known, None)
        return {name: value for name, value in prepared.items() if name not in drop}

    def forward(self: Any, *args: Any, kv_store: Any = None, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **({known: kv_store} if kv_store else {}) | kwargs)

    old = inspect.signature(kind.forward)
    new = inspect.Parameter("kv_store", inspect.Parameter.KEYWORD_ONLY, default=None)
    own, rest = list(old.parameters.values())[:-1], list(old.parameters.values())[-1]
    forward.__signature__ = old.replace(parameters=[*own, new, rest])  # type: ignore[attr-defined]
    return changed(model, forward=forward, prepare_inputs_for_generation=prepare)


def test_a_cache_that_comes_under_a_new_name_is_missed_at_the_first_token(model: Any) -> None:
    _renaming_caller(model)
    with pytest.raises(FoveateError, match=r"The mask covers \d+ tokens, but the model got 1 and"):
        generate(model, batch=3)


def test_a_step_that_lost_its_image_is_an_error_without_a_mask_too(model: Any) -> None:
    _renaming_caller(model, drop=("attention_mask",))
    with pytest.raises(FoveateError, match=r"began a new prompt without the image"):
        generate(model)


def test_a_new_prompt_without_an_image_still_only_warns(model: Any) -> None:
    with torch.no_grad(), enhance(model, FREE):
        model.generate(**inputs(model), max_new_tokens=2)
        with pytest.warns(UserWarning, match="no image, so clvs does nothing"):
            model.generate(**inputs(model, "text"), max_new_tokens=2)


def test_a_mask_for_a_whole_static_cache_is_no_lost_cache() -> None:
    from transformers import StaticCache

    model = models.build("llava")
    given = models.inputs("llava")
    columns = given["input_ids"].shape[1]
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 4))
    cache = StaticCache(config=model.get_decoder().config, max_cache_len=columns + 4)
    with torch.no_grad(), enhance(model, "clvs(unified_positions=False, stop_threshold=0)"):
        want = model(**given).logits[:, -1]
        given |= {"attention_mask": mask} | passing(model, cache)
        got = model(**given, position_ids=torch.arange(columns)[None]).logits[:, -1]
    assert torch.allclose(got, want, atol=1e-5)


def test_an_output_without_a_known_cache_is_an_error(model: Any) -> None:
    kind = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = kind.forward(self, *args, **kwargs)
        return SimpleNamespace(logits=out.logits, kv_store=cache_of(out))

    forward.__wrapped__ = kind.forward  # type: ignore[attr-defined]  # the same signature
    changed(model, forward=forward)
    with (
        torch.no_grad(),
        enhance(model, FREE),
        pytest.raises(FoveateError, match="its output has no cache under a known name"),
    ):
        model(**inputs(model))


def test_a_tuple_is_an_error(model: Any) -> None:
    with (
        torch.no_grad(),
        enhance(model, FREE),
        pytest.raises(FoveateError, match="its forward returned a tuple"),
    ):
        model(**inputs(model), return_dict=False)


# -- masks and names -------------------------------------------------------------------------------


def test_a_mask_registry_that_is_gone_is_refused_at_the_door(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AttentionInterface

    def only_attention(name: str, function: Any, like: str | None = None) -> None:
        AttentionInterface.register(name, function)

    monkeypatch.setattr(compat, "register_attention", only_attention)
    with pytest.raises(FoveateError, match="does not take an attention function and its masks"):
        generate(model, method=CLVS(smoothing=0.123, stop_threshold=0.0))
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_a_name_that_is_not_taken_is_refused_at_the_door(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "set_attention_name", lambda decoder, name: None)
    with pytest.raises(FoveateError, match="does not take an attention function"):
        generate(model)


@pytest.fixture
def maskless() -> Iterator[Callable[[Any], None]]:
    """Masks of the active methods are no longer asked for: attention gets None."""
    names: list[str] = []

    def drop(model: Any) -> None:
        names.append(model.get_decoder().config._attn_implementation)
        AttentionMaskInterface.register(names[0], lambda *args, **kwargs: None)

    yield drop
    for name in names:
        compat.forget_attention(name)


def test_a_padded_batch_without_a_mask_is_an_error(
    model: Any, maskless: Callable[[Any], None]
) -> None:
    with torch.no_grad(), enhance(model, FREE):
        maskless(model)
        with pytest.raises(FoveateError, match="got no mask for a padded batch"):
            model(**inputs(model, batch=3))


def test_a_question_on_a_prefix_without_a_mask_is_an_error(
    model: Any, maskless: Callable[[Any], None]
) -> None:
    with torch.no_grad(), enhance(model, FREE):
        prefix = inputs(model, "prefix")
        cache = prefill(model, prefix)
        first = next_position(model, cache)
        maskless(model)
        given = suffix_batch(prefix, [[20, 21, 22]], first) | passing(model, cache)
        with pytest.raises(FoveateError, match="got no mask for a prompt on a filled cache"):
            model(**given)


# -- the route through the model -------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_layer_that_skips_the_interface_is_named(model: Any, layer: int) -> None:
    attention = model.get_decoder().layers[layer].self_attn
    attention.config = copy.deepcopy(attention.config)
    with pytest.raises(FoveateError, match=f"the attention of layer {layer} was never reached"):
        generate(model)


def test_a_layer_that_is_left_out_is_named(model: Any) -> None:
    decoder = model.get_decoder()
    call = type(decoder).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = self.layers
        self.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != 2)
        try:
            return call(self, *args, **kwargs)
        finally:
            self.layers = layers

    decoder.__class__ = type("Shorter", (type(decoder),), {"forward": forward})
    with pytest.raises(FoveateError, match="the attention of layer 2 was never reached"):
        generate(model, method=Recorder())
    with pytest.raises(FoveateError, match="the input of layer 2 was never reached"):
        generate(model, method=DoLa())


def test_a_layer_that_runs_twice_is_named(model: Any) -> None:
    decoder = model.get_decoder()
    layer = decoder.layers[4]
    call = layer.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        call(hidden, *args, **kwargs | {cache_argument(model): None})
        return call(hidden, *args, **kwargs)

    layer.forward = forward
    with pytest.raises(FoveateError, match="the attention of layer 4 was reached twice"):
        generate(model)


def test_a_decoder_that_runs_twice_is_an_error(model: Any) -> None:
    core, decoder = model.model, model.get_decoder()
    call = type(core).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        decoder(inputs_embeds=out.last_hidden_state, use_cache=False, foveate=kwargs["foveate"])
        return out

    core.__class__ = type("Twice", (type(core),), {"forward": forward})
    with pytest.raises(FoveateError, match="calls its decoder twice in one forward"):
        generate(model)


def test_a_decoder_that_is_never_called_is_an_error(model: Any) -> None:
    core, decoder = model.model, model.get_decoder()
    call = type(core).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.language_model = twin
        try:
            return call(self, *args, **kwargs)
        finally:
            self.language_model = decoder

    twin = copy.deepcopy(decoder)
    core.__class__ = type("Elsewhere", (type(core),), {"forward": forward})
    with pytest.raises(FoveateError, match="its decoder was never called"):
        generate(model)


@pytest.mark.parametrize("where", ["decoder", "layer", "attention"])
def test_a_keyword_that_is_not_handed_on_is_an_error(model: Any, where: str) -> None:
    decoder = model.get_decoder()
    part = {
        "decoder": model.model,
        "layer": decoder,
        "attention": decoder.layers[2],
    }[where]
    call = type(part).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("foveate", None)
        return call(self, *args, **kwargs)

    part.__class__ = type("Dropping", (type(part),), {"forward": forward})
    with pytest.raises(FoveateError, match="without the context of its sequence"):
        generate(model, method=DoLa() if where == "layer" else FREE)


def test_parts_of_a_model_called_by_hand_are_refused(model: Any) -> None:
    ids = inputs(model)["input_ids"]
    with torch.no_grad(), enhance(model, FREE):
        for call in (model.get_decoder(), model.forward):
            with pytest.raises(FoveateError, match="call the whole model, not its parts"):
                call(input_ids=ids)


def test_attention_that_does_not_know_its_layer_is_refused_at_the_door(model: Any) -> None:
    attention = model.get_decoder().layers[2].self_attn
    attention.number = attention.__dict__.pop("layer_idx")
    with pytest.raises(FoveateError, match=r"Layer 2 of .* has no attention with its number"):
        generate(model)


# -- compiled graphs -------------------------------------------------------------------------------


@pytest.mark.long
def test_a_layer_that_only_a_graph_skips_is_named() -> None:
    """The prompt runs as it should; the compiled steps after it do not."""
    model = models.build("llava", fresh=True)
    model.family = "llava"
    attention = model.get_decoder().layers[3].self_attn
    method = CLVS(smoothing=0.456, stop_threshold=0.0)  # a name of its own

    call = type(attention).forward

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return call(self, hidden_states, **kwargs)
        return hidden_states, None

    attention.__class__ = type("Other", (type(attention),), {"forward": forward})
    config = CompileConfig(fullgraph=True, backend="eager", dynamic=False)
    config._compile_all_devices = True
    torch._dynamo.reset()
    options = {"cache_implementation": "static", "compile_config": config}
    with pytest.raises(FoveateError, match="compiled graph never reaches the attention of layer 3"):
        generate(model, method=method, **options)


@pytest.mark.long
def test_graphs_are_checked_once_they_are_made() -> None:
    model = models.build("llava")
    config = CompileConfig(fullgraph=True, backend="eager", dynamic=False)
    config._compile_all_devices = True
    torch._dynamo.reset()
    heartbeat._traced.clear()
    generate_options = {"cache_implementation": "static", "compile_config": config}
    model.family = "llava"
    generate(model, **generate_options)
    assert list(heartbeat._traced.values()) == [{("attention", layer) for layer in range(6)}]


def test_a_forward_that_is_compiled_in_part_is_no_miss() -> None:
    """Some layers run as graphs, which note nothing, and others as they are."""
    model = models.build("llava", fresh=True)
    model.family = "llava"
    method = CLVS(smoothing=0.789, stop_threshold=0.0)  # a name of its own
    with torch.no_grad(), enhance(model, method):
        want = model(**inputs(model)).logits
    torch._dynamo.reset()
    for layer in model.get_decoder().layers[1:3]:
        layer.forward = torch.compile(layer.forward, backend="eager")
    with torch.no_grad(), enhance(model, method):
        got = model(**inputs(model)).logits
    assert torch.allclose(got, want, atol=1e-5)
