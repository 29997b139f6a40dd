"""What checks work with: a model, drawn pictures with questions, and two results side by side."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.transformers.compat import decoder_of
from ...core.method import Method
from ...scenes import questions, world
from ...vlm.chat import Chat
from ...vlm.generation import generation_options
from ...vlm.vlm import VLM

Stack = tuple[Method, ...]

TOKENS = 4  # of an answer
LAYERS = 4  # of a slice
LIMITS = {torch.float32: 1e-3}  # of a `distance` that rounding may make; of other dtypes:
HALF = 0.2
SLACK = 4.0  # a method may be so many times further away than the plain model is
QUESTIONS = ("Is there a tree in the picture?", "What color is the car?")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        passed: None where it is neither good nor bad.
    """

    passed: bool | None
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Produced:
    """What the model wrote.

    Attributes:
        tokens: (B, T) int64.
        logits: (T, B, V) float32, after the methods' edits; None where a method searches.
    """

    tokens: Tensor
    logits: Tensor | None


class Lab:
    """A model with two questions about two drawn pictures, one of them wide.

    Attributes:
        vlm: what is checked.
        plain: check -> how far apart the plain model is, which a method is judged by.
    """

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        first = questions.FIRST_HELD_OUT
        square, wide = (world.draw(world.sample(first + i), 384) for i in range(2))
        self.pictures = [square, wide.crop((0, 64, 384, 320))]
        self.plain: dict[str, float] = {}

    @property
    def device(self) -> torch.device:
        return self.vlm.device

    def chats(self, stack: Stack, count: int = 2) -> list[Chat]:
        """Questions as the methods want them asked, each about a picture of its own."""
        asked = zip(self.pictures, QUESTIONS, strict=True)
        new = [self.vlm.rewrite([self.vlm.chat([p], q, None)], stack)[0] for p, q in asked]
        return new[:count]

    def about_one(self, stack: Stack) -> list[Chat]:
        """Both questions about one picture."""
        images = self.pictures[:1]
        asked = [self.vlm.chat(images, question, None) for question in QUESTIONS]
        for chat in asked:
            chat.images = images  # one list, as in an evaluation
        return self.vlm.rewrite(asked, stack)

    def forward(self, stack: Stack, chats: Sequence[Chat] | None = None) -> Tensor:
        """The logits (1, Q, V) of one pass over a prompt, float32."""
        chats = list(chats or self.chats(stack, 1))
        inputs = self.vlm.inputs(chats)
        with torch.no_grad(), self.vlm.using(stack, chats):
            return self.vlm.model(**inputs).logits.float()

    def produce(self, stack: Stack, chats: list[Chat], **options: Any) -> Produced:
        """What is written after these chats, `TOKENS` tokens each, greedily."""
        searches = any(m.wants("search") for m in stack)
        options = {"min_new_tokens": TOKENS, "output_logits": not searches, **options}
        options = generation_options(self.vlm.model, self.vlm.tokenizer, TOKENS, options)
        inputs = self.vlm.inputs(chats)
        with self.vlm.using(stack, chats):
            out = self.vlm.model.generate(**inputs, **options, return_dict_in_generate=True)
        written = out.sequences[:, inputs["input_ids"].shape[1] :].cpu()
        return Produced(written, None if searches else torch.stack(out.logits).float().cpu())

    def limit(self, plain: float) -> float:
        """How large a method's `distance` may be where the plain model's is `plain`."""
        return max(LIMITS.get(self.vlm.model.dtype, HALF), SLACK * plain)

    @functools.cached_property
    def slice(self) -> dict[str, Lab]:
        """Copies of the model with its first layers only, in float32 and in bfloat16.

        Both have the weights that bfloat16 can hold.
        """
        decoder = decoder_of(self.vlm.model)
        with _cut(decoder):
            half = copy.deepcopy(self.vlm.model)
        config = decoder_of(half).config
        config.num_hidden_layers = len(decoder_of(half).layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        half = half.to(torch.bfloat16)
        models = {"bfloat16": half, "float32": copy.deepcopy(half).float()}
        return {name: Lab(VLM(m, self.vlm.processor, name)) for name, m in models.items()}


@contextmanager
def _cut(decoder: Any) -> Iterator[None]:
    """The decoder with its first `LAYERS` layers, for as long as it is copied."""
    whole = decoder.layers
    decoder.layers = nn.ModuleList(list(whole)[:LAYERS])
    try:
        yield
    finally:
        decoder.layers = whole


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference over the standard deviation of `a`.

    Tokens that either excludes (-inf) are left out.
    """
    known = a.isfinite() & b.isfinite()
    x, y = a[known], b[known]
    if x.numel() < 2:
        return 0.0
    return float((x - y).square().mean().sqrt() / x.std().clamp(min=1e-12))


def apart(a: Produced, b: Produced) -> tuple[float, int]:
    """`distance` up to where the tokens of a row part, the parting step included; and how many
    rows part."""
    parted, worst = 0, 0.0
    for row in range(len(a.tokens)):
        same = (a.tokens[row] == b.tokens[row]).long().cumprod(0)
        steps = min(int(same.sum()) + 1, len(same))
        parted += not bool(same.all())
        if a.logits is not None and b.logits is not None:
            worst = max(worst, distance(a.logits[:steps, row], b.logits[:steps, row]))
    return worst, parted
