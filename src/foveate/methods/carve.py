"""CARVE: contrast two looks at the picture, and show what only the question looks at (2509.06461).

Where a model looks is partly its question and partly the picture's clutter. What it looks at when
asked for a general description is the clutter alone, so dividing one by the other leaves what the
question is about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base.form import costly
from ..core import Anatomy, Method
from ..vlm.regions import regions

if TYPE_CHECKING:
    from ..families.layout import Box
    from ..vlm.look import Pixels
    from ..vlm.vlm import VLM, Chat

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"final_input": "refined", "regions": 2, "keep": 0.4},
    "released": {"final_input": "both", "regions": "released", "keep": 0.2},
}
VERSIONS: dict[str, dict[str, Any]] = {
    "v1": {"time": "start", "rank": "all", "smallest": 0.001},
    "v2": {"time": "start", "rank": "area", "smallest": 0.0},
    "v3": {"time": "start", "rank": "attention", "smallest": 0.0},
    "v4": {"time": "full", "rank": "attention", "smallest": 0.0},
}
LEVEL = 1e-4  # contrasts that differ by less than this share are equal but for rounding
LARGEST = 4  # times the original's pixels that a magnified crop may have
SHOWN = 384  # pixels along the longer side of the picture of the mask


@dataclass(frozen=True)
class CARVE(Method):
    """Contrastive attention: crop to what the question looks at and a general description does not.

    Two plain passes read the last query row's attention to the image, mean over heads, at every
    generated token: one with the question, one with a general instruction (once per image). Their
    ratio, eq. (4.6) of arXiv 2509.06461, is summed over layers and steps on the token grid and
    resized bilinearly to the image (half-pixel centres, inferred). Of the pixels with the largest
    values the best 4-connected regions stay, all others become black, and the regions' bounding
    box is magnified by ``max(W / w, H / h)`` (LANCZOS) and asked about with the original text.

    What the paper leaves open: pixels that the model does not see (a centre crop) are never kept.
    Where the threshold lies among values that are equal but for rounding, only pixels above them
    are kept. Where nothing is kept, and where the question is the general instruction, the whole
    image is asked about. A crop is magnified to at most four times the original's pixels.

    Notes: "crop", the box [left, top, right, bottom] in pixels of the original; "kept", the share
    of the image's pixels that are not black; "regions", [found, kept]; "steps", how many both
    passes had.

    Attributes:
        variant: "paper" or "released" (the authors' code): what `final_input`, `regions` and `keep`
            are where they are None.
        version: of the released code, "v1" to "v4": what `time`, `rank` and `smallest` are where
            they are None. The paper's T_full with regions ranked by attention is "v4".
        final_input: "refined": the new picture alone (Alg. 1, line 8); "both": the original before
            it (the authors' code).
        regions: how many are kept: the paper's best is 2; "released" is the authors' code,
            ``max(3, int(keep * n))`` of n.
        keep: share p of pixels above the threshold, up to 1. 0.4 is the best of the paper's Fig. 7,
            0.2 is in the authors' code.
        time: "full": all steps, the t-th weighted with t; "start", "end": the first, the last one.
        end: which last step "end" means where the two answers differ in length: the last one that
            both have, as eq. (4.6) reads, or "own", each answer's own. Both inferred.
        rank: regions are kept by their sum of "attention" (the contrast), by "area", or "all" are.
        smallest: regions with a smaller share of the kept pixels are dropped before the ranking;
            0.001 in version v1 of the authors' code.
        ratio_floor: lambda of eq. (4.6), added to the general attention. Authors' code: 1e-8.
        ratio_clip: largest ratio, 0 for none. Inferred; the authors' code does not clip.
        steps: most tokens of a reading pass. Authors' code: 32.
        instruction: the general instruction. None: the published "Write a general description of
            the image."
        suffix: appended to question and instruction in the reading passes, but to no text that
            ends with it. None: " Answer the question using a single word or phrase.", which is in
            the authors' code.
        layers: 20 to 25, published for all models.
    """

    variant: Literal["paper", "released"] = "paper"
    version: Literal["v1", "v2", "v3", "v4"] = "v4"
    final_input: Literal["refined", "both"] | None = None
    regions: int | Literal["released"] | None = None
    keep: float | None = None
    time: Literal["full", "start", "end"] | None = None
    end: Literal["common", "own"] = "common"
    rank: Literal["attention", "area", "all"] | None = None
    smallest: float | None = None
    ratio_floor: float = 1e-8
    ratio_clip: float = 0.0
    steps: int = costly(32, limit=64)
    instruction: str | None = costly(None, limit=300)
    suffix: str | None = costly(None, limit=300)

    name: ClassVar[str] = "carve"
    paper: ClassVar[str] = "2509.06461"
    paper_layers: ClassVar[tuple[int | EllipsisType, ...]] = (20, ..., 25)
    neutral: ClassVar[dict[str, Any]] = {"keep": 1.0, "variant": "paper", "final_input": None}
    example: ClassVar[dict[str, Any]] = {"keep": 0.3}
    looks_again: ClassVar[bool] = True
    passes: ClassVar[str] = (
        "one generation per image (general instruction) and one per question, up to 32 tokens each"
    )

    def check(self) -> None:
        if self.regions is not None and self.regions != "released":
            self.require(self.regions >= 1, "regions must be 1 or more")
        self.require(self.keep is None or 0 < self.keep <= 1, "keep must lie above 0, up to 1")
        self.require(
            self.smallest is None or 0 <= self.smallest <= 1, "smallest must lie between 0 and 1"
        )
        self.require(self.ratio_floor > 0, "ratio_floor must be above 0")
        self.require(self.ratio_clip >= 0, "ratio_clip must be 0 (none) or more")
        self.require(self.steps >= 1, "steps must be 1 or more")
        self.require(
            self.instruction is None or bool(self.instruction.strip()),
            "instruction must not be empty",
        )

    def resolve(self, anatomy: Anatomy) -> Method:
        from ..vlm.look import GENERAL, SHORT  # imports transformers

        values = VARIANTS[self.variant] | VERSIONS[self.version]
        values |= {"instruction": GENERAL, "suffix": SHORT}
        missing = {k: v for k, v in values.items() if getattr(self, k) is None}
        return replace(super().resolve(anatomy), **missing)

    def rewrite(self, vlm: VLM, chats: list[Chat]) -> list[Chat]:
        from ..vlm.look import Chain, Panel, followed, fractions, read_beside, the_image

        image = the_image(self, chats)
        if image is None:
            return chats
        if self.keep == 1:
            whole = {"crop": [0, 0, *image.size], "kept": 1.0}
            return [self._shown(chat, image, image, whole) for chat in chats]
        instruction, suffix = cast(str, self.instruction), cast(str, self.suffix)  # resolved
        limit = 1 if self.time == "start" else self.steps
        found, beside = read_beside(
            vlm, chats, self.layers, instruction, suffix, max_new_tokens=limit
        )
        general, box, new = beside.map(beside.weights), beside.box, []
        for chat, reading in zip(chats, found, strict=True):
            asked = reading.map(reading.weights)
            steps = min(len(asked), len(general))
            contrast = self.contrasted(asked, general)
            mask, counts = self.masked(contrast.numpy(), image.size, box)
            if followed(chat.text, suffix) == followed(instruction, suffix):
                mask[:], counts = False, [counts[0], 0]
            crop, picture = cut(image, mask)
            if picture is image:
                mask[:] = True
            panels = (
                Panel("attention to the general instruction", image, _mean(general), box),
                Panel("attention to the question", image, _mean(asked), box),
                Panel("contrast: question / general", image, contrast.numpy(), box),
                Panel("mask", dimmed(image, mask), frames=(fractions(crop, image.size),)),
                Panel("refined", picture),
            )
            notes = {
                "crop": list(crop),
                "kept": round(float(mask.mean()), 4),
                "regions": counts,
                "steps": steps,
                "chain": Chain(panels),
            }
            new.append(self._shown(chat, image, picture, notes))
        return new

    def _shown(
        self, chat: Chat, image: Image.Image, picture: Image.Image, notes: dict[str, Any]
    ) -> Chat:
        """The chat that is answered."""
        images = chat.images if picture is image else [picture]
        if self.final_input == "both":
            images = [image, picture]
        return replace(chat, images=images, notes={**chat.notes, **notes})

    def contrasted(self, asked: Tensor, general: Tensor) -> Tensor:
        """Ratios fused over steps and layers, S of section 4 on the token grid, (rows, cols).

        Args:
            asked, general: (steps, layers, rows, cols), attention to the image for the question
                and for the general instruction; as many steps count as both have.
        """
        if self.time != "end" or self.end == "common":
            steps = min(len(asked), len(general))
            asked, general = asked[:steps], general[:steps]
        if self.time != "full":
            step = slice(1) if self.time == "start" else slice(-1, None)
            asked, general = asked[step], general[step]
        ratio = asked / (general + self.ratio_floor)
        if self.ratio_clip:
            ratio = ratio.clamp(max=self.ratio_clip)
        weights = torch.arange(1, len(ratio) + 1, device=ratio.device, dtype=ratio.dtype)
        return torch.einsum("t,tlij->ij", weights, ratio)

    def masked(
        self, contrast: np.ndarray, size: tuple[int, int], box: Box
    ) -> tuple[np.ndarray, list[int]]:
        """The pixels that are kept, bool (height, width), and how many regions: found, kept.

        Args:
            contrast: (rows, cols), none negative. size: (width, height) of the image.
            box: what of the image the grid covers.
        """
        assert self.keep is not None  # all resolved
        assert self.smallest is not None
        mask = np.zeros((size[1], size[0]), bool)
        heat, (left, top) = resized(contrast, size, box)
        if not heat.size:
            return mask, [0, 0]
        level = float(heat.min()) * (1 + LEVEL)
        threshold = np.percentile(heat, 100 * (1 - self.keep))
        stands_out = threshold > level or self.keep == 1
        found = regions(heat >= threshold if stands_out else heat > level)
        areas, sums = found.areas(), found.sums(heat)
        large = np.flatnonzero(areas >= self.smallest * areas.sum())
        number = self.regions
        if self.rank == "all":
            number = len(large)
        elif number == "released":
            number = max(3, int(self.keep * len(large)))
        score = areas if self.rank == "area" else sums
        best = large[np.argsort(-score[large], kind="stable")[:number]]
        rows, columns = heat.shape
        mask[top : top + rows, left : left + columns] = found.mask(best)
        return mask, [found.count, len(best)]


def _mean(maps: Tensor) -> np.ndarray:
    return maps.mean((0, 1)).numpy()


def resized(
    heat: np.ndarray, size: tuple[int, int], box: Box = (0.0, 0.0, 1.0, 1.0)
) -> tuple[np.ndarray, tuple[int, int]]:
    """A map bilinearly on those pixels of the image that it covers.

    Pixels and cells are squares with their values in their middles, and the map goes on beyond its
    outermost middles with the same values, as in `torch.nn.functional.interpolate` with
    ``align_corners=False``; where the map has equal neighbours, so has the result.

    Args:
        heat: (rows, cols). size: (width, height) of the image. box: what of it the map covers.

    Returns:
        float32 (height, width) of the pixels whose middles lie in the box, and the (left, top) one.
    """
    heat = heat.astype(np.float32)
    left, low, high, part = _samples(size[0], heat.shape[1], box[0], box[2])
    heat = heat[:, low] + (heat[:, high] - heat[:, low]) * part
    top, low, high, part = _samples(size[1], heat.shape[0], box[1], box[3])
    fine = heat[high]
    fine -= heat[low]
    fine *= part[:, None]
    fine += heat[low]
    return fine, (left, top)


def _samples(
    pixels: int, cells: int, start: float, end: float
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels with their middles in start .. end: the first; two cells each; share of the second."""
    middles = (np.arange(pixels) + 0.5) / pixels
    inside = np.flatnonzero((middles >= start) & (middles < end))
    at = ((middles[inside] - start) / (end - start) * cells - 0.5).clip(0, cells - 1)
    low = at.astype(np.int64)
    first = int(inside[0]) if len(inside) else 0
    return first, low, np.minimum(low + 1, cells - 1), (at - low).astype(np.float32)


def cut(image: Image.Image, mask: np.ndarray) -> tuple[Pixels, Image.Image]:
    """The box of what is kept, in pixels, and what is in it, black elsewhere, magnified.

    The image itself where nothing is kept.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, *image.size), image
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    left, top, right, bottom = box
    part = Image.new(image.mode, (right - left, bottom - top))
    part.paste(image.crop(box), mask=_stencil(mask[top:bottom, left:right]))
    across, down = image.width / part.width, image.height / part.height
    scale = min(max(across, down), (LARGEST * across * down) ** 0.5)
    size = [max(1, round(side * scale)) for side in part.size]
    return box, part.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def dimmed(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """A small copy of the image, black where nothing is kept."""
    small = image.copy()
    small.thumbnail((SHOWN, SHOWN))
    black = Image.new(image.mode, small.size)
    black.paste(small, mask=_stencil(mask).resize(small.size))
    return black


def _stencil(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
