"""What a model looked at, with several methods side by side: the numbers of a trace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..families.layout import Box
from ..vlm.chat import Answer
from .target import Target

Heads = Literal["mean", "max"] | tuple[int, ...]
"""Over all heads, the mean or the largest; or the mean over the heads of these numbers, from 0."""


@dataclass(frozen=True)
class HeatMap:
    """One picture that a method asked about, and the attention to it.

    Attributes:
        image: as it was handed to the processor.
        part: the part of the user's image that it shows; None where nobody knows.
        heat: (tokens, layers, rows, cols) float16, attention on its one grid of tokens; tiles are
            put together.
        box: the part of the picture that `heat` covers, as fractions of it.
    """

    image: Image.Image
    part: Box | None
    heat: np.ndarray
    box: Box


@dataclass(frozen=True)
class MethodTrace:
    """One answer, and what the last query row looked at while each of its tokens was written.

    Attributes:
        method: the stack's text form.
        answer: with the chat as the model saw it.
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
    pictures: tuple[HeatMap, ...]
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

    def curves(self, digits: int) -> dict[str, Any]:
        """Tokens, curves by token and layer, and where CLVS stopped, ready for JSON."""
        curves = {
            "on_image": self.on_image,
            "on_object": self.on_object,
            "object_share": self.object_share,
            "uncertainty": self.uncertainty,
        }
        return {
            "method": self.method,
            "tokens": self.tokens,
            "probabilities": self.answer.probabilities,
            **{k: None if v is None else short(v, digits) for k, v in curves.items()},
            "stopped": self.stopped,
            "threshold": self.threshold,
            "tested": self.tested,
        }


@dataclass(frozen=True)
class Seen:
    """One question about one image, with every method.

    Attributes:
        model: its name. heads: how heads were reduced.
        target: the object that attention is measured to, or None.
        runs: one per method, in the order in which they were given.
        revision, commit: of a model from the hub.
    """

    model: str
    image: Image.Image
    question: str
    heads: Heads
    target: Target | None
    runs: tuple[MethodTrace, ...]
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
        arrays = {} if self.target is None else {"object": self.target.mask}
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
            arrays |= {f"{run.method}/{k}": v for k, v in values.items() if v is not None}
        return arrays


def _as_json(run: MethodTrace) -> dict[str, Any]:
    return {
        "answer": run.answer.text,
        "layers": run.layers,
        **run.curves(6),
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
        "notes": {k: v for k, v in run.answer.chat.notes.items() if _is_json(v)},
    }


def short(values: np.ndarray, digits: int) -> list[list[float]]:
    """A table (rows, columns) with so many significant digits, ready for JSON."""
    return [[float(f"{x:.{digits}g}") for x in row] for row in values]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
