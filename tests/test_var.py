"""VAR: the fast path against slow full maps, rows by hand, and where its dimensions come from."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from foveate import FoveateError, enhance, prefill
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of, passing
from foveate.core import Stream
from foveate.methods.var import VAR, find_sink_dims, known_sink_dims
from tests import models
from tests.references import var as reference
from tests.references.full import disagreement, disagreement_in_beams, disagreement_in_turns

STRONG = VAR(**VAR.example)
VARIANTS = [
    dataclasses.replace(STRONG, keep=0.0),
    dataclasses.replace(STRONG, keep=0.6, max_sink_fraction=0.5, min_visual_mass=0.2),
    dataclasses.replace(STRONG, sink_threshold=1.8, sink_dims=(9, 0, 63, 40)),
    dataclasses.replace(STRONG, sink_threshold=0.0, max_sink_fraction=1.0),  # all tokens are sinks
    dataclasses.replace(STRONG, sink_threshold=0.6, max_sink_fraction=1.0, min_visual_mass=0.0),
    dataclasses.replace(STRONG, min_visual_mass=0.5, sink_dims=(5,)),
    dataclasses.replace(STRONG, layers=(1, 3)),
    dataclasses.replace(STRONG, layers=(0, 5)),  # the last layer, as the authors' code has it
]


def slow(model: Any, method: VAR) -> reference.VAR:
    return reference.VAR(model, **method.resolve(anatomy(model)).parameters())


def forward(model: Any, inputs: dict[str, Tensor], *stack: Any) -> Any:
    with torch.no_grad(), enhance(model, *stack):
        return model(**inputs)


# -- what it does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    method = STRONG
    if family == "lfm2_vl":  # in its one layer all rows pass those filters
        method = dataclasses.replace(STRONG, min_visual_mass=0.4)
    slowly = slow(model, method)
    assert disagreement(method, slowly, models.inputs(family, kind, batch=3)) < 1e-5
    assert 0 < slowly.changed < slowly.seen_rows


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, method: VAR) -> None:
    model, inputs = models.build(name), models.inputs(name, "images", batch=3)
    assert method.resolve(anatomy(model)).layers in [(0, 1, 2, 3, 4), method.layers]
    assert disagreement(method, slow(model, method), inputs) < 1e-5


@pytest.mark.parametrize("second", ["suffix", "image"])
def test_a_second_turn_adds_its_sinks_and_leaves_generated_tokens_out(
    family: str, model: Any, second: str
) -> None:
    talk, slowly = models.conversation(family, second), slow(model, STRONG)
    worst, cache = disagreement_in_turns(STRONG, slowly, talk)
    assert worst < 1e-5
    start, stop = (sum(p["input_ids"].shape[1] for p in talk[:n]) for n in (1, 3))
    for layer, sinks in VAR.sinks(cache).items():
        assert sinks[:, :start].any()
        assert sinks[:, stop:].any()
        assert not sinks[:, start:stop].any()
        for sample, columns in enumerate(sinks):
            want = [j in slowly.sinks[layer, sample] for j in range(len(columns))]
            # padded columns may be of either kind: nothing attends to them
            real = slowly.seen["attention_mask"][sample, : len(columns)].bool()
            assert torch.equal(columns[real], torch.tensor(want)[real])


def test_sinks_follow_beams(family: str, model: Any) -> None:
    alone = [models.inputs(family, row=row) for row in range(2)]
    together = models.inputs(family, batch=2)
    assert disagreement_in_beams(STRONG, lambda: slow(model, STRONG), together, alone) < 1e-5


def test_a_prefix_cut_short_and_filled_again_is_the_single_prompt() -> None:
    model, whole = models.build("llava"), models.inputs("llava", "shared", row=1)
    ids, prefix = whole["input_ids"], models.inputs("llava", "image", row=0)
    with torch.no_grad(), enhance(model, STRONG):
        cache = prefill(model, prefix)
        fork = copy.deepcopy(cache)
        length = models.inputs("llava", "prefix")["input_ids"].shape[1]
        fork.crop(length - prefix["input_ids"].shape[1])  # below zero: columns to give up
        out = model(input_ids=ids[:, length:], **passing(model, fork))
        want = model(**whole)
    assert torch.allclose(out.logits[:, -1], want.logits[:, -1], atol=1e-5)
    for a, b in zip(VAR.sinks(fork).values(), VAR.sinks(want).values(), strict=True):
        assert torch.equal(a, b)


def test_every_request_finds_its_own_sinks() -> None:
    model = models.build("llava")
    alone = [VAR.sinks(forward(model, models.inputs("llava", row=r), STRONG)) for r in range(3)]
    with torch.no_grad(), enhance(model, STRONG):
        for row, want in enumerate(alone):
            out = model.generate(
                **models.inputs("llava", row=row), max_new_tokens=4, return_dict_in_generate=True
            )
            found = VAR.sinks(out)
            assert found.keys() == want.keys() == set(STRONG.resolve(anatomy(model)).layers)
            assert all(torch.equal(found[layer], want[layer]) for layer in want)


def by_hand(method: VAR, x: Tensor, sinks: list[bool], visual: list[bool]) -> Tensor:
    """The method's weights for rows (B, H, R, K) where it found these sinks, in two dimensions."""
    hidden = torch.tensor(sinks)[None, :, None] * torch.tensor([1.0, 0.0]) + torch.eye(2)[1]
    ctx: Any = SimpleNamespace(phase="prompt", visual=torch.tensor([visual]), memory={})
    method = dataclasses.replace(method, sink_threshold=0.5, sink_dims=(0,), layers=(3,))
    method.before(Stream(hidden, 3), ctx)
    return method.weights(SimpleNamespace(x=x, layer=3, memory=ctx.memory))


def test_redistribution_by_hand() -> None:
    """Columns: BOS (a sink), two visual, a visual sink, text; then a generated token."""
    x = torch.tensor(
        [
            [0.3, 0.1, 0.2, 0.2, 0.1, 0.1],  # share of the sink 0.4: chosen
            [0.3, 0.1, 0.1, 0.3, 0.1, 0.1],  # 0.6: too large
            [0.7, 0.06, 0.06, 0.06, 0.1, 0.02],  # mass 0.18: too small
            [0.0, 0.4, 0.4, 0.2, 0.0, 0.0],
        ]
    )[None, :, None]
    sinks, visual = [True, False, False, True, False], [False, True, True, True, False]
    edited = by_hand(VAR(), x, sinks, visual)
    # 0.4 of 0.5 = 0.2 is taken and shared out one to two; 0.4 of 0.2 = 0.08 is shared out evenly
    want = x.clone()
    want[0, 0, 0] = torch.tensor([0.18, 0.1 + 0.2 / 3, 0.2 + 0.4 / 3, 0.12, 0.1, 0.1])
    want[0, 3, 0] = torch.tensor([0.0, 0.44, 0.44, 0.12, 0.0, 0.0])
    assert torch.allclose(edited, want, atol=1e-6)
    assert torch.equal(edited[:, 1:3], x[:, 1:3])


@pytest.mark.parametrize("sinks", [[True, False, False], [False, True, True]])
def test_without_a_sink_on_the_image_or_with_nothing_else_a_row_stays(sinks: list[bool]) -> None:
    x = torch.tensor([[0.2, 0.3, 0.5]])[None, None]
    method = VAR(max_sink_fraction=1.0, min_visual_mass=0.0)
    assert torch.equal(by_hand(method, x, sinks, [False, True, True]), x)


def test_phi_is_the_largest_of_the_dimensions_over_the_root_mean_square() -> None:
    hidden = torch.zeros(1, 4, 8, dtype=torch.bfloat16)
    hidden[0, :, 0] = torch.tensor([1.0, -1.0, 0.0, 300.0])
    hidden[0, :, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    hidden[0, :, 2] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    # sqrt(8) where one dimension holds everything, 2 where two share it, 0 outside sink_dims
    for threshold, want in [(1.99, [1, 1, 0, 1]), (2.01, [0, 1, 0, 1]), (2.83, [0, 0, 0, 0])]:
        method = VAR(sink_threshold=threshold, sink_dims=(0, 1), layers=(2,))
        ctx: Any = SimpleNamespace(
            phase="prompt", visual=torch.tensor([[False, True, True, False]]), memory={}
        )
        assert method.before(Stream(hidden, 2), ctx) is hidden
        assert ctx.memory["sets 2"][..., 0].tolist() == [want]
        method.before(Stream(hidden, 3), ctx)
        assert set(ctx.memory) == {"sets 2", "slack 2"}


def test_a_cache_without_var_has_no_sinks() -> None:
    model = models.build("llava")
    for stack in ((), ("clvs",)):
        with pytest.raises(FoveateError, match="No sinks were looked for"):
            VAR.sinks(forward(model, models.inputs("llava"), *stack))


# -- sink dimensions -------------------------------------------------------------------------------


def empty(cls: Any, config: Any, text: Any) -> Any:
    """A model with this language model, without weights."""
    with torch.device("meta"):
        return cls(config(text_config=text.to_dict()))


def language(model_type: str, sizes: tuple[int, ...], **extra: Any) -> Any:
    width, layers, heads, grouped = sizes
    return tf.AutoConfig.for_model(
        model_type,
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=grouped,
        **extra,
    )


LLAVA = (tf.LlavaForConditionalGeneration, tf.LlavaConfig)
NEXT = (tf.LlavaNextForConditionalGeneration, tf.LlavaNextConfig)
INTERN = (tf.InternVLForConditionalGeneration, tf.InternVLConfig)
QWEN2 = (tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig)
QWEN25 = (tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig)


@pytest.mark.parametrize(
    ("kind", "text", "dims"),
    [
        (LLAVA, language("llama", (4096, 32, 32, 32)), (1415, 2533)),
        (NEXT, language("llama", (4096, 32, 32, 32), vocab_size=32064), (1415, 2533)),
        (LLAVA, language("llama", (5120, 40, 40, 40)), (2100, 4743)),
        (QWEN2, language("qwen2_vl_text", (3584, 28, 28, 4)), (458, 2570)),
        (INTERN, language("llama", (4096, 32, 32, 8), vocab_size=92553), (3584,)),
        (NEXT, language("llama", (4096, 32, 32, 8), vocab_size=128320), None),  # LLaMA-3 8B
        (NEXT, language("mistral", (4096, 32, 32, 8), sliding_window=None), None),
        (QWEN25, language("qwen2_5_vl_text", (3584, 28, 28, 4)), None),
    ],
)
def test_published_dimensions_are_found_by_shape(kind: Any, text: Any, dims: Any) -> None:
    model = empty(*kind, text)
    assert known_sink_dims(anatomy(model)) == dims
    resolved = VAR().resolve(anatomy(model))  # unknown ones cannot be found without weights
    assert resolved.sink_dims == dims
    depth = text.num_hidden_layers
    assert resolved.layers == tuple(range(2, depth - 1))
    assert str(dims) in str(resolved) or dims is None
    assert VAR(sink_dims=(7,)).resolve(anatomy(model)).sink_dims == (7,)


def planted(family: str, dims: tuple[int, ...], token: int = models.BOS) -> Any:
    """A model of width 64 whose first token is huge in `dims`, and keeps that to the end."""
    model = models.build(family, fresh=True)
    model.get_input_embeddings().weight.data[token, list(dims)] = 1000.0
    return model


def test_unknown_dimensions_are_found_at_the_first_token(family: str) -> None:
    model = planted(family, (11, 40))
    method = VAR(sink_threshold=4.0)  # two dimensions that share all have sqrt(64 / 2)
    assert method.resolve(anatomy(model)).sink_dims == (11, 40)
    assert "sink_dims=(11, 40)" in str(method.resolve(anatomy(model)))
    with torch.no_grad(), enhance(model, method):
        cache = cache_of(model(**models.inputs(family)))
    assert all(sinks[0, 0] for sinks in VAR.sinks(cache).values())


def test_finding_touches_nothing_and_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted("qwen2_5_vl", (3,))
    with torch.no_grad():
        model(**models.inputs("qwen2_5_vl", "images"))  # leaves rope_deltas on the model
    deltas, state = model.model.rope_deltas, _state(model)
    passes, decoder = [], model.get_decoder()
    original = type(decoder).forward

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(decoder), "forward", noted)
    assert find_sink_dims(anatomy(model), 5.0) == (3,)
    assert find_sink_dims(anatomy(model), 4.0) == (3,)
    assert passes == [decoder]
    assert model.model.rope_deltas is deltas
    assert _state(model) == state
    assert find_sink_dims(anatomy(planted("qwen2_5_vl", (8,))), 5.0) == (8,)
    assert len(passes) == 2


def _state(model: Any) -> Any:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__), m.training)
        for m in model.modules()
    ]
    return hooks, model.get_decoder().config._attn_implementation


def test_the_found_are_forgotten_with_their_model() -> None:
    model = planted("llava", (3,))
    find_sink_dims(anatomy(model), 5.0)
    kept = weakref.ref(anatomy(model).kept["first token"])
    assert kept() is not None
    del model
    gc.collect()
    assert kept() is None


def test_a_model_without_a_bos_token_is_asked_with_token_zero() -> None:
    model = planted("llava", (3,), token=0)
    model.get_decoder().config.bos_token_id = None
    assert find_sink_dims(anatomy(model), 5.0) == (3,)


def test_offloaded_weights_are_brought_for_it(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = planted("llava", (3,))
    names = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    places = dict.fromkeys([*names, "model.language_model.norm"], "cpu")
    places |= {"model.language_model.rotary_emb": "cpu"}
    places |= {"model.language_model.embed_tokens": "disk"}
    places |= {f"model.language_model.layers.{i}": "disk" for i in range(6)}
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert find_sink_dims(anatomy(model), 5.0) == (3,)


def test_where_none_is_found_it_says_so_and_is_the_plain_model() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    with pytest.warns(UserWarning, match=r"var does nothing .* width 64 none can exceed 8") as seen:
        edited = forward(model, inputs, "var")
    assert len(seen) == 1
    with torch.no_grad():
        assert torch.equal(edited.logits, model(**inputs).logits)
    with pytest.warns(UserWarning, match=r"exceeds sink_threshold=7.9 in the middle layers\.$"):
        assert find_sink_dims(anatomy(model), 7.9) == ()


def test_neutral_parameters_look_for_nothing() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    for method in (VAR(keep=1.0), VAR(sink_dims=())):
        assert method.is_neutral
        edited = forward(model, inputs, method).logits  # a warning would be an error here
        with torch.no_grad():
            assert torch.equal(edited, model(**inputs).logits)


def test_dimensions_beyond_the_width_are_refused() -> None:
    with pytest.raises(FoveateError, match=r"no dimension 64, this model's .* 0 to 63"):
        VAR(sink_dims=(3, 64)).resolve(anatomy(models.build("llava")))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sink_threshold": -1.0}, "sink_threshold must be 0 or more"),
        ({"max_sink_fraction": 1.5}, "max_sink_fraction must lie between 0 and 1"),
        ({"min_visual_mass": -0.1}, "min_visual_mass must lie between 0 and 1"),
        ({"keep": 1.1}, "keep must lie between 0 and 1"),
        ({"sink_dims": (-1,)}, "sink_dims are counted from 0"),
        ({"sink_dims": 5}, "sink_dims must be a tuple of a whole number or None"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        VAR(**parameters)
