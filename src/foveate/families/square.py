"""One square grid per image: LLaVA-1.5 and its like, PaliGemma, Gemma 3 as a whole, Janus.

What of the image the grid covers is the image processor's doing: the whole image squeezed to a
square, its centre (CLIP's crop), or a square around it (LLaVA's padding). Without the image's size
or the processor the whole image is assumed.
"""

from __future__ import annotations

import math
from typing import Any

from .layout import WHOLE, Box, Grid, Picture

serves = ("llava", "vipllava", "paligemma", "gemma3", "janus")


def grid(picture: Picture) -> tuple[list[Grid], int] | None:
    """One grid; None for Gemma 3 with pan-and-scan where the image's size is not known."""
    if picture.size is None and getattr(picture.processor, "do_pan_and_scan", False):
        return None
    vision = picture.config.vision_config
    pooled = getattr(picture.config, "mm_tokens_per_image", None)  # Gemma 3
    side = math.isqrt(pooled) if pooled else vision.image_size // vision.patch_size
    box = WHOLE if picture.size is None else covered(picture.processor, picture.size)
    return [Grid(side, side, box=box)], side * side


def covered(processor: Any, size: tuple[int, int]) -> Box:
    """What of an image of (width, height) pixels an image processor leaves, in fractions of it."""

    def option(name: str) -> Any:
        return getattr(processor, name, None)

    frame = letterbox(size) if option("do_pad") else WHOLE
    if not option("do_center_crop"):
        return frame
    width, height = (max(size), max(size)) if option("do_pad") else size
    resize, crop = option("size") or {}, option("crop_size")
    if option("do_resize") and resize.get("shortest_edge"):
        edge, short = resize["shortest_edge"], min(width, height)
        width, height = (
            edge if side == short else int(edge * side / short) for side in (width, height)
        )
    elif option("do_resize") and resize.get("height"):
        width, height = resize["width"], resize["height"]
    left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
    across, down = (frame[2] - frame[0]) / width, (frame[3] - frame[1]) / height
    return (
        frame[0] + left * across,
        frame[1] + top * down,
        frame[0] + (left + crop["width"]) * across,
        frame[1] + (top + crop["height"]) * down,
    )


def letterbox(size: tuple[int, int]) -> Box:
    """The square around an image of (width, height) pixels, padded on both sides alike."""
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    return (-left / width, -top / height, (side - left) / width, (side - top) / height)
