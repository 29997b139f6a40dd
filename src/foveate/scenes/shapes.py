"""How things are drawn: a pen, and the strokes of every kind (shapes.json).

SHAPES[kind]                                            # "strokes", and "plate": where print stands
Pen(width, height, margin, color, paint).draw(strokes)  # onto the paint and a mask
texture(color, pattern, period) -> PIL.Image            # plain, striped or dotted paint

A stroke is [its name, its points or box, its options], in the unit box of the thing (0..1). Tone
"body" shows the thing's paint, "hole" takes away from the mask, any other is flat.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]
RGB = tuple[int, int, int]
Stroke = list[Any]
SHAPES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text("utf-8")
)


class Pen:
    """Draws one thing, width x height pixels, on a tile with a margin around it."""

    def __init__(self, width: int, height: int, margin: int, color: RGB, paint: Image.Image):
        self.w, self.h, self.margin = width, height, margin
        self.mask = Image.new("L", paint.size)
        self.on_tile, self.on_mask = ImageDraw.Draw(paint), ImageDraw.Draw(self.mask)
        self.tones: dict[str, RGB] = {
            "dark": mix(color, (20, 20, 40), 0.45),
            "light": mix(color, (255, 255, 255), 0.62),
            "white": (250, 250, 246),
            "ink": (52, 48, 60),
            "wood": (120, 84, 54),
            "leaf": (74, 142, 70),
            "gold": (250, 214, 90),
        }

    def draw(self, strokes: list[Stroke]) -> None:
        for name, points, *options in strokes:
            self.stroke(name, points, **dict(*options))

    def stroke(
        self,
        name: str,
        points: list[Any],
        tone: str = "",
        width: float = 0,
        radius: float = 0,
        start: float = 0,
        end: float = 0,
    ) -> None:
        """Draw one stroke.

        Args:
            points: (x, y) of a polygon or line; else the box (x0, y0, x1, y1).
            tone: lines and arcs are "ink" unless told, areas "body".
            width, radius: of a line or arc and of a rectangle's corners; 1 = the shorter side.
            start, end: degrees of an arc or slice, clockwise from the right.
        """
        shorter = min(self.w, self.h)
        pixels = max(1, round(width * shorter))
        pairs = points if name in ("polygon", "line") else (points[:2], points[2:])
        at = [(self.margin + x * self.w, self.margin + y * self.h) for x, y in pairs]
        tone = tone or ("ink" if width else "body")
        targets: list[tuple[ImageDraw.ImageDraw, RGB | int]]
        targets = [(self.on_mask, 0 if tone == "hole" else 255)]
        if tone in self.tones:
            targets.append((self.on_tile, self.tones[tone]))
        for pen, fill in targets:
            if name == "polygon":
                pen.polygon(at, fill)
            elif name == "ellipse":
                pen.ellipse(at, fill)
            elif name == "rectangle":
                pen.rounded_rectangle(at, radius * shorter, fill)
            elif name == "line":
                pen.line(at, fill, pixels, joint="curve")
            elif name == "slice":
                pen.pieslice(at, start, end, fill)
            else:
                pen.arc(at, start, end, fill, pixels)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    r, g, bl = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return (r, g, bl)


@lru_cache(maxsize=64)
def texture(base: RGB, pattern: str, period: int) -> Image.Image:
    """A square of paint, larger than any thing; stripes and dots have a fixed scene period."""
    other = mix(base, (255, 255, 255), 0.75)
    if pattern == "plain":
        return Image.new("RGB", (period, period), base)
    cell = Image.new("RGB", (4 * period, 4 * period), base)
    pen = ImageDraw.Draw(cell)
    if pattern == "striped":
        for k in range(-4, 8):
            a = k * period
            pen.polygon([(a, 0), (a + period * 0.45, 0), (a + period * 4.45, 4 * period),
                         (a + 4 * period, 4 * period)], fill=other)  # fmt: skip
    else:
        radius = period * 0.26
        for i in range(5):
            for j in range(5):
                x, y = (i + 0.5 * (j % 2)) * period, j * period
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=other)
    return cell
