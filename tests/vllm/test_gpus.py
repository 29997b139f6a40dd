"""What runs on GPUs, against stand-ins of vLLM's classes there. Nothing of it has run on one.

Signatures are compared with those of the real classes, which import on CPUs.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers  # noqa: F401  # vLLM's modules do not import before it
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from foveate import FoveateError
from foveate.backends.vllm import compat, compat_gpus, gpus, hidden, step, watch
from foveate.backends.vllm.asked import IMAGES, KEY, POSITIONS
from foveate.backends.vllm.requests import ROWS
from foveate.backends.vllm.runners import Requests
from foveate.core.method import parse
from foveate.core.sequence import Stack
from tests.test_paged_rows import ANATOMY, HKV, REQUESTS, SCALE, SIZE, Cache, D, H, plain, slow

TEXT = "pai(alpha=1.0, gamma=1.0)"


def params(text: str = TEXT, images: Any = ((5, 20),), **more: Any) -> Any:
    return SimpleNamespace(extra_args={KEY: text, IMAGES: list(images)} | more)


# -- the V2 model runner ---------------------------------------------------------------------------


class States:
    """What V2 shows a logits processor of its slots."""

    def __init__(self, slots: int = 16) -> None:
        self.prompt_len = SimpleNamespace(np=np.zeros(slots, dtype=np.int32))


def context(slots: list[int]) -> Any:
    return SimpleNamespace(idx_mapping_np=np.array(slots, dtype=np.int32))


@pytest.fixture(autouse=True)
def empty() -> Any:
    ROWS.clear()
    watch.expect([])
    watch.verify(False)
    yield
    ROWS.clear()


def test_one_class_serves_both_runners() -> None:
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor as One
    from vllm.v1.worker.gpu.sample.logits_processor.interface import (
        LogitsContext,
        LogitsProcRequestState,
    )
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as Two

    assert issubclass(Requests, One)
    assert issubclass(Requests, Two)
    asked = inspect.signature(Two.add_request).parameters
    assert list(asked) == list(inspect.signature(Requests.add_request).parameters)
    for owner in (One, Two):
        given = list(inspect.signature(owner.apply).parameters)
        assert given == list(inspect.signature(Requests.apply).parameters)[: len(given)]
    assert "idx_mapping_np" in {field.name for field in fields(LogitsContext)}
    assert "prompt_len" in {field.name for field in fields(LogitsProcRequestState)}
    assert "req_idx" in {field.name for field in fields(CommonAttentionMetadata)}


def test_a_slot_belongs_to_a_request_until_it_is_free() -> None:
    states = States()
    states.prompt_len.np[[3, 7]] = 50, 31
    processor = Requests(None, states)
    assert processor.add_request(3, params())
    assert processor.add_request(7, params("clvs", [(8, 16)]))
    assert not processor.add_request(2, SimpleNamespace(extra_args=None))
    assert {slot: live.prompt for slot, live in ROWS.items()} == {3: 50, 7: 31}
    assert (ROWS[7].first, ROWS[7].last) == (8, 23)

    class Runner:
        def __init__(self) -> None:
            self.req_states = SimpleNamespace(req_id_to_index={"a": 3, "b": 7})

        def _remove_request(self, req_id: str) -> bool:
            return self.req_states.req_id_to_index.pop(req_id, None) is not None

    compat_gpus.slots(Runner)
    runner = Runner()
    assert runner._remove_request("a")
    assert not runner._remove_request("a")
    assert list(ROWS) == [7]
    processor.add_request(7, SimpleNamespace(extra_args=None))
    assert not ROWS, "its next request has no method"


def test_what_is_replaced_is_there_in_vllm() -> None:
    from vllm.v1.worker.gpu.mm.rope import RopeState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    for owner, name, asked in (
        (GPUModelRunner, "_remove_request", ["self", "req_id"]),
        (GPUModelRunner, "sample_tokens", ["self", "grammar_output"]),
        (DefaultModelState, "add_request", ["self", "req_index", "new_req_data"]),
    ):
        assert list(inspect.signature(getattr(owner, name)).parameters) == asked
    source = inspect.getsource(RopeState.init_prefill_positions)
    assert "get_mrope_input_positions(" in source
    assert "req_id_to_index" in inspect.getsource(GPUModelRunner.add_requests)
    added = inspect.getsource(GPUModelRunner.add_requests)
    order = [added.index(f"{part}.add_request(") for part in ("req_states", "model_state")]
    assert order[0] < order[1] < added.index("self.sampler.add_request(")


def test_positions_of_a_prompt_come_before_its_slot_is_known() -> None:
    class State:
        rope_state = object()
        model = SimpleNamespace(
            get_mrope_input_positions=lambda ids, features: (
                torch.arange(len(ids)).expand(3, -1) * len(features),
                0,
            )
        )

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            pass

    compat_gpus.positions(State)
    asked, states = params(), States()
    feature = SimpleNamespace(modality="image")
    data = SimpleNamespace(
        sampling_params=asked,
        mm_features=[feature, feature],
        prefill_token_ids=list(range(53)),  # a request that was preempted at its fourth token
        prompt_len=50,
    )
    State().add_request(4, data)
    assert torch.equal(asked.extra_args[POSITIONS], 2 * torch.arange(50).expand(3, -1))
    states.prompt_len.np[4] = 50
    Requests(None, states).add_request(4, asked)
    assert ROWS[4].positions is asked.extra_args[POSITIONS]
    data.sampling_params = SimpleNamespace(extra_args=None)
    State().add_request(4, data)
    assert data.sampling_params.extra_args is None


def test_a_step_that_was_not_planned_stops_the_engine() -> None:
    states = States()
    states.prompt_len.np[3] = 50
    processor = Requests(None, states)
    processor.add_request(3, params())
    logits = torch.zeros(2, 5)
    assert processor.apply(logits, context([0, 1])) is logits, "it is in no row of this step"
    with pytest.raises(RuntimeError, match="was not planned"):
        processor.apply(logits, context([1, 3]))


def test_what_a_step_edited_is_handed_on_by_either_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner:
        def sample_tokens(self, grammar_output: Any) -> Any:
            told = SimpleNamespace(req_ids=["a", "b"])
            return SimpleNamespace(model_runner_output=told)

    monkeypatch.setattr(watch, "_counted", {1: {"pai": (49, 50)}})
    compat.sampling(Runner)
    out = Runner().sample_tokens(None)
    assert out.model_runner_output.foveate == {"b": {"pai": (49, 50)}}


# -- attention backends ----------------------------------------------------------------------------


@dataclass
class Metadata:
    """As FlashInfer's, it has no block table."""

    num_actual_tokens: int


class PlainBuilder:
    supports: ClassVar = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return cls.supports

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Metadata:
        return Metadata(common_attn_metadata.num_actual_tokens)


class PlainImpl:
    num_heads, num_kv_heads, head_size, scale = H, HKV, D, SCALE

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        output[: len(layer.kernel)] = layer.kernel
        return output


class PlainBackend:
    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls() -> type:
        return PlainImpl

    @staticmethod
    def get_builder_cls() -> type:
        return PlainBuilder


def test_backends_of_vllm_are_extended() -> None:
    """The real classes, as far as they import on CPUs; their kernels do not run there."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert tuple(gpus.PLACES) == compat_gpus.BACKENDS
    for name, (module, owner) in gpus.PLACES.items():
        place = f"vllm.v1.attention.backends.{module}.{owner}"
        assert AttentionBackendEnum[name].value == place
    for name in ("FLASH_ATTN", "TRITON_ATTN"):  # FlashInfer's needs its package
        made: Any = getattr(gpus, name)
        assert made.get_name() == name
        own = made.__mro__[1]
        assert issubclass(made.get_impl_cls(), own.get_impl_cls())
        assert issubclass(made.get_builder_cls(), own.get_builder_cls())
        assert made.get_impl_cls().forward is gpus.Editing.forward
        assert not made.get_builder_cls().supports_update_block_table
        given = list(inspect.signature(own.get_impl_cls().forward).parameters)
        assert given == list(inspect.signature(gpus.Editing.forward).parameters)


def test_a_backend_that_has_changed_is_refused_in_one_sentence() -> None:
    class Changed(PlainImpl):
        def forward(self, layer: Any, query: Tensor, out: Tensor) -> Tensor:  # type: ignore[override]
            return out

    class Backend(PlainBackend):
        @staticmethod
        def get_impl_cls() -> type:
            return Changed

    with pytest.raises(FoveateError, match=r"has changed Changed.forward.*FOVEATE_VLLM=off"):
        gpus.extended(Backend)
    with pytest.raises(AttributeError):
        gpus.__getattr__("FLEX_ATTENTION")


def config(multimodal: bool = True) -> Any:
    return SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=multimodal))


def test_whole_steps_are_no_graph_where_models_see() -> None:
    builder: Any = gpus.extended(PlainBackend).get_builder_cls()  # type: ignore[attr-defined]
    assert builder.get_cudagraph_support(config(), None) == AttentionCGSupport.NEVER
    assert builder.get_cudagraph_support(config(False), None) == AttentionCGSupport.ALWAYS


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("text", [TEXT, "spin(keep=0.5, scale=0.2)"])
def test_a_step_of_the_second_runner_is_edited(
    text: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From slots to the output: rows in an order of their own, padded at the end of the batch."""
    model = SimpleNamespace(stack=lambda text: Stack(ANATOMY, parse(text)), shape=None)
    monkeypatch.setattr(step, "served", lambda: model)
    monkeypatch.setattr(gpus, "check", lambda *asked: True)
    monkeypatch.setattr(step, "ranks", lambda: None)
    cache, states = Cache(), States()
    slots = [9, 4, 11, 2, 0, 13, 7]
    processor = Requests(None, states)
    for slot, (prompt, _, _, images) in zip(slots, REQUESTS, strict=True):
        states.prompt_len.np[slot] = prompt
        processor.add_request(slot, params(text, images))
    states.prompt_len.np[1] = 20
    processor.add_request(1, params(text))  # it has no row in this step
    backend: Any = gpus.extended(PlainBackend)
    spec = SimpleNamespace(block_size=SIZE)
    builder = backend.get_builder_cls()(spec, ["l"], None, "cpu")
    common = SimpleNamespace(
        num_reqs=len(slots),
        num_actual_tokens=cache.starts[-1],
        query_start_loc_cpu=torch.tensor([*cache.starts, cache.starts[-1]]),
        seq_lens_cpu_upper_bound=torch.tensor([*cache.lengths, 0]),
        block_table_tensor=torch.nn.functional.pad(cache.table, (0, 0, 0, 1)),
        req_idx=np.array([*slots, 5]),
    )
    metadata = builder.build(0, common)
    expected, impl, changed = slow(cache, text), backend.get_impl_cls()(), False
    for layer, wanted in enumerate(expected):
        held = torch.cat(list(cache.blocks[layer]), 3)
        if order == "NHD":
            held = held.transpose(1, 2).contiguous().transpose(1, 2)
        kernel = plain(cache, layer)
        named = SimpleNamespace(layer_name=f"model.layers.{layer}.attn", kernel=kernel)
        query = torch.nn.functional.pad(cache.queries[layer], (0, 0, 0, 0, 0, 3))
        out = torch.zeros(len(query), H, D)
        impl.forward(named, query, query, query, held, metadata, out)
        assert (out[: len(kernel)] - wanted).abs().max() < 2e-5
        changed |= bool((wanted - kernel).abs().max() > 1e-2)
    assert changed
    assert processor.apply(torch.zeros(7, 5), context(slots)) is not None
    assert set(watch.counted()) == {0, 1, 2, 4, 5, 6}  # the fourth does not end its prompt


def test_a_cache_that_lies_otherwise_stops_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    impl: Any = gpus.extended(PlainBackend).get_impl_cls()()  # type: ignore[attr-defined]
    query = torch.zeros(1, H, D)
    impl._cache(torch.zeros(4, HKV, SIZE, 2 * D), query, query)
    for cache in (
        torch.zeros(2, 4, SIZE, HKV, D),
        torch.zeros(4, SIZE, HKV, 2 * D)[:, :, :1],
        torch.zeros(4, HKV, SIZE, 2 * D).half(),
        torch.zeros(4, HKV, 2 * D, SIZE).transpose(2, 3),
    ):
        with pytest.raises(RuntimeError, match="keeps keys and values as"):
            impl._cache(cache, query, query)


def start(**changed: Any) -> Any:
    parallel = {"use_ubatching": False, "enable_batch_sharded_sampling": None} | changed
    fused = SimpleNamespace(fuse_attn_quant=changed.get("fuse_attn_quant", False))
    compilation = SimpleNamespace(pass_config=fused, splitting_ops=["vllm::attention"])
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel), compilation_config=compilation
    )


def test_graphs_are_split_where_methods_look() -> None:
    given = start()
    compat_gpus.prepare(given)
    compat_gpus.prepare(given)
    assert given.compilation_config.splitting_ops == ["vllm::attention", compat_gpus.OPERATION]
    assert hasattr(torch.ops.vllm, compat_gpus.OPERATION.partition("::")[2])
    assert hidden._before.__name__ == "_before"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("use_ubatching", "micro-batches"),
        ("enable_batch_sharded_sampling", "batch-sharded sampling"),
        ("fuse_attn_quant", "fused quantisation"),
    ],
)
def test_settings_that_methods_cannot_run_under_are_refused(setting: str, sentence: str) -> None:
    with pytest.raises(FoveateError, match=rf"{sentence}.*FOVEATE_VLLM=off"):
        compat_gpus.prepare(start(**{setting: True}))


def test_other_backends_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import attention
    from vllm.v1.attention.backend import AttentionType

    class Layer:
        attn_type = AttentionType.DECODER
        attn_backend = SimpleNamespace(get_name=lambda: "FLEX_ATTENTION")

        def __init__(self, impl: Any) -> None:
            self.impl = impl

    monkeypatch.setattr(attention, "Attention", Layer)
    layers = {"a": Layer(gpus.extended(PlainBackend).get_impl_cls()()), "b": object()}  # type: ignore[attr-defined]
    given = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    compat_gpus.check_backends(given)
    layers["c"] = Layer(PlainImpl())
    with pytest.raises(FoveateError, match=r"is FLEX_ATTENTION; start it with --attention-backend"):
        compat_gpus.check_backends(given)
