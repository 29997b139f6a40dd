"""Every place of vLLM that foveate replaces on GPUs only, and what it refuses there.

Read in vLLM's source and tested against stand-ins of its classes; not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...base.errors import FoveateError
from .compat import AFTER, BEFORE, _replace, on_gpus, sampling
from .settings import OFF, refuse

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
OPERATION = "vllm::foveate_before"  # what methods see of the layers; see `hidden`


def install() -> None:
    """Put foveate into the backends of GPUs, and into the V2 model runner; nothing elsewhere."""
    if not on_gpus():
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    for name in BACKENDS:
        register_backend(AttentionBackendEnum[name], f"foveate.backends.vllm.gpus.{name}")
    slots(GPUModelRunner)
    positions(DefaultModelState)
    sampling(GPUModelRunner)
    BEFORE.append(prepare)
    AFTER.append(check_backends)


def slots(runner: type) -> None:
    """Where the V2 runner takes a request's slot away."""
    from .runners import leave

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def remove(self: Any, req_id: str) -> Any:
            leave(self.req_states.req_id_to_index.get(req_id))
            return plain(self, req_id)

        return remove

    _replace(runner, "_remove_request", ("self", "req_id"), wrap)


def positions(state: type) -> None:
    """Where the V2 runner makes the positions of a prompt under M-RoPE."""
    import torch

    from .asked import POSITIONS, asked

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(self: Any, req_index: int, new_req_data: Any) -> Any:
            out = plain(self, req_index, new_req_data)
            params = new_req_data.sampling_params
            if self.rope_state is not None and asked(params):
                features = [f for f in new_req_data.mm_features if f.modality != "prompt_embeds"]
                tokens = new_req_data.prefill_token_ids[: new_req_data.prompt_len]
                places, _ = self.model.get_mrope_input_positions(tokens, features)
                params.extra_args[POSITIONS] = torch.as_tensor(places)
            return out

        return add_request

    _replace(state, "add_request", ("self", "req_index", "new_req_data"), wrap)


def prepare(config: Any) -> None:
    """Before a model with images is loaded: refuse settings, and split graphs at the layers.

    Args:
        config: vLLM's configuration; a graph is split where methods look at what enters a layer.

    Raises:
        FoveateError: methods would not run, or not exactly.
    """
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled

    parallel, compilation = config.parallel_config, config.compilation_config
    refuse(
        {
            "micro-batches of a step are planned apart": parallel.use_ubatching,
            "batch-sharded sampling splits the logits": parallel.enable_batch_sharded_sampling,
            "breakable CUDA graphs hide what enters layers": is_breakable_cudagraph_enabled(),
            "fused quantisation of attention's output leaves nothing to edit": (
                compilation.pass_config.fuse_attn_quant
            ),
        }
    )
    if compilation.splitting_ops and OPERATION not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATION)


def check_backends(config: Any) -> None:
    """After a model with images is loaded: refuse attention backends that foveate does not extend.

    Args:
        config: vLLM's configuration.

    Raises:
        FoveateError: a layer's is another one.
    """
    from vllm.model_executor.layers.attention import Attention

    layers = config.compilation_config.static_forward_context.values()
    for layer in layers:
        if isinstance(layer, Attention) and not _known(layer):
            raise FoveateError(
                f"foveate's methods cannot run in this vLLM: its attention backend is "
                f"{layer.attn_backend.get_name()}; start it with --attention-backend and one of "
                f"{', '.join(BACKENDS)}, or {OFF}."
            )


def _known(layer: Any) -> bool:
    from vllm.v1.attention.backend import AttentionType

    return hasattr(layer.impl, "edits_rows") or layer.attn_type != AttentionType.DECODER
