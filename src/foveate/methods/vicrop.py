"""ViCrop: find the window that the question makes the model look at, and show it (2502.17422).

Where a model looks for any question is divided out of where it looks for this one. A window slides
over the quotient; the picture inside the best one is cut out and shown beside the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from ..core import Method, costly
from ..core.visual import WHOLE, Box, Pixels

_FLAT = 1e-4  # a map is flat if its values differ by less than this share of the largest
_FINE = 2**40  # maps are scaled to integers up to this one, so that sums and ties are exact


@dataclass(frozen=True)
class ViCrop(Method):
    """Crop where the question makes the model look, and show the crop, too.

    Relative attention: the last prompt row's attention on the image, mean over the heads of one
    layer (and over `layers` where several are given), for the question, divided by the same for a
    general instruction. `window_search` turns the map into a square crop, which is shown after the
    whole image. The question is then asked as it came; the authors also keep `suffix` there, which
    here the benchmark decides.

    The two passes are plain and read the prompt only. All questions about an image share its
    prefix, and the general pass is kept for later ones. The prompt stays as it is where the window
    covers the whole image, as with small images, and where the map is flat, as for the general
    instruction itself (inferred; the authors would then show the same image twice, or its upper
    left corner). ``notes["crop"]`` is the crop in pixels.

    Attributes:
        window: side of the smallest window in pixels of the image, 2 or more. Published: the input
            side of the vision tower, 336 for LLaVA-1.5, and 224 for Qwen. BLIP, which the authors
            also crop for, has visual tokens without a place on the image and is refused.
        ratios: sides of the windows tried, in units of `window`: rising, each above 0. Published.
        final_input: "both" shows the image and the crop, as published; "crop" only the crop.
        instruction: of the general pass. None: the published "Write a general description of the
            image."
        suffix: follows question and instruction in both passes, unless they end with it. None:
            the published " Answer the question using a single word or phrase."
        layers: read, not edited. Published: 14 for LLaVA-1.5 and 22 for Qwen2.5-VL-3B; 14 for
            other models is inferred.
    """

    window: int | None = None
    ratios: tuple[float, ...] = costly((1.0, 1.2, 1.4, 1.6, 1.8, 2.0), limit=16)
    final_input: Literal["both", "crop"] = "both"
    instruction: str | None = costly(None, limit=300)
    suffix: str | None = costly(None, limit=300)

    name: ClassVar[str] = "vicrop"
    paper: ClassVar[str] = "2502.17422"
    paper_layers: ClassVar[tuple[int, ...]] = (14,)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"window": 336},
        "llava": {"layers": (14,)},
        "qwen": {"window": 224},
        "qwen2_5_vl": {"layers": (22,)},
    }
    looks_again: ClassVar[bool] = True
    passes: ClassVar[str] = "the prompt twice: question, and once per image a general instruction"
    example: ClassVar[dict[str, Any]] = {"window": 10}

    def check(self) -> None:
        self.require(self.window is None or self.window >= 2, "window must be 2 pixels or more")
        self.require(
            bool(self.ratios) and self.ratios[0] > 0 and list(self.ratios) == sorted(self.ratios),
            "ratios must be positive and rise",
        )
        self.require(
            self.instruction is None or bool(self.instruction.strip()),
            "instruction must not be empty",
        )

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        from ..vlm.look import read_with_general, the_image

        image = the_image(self, chats)
        if image is None:
            return chats
        readings, general = read_with_general(
            vlm, chats, self.layers, self.instruction, self.suffix
        )
        crops: dict[Pixels, Image.Image] = {}  # one picture for equal crops: they share its prefix
        return [
            self._look_again(chat, image, reading, general, crops)
            for chat, reading in zip(chats, readings, strict=True)
        ]

    def _look_again(
        self,
        chat: Any,
        image: Image.Image,
        reading: Any,
        general: Any,
        crops: dict[Pixels, Image.Image],
    ) -> Any:
        """The chat with the crop that its question's reading points at."""
        from ..vlm.look import Chain, Panel, fractions

        asked, described = (
            one.map(one.weights[0].mean(0)).double().numpy() for one in (reading, general)
        )
        relative, box = asked / described.clip(min=np.finfo(np.float32).tiny), general.box
        crop = whole = (0, 0, *image.size)
        if np.ptp(relative) > _FLAT * relative.max():
            assert self.window is not None  # resolved
            crop = window_search(relative, image.size, self.window, self.ratios, box)
        images, contrast = chat.images, chat.contrast
        if crop != whole:
            piece = crops.setdefault(crop, image.crop(crop))
            images = self._shown(image, piece)
            if isinstance(contrast, list):
                contrast = self._shown(contrast[0], contrast[0].crop(crop))

        def draw() -> list[Panel]:
            frame = fractions(crop, image.size)
            panels = [
                Panel("attention to the general instruction", image, described, box),
                Panel("attention to the question", image, asked, box),
                Panel("question / general", image, relative, box, (frame,)),
            ]
            return panels if crop == whole else [*panels, Panel("crop", images[-1])]

        notes = {**chat.notes, "crop": list(crop), "chain": Chain(draw)}
        return replace(chat, images=images, contrast=contrast, notes=notes)

    def _shown(self, image: Image.Image, crop: Image.Image) -> list[Image.Image]:
        return [image, crop] if self.final_input == "both" else [crop]


def window_search(
    heat: np.ndarray,
    size: tuple[int, int],
    window: int,
    ratios: Sequence[float],
    box: Box = WHOLE,
) -> Pixels:
    """The square crop around the sharpest window of a map, as the authors' code finds it.

    For each ratio a window of ``int(window * ratio / cell)`` cells, at most the map, slides over
    it; where its sum is largest (the first such place, columns before rows), its score is the sum
    minus the mean of the up to four windows one cell away, per cell. The best score wins, the
    smaller window on a tie. The crop has ``window * ratio`` pixels to a side, less where the image
    has less, is centred on the window and shifted into the image. Windows that cover the whole map
    do not compete; if even the smallest does, the crop is the whole image.

    Cells of the map that lie on padding beside the image take no part, and a cell larger than the
    window counts as one cell (both inferred: the authors' maps cover the whole image).

    Args:
        heat: (rows, cols), none negative.
        size: (width, height) of the image in pixels.
        window: pixels.
        box: what of the image the map covers, as fractions.
    """
    heat, box = _on_image(heat, box)
    rows, cols = heat.shape
    width = (box[2] - box[0]) * size[0] / cols  # of a cell
    height = (box[3] - box[1]) * size[1] / rows
    whole = np.rint(heat * (_FINE / max(heat.max(), 1e-300))).astype(np.int64)
    summed = np.pad(whole.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    best, crop = -np.inf, (0, 0, *size)
    for ratio in ratios:
        side = window * ratio
        across, down = max(1, min(int(side / width), cols)), max(1, min(int(side / height), rows))
        if (across, down) == (cols, rows):
            break
        sums = summed[down:] - summed[:-down]
        sums = sums[:, across:] - sums[:, :-across]
        x, y = divmod(int(sums.T.argmax()), len(sums))
        beside = [
            sums[v, u]
            for u, v in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1))
            if 0 <= u < sums.shape[1] and 0 <= v < len(sums)
        ]
        score = (sums[y, x] - np.mean(beside)) / (across * down)
        if score > best:
            best = score
            centre = (
                int(box[0] * size[0] + x * width + width * across / 2),
                int(box[1] * size[1] + y * height + height * down / 2),
            )
            crop = square(centre, int(side // 2), size)
    return crop


def _on_image(heat: np.ndarray, box: Box) -> tuple[np.ndarray, Box]:
    """The cells of a map that touch the image, and what these cover."""
    spans = []
    for cells, low, high in ((heat.shape[1], box[0], box[2]), (heat.shape[0], box[1], box[3])):
        edges = np.linspace(low, high, cells + 1)
        touch = np.flatnonzero((edges[1:] > 1e-6) & (edges[:-1] < 1 - 1e-6))
        start, stop = int(touch[0]), int(touch[-1]) + 1
        spans.append((slice(start, stop), float(edges[start]), float(edges[stop])))
    (across, left, right), (down, top, bottom) = spans
    return heat[down, across], (left, top, right, bottom)


def square(centre: tuple[int, int], half: int, size: tuple[int, int]) -> Pixels:
    """The square of 2 x `half` pixels around a point, shifted and clipped into the image."""
    ends = []
    for middle, limit in zip(centre, size, strict=True):
        middle = min(max(middle, half), limit - half)
        ends.append((max(0, middle - half), min(limit, middle + half)))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom
