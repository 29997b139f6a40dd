"""What transformers keeps private or has renamed, of KV caches; see `compat`."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedCache,
)

from .compat import layer_kinds


def length(cache: Any) -> int:
    """Tokens that a cache holds; 0 without a cache."""
    return int(cache.get_seq_length()) if cache is not None else 0


def capacity(cache: Any) -> int | None:
    """Tokens that a static cache can hold at most; None for caches that grow."""
    if cache is None or not cache.is_compileable:
        return None
    ask = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape
    return int(ask())


def allocated(cache: Any) -> bool:
    """Whether an empty cache has its rows already, as static ones of early transformers 5 do."""
    return length(cache) == 0 and _keys(cache) is not None


def batch_of(cache: Any) -> int:
    """Rows of a filled cache."""
    return len(cast(Tensor, _keys(cache)))


def _keys(cache: Any) -> Tensor | None:
    """The keys of the first layer that has any; linear-attention layers have none."""
    layers = getattr(cache, "layers", None) or ()
    found = (getattr(layer, "keys", None) for layer in layers)
    return next((keys for keys in found if keys is not None), None)


def empty_cache(decoder: Any) -> Cache:
    """A dynamic cache for this decoder."""
    return DynamicCache(config=decoder.config)


def whole_cache() -> Cache:
    """A dynamic cache that keeps all tokens of sliding-window layers, too."""
    return DynamicCache()


def rows(cache: Any, index: Tensor) -> Any:
    """A new cache with the rows `index` (N,) int64 of a filled one."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    new.reorder_cache(index)  # which puts other tensors in place of those of the layers
    return new


def grows(decoder: Any, cache: Any) -> bool:
    """Whether a filled cache gives each layer its latest keys, all or the window's, and no more.

    A single new token then sees all of them, but for padding.
    """
    known = {"full_attention": DynamicLayer, "sliding_attention": DynamicSlidingWindowLayer}
    kinds, layers = layer_kinds(decoder.config), getattr(cache, "layers", ())
    return len(kinds) == len(layers) and all(
        type(layer) is known.get(kind) for kind, layer in zip(kinds, layers, strict=True)
    )


def is_quantized(cache: Any) -> bool:
    """Whether a cache returns other keys than it was given."""
    return isinstance(cache, QuantizedCache)


def renews(cache: Any) -> bool:
    """Whether every update of a cache makes new tensors, so that copies may share the old ones."""
    return all(isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", (None,)))


def keeps_all(cache: Any) -> bool:
    """Whether a cache that grows keeps every token in every layer."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def sharing(cache: Any) -> Any:
    """A copy of a cache that grows; it shares the tensors."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new
