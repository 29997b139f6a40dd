"""Settings of vLLM under which methods would not be exact: they are refused when it starts."""

from __future__ import annotations

from typing import Any

from ...base.errors import FoveateError

OFF = "set FOVEATE_VLLM=off to run vLLM without foveate"


def refuse(reasons: dict[str, bool]) -> None:
    """Refuse to start for the first reason that holds.

    Raises:
        FoveateError: one does.
    """
    for reason, holds in reasons.items():
        if holds:
            raise FoveateError(f"foveate's methods cannot run in this vLLM: {reason}; {OFF}.")


_WHOLE = ("auto", "float32", "float16", "bfloat16")  # types of a cache


def check_settings(config: Any) -> None:
    """Before a model with images is loaded: refuse settings under which methods are not exact.

    Args:
        config: vLLM's configuration.

    Raises:
        FoveateError: methods would not run, or not exactly, and nothing would tell.
    """
    parallel, model = config.parallel_config, config.model_config
    context = parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
    refuse(
        {
            "speculative decoding leaves out logits processors": bool(config.speculative_config),
            "pipeline parallelism splits the layers": parallel.pipeline_parallel_size > 1,
            "context parallelism splits the rows": max(context) > 1,
            "latent attention (MLA) keeps no keys of heads": model.use_mla,
            "a quantised cache holds rounded keys": config.cache_config.cache_dtype not in _WHOLE,
        }
    )


def check(config: Any, spec: Any, layer_names: list[str]) -> bool:
    """Whether methods edit the layers of a KV cache group.

    Args:
        config: vLLM's configuration. spec: the group's `KVCacheSpec`.

    Raises:
        FoveateError: see `check_settings`; or its layers do more than softmax.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if not config.model_config.is_multimodal_model or type(spec) is not FullAttentionSpec:
        return False
    check_settings(config)
    layers = [config.compilation_config.static_forward_context[name] for name in layer_names]
    check_layers([layer.impl for layer in layers if isinstance(layer, Attention)])
    return True


def check_layers(impls: list[Any]) -> None:
    """Refuse layers whose weights are not the softmax of their scores.

    Args:
        impls: what computes the attention of each layer.

    Raises:
        FoveateError: one of them does more.
    """
    refuse(
        {
            "attention sinks change the softmax": any(impl.sinks is not None for impl in impls),
            "scores are soft-capped": any(impl.logits_soft_cap for impl in impls),
        }
    )
