"""What holds for every registered method on every family; a new method is tested by existing."""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from foveate import FoveateError, Method, Recorder, enhance, prefill
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import passing, reads_both_ways
from foveate.core.method import from_json, methods, parse, text, to_json
from foveate.methods.cli.method import CLI, SERVES
from foveate.vlm.prefix import next_position, suffix_batch
from tests import models, newer

TOKENS = 6
# what rewrites chats or searches shows in no single forward: those have such tests of their own
METHODS = [
    cls
    for cls in methods().values()
    if not (cls(**cls.example).wants("rewrite") or "search" in cls.stages)
]
METHODS.append(Recorder)


@pytest.fixture(params=METHODS, ids=lambda cls: cls.name)
def method(request: pytest.FixtureRequest) -> Method:
    """Every registered method in turn, and the recorder, with the parameters of `example`."""
    found = request.param(**request.param.example)
    if isinstance(found, CLI) and "family" in request.fixturenames:
        family = request.getfixturevalue("family")
        if models.build(family).config.model_type not in SERVES:
            with pytest.raises(FoveateError, match="cli follows the images of"):
                found.resolve(anatomy(models.build(family)))
            pytest.skip(f"refused: cli does not know how {family} projects its images")
    if "family" not in request.fixturenames:
        return found
    family = request.getfixturevalue("family")
    found = models.ready(found, family)
    if family in newer.FAMILIES:  # on hybrids the layers of an example may not see the image
        try:
            found.resolve(anatomy(models.build(family)))
        except FoveateError as error:
            if "does not see the whole image" not in str(error):
                raise
            pytest.skip(f"refused: {error}")
        if family == "gemma4_moe" and found.wants("mlp"):
            with pytest.raises(FoveateError, match="has no feed-forward module"):
                forward(models.build(family), models.inputs(family), found)
            pytest.skip("refused: experts stand beside the feed-forward of a layer")
        if reads_both_ways(models.build(family)):
            _skip_what_reads_other_tokens(found, family)
    return found


def _skip_what_reads_other_tokens(method: Method, family: str) -> None:
    """Second streams, but for those of other pixels, have no prompt that can be read both ways."""
    if method.name in ("avisc", "icd", "m3id", "pai", "sid", "vista"):
        with pytest.raises(FoveateError, match="which reads prompts in both directions"):
            forward(models.build(family), models.inputs(family), method)
        pytest.skip("refused: a second stream of other tokens where prompts are read both ways")


def near(family: str) -> float:
    """How far rounding may carry logits; routers of experts and the delta rule amplify it."""
    return 5e-4 if family in newer.FAMILIES else 2e-5


def logits(model: Any, inputs: dict[str, Tensor], method: Method | None, **options: Any) -> Tensor:
    """(tokens, B, V): raw logits of greedy generation."""
    with torch.no_grad(), enhance(model, *([method] if method else [])):
        out = model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return torch.stack(out.logits)


def forward(model: Any, inputs: dict[str, Tensor], *stack: Method | str, **options: Any) -> Any:
    with torch.no_grad(), enhance(model, *stack):
        return model(**inputs, **options)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal but for rounding; excluded tokens (-inf) must be the same ones."""
    return torch.where(a == b, 0, (a - b).abs()).max().item() < tolerance


# 1
def test_neutral_parameters_are_the_plain_model(method: Method, family: str, model: Any) -> None:
    inputs = models.inputs(family, batch=3)
    plain = forward(model, inputs).logits
    if method.name == "recorder":
        assert close(forward(model, inputs, method).logits, plain)
        return
    assert method.neutral, "a method says which parameters make it the plain model"
    neutral = type(method)(**method.neutral)
    assert torch.equal(forward(model, inputs, neutral).logits, plain)
    assert not torch.equal(forward(model, inputs, method).logits, plain)


# 2
def test_leaving_restores_the_model(method: Method, family: str, model: Any) -> None:
    inputs = models.inputs(family, batch=3)
    plain, state = forward(model, inputs).logits, _state(model)
    forward(model, inputs, method)
    assert _state(model) == state
    assert torch.equal(forward(model, inputs).logits, plain)
    with pytest.raises(ValueError, match="mark"), enhance(model, method):  # noqa: PT012 - leaves after a forward
        model(**inputs)
        raise ValueError("mark")
    assert _state(model) == state
    assert torch.equal(forward(model, inputs).logits, plain)


def _state(model: Any) -> Any:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for m in model.modules()
    ]
    return hooks, model.get_decoder().config._attn_implementation, model.config._attn_implementation


# 3
def test_other_rows_are_untouched(method: Method, family: str, model: Any) -> None:
    inputs = models.inputs(family, "images")
    plain, edited = forward(model, inputs).logits, forward(model, inputs, method).logits
    if method.rows == "all" or not method.shares_prefix:
        pytest.skip("declares that it changes image rows")
    if reads_both_ways(model):
        pytest.skip("the last row, once edited, is seen by all others in the next layer")
    count = 1
    if method.rows == "text":
        count = int((inputs["input_ids"] == models.IMAGE).flip(1).int().argmax())
    if method.wants("contrast") or "moe" in family:  # rows are grouped, and rounded, differently
        assert close(plain[:, :-count], edited[:, :-count])
    else:
        assert torch.equal(plain[:, :-count], edited[:, :-count])


# 4
def test_weights_are_finite_and_sum_to_one(method: Method, family: str, model: Any) -> None:
    edited = method.resolve(anatomy(model)).layers
    layers = tuple(i for i in anatomy(model).full_layers if edited is None or i in edited)
    recorder = Recorder(heads="all", layers=layers or None)
    stack = [recorder] if method.name == "recorder" else [method, recorder]
    inputs = models.inputs(family, "mixed", batch=3)
    rows = Recorder.read(forward(model, inputs, *stack)).values[0]
    assert rows.isfinite().all()
    assert (rows >= 0).all()
    assert (rows.permute(0, 3, 1, 2)[inputs["attention_mask"] == 0] == 0).all(), "not on padding"
    if method.row_sum_one:
        assert close(rows.sum(-1), torch.ones(()))


# 5
@pytest.mark.parametrize("kind", ["image", "mixed"])
def test_padded_batch_equals_single_runs(
    method: Method, family: str, model: Any, kind: str
) -> None:
    if method.name == "vista" and "linear_attention" in anatomy(model).layer_kinds:
        pytest.skip("the image has not reached the first layer: its steering vector is rounding")
    batch = logits(model, models.inputs(family, kind, batch=3), method)
    for row in range(3):
        if kind == "mixed" and row == 1 and method.needs_image:
            single = logits(model, models.inputs(family, kind, row=row), None)
        else:
            single = logits(model, models.inputs(family, kind, row=row), method)
        assert close(batch[:, row], single[:, 0], near(family))


# 6
def test_static_cache_equals_dynamic(method: Method, family: str, model: Any) -> None:
    inputs = models.inputs(family, batch=3)
    static = logits(model, inputs, method, cache_implementation="static")
    assert close(static, logits(model, inputs, method), near(family))


# 7
QUICK = ("llava",)  # the others take minutes


@pytest.mark.long
@pytest.mark.parametrize(
    "family",
    [
        n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
        for n in models.FAMILIES
        if n not in newer.FAMILIES
    ],
)
def test_decoding_compiles_to_one_graph(method: Method, family: str) -> None:
    if method.wants("contrast") or method.name == "recorder":
        pytest.skip("runs a second stream or keeps a record, which are not one static graph")
    if family != "gemma3":  # its sliding layers count in Python: several plain graphs
        assert plain_graphs(family) == 1
    graphs, compiled = compile_decoding(family, method)
    # the hook on the top model is a frame of its own, and a graph where it edits logits
    assert graphs == plain_graphs(family) + method.wants("logits")
    expected = logits(models.build(family), models.inputs(family, batch=3), method)
    assert close(compiled, expected, 2e-5)


def compile_decoding(family: str, method: Method | None) -> tuple[int, Tensor]:
    config = CompileConfig(fullgraph=True, backend="eager", dynamic=False)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"cache_implementation": "static", "compile_config": config}
    out = logits(models.build(family), models.inputs(family, batch=3), method, **options)
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], out


@functools.cache
def plain_graphs(family: str) -> int:
    return compile_decoding(family, None)[0]


# 8
def test_a_second_request_equals_a_fresh_process(method: Method, family: str) -> None:
    first, second = models.inputs(family, "images"), models.inputs(family, "image", row=1)
    used, fresh = models.build(family, fresh=True), models.build(family, fresh=True)
    with torch.no_grad(), enhance(used, method):
        used.generate(**first, max_new_tokens=3)
        again = used(**second).logits
    assert torch.equal(again, forward(fresh, second, method).logits)


# 9
def test_every_stage_fires_at_every_layer_and_step(
    method: Method, family: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    stages = [s for s in ("scores", "weights", "before", "mlp", "logits") if method.wants(s)]
    for stage in stages:
        original = getattr(type(method), stage)

        def counted(self: Any, *args: Any, _stage: str = stage, _call: Any = original) -> Any:
            calls[_stage] += 1
            return _call(self, *args)

        monkeypatch.setattr(type(method), stage, counted)
    logits(model, models.inputs(family), method)
    depth = model.get_decoder().config.num_hidden_layers
    found = method.resolve(anatomy(model))
    fed = len(found.mlp_layers) * TOKENS
    each = {"before": (depth + 1) * TOKENS, "mlp": fed, "logits": TOKENS}
    edited = len(found.layers or ()) * (1 if method.rows == "prompt" else TOKENS)
    for stage in stages:
        assert calls[stage] == each.get(stage, edited), stage


# 10
@pytest.mark.filterwarnings("ignore:The prompt has no image")
def test_text_only_input_is_plain(method: Method, family: str, model: Any) -> None:
    inputs = models.inputs(family, "text", batch=3)
    edited, plain = logits(model, inputs, method), logits(model, inputs, None)
    if method.needs_image:
        assert torch.equal(edited, plain)
    elif method.name == "recorder":
        assert close(edited, plain)
    else:
        assert edited.amax(-1).isfinite().all()


# 11
def test_a_shared_prefix_equals_single_prompts(method: Method, family: str, model: Any) -> None:
    if not method.shares_prefix:
        pytest.skip("declares that it does not share prefixes")
    prefix = models.inputs(family, "prefix")
    if reads_both_ways(model):
        with enhance(model, method), pytest.raises(FoveateError, match="in both directions, so"):
            prefill(model, prefix)
        return
    sliding = len(anatomy(model).full_layers) < model.get_decoder().config.num_hidden_layers
    # a sliding window counts the padding between prefix and question, also in the plain model
    batches = [(0, 1), (1, 1), (2, 1)] if sliding else [(0, 3)]
    rows = []
    with torch.no_grad(), enhance(model, method):
        cache = prefill(model, prefix)
        first = next_position(model, cache)
        for row, batch in batches:
            fork = copy.deepcopy(cache)
            fork.batch_repeat_interleave(batch)
            suffix = models.inputs(family, "suffix", row=row, batch=batch)
            own = zip(suffix["input_ids"], suffix["attention_mask"].bool(), strict=True)
            inputs = suffix_batch(prefix, [ids[mask].tolist() for ids, mask in own], first)
            rows += model(**inputs, **passing(model, fork)).logits[:, -1]
        assert cache.foveate.phase == "prefix", "a fork left the original alone"
    for row in range(3):
        single = forward(model, models.inputs(family, "shared", row=row), method)
        assert close(rows[row], single.logits[0, -1], near(family) / 2)


# 12
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_no_nan(method: Method, family: str, dtype: torch.dtype) -> None:
    model = models.build(family, dtype=dtype)
    found = logits(model, models.inputs(family, "mixed", batch=3, dtype=dtype), method)
    assert not found.isnan().any()
    assert found.amax(-1).isfinite().all()


def test_half_precision_is_as_near_as_the_plain_models(
    method: Method, family: str, model: Any
) -> None:
    """The second stream of VCD and PAI about doubles the error."""
    if method.name in ("avisc", "dola", "only", "var"):
        pytest.skip("rounding may change which layer, heads or tokens are chosen")
    if family in newer.FAMILIES:
        pytest.skip("linear attention and experts round in ways of their own")
    if (method.name, family) == ("vista", "gemma3"):
        pytest.skip("what an image adds to its large states is a difference that half rounds away")
    half, dtype = models.build(family, dtype=torch.float16), torch.float16

    def error(*stack: Method) -> float:
        full = forward(model, models.inputs(family, batch=3), *stack).logits[:, -1]
        rounded = forward(half, models.inputs(family, batch=3, dtype=dtype), *stack).logits[:, -1]
        kept = full.isfinite() & rounded.isfinite()
        return (full - rounded)[kept].abs().mean().item()

    assert error(method) < 3 * error()


# 13
def test_text_and_json_round_trips(method: Method) -> None:
    if method.name == "recorder":
        pytest.skip("has no text form: it is for code that reads what it kept")
    assert parse(text([method])) == (method,)
    assert from_json(json.loads(json.dumps(to_json([method])))) == (method,)
