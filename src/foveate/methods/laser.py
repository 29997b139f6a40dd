"""LASER: the layer that the question changes most says where to look again (arXiv 2602.04304).

The image's attention is read with the question and without it. What the question adds chooses a
layer, that layer's map chooses a crop, and the crop is what the model answers from. Hiding what
the map points at gives a second stream of logits to decode against.

Written from the paper's abstract and captions ("published" below) and from what others who read
it report ("reported", where two of them agree); its code is not public. What stays open is a
parameter, marked "inferred". Numbers in brackets are those of the equations, as reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core import Method, Prompt, Sequences, costly, plausible
from ..core.visual import Box, Pixels


@dataclass(frozen=True)
class Evidence:
    """What a question adds to the attention on the image.

    Attributes:
        layers: the layers that were read, 0-based.
        vaq: (layers,) float32, VAQ of each of them, equation (5).
        layer: the chosen one, 0-based, equation (6); None where the question adds nothing anywhere.
        a_q, a_0: (N_v,) float32, attention with and without the question, and
        c: (N_v,) float32, the map C of what the question adds: all three at `layer`, mean over the
            heads behind its VAQ.
    """

    layers: tuple[int, ...]
    vaq: Tensor
    layer: int | None
    a_q: Tensor
    a_0: Tensor
    c: Tensor


@dataclass(frozen=True)
class LASER(Method):
    """Look again where the question drew attention, at the layer that it changed most.

    Reading: the prompt's last row gives a_q with the question and a_0 without it, per layer and
    head, on the visual tokens.

    * (3) A_con = max(a_q - a_0, 0)
    * (4) VAQ of a head = norm of A_con over the tokens
    * (5) VAQ of a layer = mean over its `heads` largest
    * (6) layer = argmax of VAQ; the map C is the mean of A_con over those heads there.

    Crop: `share` of the image in each dimension but at least `floor` pixels, cut from the original
    pixels where C says. An image that is not larger stays as it is.

    VAT: a second stream sees the same crop with the `patches` of the largest C filled, (7), and
    reads the same answer. Logits z become

    * (8) VAT = z - z_masked
    * (9) s = z + alpha VAT, in the prompt and at every decode step.

    It needs one batch, not a shared prefix.

    Where the question changes nothing (it is no other prompt than the one without it), the whole
    image is shown and there is no VAT. The notes of a chat hold ``crop`` (left, top, right,
    bottom, in pixels of the original), ``layers`` with their ``vaq``, the chosen ``layer`` (None
    where nothing changes), ``vat`` (whether it is on), and the ``chain`` of pictures.

    Attributes:
        noq: the prompt without the question. "empty", reported: image and chat template alone;
            "instruction_only", as one reader has it: with `suffix`.
        heads: how many heads per layer count, 1 or more, or "all"; a model with fewer uses all.
            Inferred: the paper gives no number, its readers use 8 or all.
        placement: of the crop; inferred. "slide_max_sum": the window that holds most of C, and of
            equal ones that nearest to C's centroid; "topk_bbox": around the box of the patches
            that VAT hides, no larger than they need; "centroid": around C's centroid.
        share: of each side of the image, above 0, up to 1; 1 keeps the image whole. Reported: 0.5.
        floor: least side of a crop in pixels, 1 or more. Reported: 224.
        answer_input: "crop", as the captions read, or "both", original and crop; inferred.
        vat: "always", "never", or "auto": for questions whose layer lies deeper than `auto_depth`.
            Easier questions are published to do without; the rule for it, "auto", is inferred.
        auto_depth: any number. None: half of the model's layers plus 2; inferred.
        alpha: strength of VAT, 0 or more; 0 switches it off. Reported: 1.
        patches: share of the map's cells that VAT hides, 0 to 1; 0 switches it off. Inferred:
            32 of 576, as one reader has it; never more cells than the question added to.
        fill: what hides them, the image's "mean" colour, "grey" (127) or "black"; inferred.
        plausibility: VAT excludes tokens with less than this share of the likeliest one's
            probability, 0 to 1; 0 excludes none. Inferred, from VCD, whose authors use 0.1.
        suffix: follows the question in the reading pass, unless it ends with it; inferred. None:
            ViCrop's " Answer the question using a single word or phrase."
        first_layer: shallower layers than this, 0 or more, are read but not chosen; inferred.
        layers: those to read and choose from. None: all, as reported.
    """

    noq: Literal["empty", "instruction_only"] = "empty"
    heads: int | Literal["all"] = 8
    placement: Literal["slide_max_sum", "topk_bbox", "centroid"] = "slide_max_sum"
    share: float = 0.5
    floor: int = 224
    answer_input: Literal["crop", "both"] = "crop"
    vat: Literal["always", "never", "auto"] = "always"
    auto_depth: float | None = None
    alpha: float = 1.0
    patches: float = 32 / 576
    fill: Literal["mean", "grey", "black"] = "mean"
    plausibility: float = 0.0
    suffix: str | None = costly(None, limit=300)
    first_layer: int = 0

    name: ClassVar[str] = "laser"
    paper: ClassVar[str] = "2602.04304"
    looks_again: ClassVar[bool] = True
    needs_pixels: ClassVar[bool] = True
    passes: ClassVar[str] = (
        "the prompt twice: question, and once per image without; with VAT every token once more"
    )
    neutral: ClassVar[dict[str, Any]] = {"share": 1.0, "vat": "never"}

    def check(self) -> None:
        self.require(self.heads == "all" or self.heads >= 1, "heads must be 1 or more, or 'all'")
        self.require(0 < self.share <= 1, "share must lie above 0 and up to 1")
        self.require(self.floor >= 1, "floor must be 1 or more pixels")
        self.require(self.alpha >= 0, "alpha must be 0 or more")
        self.require(0 <= self.patches <= 1, "patches must lie between 0 and 1")
        self.require(
            self.patches > 0 or self.placement != "topk_bbox",
            "placement='topk_bbox' is around the patches, so patches must be more than 0",
        )
        self.require(0 <= self.plausibility <= 1, "plausibility must lie between 0 and 1")
        self.require(self.first_layer >= 0, "first_layer must be 0 or more")
        deepest = max(self.layers or (), default=math.inf)
        self.require(self.first_layer <= deepest, "first_layer must leave a layer to choose")

    @property
    def contrasts(self) -> bool:
        """Whether any question may get a second stream."""
        return self.vat != "never" and self.alpha > 0 and self.patches > 0

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage == "rewrite" or self.contrasts)

    # -- reading -----------------------------------------------------------------------------------

    def readings(self, vlm: Any, chats: list[Any]) -> list[tuple[Any, Any]]:
        """Attention of all heads with and without the question, per chat about one image.

        Call it on a method that was resolved for the model. The image is read once, where the
        model allows it; equal prompts are read once, so their readings are equal to the bit.

        Returns:
            Two `foveate.vlm.look.Reading` per chat.
        """
        from ..vlm.look import SHORT, plain, read

        suffix = SHORT if self.suffix is None else self.suffix
        noq = suffix.strip() if self.noq == "instruction_only" else ""
        prompts, pairs = dict[Any, Any](), []
        for chat in chats:
            asked = replace(chats[0], system=chat.system)
            pair = plain(asked, chat.text, suffix), plain(asked, noq)
            pairs.append([(one.system, one.text) for one in pair])
            prompts |= zip(pairs[-1], pair, strict=True)
        read_once = read(vlm, list(prompts.values()), self.layers, heads="all")
        by_prompt = dict(zip(prompts, read_once, strict=True))
        return [(by_prompt[q], by_prompt[empty]) for q, empty in pairs]

    def evidence(self, asked: Any, unasked: Any) -> Evidence:
        """Equations (3) to (6) on two readings of all heads, with and without the question."""
        a_q, a_0 = asked.weights[0], unasked.weights[0]  # (layers, H, N_v)
        a_con = (a_q - a_0).relu()  # (3)
        vaq_heads = a_con.norm(dim=-1)  # (4), (layers, H)
        heads = vaq_heads.shape[1]
        top = vaq_heads.topk(heads if self.heads == "all" else min(self.heads, heads), 1)
        vaq = top.values.mean(1)  # (5), (layers,)
        eligible = torch.tensor([layer >= self.first_layer for layer in asked.layers])
        best = int(torch.where(eligible, vaq, -1.0).argmax())  # (6)
        layer = asked.layers[best] if vaq[best] > 0 else None
        means = [a[best, top.indices[best]].mean(0) for a in (a_q, a_0, a_con)]
        return Evidence(asked.layers, vaq, layer, *means)

    # -- the crop and the masked view --------------------------------------------------------------

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        from ..vlm.look import the_image

        image = the_image(self, chats)
        if image is None:
            return chats
        depth = vlm.model.get_decoder().config.num_hidden_layers
        deep = depth / 2 + 2 if self.auto_depth is None else self.auto_depth
        shown: dict[Pixels, list[Image.Image]] = {(0, 0, *image.size): chats[0].images}
        return [
            self._look_again(chat, image, asked, unasked, deep, shown)
            for chat, (asked, unasked) in zip(chats, self.readings(vlm, chats), strict=True)
        ]

    def _look_again(
        self,
        chat: Any,
        image: Image.Image,
        asked: Any,
        unasked: Any,
        deep: float,
        shown: dict[Pixels, list[Image.Image]],
    ) -> Any:
        """The chat about the crop; `shown` has the pictures of the crops that earlier chats saw."""
        from ..vlm.look import Chain, Panel, fractions

        evidence, box = self.evidence(asked, unasked), asked.box
        layer = evidence.layer
        a_q, a_0, c = (asked.map(a).numpy() for a in (evidence.a_q, evidence.a_0, evidence.c))
        heat = _Heat(c.astype(np.float64), box, image.size)
        seen = layer is not None and bool(heat.cells.any())
        crop = self.crop(heat) if seen else (0, 0, *image.size)
        if crop not in shown:  # equal crops are one object, so that they share a prefix
            part = image.crop(crop)
            shown[crop] = [part] if self.answer_input == "crop" else [image, part]
        vat = seen and self.contrasts and (self.vat == "always" or (layer or 0) > deep)
        *whole, part = images = shown[crop]

        def draw() -> list[Panel]:
            frame, panels = fractions(crop, image.size), []
            if layer is not None:
                panels = [
                    Panel(f"attention with the question, layer {layer}", image, a_q, box),
                    Panel("attention without it", image, a_0, box),
                    Panel("what the question adds", image, c, box, (frame,)),
                ]
            if vat:
                hidden = self.masked(image, heat)
                panels.append(Panel("hidden from the second stream", hidden, frames=(frame,)))
            return [*panels, Panel("crop", part)]

        notes = chat.notes | {
            "crop": list(crop),
            "layers": list(evidence.layers),
            "vaq": [float(f"{value:.6g}") for value in evidence.vaq.tolist()],
            "layer": layer,
            "vat": vat,
            "chain": Chain(draw),
        }
        contrast = [*whole, self.masked(image, heat).crop(crop)] if vat else None
        return replace(chat, images=images, notes=notes, contrast=contrast)

    def crop(self, heat: _Heat) -> Pixels:
        """Where to look again; not all of `heat` is 0."""
        sides = [min(side, max(self.floor, round(self.share * side))) for side in heat.size]
        if self.placement == "topk_bbox":
            (left, top), (right, bottom) = heat.around(self.patches)
            needed = max(round(right - left), self.floor), max(round(bottom - top), self.floor)
            sides = [min(most, side) for most, side in zip(sides, needed, strict=True)]
            middle = (left + right) / 2, (top + bottom) / 2
        else:
            middle = heat.centroid
        starts = [at - side / 2 for at, side in zip(middle, sides, strict=True)]
        if self.placement == "slide_max_sum":
            starts = heat.slide(starts, sides)
        left, top = (
            round(min(max(start, 0), length - side))
            for start, side, length in zip(starts, sides, heat.size, strict=True)
        )
        return left, top, left + sides[0], top + sides[1]

    def masked(self, image: Image.Image, heat: _Heat) -> Image.Image:
        """The original without its most relevant patches, equation (7)."""
        colour = {"grey": (127, 127, 127), "black": (0, 0, 0)}.get(self.fill)
        if colour is None:
            colour = tuple(np.asarray(image).mean((0, 1)).round().astype(int).tolist())
        hidden = image.copy()
        for row, col in heat.top(self.patches):
            edges = heat.x[col], heat.y[row], heat.x[col + 1], heat.y[row + 1]
            hidden.paste(colour, tuple(round(edge) for edge in edges))
        return hidden

    # -- the second stream -------------------------------------------------------------------------

    def begin(self, seq: Sequences) -> None:
        visual = seq.visual
        on = [bool(note.get("vat")) for note in seq.notes] or [False] * len(visual)
        seq.memory["vat"] = torch.tensor(on, device=visual.device)

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        return prompt.given

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        if other is None:
            return logits
        z = logits.float()
        vat = z - other.float()  # (8)
        s = z + self.alpha * vat  # (9)
        s = plausible(s, z, self.plausibility)
        return torch.where(seq.memory["vat"][:, None].to(z.device), s, z)


class _Heat:
    """A map laid on an image.

    Attributes:
        cells: (rows, cols) float64, without what falls beside the image.
        x, y: the cells' edges in pixels, (cols + 1,) and (rows + 1,), kept inside the image.
        size: (width, height) of the image.
    """

    def __init__(self, values: np.ndarray, box: Box, size: tuple[int, int]) -> None:
        self.size, (rows, cols) = size, values.shape
        whole = np.linspace(box[0], box[2], cols + 1), np.linspace(box[1], box[3], rows + 1)
        inside = [edges.clip(0, 1) for edges in whole]
        self.x, self.y = (edges * side for edges, side in zip(inside, size, strict=True))
        across, down = (
            np.diff(part) / np.diff(edges) for part, edges in zip(inside, whole, strict=True)
        )
        self.cells = values * across * down[:, None]

    def top(self, share: float) -> np.ndarray:
        """(n, 2) row and column of the hottest cells, hottest first; none of them is 0."""
        count = min(max(1, round(share * self.cells.size)), int((self.cells > 0).sum()))
        order = np.argsort(-self.cells, axis=None, kind="stable")[:count]
        return np.stack(np.unravel_index(order, self.cells.shape), 1)

    def around(self, share: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """(left, top) and (right, bottom), in pixels, of the box of the hottest cells."""
        rows, cols = self.top(share).T
        low, high = (cols.min(), rows.min()), (cols.max() + 1, rows.max() + 1)
        return (self.x[low[0]], self.y[low[1]]), (self.x[high[0]], self.y[high[1]])

    @property
    def centroid(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        x, y = ((edges[1:] + edges[:-1]) / 2 for edges in (self.x, self.y))
        total = self.cells.sum()
        return float(self.cells.sum(0) @ x / total), float(self.cells.sum(1) @ y / total)

    def slide(self, near: list[float], sides: list[int]) -> list[float]:
        """Left and top of the window (width, height) that holds most.

        Over all positions, not only those of whole cells: the sum is linear between positions
        where an edge of the window meets one of a cell, so that only those need be looked at. Of
        equal ones, the nearest to `near`, which is looked at, too.
        """
        starts, covers = [], []
        for edges, start, side, length in zip(
            (self.x, self.y), near, sides, self.size, strict=True
        ):
            aligned = np.concatenate([[start], edges, edges - side])
            found = np.unique(np.clip(aligned, 0, length - side))[:, None]
            overlap = np.minimum(found + side, edges[1:]) - np.maximum(found, edges[:-1])
            starts.append(found[:, 0])
            covers.append(overlap.clip(0) / np.diff(edges).clip(1e-12))
        sums = covers[1] @ self.cells @ covers[0].T
        away = (starts[1][:, None] - near[1]) ** 2 + (starts[0] - near[0]) ** 2
        row, col = np.unravel_index(
            np.where(sums > sums.max() * (1 - 1e-9), away, np.inf).argmin(), sums.shape
        )
        return [float(starts[0][col]), float(starts[1][row])]
