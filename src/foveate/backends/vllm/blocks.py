"""Prefix caching: a block of the KV cache that holds an edited row is not the plain model's.

An edited row changes the keys and values of its own token in the layers above. Blocks from there on
get a key of their own, which names the methods and the first edited position. Blocks before it are
the plain model's and stay shared between all methods.

What a method remembers of earlier tokens is made by computing them. So a request of such a method
reads only the blocks before its first edited position, also when it was preempted and comes back.
"""

from __future__ import annotations

from typing import Any

from .asked import IMAGES, KEY, acting, asked, first_edited


def with_method(keys: tuple[Any, ...] | None, request: Any, end: int) -> tuple[Any, ...] | None:
    """The extra keys of the block that ends before token `end`, with that of the method."""
    text = asked(request.sampling_params)
    if not text:
        return keys
    images = request.sampling_params.extra_args.get(IMAGES, [])
    first = first_edited(text, request.num_prompt_tokens, images)
    if end <= first:
        return keys
    return (*(keys or ()), (KEY, f"{text} from {first}"))


def readable(request: Any, size: int) -> int | None:
    """How many blocks a request of methods that remember may read from the cache.

    Args:
        size: tokens of a block.

    Returns:
        None for a request of other methods, or of one that reads the whole prompt.
    """
    text = asked(request.sampling_params)
    methods = acting(text)
    if not any(m.remembers for m in methods) or any(m.reads_prompt for m in methods):
        return None
    images = request.sampling_params.extra_args.get(IMAGES, [])
    return first_edited(text, request.num_prompt_tokens, images) // size
