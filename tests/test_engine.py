"""The engine: stages, caches, several turns, beams, and everything it refuses."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, StaticCache
from transformers.cache_utils import QuantizedCache

from foveate import FoveateError, Method, Recorder, enhance, prefill
from foveate.backends.transformers import compat, compat_cache
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of, passing
from foveate.backends.transformers.context import Context
from foveate.backends.transformers.heartbeat import note_graph
from foveate.core import Prompt, Stream
from foveate.core import method as registry
from foveate.core.sequence import Stack
from foveate.methods.clvs import CLVS
from foveate.methods.pai import PAI
from foveate.methods.vcd import VCD
from foveate.vlm.prefix import next_position, suffix_batch
from tests import models
from tests.references import clvs as reference

FREE = {"smoothing": 0.4, "stop_threshold": 0.0}


@pytest.fixture(autouse=True)
def _private_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test defines are forgotten after it."""
    registry.methods()
    monkeypatch.setattr(registry.registry, "classes", dict(registry.registry.classes))


def forward(model: Any, inputs: dict[str, Tensor], *stack: Method | str, **options: Any) -> Any:
    with torch.no_grad(), enhance(model, *stack):
        return model(**inputs, **options)


def generate(model: Any, inputs: dict[str, Tensor], *stack: Method | str, **options: Any) -> Any:
    with torch.no_grad(), enhance(model, *stack):
        return model.generate(
            **inputs,
            **{"max_new_tokens": 5, **options},
            return_dict_in_generate=True,
            output_logits=True,
        )


# -- stages ----------------------------------------------------------------------------------


def test_scores_reach_exactly_the_rows_after_the_last_image() -> None:
    @dataclass(frozen=True)
    class Boost(Method):
        name: ClassVar[str] = "boost"
        rows: ClassVar[Any] = "text"

        def scores(self, rows: Any) -> Tensor:
            return rows.x + 2.0 * rows.visual[:, None, None]

    model = models.build("llava")
    for kind in ("image", "images", "mixed"):
        batch = models.inputs("llava", kind, batch=3)
        got = forward(model, batch, Boost()).logits
        plain = forward(model, batch).logits
        for row in range(3):
            single = models.inputs("llava", kind, row=row)
            want = _boosted_everywhere_after_the_image(model, single)
            n = single["input_ids"].shape[1]
            assert torch.allclose(got[row, -n:], want[0], atol=2e-5), (kind, row)
            visual = (single["input_ids"][0] == models.IMAGE).nonzero()
            first = n if len(visual) == 0 else int(visual.max()) + 1
            assert torch.equal(got[row, -n:][:first], plain[row, -n:][:first])


def _boosted_everywhere_after_the_image(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The same edit as an additive mask on full maps."""
    ids = inputs["input_ids"][0]
    visual, n = ids == models.IMAGE, len(ids)
    last = int(visual.nonzero().max()) if visual.any() else n
    bias = torch.zeros(n, n)
    bias[last + 1 :, visual] = 2.0
    bias.masked_fill_(torch.ones(n, n).triu(1).bool(), torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs | {"attention_mask": bias[None, None]}).logits
    finally:
        model.set_attn_implementation("sdpa")


def test_chunked_rows_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Everywhere(Method):
        name: ClassVar[str] = "everywhere"
        rows: ClassVar[Any] = "all"

        def scores(self, rows: Any) -> Tensor:
            return rows.x * (1 + 0.5 * rows.visual[:, None, None])

    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    want = forward(model, inputs, Everywhere(), CLVS(**FREE)).logits
    monkeypatch.setattr(
        "foveate.backends.transformers.attention._CHUNK", 3 * 4 * inputs["input_ids"].shape[1] * 7
    )
    got = forward(model, inputs, Everywhere(), CLVS(**FREE)).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_before_sees_every_layers_input_and_the_final_norms() -> None:
    seen: dict[int, Tensor] = {}

    @dataclass(frozen=True)
    class Watch(Method):
        name: ClassVar[str] = "watch"

        def before(self, stream: Stream, seq: Any) -> Tensor:
            seen[stream.layer] = stream.x
            return stream.x + (stream.layer == 1)

    model, inputs = models.build("llava"), models.inputs("llava")
    states = forward(model, inputs, output_hidden_states=True).hidden_states
    out = forward(model, inputs, Watch())
    assert sorted(seen) == list(range(7))
    assert torch.equal(seen[0], states[0])
    assert torch.equal(seen[1], states[1])
    assert not torch.allclose(seen[2], states[2])
    normed = model.get_decoder().norm(seen[6])
    assert torch.allclose(model.lm_head(normed), out.logits, atol=1e-6)


@dataclass(frozen=True)
class Contrast(Method):
    """Two times the stream minus one on a dimmed picture."""

    name: ClassVar[str] = ""
    needs_pixels: ClassVar[bool] = True

    def contrast(self, prompt: Prompt, seq: Any) -> Prompt | None:
        return replace(prompt, pixels={k: 0.1 * v for k, v in prompt.pixels.items()})

    def logits(self, logits: Tensor, other: Tensor | None, seq: Any) -> Tensor:
        assert other is not None
        return 2 * logits - other


@dataclass(frozen=True)
class Guidance(Method):
    """Two times the stream minus one that has never seen the image."""

    name: ClassVar[str] = ""

    def contrast(self, prompt: Prompt, seq: Any) -> Prompt | None:
        if not bool(prompt.visual.any()):
            return None
        given = {"input_ids": prompt.ids, "attention_mask": prompt.mask} | prompt.inputs
        rest = without_image(given)
        ids, mask = rest.pop("input_ids"), rest.pop("attention_mask")
        return replace(prompt, ids=ids, mask=mask, pixels={}, inputs=rest)

    def logits(self, logits: Tensor, other: Tensor | None, seq: Any) -> Tensor:
        return logits if other is None else 2 * logits - other


def without_image(inputs: dict[str, Any]) -> dict[str, Any]:
    """Left-padded ids and mask of the prompts with their image tokens taken out."""
    kept = [
        row[mask.bool() & (row != models.IMAGE)]
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    width = max(map(len, kept))
    pads = [width - len(row) for row in kept]
    ids = [torch.nn.functional.pad(row, (n, 0)) for row, n in zip(kept, pads, strict=True)]
    masks = [(torch.arange(width) >= n).long() for n in pads]
    out = {"input_ids": torch.stack(ids), "attention_mask": torch.stack(masks)}
    names = [key for key in ("mm_token_type_ids", "token_type_ids") if key in inputs]
    return out | {key: torch.zeros_like(out["input_ids"]) for key in names}


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_stream_of_other_length_runs_on_its_own_cache(
    family: str, model: Any, cache: str | None
) -> None:
    inputs = models.inputs(family, "image", batch=3)
    out = generate(model, inputs, Guidance(), cache_implementation=cache)
    length = inputs["input_ids"].shape[1]
    for step, got in enumerate(out.logits):
        written = out.sequences[:, length : length + step]
        a, b = (plain_logits(model, x, written) for x in (inputs, without_image(inputs)))
        assert torch.allclose(got, 2 * a - b, atol=5e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_streams_of_one_batch_equal_two_plain_runs(
    family: str, model: Any, cache: str | None
) -> None:
    inputs = models.inputs(family, "image", batch=3)
    out = generate(model, inputs, Contrast(), cache_implementation=cache)
    # only pixels differ; early transformers 5 has no room for more rows in a static cache
    assert cache_of(out).foveate.paired or cache == "static"
    dim = {k: 0.1 * v if "pixel_values" in k else v for k, v in inputs.items()}
    length = inputs["input_ids"].shape[1]
    for step, got in enumerate(out.logits):
        written = out.sequences[:, length : length + step]
        a, b = (plain_logits(model, x, written) for x in (inputs, dim))
        assert torch.allclose(got, 2 * a - b, atol=5e-5)


def plain_logits(model: Any, inputs: dict[str, Tensor], written: Tensor) -> Tensor:
    """Next-token logits (B, V) of the plain model after the tokens `written` (B, n)."""
    fills = {"input_ids": written, "attention_mask": torch.ones_like(written)}
    for key in ("mm_token_type_ids", "token_type_ids"):
        fills[key] = torch.zeros_like(written)
    grown = {k: torch.cat([inputs[k], v], 1) for k, v in fills.items() if k in inputs}
    return generate(model, {**inputs, **grown}, max_new_tokens=1).logits[0]


def test_streams_of_one_batch_leave_the_edits_of_other_methods_to_the_first() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    edited = forward(model, inputs, CLVS(**FREE)).logits[:, -1]
    dim = {k: 0.1 * v if "pixel_values" in k else v for k, v in inputs.items()}
    plain = forward(model, dim).logits[:, -1]
    both = forward(model, inputs, CLVS(**FREE), Contrast())
    assert both.logits.shape == forward(model, inputs).logits.shape
    assert torch.allclose(both.logits[:, -1], 2 * edited - plain, atol=5e-5)
    own = forward(model, inputs, CLVS(**FREE), Guidance()).logits[:, -1]
    text = forward(model, without_image(inputs)).logits[:, -1]
    assert torch.allclose(own, 2 * edited - text, atol=5e-5)


@pytest.mark.parametrize("method", [Contrast(), Guidance()], ids=["one-batch", "own-cache"])
def test_second_streams_follow_beams(family: str, model: Any, method: Method) -> None:
    inputs = models.inputs(family, "image", batch=2)
    if isinstance(method, Contrast) and len(inputs["pixel_values"]) != 2:
        with pytest.raises(FoveateError, match="one prompt at a time"):
            generate(model, inputs, method, num_beams=3)
    else:
        assert beam_error(model, inputs, method) < 5e-5


@pytest.mark.parametrize("method", [Contrast(), Guidance()], ids=["one-batch", "own-cache"])
def test_second_streams_follow_beams_with_two_pictures(
    family: str, model: Any, method: Method
) -> None:
    inputs = models.inputs(family, "images", row=1)
    if isinstance(method, Guidance) and beam_error(model, inputs, None) > 5e-5:
        pytest.skip("this transformers mixes the pictures of a prompt among its beams, without us")
    assert beam_error(model, inputs, method) < 5e-5


def beam_error(model: Any, inputs: dict[str, Tensor], method: Method | None) -> float:
    """How far the scores of beam search are from those of plain forwards of what it wrote."""
    stack = [method] if method else []
    out = generate(model, inputs, *stack, num_beams=3, output_scores=True)
    length = inputs["input_ids"].shape[1]
    other = without_image(inputs)
    if isinstance(method, Contrast):
        other = {k: 0.1 * v if "pixel_values" in k else v for k, v in inputs.items()}
    score = torch.zeros(len(inputs["input_ids"]))
    for step in range(5):
        written = out.sequences[:, length : length + step]
        logits = plain_logits(model, inputs, written)
        if method:
            logits = 2 * logits - plain_logits(model, other, written)
        chosen = logits.log_softmax(-1).gather(1, out.sequences[:, length + step, None])
        score += chosen[:, 0]
    return (out.sequences_scores - score / 5).abs().max().item()


def test_a_cache_of_two_streams_is_refused_outside() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=2)
    cache = cache_of(forward(model, inputs, Contrast()))
    with pytest.raises(FoveateError, match="holds two streams"), torch.no_grad():
        model(input_ids=inputs["input_ids"][:, -1:], **passing(model, cache))


def test_a_stream_of_other_length_counts_on_by_itself(family: str, model: Any) -> None:
    prefix = models.inputs(family, "prefix")
    suffix = models.inputs(family, "suffix", row=1)["input_ids"].tolist()
    with torch.no_grad(), enhance(model, Guidance()):
        cache = prefill(model, prefix)
        inputs = suffix_batch(prefix, suffix, next_position(model, cache))
        shared = model(**inputs, **passing(model, cache)).logits[:, -1]
        single = model(**models.inputs(family, "shared", row=1)).logits[:, -1]
    assert torch.allclose(shared, single, atol=2e-5)


@pytest.mark.filterwarnings("ignore:The prompt has no image")
@pytest.mark.parametrize("method", [Contrast(), Guidance()], ids=["one-batch", "own-cache"])
def test_an_image_in_a_later_turn_starts_the_second_stream(method: Method) -> None:
    model = models.build("llava")
    whole = models.inputs("llava", "image", row=1)  # seven words, then the picture
    text, rest = whole["input_ids"][:, :6], {**whole, "input_ids": whole["input_ids"][:, 6:]}
    del rest["attention_mask"]
    with torch.no_grad(), enhance(model, method):
        cache = cache_of(model(input_ids=text))
        got = model(**rest, **passing(model, cache)).logits[:, -1]
    assert torch.allclose(got, forward(model, whole, method).logits[:, -1], atol=2e-5)


@dataclass(frozen=True)
class Ahead(Method):
    """Adds what a plain pass of the prompt said to every later token."""

    name: ClassVar[str] = ""

    def contrast(self, prompt: Prompt, seq: Any) -> Prompt | None:
        return replace(prompt, ahead=True)

    def scores(self, rows: Any) -> Tensor:
        return 1.5 * rows.x if rows.phase == "prompt" else rows.x

    def logits(self, logits: Tensor, other: Tensor | None, seq: Any) -> Tensor:
        assert other is None
        return logits + seq.ahead


def test_a_pass_ahead_is_the_plain_model_and_runs_once(family: str, model: Any) -> None:
    inputs, passes = models.inputs(family, "image", batch=3), []
    handle = model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    out = generate(model, inputs, Ahead())
    handle.remove()
    assert len(passes) == len(out.logits) + 1
    plain = generate(model, inputs, max_new_tokens=1).logits[0]
    ctx = cache_of(out).foveate
    assert torch.allclose(ctx.ahead, plain, atol=1e-5)
    prefix = models.inputs(family, "prefix")
    suffix = models.inputs(family, "suffix", row=1)["input_ids"].tolist()
    with torch.no_grad(), enhance(model, Ahead()):
        cache = prefill(model, prefix)
        more = suffix_batch(prefix, suffix, next_position(model, cache))
        shared = model(**more, **passing(model, cache)).logits[:, -1]
        single = model(**models.inputs(family, "shared", row=1)).logits[:, -1]
    assert torch.allclose(shared, single, atol=2e-5)


def test_the_second_stream_follows_forks_and_needs_no_cache() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "shared", row=1)
    want = forward(model, inputs, Contrast()).logits[:, -1]
    uncached = forward(model, inputs, Contrast(), use_cache=False).logits[:, -1]
    assert torch.allclose(uncached, want, atol=1e-5)
    with torch.no_grad(), enhance(model, Contrast()):
        fork = copy.deepcopy(prefill(model, models.inputs("llava", "prefix")))
        fork.batch_repeat_interleave(2)
        suffix = models.inputs("llava", "suffix", row=1)["input_ids"].expand(2, -1)
        padded = torch.nn.functional.pad(suffix, (3, 0))
        mask = torch.ones(2, fork.get_seq_length() + padded.shape[1], dtype=torch.long)
        mask[:, fork.get_seq_length() :][:, :3] = 0
        positions = fork.get_seq_length() + torch.arange(-3, suffix.shape[1]).clamp(min=0)
        twin = copy.deepcopy(fork)
        got = model(input_ids=suffix, **passing(model, fork)).logits[:, -1]
        more = {"attention_mask": mask, "position_ids": positions.expand(2, -1)}
        behind = model(input_ids=padded, **passing(model, twin), **more).logits[:, -1]
    assert torch.allclose(got, want.expand(2, -1), atol=1e-5)
    assert torch.allclose(behind, want.expand(2, -1), atol=1e-5)


def test_methods_act_in_list_order() -> None:
    @dataclass(frozen=True)
    class Double(Method):
        name: ClassVar[str] = "double"

        def logits(self, logits: Tensor, other: Any, seq: Any) -> Tensor:
            return 2 * logits

    @dataclass(frozen=True)
    class Shift(Method):
        name: ClassVar[str] = "shift"

        def logits(self, logits: Tensor, other: Any, seq: Any) -> Tensor:
            return logits + 1

    model, inputs = models.build("llava"), models.inputs("llava")
    plain = forward(model, inputs).logits[:, -1]
    assert torch.allclose(forward(model, inputs, "double+shift").logits[:, -1], 2 * plain + 1)
    assert torch.allclose(forward(model, inputs, "shift", Double()).logits[:, -1], 2 * plain + 2)
    both = forward(model, inputs, "clvs+double").logits[:, -1]
    assert torch.allclose(both, 2 * forward(model, inputs, "clvs").logits[:, -1])


# -- caches, turns, beams --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_second_turn_equals_the_reference(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, "images")
    turn = torch.tensor([[50, 51, 52, 53]])
    first = generate(model, inputs, CLVS(**FREE))
    tokens = first.sequences[:, inputs["input_ids"].shape[1] :]
    ids = torch.cat([first.sequences, turn], 1)
    more = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            more[key] = torch.cat([inputs[key], torch.zeros(1, 9, dtype=torch.long)], 1)
    kept = {k: v for k, v in more.items() if "pixel" not in k and "image" not in k}
    second = generate(model, kept, CLVS(**FREE), **passing(model, cache_of(first)))
    slow = reference.Reference(
        model, reference.Parameters(**FREE, beta=CLVS().resolve(anatomy(model)).beta)
    )
    slow.forward(dict(inputs))
    for token in tokens[:, :-1].T:
        slow.forward({"input_ids": token[:, None]})
    want = slow.forward({"input_ids": torch.cat([tokens[:, -1:], turn], 1)})
    assert (second.logits[0] - want.logits).abs().max() < 1e-5


def test_beam_search_is_exact_for_memory_that_is_born_anew(family: str, model: Any) -> None:
    inputs = models.inputs(family, "image", batch=2)
    out = generate(model, inputs, CLVS(**FREE), num_beams=3, max_new_tokens=4, output_scores=True)
    with torch.no_grad():
        for row, ids in enumerate(out.sequences):
            length = inputs["input_ids"].shape[1]
            single = models.inputs(family, "image", row=row)
            tokens = ids[None, length:]
            steps = reference.run(
                model,
                single,
                steps=tokens.shape[1],
                tokens=tokens[:, :-1],
                **FREE,
                beta=CLVS().resolve(anatomy(model)).beta,
            )
            score = sum(
                s.logits.log_softmax(-1)[0, t] for s, t in zip(steps, tokens[0], strict=True)
            )
            want = out.sequences_scores[row] * tokens.shape[1]
            assert (score - want).abs() < 1e-4


def test_memory_follows_the_rows_of_the_cache() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    with torch.no_grad(), enhance(model, CLVS(**FREE)):
        cache = cache_of(model(**inputs))
        assert isinstance(cache, DynamicCache)
        fork = copy.deepcopy(cache)
        order = torch.tensor([2, 0, 2])
        fork.batch_select_indices(order)
        token = torch.tensor([[40]] * 3)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        got = model(
            input_ids=token,
            **passing(model, fork),
            attention_mask=mask[order],
            position_ids=positions[order],
        ).logits
        want = model(
            input_ids=token, **passing(model, cache), attention_mask=mask, position_ids=positions
        ).logits
    assert torch.allclose(got, want[order], atol=1e-5)


def test_copying_a_cache_copies_no_weights() -> None:
    model = models.build("llava")
    cache = cache_of(forward(model, models.inputs("llava"), "clvs"))
    twin = copy.deepcopy(cache)
    assert twin.foveate is not cache.foveate
    assert twin.foveate.stack is cache.foveate.stack
    assert twin.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()


def test_without_a_cache_the_rows_are_the_same(family: str, model: Any) -> None:
    inputs = models.inputs(family, "images", batch=3)
    a, b = (forward(model, inputs, "clvs", use_cache=c).logits[:, -1] for c in (True, False))
    assert torch.allclose(a, b, atol=1e-5)


def test_gradients_pass_and_the_loss_takes_no_notice() -> None:
    model, inputs = models.build("llava", fresh=True), models.inputs("llava", "images", batch=3)
    with enhance(model, CLVS(**FREE)):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()
    logits = forward(model, inputs, CLVS(**FREE)).logits
    labels = inputs["input_ids"][:, 1:].flatten()
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    assert torch.allclose(loss, want, atol=1e-5)


def test_a_static_cache_can_be_reset_and_used_again() -> None:
    model = models.build("llava")
    cache = StaticCache(config=model.get_decoder().config, max_cache_len=64)
    for row in (0, 1):
        inputs = models.inputs("llava", "images", row=row)
        out = forward(model, inputs, CLVS(**FREE), **passing(model, cache))
        want = forward(model, inputs, CLVS(**FREE))
        assert torch.allclose(out.logits[:, -1], want.logits[:, -1], atol=1e-5)
        cache.reset()


def test_two_streams_of_one_model_do_not_mix() -> None:
    model = models.build("llava")
    inputs = [models.inputs("llava", "images", row=row) for row in range(3)]
    alone = [generate(model, x, CLVS(**FREE)).sequences for x in inputs]
    with torch.no_grad(), enhance(model, CLVS(**FREE)):
        caches = [cache_of(model(**x)) for x in inputs]
        ids = [a[:, x["input_ids"].shape[1]] for a, x in zip(alone, inputs, strict=True)]
        for step in range(1, 5):  # one token of each in turn
            for i, cache in enumerate(caches):
                out = model(input_ids=ids[i][:, None], **passing(model, cache))
                ids[i] = out.logits[:, -1].argmax(-1)
                assert ids[i] == alone[i][0, inputs[i]["input_ids"].shape[1] + step]


def test_other_dtypes_of_mask_and_implementations_agree() -> None:
    inputs = models.inputs("llava", "images", batch=3)
    model = models.build("llava", fresh=True)
    want = forward(model, inputs, CLVS(**FREE)).logits[:, -1]
    model.set_attn_implementation("eager")
    assert torch.allclose(forward(model, inputs, CLVS(**FREE)).logits[:, -1], want, atol=1e-5)
    assert model.get_decoder().config._attn_implementation == "eager"


def test_flash_attention_keeps_the_untouched_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plumbing only: flash kernels need a GPU, so SDPA stands in behind the same interface."""
    import transformers.integrations.flash_attention as flash
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asked: list[str] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        asked.append(kwargs["attn_implementation"])
        assert mask is None or mask.dim() == 2
        n, length = query.shape[1], key.shape[1]
        row = torch.arange(length - n, length)
        allowed = (torch.arange(length) <= row[:, None])[None, None]
        if mask is not None:
            allowed = allowed & mask[:, None, None].bool()
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, scale=kwargs["softmax_scale"], enable_gqa=True
        )
        return out.transpose(1, 2)

    monkeypatch.setattr(flash, "_flash_attention_forward", kernel)
    inputs = models.inputs("llava", "images", batch=3)
    model = models.build("llava", fresh=True)
    want = generate(model, inputs, CLVS(**FREE)).logits
    decoder = model.get_decoder()
    decoder.config._attn_implementation_internal = "flash_attention_2"
    monkeypatch.setattr(type(decoder), "set_attn_implementation", _set_unchecked)
    assert "flash_attention_2" in ALL_ATTENTION_FUNCTIONS
    got = generate(model, inputs, CLVS(**FREE)).logits
    assert torch.allclose(torch.stack(got), torch.stack(want), atol=1e-5)
    assert set(asked) == {"flash_attention_2"}
    assert decoder.config._attn_implementation == "flash_attention_2"


def _set_unchecked(self: Any, name: str) -> None:
    self.config._attn_implementation_internal = name


def test_a_model_spread_over_devices_is_served(tmp_path: Any) -> None:
    """Accelerate's dispatch moves the keyword arguments layer by layer; here to disk and back."""
    accelerate = pytest.importorskip("accelerate")
    inputs = models.inputs("llava", "images", batch=3)
    want = generate(models.build("llava"), inputs, CLVS(**FREE)).logits
    model = models.build("llava", fresh=True)
    language = "model.language_model."
    names = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    names += [language + part for part in ("embed_tokens", "norm", "rotary_emb")]
    names += [f"{language}layers.{i}" for i in range(6)]
    places = dict.fromkeys(names, "cpu") | {f"{language}layers.2": "disk"}
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    got = generate(model, inputs, CLVS(**FREE)).logits
    assert torch.allclose(torch.stack(got), torch.stack(want), atol=1e-6)


@pytest.mark.slow
def test_the_inductor_backend_gives_the_same_tokens() -> None:
    from transformers import CompileConfig

    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    config = CompileConfig(fullgraph=True, mode="default", dynamic=False)
    config._compile_all_devices = True
    want = generate(model, inputs, CLVS(**FREE), cache_implementation="static").logits
    torch._dynamo.reset()
    got = generate(
        model, inputs, CLVS(**FREE), cache_implementation="static", compile_config=config
    ).logits
    assert torch.allclose(torch.stack(got), torch.stack(want), atol=1e-4)


@pytest.mark.slow
def test_a_graph_compiled_outside_is_not_reused_inside() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    want = forward(model, inputs, CLVS(**FREE)).logits
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(**inputs, use_cache=False).logits
        with enhance(compiled, CLVS(**FREE)):
            got = compiled(**inputs, use_cache=False).logits
        again = compiled(**inputs, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(again, plain)
    assert not torch.allclose(got, plain)


def test_a_graph_that_could_not_be_made_does_not_spoil_later_blocks() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    method = CLVS(smoothing=0.123, stop_threshold=0.0)
    with pytest.raises(RuntimeError, match="no graph"), enhance(model, method):  # noqa: PT012
        name = compat.attention_name(model.get_decoder())
        note_graph(name, 0)  # layer 0 was traced, then tracing stopped
        raise RuntimeError("no graph of this")
    forward(model, inputs, method)


# -- recorder --------------------------------------------------------------------------------


def test_the_recorder_keeps_what_eager_attention_shows() -> None:
    model, inputs = models.build("llava", fresh=True), models.inputs("llava", "images", batch=3)
    record = Recorder.read(generate(model, inputs, Recorder(heads="all"), max_new_tokens=3))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.generate(
            **inputs, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True
        ).attentions
    visual = inputs["input_ids"] == models.IMAGE
    for step in range(3):
        want = torch.stack([layer[:, :, -1] for layer in maps[step]], 1)
        assert torch.allclose(record.values[step], want, atol=1e-5)
    for row, image in enumerate(record.image(1)):
        assert image.shape == (6, 4, int(visual[row].sum()))


def test_the_recorder_keeps_chosen_layers_and_steps() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images")
    full = Recorder.read(generate(model, inputs, Recorder(heads="all")))
    part = Recorder(layers=(1, 4), steps=(0, 3), heads="max")
    got = Recorder.read(generate(model, inputs, part))
    assert got.layers == (1, 4)
    assert sorted(got.values) == [0, 3]
    want = full.values[3][:, [1, 4]].amax(2)
    assert torch.allclose(got.values[3], want, atol=1e-6)
    with pytest.raises(FoveateError, match="Nothing was recorded"):
        Recorder.read(DynamicCache())


# -- one block, one thread -------------------------------------------------------------------


def test_a_second_context_is_refused_nested_and_from_another_thread() -> None:
    model, failures = models.build("llava"), []

    def elsewhere() -> None:
        try:
            with enhance(model, "clvs"):
                pass
        except FoveateError as error:
            failures.append(str(error))

    with enhance(model, "clvs"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with pytest.raises(FoveateError, match="pass all methods at once"), enhance(model, "clvs"):
            pass
    assert len(failures) == 1
    assert "pass all methods at once" in failures[0]
    elsewhere()  # free again
    assert len(failures) == 1


def test_another_thread_is_refused_and_not_edited() -> None:
    model, inputs, failures = models.build("llava"), models.inputs("llava"), []

    def elsewhere(call: Any) -> None:
        try:
            with torch.no_grad():
                call(**inputs)
        except FoveateError as error:
            failures.append(str(error))

    with torch.no_grad(), enhance(model, CLVS(**FREE)):
        want = model(**inputs).logits
        for call in (model, model.generate):
            thread = threading.Thread(target=elsewhere, args=(call,))
            thread.start()
            thread.join()
        assert torch.equal(model(**inputs).logits, want), "the block goes on"
    assert len(failures) == 2
    assert all(failure.startswith("Another thread has this model") for failure in failures)


# -- leaving ---------------------------------------------------------------------------------


NAMES = ("generate", "_supports_mm_encoder_outputs", "_expand_inputs_for_generation")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", [CLVS(**FREE), VCD()], ids=str)
def test_attributes_of_the_users_own_come_back(method: Method, fails: bool) -> None:
    model = models.build("llava", fresh=True)
    own = {name: functools.partial(getattr(model, name, bool)) for name in NAMES}
    for name, value in own.items():
        setattr(model, name, value)
    with contextlib.suppress(ZeroDivisionError), enhance(model, method):
        assert model.generate is not own["generate"]
        if fails:
            raise ZeroDivisionError
    for name, value in own.items():
        assert vars(model)[name] is value, name


def test_attributes_that_were_not_there_are_gone() -> None:
    model = models.build("llava", fresh=True)
    before = dict(vars(model))
    with enhance(model, VCD()):
        assert "generate" in vars(model)
    assert vars(model) == before


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_pair_of_streams_leaves_the_positions_alone(
    earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen keeps `rope_deltas` on the model, twice as long while two streams share a batch."""
    model, inputs = models.build("qwen2_5_vl", fresh=True), models.inputs("qwen2_5_vl", batch=3)
    with torch.no_grad():
        if earlier:
            model(**models.inputs("qwen2_5_vl", "images", batch=3))
        before = compat.kept_positions(model)
        last = model.get_decoder().layers[-1]

        def fail(*args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

        with enhance(model, VCD()):
            with monkeypatch.context() as patch:
                patch.setattr(last, "forward", fail)
                with pytest.raises(ZeroDivisionError):
                    model(**inputs)
            after = compat.kept_positions(model)
            got = model(**inputs).logits[:, -1]  # and the next call recovers
            with monkeypatch.context() as patch:
                patch.setattr(last, "forward", fail)
                compat.keep_positions(model, before)
                with pytest.raises(ZeroDivisionError):
                    model(**inputs)
        assert compat.kept_positions(model) is before
        assert after is None or len(after) == 6, "the forward did run two streams"
        want = forward(models.build("qwen2_5_vl", fresh=True), inputs, VCD()).logits[:, -1]
    assert torch.allclose(got, want, atol=1e-5)


# -- windows ---------------------------------------------------------------------------------


def windowed(**options: Any) -> Any:
    """The tiny LLaVA on Mistral's decoder, whose configuration has no `layer_types`."""
    text = MistralConfig(
        vocab_size=models.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, **options,
    )  # fmt: skip
    config = copy.deepcopy(models.build("llava").config)
    config.text_config = text
    return models.randomise(type(models.build("llava"))(config))


def test_layers_with_a_window_are_known_without_layer_types() -> None:
    model, inputs = windowed(sliding_window=8), models.inputs("llava")
    assert anatomy(model).full_layers == ()
    with (
        pytest.raises(FoveateError, match="there are 4 sliding_attention"),
        enhance(model, "clvs"),
    ):
        pass
    with enhance(windowed(sliding_window=None), "clvs") as open_model, torch.no_grad():
        assert open_model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({"sliding_window": 8, "use_sliding_window": False}, (0, 1, 2, 3)),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, (0, 1, 2)),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, ()),
        ({"attention_chunk_size": 8}, ()),
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, (1, 3)),
        ({}, (0, 1, 2, 3)),
    ],
)
def test_kinds_of_layers_follow_from_the_configuration(
    options: dict[str, Any], full: tuple[int, ...]
) -> None:
    kinds = compat.layer_kinds(SimpleNamespace(num_hidden_layers=4, **options))
    assert tuple(i for i, kind in enumerate(kinds) if kind == "full_attention") == full


def test_fewer_keys_than_the_prompt_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the configuration says: a layer that forgot part of the prompt is not edited."""
    model, inputs = windowed(sliding_window=8), models.inputs("llava")
    monkeypatch.setattr(compat, "layer_kinds", lambda config: ("full_attention",) * 4)
    with torch.no_grad(), enhance(model, PAI(gamma=1.0)):
        cache = compat_cache.empty_cache(model.get_decoder())
        out = model(**inputs, **passing(model, cache))
        token = {"input_ids": torch.tensor([[40]]), "position_ids": torch.tensor([[30]])}
        with pytest.raises(FoveateError, match=r"Layer \d keeps 8 keys of a prompt of \d+ tokens"):
            model(**token, **passing(model, cache_of(out)))


# -- refusals --------------------------------------------------------------------------------


def test_models_that_cannot_be_served_are_refused() -> None:
    with (
        pytest.raises(FoveateError, match="AttentionInterface"),
        enhance(models.remote_like(), "clvs"),
    ):
        pass
    with pytest.raises(FoveateError, match="soft-caps"), enhance(models.soft_capped(), "clvs"):
        pass
    with (
        pytest.raises(FoveateError, match="not a transformers model"),
        enhance(torch.nn.Linear(2, 2), "clvs"),
    ):
        pass


def test_a_model_without_an_image_token_names_the_option() -> None:
    model = models.build("llava", fresh=True)
    inputs = {"input_ids": models.inputs("llava")["input_ids"]}  # placeholders, no pixels
    want = forward(model, inputs, "clvs").logits
    text_only = copy.copy(model)
    text_only.config = copy.copy(model.config)
    text_only.config.__dict__["image_token_index"] = None
    with pytest.raises(FoveateError, match="image_token_id"), enhance(text_only, "clvs"):
        pass
    with torch.no_grad(), enhance(text_only, "clvs", image_token_id=models.IMAGE) as enhanced:
        assert enhanced is text_only
        got = text_only(**inputs).logits
    assert torch.equal(got, want)


def test_unserved_caches_and_padding_are_refused() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    quantised = QuantizedCache.__new__(QuantizedCache)
    with pytest.raises(FoveateError, match="quantised cache"):
        forward(model, inputs, "clvs", **passing(model, quantised))
    right = inputs | {"attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(FoveateError, match="padding_side = 'left'"):
        forward(model, right, "clvs")
    filled = cache_of(forward(model, inputs))
    with pytest.raises(FoveateError, match="filled outside"):
        forward(model, models.inputs("llava", "suffix", batch=3), "clvs", **passing(model, filled))
    other = cache_of(forward(model, inputs, "clvs"))
    token = {"input_ids": torch.tensor([[40]] * 3)}
    with pytest.raises(FoveateError, match="start from a fresh cache"):
        forward(model, token, "clvs(smoothing=0.1)", **passing(model, other))


def test_paged_attention_is_refused() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = models.build("llava")
    with enhance(model, "clvs"):
        function = ALL_ATTENTION_FUNCTIONS[model.get_decoder().config._attn_implementation]
        stack = Stack(anatomy(model), (CLVS(),))
        ctx = Context(model, stack, torch.tensor([[False, True]]), "decode")
        states = torch.zeros(1, 4, 1, 16)
        layer = model.get_decoder().layers[0].self_attn
        with pytest.raises(FoveateError, match="Paged caches"):
            function(layer, states, states, states, None, cache=object(), foveate=ctx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 2}, "Assisted decoding"),
    ],
)
def test_generation_modes_that_edit_wrong_rows_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FoveateError, match=message):
        generate(models.build("llava"), models.inputs("llava"), "clvs", **options)


def test_cropping_an_edited_cache_is_refused_but_a_prefix_may_be_cropped() -> None:
    model = models.build("llava")
    with torch.no_grad(), enhance(model, "clvs"):
        cache = cache_of(model(**models.inputs("llava")))
        with pytest.raises(FoveateError, match="cannot be cropped"):
            cache.crop(-1)
        prefix = prefill(model, models.inputs("llava", "prefix"))
        length = prefix.get_seq_length()
        prefix.crop(-2)
        assert prefix.get_seq_length() == length - 2 == prefix.foveate.visual.shape[1]


def test_methods_that_rewrite_need_the_front_door() -> None:
    @dataclass(frozen=True)
    class Crop(Method):
        name: ClassVar[str] = "crop"

        def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
            return chats

    with pytest.raises(FoveateError, match=r"VLM\.load"), enhance(models.build("llava"), "crop"):
        pass


def test_a_prompt_without_an_image_warns() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "text")
    with pytest.warns(UserWarning, match="no image, so clvs does nothing"):
        forward(model, inputs, "clvs")


# -- names and text form ---------------------------------------------------------------------


def test_text_forms() -> None:
    assert registry.parse("vanilla") == ()
    assert registry.parse(" clvs ( smoothing = 0.7 , mode=interpolate ) ") == (CLVS(smoothing=0.7),)
    assert str(CLVS(smoothing=0.7, layers=(1, 2))) == "clvs(smoothing=0.7, layers=(1, 2))"
    assert registry.parse("clvs(layers=(1,2),unified_positions=false)") == (
        CLVS(layers=(1, 2), unified_positions=False),
    )
    assert registry.text([]) == "vanilla"
    assert registry.parse("clvs(smoothing=1)") == registry.parse("clvs(smoothing=1.0)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clsv", "did you mean 'clvs'"),
        ("clvs(smothing=0.7)", "did you mean 'smoothing'"),
        ("clvs(0.7)", "write it like"),
        ("clvs(", "write it like"),
        ("clvs(smoothing=1+1)", "give a number"),
        ("clvs(smoothing=high)", "must be a number"),
        ("clvs+clvs", "named twice"),
        ("", "write it like"),
        ("clvs-clvs", "write it like"),
    ],
)
def test_bad_text_forms_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message.replace("(", r"\(")):
        registry.as_stack(text)


def test_layers_are_literal_scaled_or_refused() -> None:
    @dataclass(frozen=True)
    class Published(Method):
        name: ClassVar[str] = "published"
        paper_layers: ClassVar[Any] = (9, 10, 14, 31)

        def scores(self, rows: Any) -> Tensor:
            return rows.x

    @dataclass(frozen=True)
    class Range(Published):
        name: ClassVar[str] = "range"
        paper_layers: ClassVar[Any] = (6, ..., -2)

    @dataclass(frozen=True)
    class Read(Method):
        name: ClassVar[str] = "read"

        def before(self, stream: Stream, seq: Any) -> Tensor:
            return stream.x

    llava, gemma = models.build("llava"), models.build("gemma3")
    assert Published().resolve(anatomy(llava)).layers == (1, 2, 5)  # floor(l * 6 / 32)
    assert Range().resolve(anatomy(llava)).layers == (1, 2, 3, 4)
    with pytest.warns(UserWarning, match="here 1, 2, 3, 4, only 2 see the whole image in gemma3"):
        assert Range().resolve(anatomy(gemma)).layers == (2,)
    assert Read(layers=(0, 3)).resolve(anatomy(gemma)).layers == (0, 3)  # nothing to edit there
    with pytest.raises(FoveateError, match="acts on no layer"):
        Contrast(layers=(1,)).resolve(anatomy(llava))
    assert Published(layers=(4, 2)).resolve(anatomy(llava)).layers == (2, 4)
    assert CLVS().resolve(anatomy(gemma)).layers == (2, 5)
    with pytest.raises(FoveateError, match="layer 6 does not exist"):
        CLVS(layers=(6,)).resolve(anatomy(llava))
    with pytest.raises(FoveateError, match="does not see the whole image"):
        CLVS(layers=(0,)).resolve(anatomy(gemma))


def nameless(factor: float) -> type[Method]:
    """A class like every other that this makes, but for what it does."""

    @dataclass(frozen=True)
    class Scaled(Method):
        strength: float = 1.0

        def scores(self, rows: Any) -> Tensor:
            return rows.x * factor

    return Scaled


def test_classes_without_a_name_are_told_apart() -> None:
    one, two = nameless(0.5), nameless(2.0)
    label = registry.text((one(strength=3.0),))
    assert label == f"{__name__}.nameless.<locals>.Scaled(strength=3.0)"
    for unreadable in (label, f"{__name__}.Scaled", f"{__name__}.Scaled(strength=3.0)"):
        with pytest.raises(FoveateError, match="Cannot read the method"):
            registry.parse(unreadable)
    assert registry.identity((one(),)) == registry.identity((one(),))
    assert registry.identity((one(),)) != registry.identity((two(),))
    assert registry.identity((one(),)) != registry.identity((one(strength=3.0),))

    class Spy(CLVS, register=False):  # has another's name
        pass

    assert registry.identity((Spy(),)) != registry.identity((CLVS(),))
    assert registry.identity(registry.parse("clvs+vcd")) == registry.identity(
        registry.parse("clvs + vcd()")
    )


def test_what_one_nameless_class_began_another_does_not_go_on_with() -> None:
    """Neither on its cache, nor in a graph that was compiled for it."""
    one, two = nameless(0.5), nameless(2.0)
    model, inputs = models.build("llava"), models.inputs("llava")
    out = forward(model, inputs, one(), use_cache=True)
    token = {"input_ids": out.logits[:, -1:].argmax(-1)} | passing(model, cache_of(out))
    forward(model, token, one())
    with pytest.raises(FoveateError, match="start from a fresh cache"):
        forward(model, token, two())
    names = []
    for method in (one(), two(), one()):
        with enhance(model, method):
            names.append(model.get_decoder().config._attn_implementation)
    assert names[0] == names[2] != names[1]


def test_names_are_unique_and_reserved() -> None:
    with pytest.raises(FoveateError, match="cannot be called 'vanilla'"):

        class Vanilla(Method):
            name: ClassVar[str] = "vanilla"

    with pytest.raises(FoveateError, match="is taken"):

        class Other(Method):
            name: ClassVar[str] = "clvs"
