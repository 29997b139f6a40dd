"""What transformers keeps private or has renamed: every such name stands in this file.

The rest of foveate asks here and names no version. When a release changes something, this file
changes with it, and nothing else. Supported: transformers 5.0 and later.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, CompileConfig
from transformers.cache_utils import (
    Cache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...base.errors import FoveateError

VERSION = transformers.__version__

# -- arguments and outputs of a model's forward ----------------------------------------------------

CACHE_NAMES = ("cache", "past_key_values")
"""What a forward and its output call the KV cache: the first since 5.24, the second before."""

NOT_INPUTS = frozenset(
    {
        "foveate",
        *CACHE_NAMES,
        "cache_position",
        "logits_to_keep",
        "use_cache",
        "return_dict",
        "labels",
        "output_attentions",
        "output_hidden_states",
    }
)
"""Arguments of a forward that say nothing about the prompt."""


def cache_argument(model: Any) -> str:
    """The argument that takes the KV cache in this model's forward.

    Raises:
        FoveateError: unless the forward names exactly one that is known here.
    """
    kind: Any = type(unwrapped(model))
    return _cache_argument(kind)


@functools.cache
def _cache_argument(kind: Any) -> str:
    named = inspect.signature(kind.forward).parameters
    known = [name for name in CACHE_NAMES if name in named]
    if len(known) != 1:
        found = f"names {' and '.join(known)}" if known else "names none"
        raise FoveateError(
            f"The forward of {kind.__name__} takes its KV cache under a name that foveate does not "
            f"know: of {' and '.join(CACHE_NAMES)} it {found} (transformers {VERSION}). "
            "Upgrade foveate, or install the transformers release that its lock names."
        )
    return known[0]


def passing(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that gives `cache` to this model's forward."""
    return {cache_argument(model): cache}


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a call, under any of its names; None without."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def cache_of(out: Any) -> Any:
    """The KV cache that a forward or `generate` returned, or `out` itself where it is one."""
    if isinstance(out, Cache):
        return out
    fields = getattr(out, "__dict__", {})
    return next((fields[name] for name in CACHE_NAMES if fields.get(name) is not None), None)


def keep_rows(out: Any, batch: int) -> None:
    """Cut a forward's output to the first `batch` rows; the cache stays as it is."""
    for name in ("logits", "hidden_states", "attentions", "rope_deltas"):
        value = getattr(out, name, None)
        if isinstance(value, tuple):
            setattr(out, name, tuple(v[:batch] for v in value))
        elif isinstance(value, Tensor):
            setattr(out, name, value[:batch])


# -- the language model ----------------------------------------------------------------------------


def decoder_of(model: Any) -> Any:
    """The language model: what holds the decoder layers, without its unembedding."""
    found = unwrapped(model).get_decoder()
    inner = getattr(found, "model", None)  # Llama 4 names what is around it
    whole = hasattr(found, "layers") or not hasattr(inner, "layers")
    return found if whole or rotary(inner) is None else inner


def reads_both_ways(model: Any) -> bool:
    """Whether tokens of a prompt attend to later ones, so that no part of it can be read alone."""
    return unwrapped(model).config.model_type == "paligemma"


def latent(decoder: Any) -> bool:
    """Whether the cache holds latents, of which a layer makes its keys and values each time."""
    return getattr(decoder.config, "kv_lora_rank", None) is not None


def image_aside(model: Any) -> bool:
    """Whether text looks at an image through attention of its own, and not among its own keys."""
    if getattr(unwrapped(model).config, "is_encoder_decoder", False):
        return True
    names = {name.rsplit(".", 1)[-1] for name, _ in unwrapped(model).get_decoder().named_modules()}
    return not names.isdisjoint(_ASIDE)


_ASIDE = ("cross_attn", "crossattention", "encoder_attn", "gated_cross_attn_layers")


def is_model(model: Any) -> bool:
    """Whether this is a model of transformers, and not a wrapper around one."""
    return isinstance(model, transformers.PreTrainedModel)


def unwrapped(model: Any) -> Any:
    """The model inside what `torch.compile` returns."""
    return getattr(model, "_orig_mod", model)


def layer_kinds(config: Any) -> tuple[str, ...]:
    """What each decoder layer attends to, by transformers' names such as "full_attention".

    Where the configuration does not list them they follow from its window, as in transformers:
    `use_sliding_window` switches it off, and layers below `max_window_layers` do without it.
    """
    depth = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return tuple(kinds)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        first = getattr(config, "max_window_layers", 0) if _has_switch(config) else 0
        return tuple("full_attention" if i < first else "sliding_attention" for i in range(depth))
    if getattr(config, "attention_chunk_size", None):
        return ("chunked_attention",) * depth
    return ("full_attention",) * depth


def head_counts(config: Any) -> tuple[int, int]:
    """Query heads and key/value heads of every attention layer; 0 for a number that differs."""
    heads = _one_number(config, "num_attention_heads", 0)
    return heads, _one_number(config, "num_key_value_heads", heads)


def _one_number(config: Any, name: str, otherwise: int) -> int:
    try:
        return getattr(config, name, otherwise)
    except Exception:  # how transformers refuses to name one number for layers that differ
        return 0


def _has_switch(config: Any) -> bool:
    return getattr(config, "use_sliding_window", None) is not None


def dispatches(decoder: Any) -> bool:
    """Whether a decoder's attention can be chosen by name."""
    return bool(decoder._can_set_attn_implementation())


def attention_name(module: Any) -> str:
    """The name of the attention implementation in use."""
    return module.config._attn_implementation


def set_attention_name(decoder: Any, name: str) -> None:
    """Use another attention implementation in the decoder and nowhere else."""
    decoder.set_attn_implementation(name)


@contextmanager
def attending(config: Any, name: str) -> Iterator[None]:
    """Another attention implementation for the models of this configuration, for a while."""
    usual, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = usual


def takes_masks(model: Any) -> bool:
    """Whether a model's forward takes a mask, so that prompts can be padded to one length."""
    return "attention_mask" in inspect.signature(type(unwrapped(model)).forward).parameters


def static_cache(model: Any) -> bool:
    """Whether a static cache can be made for the model's layers."""
    try:
        transformers.StaticCache(config=decoder_of(model).config, max_cache_len=1)
    except Exception:  # kinds of layers that it does not know raise nearly anything
        return False
    return True


def static_decoding(model: Any) -> bool:
    """Whether transformers declares that the model decodes as one graph on a static cache."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def replays(decoder: Any) -> bool:
    """Whether the backward pass will run the layers of this forward again (checkpointing)."""
    if not (decoder.training and torch.is_grad_enabled()):
        return False
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def final_norm(decoder: Any) -> nn.Module | None:
    """What stands between the last decoder layer and the unembedding, or None."""
    return getattr(decoder, "norm", None) or getattr(decoder, "embedding_norm", None)  # LFM2


def feed_forward(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The modules whose outputs sum to the feed-forward of a transformer block, in order of call.

    They are given (..., D) and return that, or a tuple that begins with it. A mixture of experts
    counts as one module, with the shared experts that it has inside. None where a block has no
    feed-forward under a known name, or norms the parts of its sum apart, as Gemma 4's mixtures do.
    """
    parts = [getattr(layer, name, None) for name in _FEED_FORWARD]
    found = tuple(part for part in parts if isinstance(part, nn.Module))
    beside = isinstance(getattr(layer, "experts", None), nn.Module)
    return () if beside or (len(found) != 1 and found != (parts[-2], parts[-1])) else found


_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe", "shared_mlp")


def offloaded(decoder: Any) -> bool:
    """Whether a decoder on the meta device has its weights elsewhere, and hooks that bring them."""
    return any(hasattr(part, "_hf_hook") for part in decoder.modules())


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream (B, Q, D) among the arguments of a decoder layer."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another residual stream."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}


# -- attention functions ---------------------------------------------------------------------------


def register_attention(name: str, function: Any, like: str | None = None) -> None:
    """Make an attention function known, with the masks of the implementation `like`."""
    AttentionInterface.register(name, function)
    if like is not None:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])


def forget_attention(name: str) -> None:
    """Undo `register_attention`."""
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def is_registered(name: str) -> bool:
    """Whether models find an attention function of this name, and masks for it."""
    return name in ALL_ATTENTION_FUNCTIONS and name in ALL_MASK_ATTENTION_FUNCTIONS


def kernel(name: str) -> Callable[..., tuple[Tensor, None]]:
    """The attention function of this name, to be called while the configuration names another."""
    function = ALL_ATTENTION_FUNCTIONS[name]
    if not name.startswith("flash"):
        return function

    def run(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Flash attention asks the module's configuration which of its kernels to use."""
        told = types.SimpleNamespace(
            config=types.SimpleNamespace(_attn_implementation=name),
            is_causal=module.is_causal,
            layer_idx=module.layer_idx,
            modules=module.modules,
        )
        return function(told, *args, **kwargs)

    return run


def paged(kwargs: dict[str, Any]) -> bool:
    """Whether an attention function was called for continuous batching."""
    return kwargs.get("cache") is not None


# -- rotary positions ------------------------------------------------------------------------------


def rotary(decoder: Any) -> Any:
    """The decoder's one rotary embedding, or None."""
    return getattr(decoder, "rotary_emb", None)


def rotation(decoder: Any, module: Any, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) float32 of the decoder's rotary embedding, without its attention scaling.

    Args:
        module: the attention module that will use them; some models embed by layer type.
        like: any tensor on the right device. positions: (1, B, N), or more under M-RoPE.
    """
    embed, kind = rotary(decoder), getattr(module, "layer_type", None)
    if kind is None:
        kind = layer_kinds(decoder.config)[module.layer_idx]
    typed = hasattr(embed, f"{kind}_inv_freq")
    args = (kind,) if typed else ()
    places = positions if positions.shape[0] > 1 else positions[0]
    cos, sin = embed(like, places, *args)
    scale = getattr(embed, f"{kind}_attention_scaling" if typed else "attention_scaling", 1.0)
    if cos.dim() == 4:  # early transformers 5 leaves the mixing of M-RoPE to the attention
        section = 2 * decoder.config.rope_parameters["mrope_section"]
        cos, sin = (
            torch.cat([m[i % 3] for i, m in enumerate(t.split(section, -1))], -1)
            for t in (cos, sin)
        )
    return cos / scale, sin / scale


def rotate(module: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, *, N, D) rotary states, turned as the attention module itself turns them; float32."""
    source, x = sys.modules[type(module).__module__], x.float()
    part = getattr(module, "qk_rope_head_dim", None)
    if part:  # latent attention: the last of each head, whose pairs lie apart by now
        still, x = x[..., :-part], x[..., -part:]
        return torch.cat([still, x * cos[:, None] + source.rotate_half(x) * sin[:, None]], -1)
    apply = getattr(source, "apply_rotary_pos_emb", None)
    if apply is None:
        return x * cos[:, None] + source.rotate_half(x) * sin[:, None]
    if "k" not in inspect.signature(apply).parameters:  # one tensor at a time
        return apply(x, cos, sin)
    return apply(x, x[:, :0], cos, sin)[0]


def kept_positions(model: Any) -> Tensor | None:
    """What Qwen's models remember of their last prompt's positions, (B, 1); None on others."""
    return getattr(getattr(model, "model", None), "rope_deltas", None)


def position_axes(model: Any) -> int:
    """Components of a position: 3 or more under M-RoPE (time, height, width), else 1."""
    decoder = decoder_of(model)
    named = getattr(decoder.config, "rope_parameters", None) or {}
    sections = getattr(rotary(decoder), "mrope_section", named.get("mrope_section"))
    if sections is None or not remembers_positions(model):
        return 1
    return max(len(sections), 3) if isinstance(sections, list | tuple) else 3


def remembers_positions(model: Any) -> bool:
    """Whether a model keeps `rope_deltas` between calls."""
    return hasattr(getattr(model, "model", None), "rope_deltas")


def keep_positions(model: Any, deltas: Tensor | None) -> None:
    """Put back what the model remembers; does nothing on models that remember nothing."""
    if remembers_positions(model):
        model.model.rope_deltas = deltas


@contextmanager
def keeping_positions(model: Any) -> Iterator[None]:
    """Restore `rope_deltas` on exit."""
    deltas = kept_positions(model)
    try:
        yield
    finally:
        keep_positions(model, deltas)


def graphs() -> Any:
    """How `generate` compiles decoding to whole graphs that run eagerly, on a CPU, too."""
    config: Any = CompileConfig(
        fullgraph=True, backend="eager", dynamic=False, mode=cast(str, None)
    )
    config._compile_all_devices = True
    return config


# -- generation ------------------------------------------------------------------------------------


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an instance, for a while; then whatever was there before."""
    mine = vars(owner)
    had, old = name in mine, mine.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, old)
        else:
            delattr(owner, name)


@contextmanager
def pixels_to_the_forward(
    model: Any, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """`generate` hands pixels to the forward, instead of encoding them first.

    Args:
        around: makes a replacement of the function that repeats inputs for beams.
    """
    expand = model._expand_inputs_for_generation
    with (
        replaced(model, "_supports_mm_encoder_outputs", lambda: False),
        replaced(model, "_expand_inputs_for_generation", around(expand)),
    ):
        yield
