"""AGLA: the whole picture, and the parts of it that the question is about (arXiv 2406.12718).

A map says which parts of the picture the question is about. The rest turns black for a second
stream, whose logits are added to the first one's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from ..core import FoveateError, Method, Prompt, Sequences, costly, together
from ..core.visual import WHOLE, Box

SIDE = 384  # of the square on which maps are compared and pictures are masked
SIGMA = 7.68  # of the blur, in pixels of that square


@dataclass(frozen=True)
class AGLA(Method):
    """Assembly of global and local attention: l + alpha l', where l' sees what matters.

    A second stream reads the same tokens beside a masked picture. Its logits l' are added to the
    true l, l + alpha l', on tokens with at least `beta` times the probability of the likeliest;
    the rest get -inf. This happens in the prompt and at every decode step, before processors and
    warpers. Attention is untouched.

    The masked picture: a map R says how relevant each part is for the question, and a score c in
    -1..1 how well question and picture match. R is scaled to 0..1, brought to 384 x 384 by a cubic
    spline, blurred (Gaussian, sigma 7.68) and scaled again. Pixels whose R is among the
    1 - c / 2 largest share stay, the others are black: a better match keeps less. A constant R
    keeps everything (inferred; the authors' code divides by zero there).

    The default is a departure: R and c come from the model itself and not from a second model. R
    is the attention of the prompt's last row on the picture for the question, divided by the same
    for a general instruction, both as ViCrop asks them and in the layer that it reads. c is the
    share of the attention that the question moves: half the summed difference of the two maps,
    each scaled to sum 1 (inferred). It is 0 where the question looks where any question looks,
    which keeps everything, and 1 where the two looks have nothing in common, which keeps half.
    Parts of the picture without a token count as least relevant (inferred).

    LLaVA-1.5 sees the masked picture as a square of 384 pixels, whatever the picture's shape, as
    published. For other models the mask is laid on the picture in its own size, so that the number
    of tokens stays (inferred). Of several pictures each is masked on its own (inferred).
    ``notes["matches"]`` has each picture's score and the share of it that is kept. The masks depend
    on the question, so questions do not share the prefix of the second stream.

    Attributes:
        alpha: strength of the second stream, 0 or more; 0 leaves only the plausibility cut.
            Published: 2; the authors' code falls back to 1.
        beta: plausibility cut, 0 to 1; 0 cuts nothing. Published: 0.5.
        matcher: a function (picture, question) -> (map, score), or the name of one that is loaded
            from the hub: "blip-itm", as published, or "siglip". None: the model's own attention.
        first_token_only: from the second token on, l' = l, so that only the first token sees the
            masked picture. The authors' code does so by accident: its second stream goes on with
            the first one's cache. False is the paper's intent.
        layers: read where there is no matcher. ViCrop's: 14, for Qwen2.5-VL 22.
    """

    alpha: float = 2.0
    beta: float = 0.5
    matcher: Callable[..., Any] | Literal["siglip", "blip-itm"] | None = costly(  # noqa: RUF009 - a field
        None, limit=None
    )
    first_token_only: bool = False

    name: ClassVar[str] = "agla"
    paper: ClassVar[str] = "2406.12718"
    paper_layers: ClassVar[tuple[int, ...]] = (14,)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"qwen2_5_vl": {"layers": (22,)}}
    looks_again: ClassVar[bool] = True
    needs_pixels: ClassVar[bool] = True
    passes: ClassVar[str] = (
        "the prompt twice: question, and once per image a general instruction; every token once "
        "more, in one batch"
    )
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"beta": 0.0}

    def check(self) -> None:
        self.require(self.alpha >= 0, "alpha must be 0 or more")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")
        self.require(
            self.matcher is None or self.layers is None,
            "layers are read only without a matcher, so leave out one of them",
        )

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage == "logits" or self.alpha != 0)

    def resolve(self, anatomy: Any) -> Method:
        return super().resolve(anatomy) if self.matcher is None else self

    # -- the masked picture ------------------------------------------------------------------------

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        from ..vlm.look import Chain, Panel, fixed_square

        images = chats[0].images
        if not images:
            return chats
        square = fixed_square(vlm)
        found = list(zip(*(self.matches(vlm, chats, image) for image in images), strict=True))
        rewritten = []
        for chat, matches in zip(chats, found, strict=True):
            masks = [kept(r, c, box) for r, c, box in matches]
            masked = [
                hidden(image, mask, square) for image, mask in zip(images, masks, strict=True)
            ]

            def draw(matches: Any = matches, masked: Any = masked) -> list[Panel]:
                panels = []
                for image, (r, c, box), shown in zip(images, matches, masked, strict=True):
                    panels.append(Panel(f"relevance, score {c:.2f}", image, r, box))
                    panels.append(Panel("what the second stream sees", shown))
                return panels

            notes = chat.notes | {
                "matches": [
                    {"score": float(f"{c:.6g}"), "kept": float(f"{mask.mean():.6g}")}
                    for (_, c, _), mask in zip(matches, masks, strict=True)
                ],
                "chain": Chain(draw),
            }
            rewritten.append(replace(chat, contrast=masked, notes=notes))
        return rewritten

    def matches(
        self, vlm: Any, chats: list[Any], image: Image.Image
    ) -> list[tuple[np.ndarray, float, Box]]:
        """Per chat the map (rows, cols) of one of its pictures, its score, and what it covers."""
        if self.matcher is None:
            return self.own_matches(vlm, chats, image)
        match: Any = self.matcher
        if isinstance(match, str):
            from ..vlm.match import matcher

            match = matcher(match, vlm.model.device)
        found = []
        for chat in chats:
            r, c = match(image, chat.text)
            r, c = np.asarray(r, np.float64), float(c)
            self.require(
                r.ndim == 2 and r.size > 0 and bool(np.isfinite(r).all()) and -1 <= c <= 1,
                "the matcher must return a finite map (rows, cols) and a score from -1 to 1",
            )
            found.append((r, c, WHOLE))
        return found

    def own_matches(
        self, vlm: Any, chats: list[Any], image: Image.Image
    ) -> list[tuple[np.ndarray, float, Box]]:
        """`matches` from the model's own attention; several pictures are read one by one."""
        from ..vlm.look import read_with_general

        if len(chats[0].images) > 1:
            chats = [replace(chat, images=[image], earlier=()) for chat in chats]
        readings, general = read_with_general(vlm, chats, self.layers)
        found = []
        for reading in readings:
            asked, described = (
                one.map(one.weights[0].mean(0)).double().numpy() for one in (reading, general)
            )
            described = described.clip(min=np.finfo(np.float32).tiny)
            asked = asked.clip(min=np.finfo(np.float32).tiny)
            moved = abs(asked / asked.sum() - described / described.sum()).sum() / 2
            found.append((asked / described, float(moved), general.box))
        return found

    # -- the second stream -------------------------------------------------------------------------

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        if not bool(prompt.visual.any()):
            return None
        if prompt.given is None:
            raise FoveateError(
                "agla masks the picture before the processor, and this prompt came without a "
                "masked one: use VLM.load(...).ask(image, question, method=...)."
            )
        return prompt.given

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        if other is not None and self.first_token_only and seq.phase == "decode":
            other = logits
        return together(other, logits, self.alpha, self.beta)


def kept(relevance: np.ndarray, score: float, box: Box = WHOLE) -> np.ndarray:
    """Which pixels of the picture, seen as a square of 384 pixels, stay: (384, 384) bool.

    Args:
        relevance: (rows, cols) finite. score: -1 to 1.
        box: what of the picture the map covers; the rest counts as least relevant.
    """
    from scipy import ndimage

    if np.ptp(relevance) == 0:
        return np.ones((SIDE, SIDE), bool)
    left, top, right, bottom = (round(edge * SIDE) for edge in box)
    zoom = (bottom - top) / relevance.shape[0], (right - left) / relevance.shape[1]
    # cells are areas; beyond the border the spline meets zeros and is clipped to the map's values
    fine = ndimage.zoom(_scaled(relevance), zoom, order=3, mode="grid-constant", grid_mode=True)
    canvas = np.zeros((SIDE, SIDE))
    inside = slice(max(top, 0), min(bottom, SIDE)), slice(max(left, 0), min(right, SIDE))
    canvas[inside] = fine.clip(0, 1)[
        inside[0].start - top : inside[0].stop - top, inside[1].start - left : inside[1].stop - left
    ]
    smooth = _scaled(ndimage.gaussian_filter(canvas, SIGMA))
    share = min(1 - score / 2, 1 - 1e-5)
    least = np.sort(smooth, axis=None)[::-1][int(SIDE * SIDE * share)]
    return smooth >= least


def hidden(image: Image.Image, mask: np.ndarray, square: bool) -> Image.Image:
    """The picture, black where `mask` (384, 384) is False.

    Args:
        square: as a square of 384 pixels; False: in its own size, under the resized mask.
    """
    stays = Image.fromarray(mask.astype(np.uint8) * 255)
    if square:
        image = image.resize((SIDE, SIDE))
    else:
        stays = stays.resize(image.size, Image.Resampling.NEAREST)
    black = Image.new("RGB", image.size)
    return Image.composite(image, black, stays)


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values brought to 0..1; not all of them are equal."""
    return (values - values.min()) / np.ptp(values)
