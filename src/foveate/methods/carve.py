"""CARVE: contrast two looks at the picture, and show what only the question looks at (2509.06461).

Where a model looks is partly its question and partly the picture's clutter. What it looks at when
asked for a general description is the clutter alone, so dividing one by the other leaves what the
question is about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core import Anatomy, Method, costly
from ..core.visual import Box, Pixels

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
LEVEL = 1e-4  # contrasts that exceed the least one by less than this share tie with it
LARGEST = 4  # times the original's pixels that a magnified crop may have


@dataclass(frozen=True)
class CARVE(Method):
    """Contrastive attention: crop to what the question looks at and a general description does not.

    Two plain passes read the last query row's attention to the image, mean over heads, at every
    generated token: one with the question, one with a general instruction (once per image).

    * (4.6) their ratio, on the token grid; summed over layers and steps it is the contrast S, which
      is resized bilinearly to the image (half-pixel centres, inferred).
    * Mask M: of the pixels with the largest S the best 4-connected regions.
    * Extract Phi: all other pixels become black, and the regions' bounding box is magnified by
      ``max(W / w, H / h)`` (LANCZOS). The original text is asked about this picture.

    What the paper leaves open: pixels that the model does not see (a centre crop) are never kept.
    Where the threshold ties with the map's least value, only strictly larger pixels are kept. Where
    nothing is kept, and where the question is the general instruction, the whole image is asked
    about. A crop is magnified to at most four times the original's pixels.

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
        regions: how many are kept, 1 or more: the paper's best is 2. "released" is the authors'
            code, ``max(3, int(keep * n))`` of n.
        keep: share p of pixels above the threshold, above 0, up to 1. 0.4 is the best of the
            paper's Fig. 7, 0.2 is in the authors' code.
        time: "full": all steps that both passes have, the t-th weighted with t; "start", "end":
            the first, the last of them.
        rank: regions are kept by their sum of "attention" (the contrast), by "area", or "all" are.
        smallest: regions with a smaller share of the kept pixels, 0 to 1, are dropped before the
            ranking; 0.001 in version v1 of the authors' code.
        ratio_floor: lambda of eq. (4.6), above 0, added to the general attention. Authors' code:
            1e-8.
        steps: the most tokens of a reading pass, 1 or more. Authors' code: 32.
        instruction: the general instruction. None: the published "Write a general description of
            the image."
        suffix: appended to question and instruction in the reading passes, but to no text that
            ends with it. None: " Answer the question using a single word or phrase.", which is in
            the authors' code.
        layers: those that are read. Published for all models: 20 to 25.
    """

    variant: Literal["paper", "released"] = "paper"
    version: Literal["v1", "v2", "v3", "v4"] = "v4"
    final_input: Literal["refined", "both"] | None = None
    regions: int | Literal["released"] | None = None
    keep: float | None = None
    time: Literal["full", "start", "end"] | None = None
    rank: Literal["attention", "area", "all"] | None = None
    smallest: float | None = None
    ratio_floor: float = 1e-8
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
        self.require(self.steps >= 1, "steps must be 1 or more")
        self.require(
            self.instruction is None or bool(self.instruction.strip()),
            "instruction must not be empty",
        )

    def resolve(self, anatomy: Anatomy) -> Method:
        preset = VARIANTS[self.variant] | VERSIONS[self.version]
        missing = {k: v for k, v in preset.items() if getattr(self, k) is None}
        return replace(super().resolve(anatomy), **missing)

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        from ..vlm.look import read_with_general, the_image

        image = the_image(self, chats)
        if image is None:
            return chats
        if self.keep == 1:
            whole = {"crop": [0, 0, *image.size], "kept": 1.0}
            return [self._shown(chat, image, image, whole) for chat in chats]
        readings, general = read_with_general(
            vlm, chats, self.layers, self.instruction, self.suffix,
            max_new_tokens=1 if self.time == "start" else self.steps,
        )  # fmt: skip
        return [
            self._look_again(chat, image, reading, general)
            for chat, reading in zip(chats, readings, strict=True)
        ]

    def _look_again(self, chat: Any, image: Image.Image, reading: Any, general: Any) -> Any:
        """The chat about what its question's reading has more of than the general one."""
        from ..vlm.look import Chain, Panel, fractions

        a_q, a_g, box = reading.map(reading.weights), general.map(general.weights), general.box
        contrast, steps = self.contrast_map(a_q, a_g), min(len(a_q), len(a_g))
        mask, counts = self.mask(contrast, image.size, box)
        if reading.answer.chat.text == general.answer.chat.text:
            mask[:], counts = False, [counts[0], 0]
        crop, picture = extract(image, mask)
        means = [maps.mean((0, 1)).numpy() for maps in (a_g, a_q)]

        def draw() -> list[Panel]:
            kept = image
            if picture is not image:
                kept = blackened(image, self.mask(contrast, image.size, box)[0])
            return [
                Panel("attention to the general instruction", image, means[0], box),
                Panel("attention to the question", image, means[1], box),
                Panel("contrast: question / general", image, contrast.numpy(), box),
                Panel("mask", kept, frames=(fractions(crop, image.size),)),
                Panel("refined", picture),
            ]

        notes = {
            "crop": list(crop),
            "kept": 1.0 if picture is image else round(float(mask.mean()), 4),
            "regions": counts,
            "steps": steps,
            "chain": Chain(draw),
        }
        return self._shown(chat, image, picture, notes)

    def _shown(
        self, chat: Any, image: Image.Image, picture: Image.Image, notes: dict[str, Any]
    ) -> Any:
        """The chat that is answered."""
        images = chat.images if picture is image else [picture]
        if self.final_input == "both":
            images = [image, picture]
        return replace(chat, images=images, notes={**chat.notes, **notes})

    def contrast_map(self, a_q: Tensor, a_g: Tensor) -> Tensor:
        """The contrast S on the token grid, (rows, cols).

        Args:
            a_q, a_g: (steps, layers, rows, cols), attention to the image for the question and for
                the general instruction; as many steps count as both have.
        """
        steps = slice(min(len(a_q), len(a_g)))
        a_q, a_g = a_q[steps], a_g[steps]
        if self.time != "full":
            only = slice(1) if self.time == "start" else slice(-1, None)
            a_q, a_g = a_q[only], a_g[only]
        ratio = a_q / (a_g + self.ratio_floor)  # (4.6)
        w = torch.arange(1, len(ratio) + 1, dtype=ratio.dtype)  # w_t = t - t_start + 1
        return torch.einsum("t,tlij->ij", w, ratio)  # S = sum_t w_t sum_l ratio

    def mask(
        self, contrast: Tensor, size: tuple[int, int], box: Box
    ) -> tuple[np.ndarray, list[int]]:
        """M, the pixels that are kept, bool (height, width), and how many regions: found, kept.

        Args:
            contrast: (rows, cols), none negative. size: (width, height) of the image.
            box: what of the image the grid covers.
        """
        from scipy import ndimage

        assert self.keep is not None  # all resolved
        assert self.smallest is not None
        mask = np.zeros((size[1], size[0]), bool)
        s, (left, top) = on_pixels(contrast, size, box)
        if not s.size:
            return mask, [0, 0]
        level = float(s.min()) * (1 + LEVEL)
        threshold = np.percentile(s, 100 * (1 - self.keep))  # keeps the share p of pixels
        stands_out = threshold > level or self.keep == 1
        labels, count = ndimage.label(s >= threshold if stands_out else s > level)  # 4-connected
        kept = labels > 0
        numbers = labels[kept].astype(np.intp) - 1
        areas = np.bincount(numbers, minlength=count)
        sums = np.bincount(numbers, s[kept], count)
        large = np.flatnonzero(areas >= self.smallest * len(numbers))
        most: Any = self.regions
        if self.rank == "all":
            most = len(large)
        elif most == "released":
            most = max(3, int(self.keep * len(large)))
        score = areas if self.rank == "area" else sums
        best = large[np.argsort(-score[large], kind="stable")[:most]]
        chosen = np.zeros(count + 1, bool)
        chosen[best + 1] = True
        rows, columns = s.shape
        mask[top : top + rows, left : left + columns] = chosen[labels]
        return mask, [count, len(best)]


def on_pixels(
    contrast: Tensor, size: tuple[int, int], box: Box
) -> tuple[np.ndarray, tuple[int, int]]:
    """A map bilinearly on those pixels of the image that it covers.

    With ``box=WHOLE`` this is `torch.nn.functional.interpolate`, which cannot begin between two
    pixels, as most maps of tiled models do.

    Args:
        contrast: (rows, cols). size: (width, height) of the image.
        box: what of the image the map covers; beyond it where the image was padded.

    Returns:
        float32 (height, width) of the pixels whose middles lie in the box, and the (left, top) one.
    """
    starts, weights = [], []
    for side, cells, low, high in zip(size, contrast.T.shape, box[:2], box[2:], strict=True):
        middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        inside = (middles >= low) & (middles < high)
        at = ((middles[inside] - low) / (high - low) * cells - 0.5).clamp(0, cells - 1)
        weights.append((1 - (at[:, None] - torch.arange(cells)).abs()).clamp(min=0).float())
        starts.append(int(inside.int().argmax()))
    across, down = weights
    return (down @ contrast.float() @ across.T).numpy(), (starts[0], starts[1])


def extract(image: Image.Image, mask: np.ndarray) -> tuple[Pixels, Image.Image]:
    """Phi: the box of what is kept, in pixels, and what is in it, black elsewhere, magnified.

    The image itself where nothing is kept.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, *image.size), image
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    part = blackened(image, mask).crop(box)
    across, down = image.width / part.width, image.height / part.height
    scale = min(max(across, down), (LARGEST * across * down) ** 0.5)
    size = [max(1, round(side * scale)) for side in part.size]
    return box, part.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def blackened(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """A copy of the image, black where nothing is kept."""
    black = Image.new(image.mode, image.size)
    black.paste(image, mask=Image.fromarray(mask))
    return black
