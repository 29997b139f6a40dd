"""What stands behind the things: six backgrounds, drawn for any part of the scene.

BACKGROUNDS                                             # their names
Viewport(box, pixels)                                   # which part, at what size
backdrop(name, shade, seed, viewport) -> PIL.Image      # RGB, pixels x pixels
"""

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .shapes import RGB, Box

# band colours from the top of the picture to its bottom, with their heights
BANDS: dict[str, list[tuple[float, RGB]]] = {
    "meadow": [(0, (150, 205, 240)), (0.58, (226, 242, 250)), (0.6, (176, 214, 138)),
               (1, (126, 182, 104))],
    "shore": [(0, (170, 220, 245)), (0.42, (232, 246, 250)), (0.43, (96, 178, 206)),
              (0.66, (142, 208, 216)), (0.68, (244, 226, 180)), (1, (230, 204, 150))],
    "room": [(0, (236, 224, 206)), (0.7, (224, 208, 188)), (0.705, (156, 122, 92)),
             (0.73, (188, 150, 114)), (1, (168, 130, 98))],
    "night": [(0, (24, 28, 62)), (0.7, (66, 62, 118)), (1, (104, 84, 138))],
    "paper": [(0, (250, 246, 232)), (1, (244, 236, 214))],
    "snow": [(0, (186, 206, 224)), (0.55, (232, 238, 244)), (0.57, (246, 249, 252)),
             (1, (222, 232, 242))],
}  # fmt: skip
BACKGROUNDS = tuple(BANDS)


class Viewport:
    """Maps scene coordinates to pixels of a square canvas that shows `box`."""

    def __init__(self, box: Box, pixels: int):
        self.box, self.pixels = box, pixels
        self.sx, self.sy = pixels / (box[2] - box[0]), pixels / (box[3] - box[1])

    def point(self, x: float, y: float) -> tuple[float, float]:
        return ((x - self.box[0]) * self.sx, (y - self.box[1]) * self.sy)


@lru_cache(maxsize=8)
def _gradient(name: str) -> Image.Image:
    bands = BANDS[name]
    at = np.linspace(0, 1, 1024)
    rows = [np.interp(at, [y for y, _ in bands], [c[i] for _, c in bands]) for i in range(3)]
    return Image.fromarray(np.stack(rows, 1).round().astype(np.uint8)[:, None])


def backdrop(name: str, shade: float, seed: int, viewport: Viewport) -> Image.Image:
    """The background called `name`; `shade` (0..1) tints it, `seed` places its details."""
    _, y0, _, y1 = viewport.box
    size = (viewport.pixels, viewport.pixels)
    canvas = _gradient(name).resize(
        size, Image.Resampling.BILINEAR, box=(0, y0 * 1024, 1, y1 * 1024)
    )
    tint = Image.new("RGB", size, (255, 214, 170) if shade < 0.5 else (170, 200, 255))
    canvas = Image.blend(canvas, tint, 0.3 * abs(shade - 0.5))
    pen, rng, point = ImageDraw.Draw(canvas), random.Random(seed), viewport.point
    width = max(1, round(0.003 * viewport.sx))

    def ellipse(cx: float, cy: float, rx: float, ry: float, fill: RGB) -> None:
        pen.ellipse((*point(cx - rx, cy - ry), *point(cx + rx, cy + ry)), fill=fill)

    def line(x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        pen.line([point(x0, y0), point(x1, y1)], fill, width)

    if name == "meadow":
        ellipse(rng.uniform(0, 0.4), 0.74, 0.5, 0.2, (160, 206, 126))
        ellipse(rng.uniform(0.6, 1), 0.78, 0.6, 0.22, (148, 198, 116))
    elif name == "shore":
        for _ in range(7):
            x, y = rng.uniform(0, 0.9), rng.uniform(0.46, 0.64)
            line(x, y, x + 0.08, y, (206, 236, 240))
    elif name == "room":
        for k in range(1, 8):
            line(k / 8, 0, k / 8, 0.7, (216, 202, 182))
    elif name == "night":
        for _ in range(40):
            ellipse(rng.random(), rng.random() * 0.8, 0.0025, 0.0025, (226, 226, 250))
    elif name == "paper":
        for k in range(1, 16):
            line(0, k / 16, 1, k / 16, (206, 220, 232))
            line(k / 16, 0, k / 16, 1, (226, 232, 232))
    else:
        ellipse(rng.uniform(0.1, 0.9), 0.72, 0.7, 0.2, (250, 252, 254))
        for _ in range(40):
            ellipse(rng.random(), rng.random(), 0.004, 0.004, (255, 255, 255))
    return canvas
