"""What a model looks at, layer by layer and token by token, with several methods side by side.

found = trace(VLM.load("pocket"), "photo.jpg", "Is there a cup?", object=(0.1, 0.2, 0.4, 0.6))
found.runs[1].on_object     # (tokens, layers): attention to the object with the second method
found.save("out")           # pictures, numbers, and a page that shows it all
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..backends.transformers.anatomy import anatomy
from ..backends.transformers.record import Recorder
from ..base.errors import FoveateError
from ..base.images import ImageLike, decode
from ..core import Anatomy, Method, Rows, Sequences, Stream
from ..core.method import as_stack, text
from ..families.layout import WHOLE, Box, Grid, together
from ..methods.clvs import CLVS
from ..vlm.vlm import VLM, Answer, Chat, Methods
from . import target
from .target import Target

Heads = Literal["mean", "max"] | tuple[int, ...]
"""Over all heads, the mean or the largest; or the mean over the heads of these numbers, from 0."""

END = "(end)"


# -- what is kept ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One picture that a method asked about.

    Attributes:
        image: as it was handed to the processor.
        part: the part of the user's image that it shows; None where that is not known.
        heat: (tokens, layers, rows, cols) float16, attention on its one grid of tokens; tiles are
            put together.
        box: the part of the picture that `heat` covers, as fractions of it.
    """

    image: Image.Image
    part: Box | None
    heat: np.ndarray
    box: Box


@dataclass(frozen=True)
class Run:
    """One answer, and what the last query row looked at while each of its tokens was written.

    Attributes:
        method: the stack's text form.
        answer: what was said to what.
        tokens: what was written, one text per step; the end token, where it came, is "(end)".
        layers: decoder layers (0-based) whose attention was read: those with full attention.
        attention: (tokens, layers, N_v) float16: weights on the visual tokens after the softmax
            over the whole sequence and after the method's edits; not renormalised.
        pictures: what was asked about.
        share: (N_v,) float32: the share of each visual token's area that belongs to the object;
            None without one, or where a picture's place on the image is not known.
        uncertainty: (tokens, L) float32, 0 to 1: the quantity u of CLVS's stop test, eq. (8) of
            arXiv 2509.12897, of the residual stream after every layer.
        stopped: per token the layer after which CLVS stopped, None where it did not.
        threshold: below which u stops CLVS; None without CLVS.
        tested: the layers that CLVS tests.
    """

    method: str
    answer: Answer
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    attention: np.ndarray
    pictures: tuple[Picture, ...]
    share: np.ndarray | None
    uncertainty: np.ndarray
    stopped: tuple[int | None, ...]
    threshold: float | None
    tested: tuple[int, ...]

    @cached_property
    def on_image(self) -> np.ndarray:
        """(tokens, layers) float32: what of the attention goes to the image.

        With ``heads="max"`` this is the sum of every token's largest weight, which may exceed 1.
        """
        return self.attention.sum(-1, dtype=np.float32)

    @cached_property
    def on_object(self) -> np.ndarray | None:
        """(tokens, layers) float32: what of all attention goes to the object.

        A^l of arXiv 2509.12897 section 2, with a token's weight counted by the share of its area
        that is the object's (the paper's rule for partly covered tokens is not known).
        """
        return None if self.share is None else self.attention.astype(np.float32) @ self.share

    @cached_property
    def object_share(self) -> np.ndarray | None:
        """(tokens, layers) float32: `on_object` as a share of `on_image`."""
        if self.on_object is None:
            return None
        return self.on_object / np.maximum(self.on_image, 1e-12)

    @property
    def said(self) -> int:
        """How many of the tokens the plots' means are over: all but the end token's."""
        return max(1, len(self.answer.tokens))


@dataclass(frozen=True)
class Trace:
    """One question about one image, with every method.

    Attributes:
        model: its name. heads: how heads were reduced.
        target: the object, where one was given.
        revision, commit: of a model from the hub.
    """

    model: str
    image: Image.Image
    question: str
    heads: Heads
    target: Target | None
    runs: tuple[Run, ...]
    revision: str | None = None
    commit: str | None = None

    @property
    def measure(self) -> Literal["on_image", "on_object", "object_share"]:
        """The curve of a run that is drawn: attention to the object, without one to the image.

        The largest weights over heads sum to more than 1, so of them the object's share is drawn.
        """
        if self.target is None:
            return "on_image"
        return "object_share" if self.heads == "max" else "on_object"

    def save(self, folder: str | Path) -> list[Path]:
        """Write trace.json, trace.npz, strip.png, curves.png and index.html; older ones go.

        Raises:
            FoveateError: where matplotlib is missing or the folder cannot be written.
        """
        from .pages.trace import page
        from .plots.trace import show_curves, show_strip

        folder = Path(folder)
        paths = [folder / f for f in ("trace.json", "trace.npz", "index.html")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            drawn = [
                show_strip(self, folder / "strip.png"),
                show_curves(self, folder / "curves.png"),
            ]
            paths[0].write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            np.savez_compressed(paths[1], allow_pickle=False, **self.arrays())
            paths[2].write_text(page(self), encoding="utf-8")
        except OSError as error:
            raise FoveateError(f"The trace cannot be written to {folder}: {error}.") from error
        return [*drawn, *paths]

    def to_json(self) -> dict[str, Any]:
        """Everything but the maps: answers, curves by token and layer, where CLVS stopped."""
        return {
            "model": self.model,
            "revision": self.revision,
            "commit": self.commit,
            "question": self.question,
            "size": self.image.size,
            "heads": self.heads,
            "object": None
            if self.target is None
            else {"name": self.target.name, "box": self.target.box, "area": self.target.area},
            "runs": [_as_json(run) for run in self.runs],
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What trace.npz holds: ``<method>/attention``, ``<method>/heat-0``, curves, the mask."""
        found = {} if self.target is None else {"object": self.target.mask}
        for run in self.runs:
            values = {
                "attention": run.attention,
                "on_image": run.on_image,
                "on_object": run.on_object,
                "object_share": run.object_share,
                "share": run.share,
                "uncertainty": run.uncertainty,
                "layers": np.array(run.layers),
                **{f"heat-{i}": picture.heat for i, picture in enumerate(run.pictures)},
            }
            found |= {f"{run.method}/{k}": v for k, v in values.items() if v is not None}
        return found


def _as_json(run: Run) -> dict[str, Any]:
    def numbers(values: np.ndarray | None) -> Any:
        return None if values is None else [[float(f"{x:.6g}") for x in row] for row in values]

    notes = {k: v for k, v in run.answer.chat.notes.items() if _is_json(v)}
    return {
        "method": run.method,
        "answer": run.answer.text,
        "tokens": run.tokens,
        "probabilities": run.answer.probabilities,
        "layers": run.layers,
        "on_image": numbers(run.on_image),
        "on_object": numbers(run.on_object),
        "object_share": numbers(run.object_share),
        "uncertainty": numbers(run.uncertainty),
        "stopped": run.stopped,
        "threshold": run.threshold,
        "tested": run.tested,
        "pictures": [
            {
                "size": picture.image.size,
                "part": picture.part,
                "rows": picture.heat.shape[-2],
                "cols": picture.heat.shape[-1],
                "box": picture.box,
            }
            for picture in run.pictures
        ],
        "notes": notes,
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


# -- readers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfRecorder(Recorder, register=False):
    """The recorder in half the memory, and of chosen heads.

    Attributes:
        chosen: numbers of query heads (0-based) whose mean is kept; None = as `heads` says.
    """

    chosen: tuple[int, ...] | None = None

    def _reduce(self, rows: Rows) -> Tensor:
        if self.chosen is None:
            return super()._reduce(rows).half()
        return rows.x[:, list(self.chosen), -1].mean(1).half()


@dataclass(frozen=True)
class Uncertainty(Method, register=False):
    """Reads CLVS's uncertainty after every layer, and where CLVS stopped; changes nothing.

    Leaves ``notes["uncertainty"]`` on the first prompt's chat: per token and layer a pair of u,
    0-d float32, and whether the CLVS of the stack, if there is one, rests from there on.

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
            steps = seq.notes[0].setdefault("uncertainty", [])
            if stream.layer == 1:
                steps.append([])
            clvs = CLVS(top_k=self.top_k, final_norm=self.final_norm)
            u = clvs.uncertainty(stream.last[:1], seq.plan)[0]
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
        object: where attention is measured: whatever `foveate.insight.target.read` reads.
        heads: "mean" or "max" over query heads, or numbers of heads, whose mean is read.
        max_new_tokens: longest answer; memory grows with it.
        watch: is told what is being done, in words.

    Raises:
        FoveateError: for bad input, and where it is not known how the model lays out its tokens.
    """
    picture = decode(image)
    stacks = [as_stack(*([m] if isinstance(m, (str, Method)) else m or ())) for m in methods]
    names = [text(stack) for stack in stacks]
    if not names:
        raise FoveateError("There is no method to trace: give at least one, such as vanilla.")
    for name in names:
        if names.count(name) > 1:
            raise FoveateError(f"{name} is to be traced twice: give each method once.")
    recorder = _recorder(vlm, heads)
    names_of = target.known(image) if isinstance(image, (str, Path)) else None
    found = None if object is None else target.read(object, picture.size, names_of)
    every = [method for stack in stacks for method in stack]
    clvs = next((m for m in every if isinstance(m, CLVS)), CLVS())
    chat = vlm.chat([picture], question, system)
    vlm.grids(chat)  # an unknown layout is told before anything is computed
    runs = []
    for number, (name, stack) in enumerate(zip(names, stacks, strict=True)):
        if watch:
            watch(f"tracing {name}, {number + 1} of {len(stacks)}")
        run = _run(vlm, chat, stack, recorder, clvs, found, max_new_tokens)
        if found is not None and (run.share is None or not run.share.any()):
            why = (
                f"It is not known what part of the image {name} asked about, so its attention to "
                "the object is left out."
                if run.share is None
                else f"The object lies where the model does not look with {name}: it was cut away."
            )
            warnings.warn(why, stacklevel=2)
        runs.append(run)
    return Trace(vlm.name, picture, question, heads, found, tuple(runs), vlm.revision, vlm.commit)


def _recorder(vlm: VLM, heads: Heads) -> HalfRecorder:
    if heads == "mean" or heads == "max":
        return HalfRecorder(heads=heads)
    count = vlm.model.get_decoder().config.num_attention_heads
    chosen = () if isinstance(heads, str) else tuple(heads)
    if not chosen or not all(isinstance(h, int) and 0 <= h < count for h in chosen):
        raise FoveateError(
            f"Cannot read the heads {heads!r}: give mean, max, or numbers from 0 to {count - 1}."
        )
    return HalfRecorder(chosen=chosen)


def _run(
    vlm: VLM,
    chat: Chat,
    stack: tuple[Method, ...],
    recorder: HalfRecorder,
    like: CLVS,
    found: Target | None,
    max_new_tokens: int,
) -> Run:
    """One method's answer with its readings; `like`: whose uncertainty is read without CLVS."""
    own = next((m for m in stack if isinstance(m, CLVS) and not m.is_neutral), None)
    like = own or like
    (asked,) = vlm.rewrite([Chat(chat.images, chat.text, chat.system)], stack)
    readers = (Uncertainty(top_k=like.top_k, final_norm=like.final_norm), recorder)
    answer = vlm.answer([asked], (*stack, *readers), max_new_tokens)[0]
    record, read = answer.record, asked.notes.pop("uncertainty")
    assert record is not None
    steps = range(len(record.values))
    attention = torch.stack([record.image(step)[0].cpu() for step in steps])
    grids = vlm.grids(asked)
    parts = [_part(asked, index, chat.images[0]) for index in range(len(asked.images))]
    share = None
    if found is not None and None not in parts:
        known = [part for part in parts if part is not None]
        share = found.tokens(grids, attention.shape[-1], known).numpy()
    tokens = (*answer.tokens, END)[: len(steps)]
    resolved = own.resolve(anatomy(vlm.model)) if own else None
    return Run(
        method=text(stack),
        answer=replace(answer, record=None),
        tokens=tokens,
        layers=record.layers,
        attention=attention.numpy(),
        pictures=tuple(
            _picture(image, part, attention, grids, index)
            for index, (image, part) in enumerate(zip(asked.images, parts, strict=True))
        ),
        share=share,
        uncertainty=np.array([[float(u) for u, _ in step] for step in read], np.float32),
        stopped=tuple(
            next((layer for layer, (_, rests) in enumerate(step) if rests), None) for step in read
        ),
        threshold=own.stop_threshold if own else None,
        tested=tuple(sorted(resolved.setup(anatomy(vlm.model))[1])) if resolved else (),
    )


def _part(asked: Chat, index: int, original: Image.Image) -> Box | None:
    """What a picture shows of the user's image: all of it, or what the method says it cut out."""
    image, crop = asked.images[index], asked.notes.get("crop")
    if image is original or (crop is None and image.size == original.size):
        return WHOLE
    if crop is None:
        return None
    left, top, right, bottom = crop
    wide, high = original.size
    return (left / wide, top / high, right / wide, bottom / high)


def _picture(
    image: Image.Image, part: Box | None, attention: Tensor, grids: Sequence[Grid], index: int
) -> Picture:
    heat, box = together(grids, attention.float(), index)
    return Picture(image, part, heat.half().numpy(), box)
