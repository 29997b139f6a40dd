"""Look, then look again: reading passes, and the pictures of what was read.

Methods that give the model a better picture first ask it plainly and read where it looks::

    image = the_image(self, chats)
    for chat, reading in zip(chats, read(vlm, chats, self.layers), strict=True):
        heat = reading.map(reading.weights[0].mean(0))  # first step, mean over layers
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..backends.transformers.record import Recorder
from ..base.errors import FoveateError
from ..core.method import Method
from ..core.visual import WHOLE, Box, Pixels
from ..families.layout import Grid, together
from .answering import answer_all, complete
from .chat import Answer, Chat
from .vlm import VLM

T = TypeVar("T")

GENERAL = "Write a general description of the image."
"""The general instruction of ViCrop and CARVE: its attention is what all questions share."""
SHORT = " Answer the question using a single word or phrase."
"""The authors of both append this to the question and to the general instruction."""

_KEPT = 32  # readings that a VLM keeps


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What the last query row gave the image's tokens while a plain answer was written.

    Attributes:
        weights: (steps, layers, N_v), or (steps, layers, H, N_v) for ``heads="all"``, float32 on
            the CPU: attention after the softmax over the whole sequence, not renormalised. Step 0
            is the prompt's last row; the step that wrote the end token is the last.
        layers: which ones they are, 0-based.
        answer: the plain answer.
        grids: where the tokens lie.
    """

    weights: Tensor
    layers: tuple[int, ...]
    answer: Answer
    grids: list[Grid]

    def map(self, values: Tensor) -> Tensor:
        """(..., N_v) on the image's one token grid, (..., rows, cols); tiles are put together."""
        return together(self.grids, values)[0]

    @property
    def box(self) -> Box:
        """The part of the image that `map` covers."""
        return together(self.grids, self.weights[0, 0])[1]


def read(
    vlm: VLM,
    chats: Sequence[Chat],
    layers: tuple[int, ...] | None,
    *,
    heads: Literal["mean", "max", "all"] = "mean",
    max_new_tokens: int = 1,
) -> list[Reading]:
    """Ask plainly and read the attention, one reading per chat.

    All chats are about the same one image, whose prefix they share where the model allows it.
    Decoding is greedy, with a KV cache; one step costs one row per layer that is read.

    Args:
        layers: 0-based; None = every full-attention layer.
        max_new_tokens: steps at most.

    Raises:
        FoveateError: where it is not known how this model lays out its image tokens.
        Exception: the first failure of a question that also fails alone.
    """
    recorder, chats = Recorder(layers=layers, heads=heads), list(chats)
    where = vlm.grids(chats[0])
    answers = complete(answer_all(vlm, chats, (recorder,), max_new_tokens))
    return [_reading(answer, where, max_new_tokens) for answer in answers]


def _reading(answer: Answer, where: list[Grid], limit: int) -> Reading:
    record = answer.record
    assert record is not None
    steps = range(min(limit, len(answer.tokens) + 1))
    weights = [record.image(step)[0].float().cpu() for step in steps]
    return Reading(torch.stack(weights), record.layers, answer, where)


def read_with_general(
    vlm: VLM,
    chats: Sequence[Chat],
    layers: tuple[int, ...] | None,
    instruction: str | None = None,
    suffix: str | None = None,
    *,
    max_new_tokens: int = 1,
) -> tuple[list[Reading], Reading]:
    """Readings of the chats' questions, and of a general instruction about their one image.

    The instruction is read along with the first questions and kept for later ones.

    Args:
        instruction: None = `GENERAL`.
        suffix: follows the instruction and every question that does not end with it; None =
            `SHORT`.
    """
    instruction = GENERAL if instruction is None else instruction
    questions = [plain(chats[0], chat.text, suffix) for chat in chats]
    general = plain(chats[0], instruction, suffix)
    readings: list[Reading] = []

    def first() -> Reading:
        reading, *rest = read(vlm, [general, *questions], layers, max_new_tokens=max_new_tokens)
        readings.extend(rest)
        return _light(reading)

    key = (layers, max_new_tokens, general.text, general.system)
    kept_reading = kept(vlm, chats[0].images[0], key, first)
    if not readings:
        readings = read(vlm, questions, layers, max_new_tokens=max_new_tokens)
    return readings, kept_reading


def plain(chat: Chat, text: str, suffix: str | None = "") -> Chat:
    """The chat as a reading pass asks it: with this text, which ends with the suffix.

    Args:
        suffix: None = `SHORT`.
    """
    suffix = SHORT if suffix is None else suffix
    text = text if text.endswith(suffix.strip()) else text + suffix
    return replace(chat, text=text, notes={}, contrast=None)


def the_image(method: Method, chats: Sequence[Chat]) -> Image.Image | None:
    """The one image that all chats are about; None, with a note, where there is none.

    Raises:
        FoveateError: where there are several.
    """
    images = chats[0].images
    if not images:
        warnings.warn(f"The prompt has no image, so {method.name} does nothing.", stacklevel=2)
        return None
    if len(images) > 1:
        raise FoveateError(
            f"{method.name} looks again at one image, and this prompt has {len(images)}: "
            "ask about one at a time."
        )
    return images[0]


def fixed_square(vlm: VLM) -> bool:
    """Whether pictures of any size and shape become equally many tokens, as in LLaVA-1.5.

    Such a model may be shown a square in place of a picture. For others, and where it is not sure,
    a picture's stand-in needs the picture's own size.
    """
    config = vlm.model.config
    vision = getattr(config, "vision_config", None)
    return config.model_type == "llava" and getattr(vision, "model_type", "") == "clip_vision_model"


def kept(vlm: VLM, image: Image.Image, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What `make` returns for this image, kept for the next questions about it.

    Args:
        key: what else the result depends on: the method, its parameters, the system prompt.
    """
    store = vlm.readings
    place = (key, image.size, image.mode, hashlib.sha256(image.tobytes()).digest())
    value = store.pop(place, None)
    if value is None:
        value = make()
    store[place] = value  # the latest used last; other threads may take readings out meanwhile
    while len(store) > _KEPT:
        store.popitem(last=False)
    return value


def _light(reading: Reading) -> Reading:
    """The reading without pictures and record, so that what is kept is small."""
    chat = replace(reading.answer.chat, images=[], contrast=None, notes={})
    return replace(reading, answer=replace(reading.answer, chat=chat, record=None))


# -- pictures of what was read ---------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One picture of a chain.

    Attributes:
        heat: (rows, cols) float, drawn over the part `box` of the image; None = nothing.
        frames: rectangles drawn on the image.
    """

    title: str
    image: Image.Image
    heat: np.ndarray | None = None
    box: Box = WHOLE
    frames: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Chain:
    """How a method came from the image to what the model is shown; ``chat.notes["chain"]``.

    Attributes:
        draw: makes the panels, once, when somebody looks at them.
    """

    draw: Callable[[], Sequence[Panel]]

    @cached_property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(self.draw())


def fractions(crop: Pixels, size: tuple[int, int]) -> Box:
    """A box in pixels as fractions of an image of (width, height)."""
    return crop[0] / size[0], crop[1] / size[1], crop[2] / size[0], crop[3] / size[1]
