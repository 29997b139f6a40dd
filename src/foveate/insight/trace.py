"""What a model looks at, layer by layer and token by token, with several methods side by side.

traced = trace(VLM.load("pocket"), "photo.jpg", "Is there a cup?", object=(0.1, 0.2, 0.4, 0.6))
traced.runs[1].on_object     # (tokens, layers): attention to the object with the second method
traced.save("out")           # pictures, numbers, and a page that shows it all
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..backends.transformers.anatomy import anatomy
from ..backends.transformers.record import Recorder
from ..base.errors import FoveateError
from ..base.files import make_folder, replacing, write_text
from ..base.images import ImageLike, decode
from ..core import Anatomy, Method, Rows, Sequences, Stream
from ..core.method import as_stack, text
from ..families.layout import WHOLE, Box, Grid, together
from ..methods.clvs import CLVS
from ..vlm.chat import Chat
from ..vlm.vlm import VLM, Methods
from . import target
from .pages.trace import page
from .plots.trace import show_curves, show_strip
from .seen import Heads, HeatMap, MethodTrace, Seen
from .target import Target

if TYPE_CHECKING:
    from transformers import BatchFeature


END = "(end)"


@dataclass(frozen=True)
class Trace(Seen):
    """One question about one image with every method, and how to write it down."""

    def save(self, folder: str | Path) -> list[Path]:
        """Write trace.json, trace.npz, strip.png, curves.png and index.html; older ones go.

        Raises:
            FoveateError: where matplotlib is missing or the folder cannot be written.
        """
        folder = make_folder(Path(folder))
        paths = [folder / f for f in ("trace.json", "trace.npz", "index.html")]
        figures = [show_strip(self, folder / "strip.png"), show_curves(self, folder / "curves.png")]
        write_text(paths[0], json.dumps(self.to_json(), indent=1) + "\n")
        with replacing(paths[1]) as part:
            np.savez_compressed(part, allow_pickle=False, **self.arrays())
        write_text(paths[2], page(self))
        return [*figures, *paths]


# -- readers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfRecorder(Recorder, register=False):
    """The recorder in half the memory."""

    def _reduce(self, rows: Rows) -> Tensor:
        return super()._reduce(rows).half()


@dataclass(frozen=True)
class Uncertainty(Method, register=False):
    """Reads CLVS's uncertainty after every layer, and where CLVS stopped; changes nothing.

    Leaves ``notes["uncertainty"]`` on the chat: per token and layer a pair of u, 0-d float32, and
    whether the CLVS of the stack, if there is one, rests from there on.

    Attributes:
        top_k, final_norm: as CLVS's.
    """

    top_k: int = CLVS.top_k
    final_norm: bool = CLVS.final_norm

    name: ClassVar[str] = "uncertainty"
    needs_image: ClassVar[bool] = False

    def setup(self, anatomy: Anatomy) -> Anatomy:
        return anatomy

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        if stream.layer > 0:
            clvs = CLVS(top_k=self.top_k, final_norm=self.final_norm)
            uncertainty = clvs.uncertainty(stream.last, seq.plan)
            for u, notes in zip(uncertainty, seq.notes, strict=False):  # a search has more rows
                steps = notes.setdefault("uncertainty", [])
                if stream.layer == 1:
                    steps.append([])
                steps[-1].append((u, seq.rests(CLVS)))
        return stream.x


# -- tracing ---------------------------------------------------------------------------------------


def trace(
    vlm: VLM,
    image: ImageLike,
    question: str,
    methods: Sequence[Methods] = ("vanilla", "clvs"),
    *,
    object: Any = None,
    heads: Heads = "mean",
    max_new_tokens: int = 32,
    system: str | None = None,
    watch: Callable[[str], None] | None = None,
) -> Trace:
    """Answer with every method, and read what the model looks at while it writes every token.

    One generation per method, greedy. A method that looks again (ViCrop, CARVE, LASER) is read
    while it answers about its own picture, after its reading passes.

    Args:
        methods: each is one method or one stack, as text or as objects.
        object: where attention is measured: anything that `foveate.insight.target.read` reads.
        heads: "mean" or "max" over query heads, or numbers of heads, whose mean is read.
        max_new_tokens: longest answer; memory grows with it.
        watch: is told which method is traced, in words.

    Raises:
        FoveateError: for bad input, and where it is not known how the model lays out its tokens.
    """
    picture = decode(image)
    stacks: dict[str, tuple[Method, ...]] = {}
    for given in methods:
        stack = as_stack(*([given] if isinstance(given, (str, Method)) else given or ()))
        name = text(stack)
        if name in stacks:
            raise FoveateError(f"{name} is named twice: give each method once.")
        stacks[name] = stack
    if not stacks:
        raise FoveateError("There is no method to trace: give at least one, such as vanilla.")
    recorder = _recorder(vlm, heads)
    names = target.known(image) if isinstance(image, (str, Path)) else None
    sought = None if object is None else target.read(object, picture.size, names)
    clvs = next((m for stack in stacks.values() for m in stack if isinstance(m, CLVS)), CLVS())
    prompt = _Prompt.of(vlm, vlm.chat([picture], question, system))  # refuses unknown layouts
    runs = []
    for number, (name, stack) in enumerate(stacks.items(), 1):
        if watch:
            watch(f"tracing {name}, {number} of {len(stacks)}")
        run = _trace_one(vlm, prompt, stack, recorder, clvs, sought, max_new_tokens)
        if sought is not None and (run.share is None or not run.share.any()):
            why = (
                f"It is not known what part of the image {name} asked about, so its attention to "
                "the object is left out."
                if run.share is None
                else f"The object lies where the model does not look with {name}: it was cut away."
            )
            warnings.warn(why, stacklevel=2)
        runs.append(run)
    return Trace(vlm.name, picture, question, heads, sought, tuple(runs), vlm.revision, vlm.commit)


def _recorder(vlm: VLM, heads: Heads) -> HalfRecorder:
    if heads == "mean" or heads == "max":
        return HalfRecorder(heads=heads)
    count = vlm.model.get_decoder().config.num_attention_heads
    chosen = () if isinstance(heads, str) else tuple(heads)
    if not chosen or not all(isinstance(h, int) and 0 <= h < count for h in chosen):
        raise FoveateError(
            f"Cannot read the heads {heads!r}: give mean, max, or numbers from 0 to {count - 1}."
        )
    return HalfRecorder(heads=chosen)


@dataclass(frozen=True)
class _Prompt:
    """A chat with its tensors, and where its visual tokens lie."""

    chat: Chat
    inputs: BatchFeature
    grids: list[Grid]

    @classmethod
    def of(cls, vlm: VLM, chat: Chat) -> _Prompt:
        inputs = vlm.inputs([chat])
        return cls(chat, inputs, vlm.grids(chat, inputs))

    def asked_as(self, vlm: VLM, chat: Chat) -> _Prompt:
        """The prompt of a rewritten chat; nothing is prepared again where it asks the same."""
        same = (chat.text, chat.system) == (self.chat.text, self.chat.system)
        same &= list(map(id, chat.images)) == list(map(id, self.chat.images))
        return replace(self, chat=chat) if same else self.of(vlm, chat)


def _trace_one(
    vlm: VLM,
    question: _Prompt,
    stack: tuple[Method, ...],
    recorder: HalfRecorder,
    clvs: CLVS,
    sought: Target | None,
    max_new_tokens: int,
) -> MethodTrace:
    """One method's answer with its readings; `clvs`: reads u where the stack has no CLVS."""
    acting = next((m for m in stack if isinstance(m, CLVS) and not m.is_neutral), None)
    reader = acting or clvs
    original = question.chat
    (chat,) = vlm.rewrite([Chat(original.images, original.text, original.system)], stack)
    prompt = question.asked_as(vlm, chat)
    readers = (Uncertainty(top_k=reader.top_k, final_norm=reader.final_norm), recorder)
    (answer,) = vlm.answer([chat], (*stack, *readers), max_new_tokens, inputs=prompt.inputs)
    record, read = answer.record, chat.notes.pop("uncertainty")
    assert record is not None
    steps = range(len(record.values))
    # a search tries tokens in between, and decodes its answer last
    uncertainty = [read[0], *read[len(read) - len(steps) + 1 :]]
    attention = torch.stack([record.image(step)[0].half().cpu() for step in steps])
    parts = [_part(chat, index, original.images[0]) for index in range(len(chat.images))]
    known = [part for part in parts if part is not None]
    share = None
    if sought is not None and len(known) == len(parts):
        share = sought.tokens(prompt.grids, attention.shape[-1], known).numpy()
    resolved = acting.resolve(anatomy(vlm.model)) if acting else None
    return MethodTrace(
        method=text(stack),
        answer=replace(answer, record=None),
        tokens=(*answer.tokens, END)[: len(steps)],
        layers=record.layers,
        attention=attention.numpy(),
        pictures=tuple(
            _heat_map(image, part, attention, prompt.grids, index)
            for index, (image, part) in enumerate(zip(chat.images, parts, strict=True))
        ),
        share=share,
        uncertainty=np.array([[float(u) for u, _ in step] for step in uncertainty], np.float32),
        stopped=tuple(
            next((layer for layer, (_, rests) in enumerate(step) if rests), None)
            for step in uncertainty
        ),
        threshold=acting.stop_threshold if acting else None,
        tested=tuple(sorted(resolved.setup(anatomy(vlm.model)).tested)) if resolved else (),
    )


def _part(chat: Chat, index: int, original: Image.Image) -> Box | None:
    """What a picture shows of the user's image: all of it, or what the method says it cut out."""
    image, crop = chat.images[index], chat.notes.get("crop")
    if image is original or (crop is None and image.size == original.size):
        return WHOLE
    if crop is None:
        return None
    left, top, right, bottom = crop
    wide, high = original.size
    return (left / wide, top / high, right / wide, bottom / high)


def _heat_map(
    image: Image.Image, part: Box | None, attention: Tensor, grids: Sequence[Grid], index: int
) -> HeatMap:
    heat, box = together(grids, attention.float(), index)
    return HeatMap(image, part, heat.half().numpy(), box)
