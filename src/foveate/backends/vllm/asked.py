"""What a request asks for, and where its images lie: in the extra arguments of its parameters."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...base.errors import FoveateError
from ...core.method import Method, parse

KEY = "foveate"  # a method's text form, from the client
IMAGES = "foveate images"  # (first column, length) of every run of visual tokens, from admission
POSITIONS = "foveate positions"  # (3, P) under M-RoPE, from the worker
LIVES = "foveate lives"  # what the request remembers, from the worker
PAIR = "foveate pair"  # of a request and its twin: the request's id, from the engine
TWIN = "foveate twin"  # of the twin: when it is read, `BESIDE` the request or `AHEAD` of it
BESIDE, AHEAD = "beside", "ahead"


def asked(params: Any) -> str:
    """The text of the methods that a request asks for; "" for the plain model."""
    text = (getattr(params, "extra_args", None) or {}).get(KEY)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise FoveateError(f"The extra argument {KEY} is a method's text, such as 'clvs'.")
    return str_of(text)


@functools.lru_cache(1024)
def str_of(text: str) -> str:
    """One text for all spellings of the same methods; "" where they change nothing."""
    return "+".join(map(str, acting(text)))


@functools.lru_cache(1024)
def acting(text: str) -> tuple[Method, ...]:
    """The methods of a text, without those that change nothing."""
    return tuple(method for method in parse(text) if not method.is_neutral) if text else ()


def visual(params: Any, length: int) -> Tensor:
    """(length,) bool: the visual columns among the first `length` of a prompt."""
    mask = torch.zeros(length, dtype=torch.bool)
    for first, count in params.extra_args.get(IMAGES, ()):
        mask[first : first + count] = True
    return mask


def first_edited(text: str, prompt: int, images: list[tuple[int, int]]) -> int:
    """The first position whose keys and values, above the first layer, a method changes.

    Args:
        prompt: its length. images: (first column, length) of every run of visual tokens.
    """
    if any(method.rows == "text" for method in acting(text)) and images:
        return max(first + count for first, count in images)
    return prompt - 1
