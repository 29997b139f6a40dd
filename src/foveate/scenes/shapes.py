"""How each kind of thing is drawn: a function per kind, in its unit box, with a pen of few strokes.

SHAPES[kind](Pen(width, height, margin, color, paint))   # draws onto the paint and a mask
PLATES[kind] -> (x, y)                                   # where its print stands
texture(color, pattern, period) -> PIL.Image             # plain, striped or dotted paint
"""

import math
from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]
RGB = tuple[int, int, int]


class Pen:
    """Draws one kind in its unit box (0..1): `body` takes the thing's paint, the rest is flat."""

    def __init__(self, width: int, height: int, margin: int, color: RGB, paint: Image.Image):
        self.w, self.h, self.margin = width, height, margin
        self.tile, self.mask = paint, Image.new("L", paint.size)
        self._tile, self._mask = ImageDraw.Draw(self.tile), ImageDraw.Draw(self.mask)
        self.tones: dict[str, RGB] = {
            "dark": mix(color, (20, 20, 40), 0.45),
            "light": mix(color, (255, 255, 255), 0.62),
            "white": (250, 250, 246),
            "ink": (52, 48, 60),
            "wood": (120, 84, 54),
            "leaf": (74, 142, 70),
            "gold": (250, 214, 90),
        }

    def _points(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        m = self.margin
        return [(m + x * self.w, m + y * self.h) for x, y in points]

    def _ops(self, tone: str) -> list[tuple[ImageDraw.ImageDraw, RGB | int]]:
        if tone == "hole":
            return [(self._mask, 0)]
        ops: list[tuple[ImageDraw.ImageDraw, RGB | int]] = [(self._mask, 255)]
        return ops if tone == "body" else [*ops, (self._tile, self.tones[tone])]

    def polygon(self, points: list[tuple[float, float]], tone: str = "body") -> None:
        for pen, fill in self._ops(tone):
            pen.polygon(self._points(points), fill=fill)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, tone: str = "body") -> None:
        for pen, fill in self._ops(tone):
            pen.ellipse(self._points([(x0, y0), (x1, y1)]), fill=fill)

    def slice(
        self, box: Box, start: float, end: float, tone: str = "body"
    ) -> None:  # degrees, clockwise from the right
        for pen, fill in self._ops(tone):
            corners = self._points([(box[0], box[1]), (box[2], box[3])])
            pen.pieslice([*corners[0], *corners[1]], start, end, fill=fill)

    def rectangle(
        self, x0: float, y0: float, x1: float, y1: float, tone: str = "body", radius: float = 0
    ) -> None:
        for pen, fill in self._ops(tone):
            pen.rounded_rectangle(
                self._points([(x0, y0), (x1, y1)]), radius * min(self.w, self.h), fill=fill
            )

    def line(self, points: list[tuple[float, float]], width: float, tone: str = "ink") -> None:
        pixels = max(1, round(width * min(self.w, self.h)))
        for pen, fill in self._ops(tone):
            pen.line(self._points(points), fill=fill, width=pixels, joint="curve")

    def arc(self, box: Box, start: float, end: float, width: float, tone: str = "ink") -> None:
        pixels = max(1, round(width * min(self.w, self.h)))
        corners = self._points([(box[0], box[1]), (box[2], box[3])])
        for pen, fill in self._ops(tone):
            pen.arc([*corners[0], *corners[1]], start, end, fill=fill, width=pixels)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    r, g, bl = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return (r, g, bl)


def _spokes(n: int, outer: float, inner: float, turn: float = -90) -> list[tuple[float, float]]:
    points = []
    for i in range(2 * n):
        angle = math.radians(turn + 180 * i / n)
        radius = outer if i % 2 == 0 else inner
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return points


def _sun(p: Pen) -> None:
    p.polygon(_spokes(12, 0.5, 0.34))
    p.arc((0.22, 0.22, 0.78, 0.78), 0, 360, 0.03, "dark")
    p.ellipse(0.37, 0.38, 0.43, 0.46, "ink")
    p.ellipse(0.57, 0.38, 0.63, 0.46, "ink")
    p.arc((0.36, 0.36, 0.64, 0.64), 30, 150, 0.03)


def _cloud(p: Pen) -> None:
    p.ellipse(0.0, 0.42, 0.38, 1.0)
    p.ellipse(0.6, 0.36, 1.0, 1.0)
    p.ellipse(0.16, 0.1, 0.56, 0.82)
    p.ellipse(0.38, 0.0, 0.82, 0.78)
    p.rectangle(0.18, 0.6, 0.8, 1.0, radius=0.1)
    p.arc((0.2, 0.18, 0.5, 0.74), 190, 280, 0.04, "light")


def _tree(p: Pen) -> None:
    p.rectangle(0.42, 0.78, 0.58, 1.0, "wood")
    p.polygon([(0.5, 0.3), (1.0, 0.84), (0.0, 0.84)])
    p.polygon([(0.5, 0.14), (0.9, 0.6), (0.1, 0.6)])
    p.polygon([(0.5, 0.0), (0.8, 0.36), (0.2, 0.36)])
    p.line([(0.22, 0.6), (0.78, 0.6)], 0.03, "dark")
    p.line([(0.3, 0.36), (0.7, 0.36)], 0.03, "dark")


def _house(p: Pen) -> None:
    p.rectangle(0.7, 0.05, 0.82, 0.4, "wood")
    p.rectangle(0.1, 0.42, 0.9, 1.0)
    p.polygon([(0.5, 0.0), (1.0, 0.46), (0.0, 0.46)], "dark")
    p.rectangle(0.18, 0.66, 0.38, 1.0, "wood", 0.03)
    p.ellipse(0.32, 0.82, 0.36, 0.86, "gold")
    p.rectangle(0.56, 0.55, 0.8, 0.78, "white", 0.02)
    p.line([(0.68, 0.55), (0.68, 0.78)], 0.025)
    p.line([(0.56, 0.665), (0.8, 0.665)], 0.025)


def _flower(p: Pen) -> None:
    p.line([(0.5, 0.5), (0.5, 1.0)], 0.09, "leaf")
    p.ellipse(0.08, 0.76, 0.5, 0.92, "leaf")
    p.ellipse(0.5, 0.68, 0.92, 0.84, "leaf")
    for i in range(6):
        a = math.radians(60 * i - 90)
        x, y = 0.5 + 0.3 * math.cos(a), 0.36 + 0.225 * math.sin(a)
        p.ellipse(x - 0.2, y - 0.15, x + 0.2, y + 0.15)
    p.ellipse(0.32, 0.225, 0.68, 0.495, "gold")


def _car(p: Pen) -> None:
    p.rectangle(0.0, 0.42, 1.0, 0.84, radius=0.16)
    p.polygon([(0.18, 0.46), (0.32, 0.0), (0.72, 0.0), (0.86, 0.46)])
    p.polygon([(0.27, 0.42), (0.36, 0.1), (0.5, 0.1), (0.5, 0.42)], "white")
    p.polygon([(0.54, 0.42), (0.54, 0.1), (0.68, 0.1), (0.77, 0.42)], "white")
    for x in (0.24, 0.76):
        p.ellipse(x - 0.13, 0.56, x + 0.13, 1.0, "ink")
        p.ellipse(x - 0.06, 0.68, x + 0.06, 0.88, "white")
    p.ellipse(0.93, 0.5, 0.99, 0.62, "gold")


def _boat(p: Pen) -> None:
    p.line([(0.48, 0.0), (0.48, 0.75)], 0.05, "wood")
    p.polygon([(0.53, 0.02), (0.96, 0.62), (0.53, 0.62)])
    p.polygon([(0.43, 0.12), (0.43, 0.62), (0.08, 0.62)], "white")
    p.polygon([(0.0, 0.7), (1.0, 0.7), (0.82, 1.0), (0.18, 1.0)])
    p.line([(0.03, 0.74), (0.97, 0.74)], 0.04, "dark")


def _fish(p: Pen) -> None:
    p.polygon([(0.7, 0.5), (1.0, 0.08), (0.93, 0.5), (1.0, 0.92)])
    p.polygon([(0.3, 0.2), (0.5, 0.0), (0.62, 0.3)])
    p.polygon([(0.36, 0.8), (0.5, 1.0), (0.58, 0.72)])
    p.ellipse(0.0, 0.12, 0.8, 0.88)
    p.ellipse(0.12, 0.32, 0.22, 0.48, "white")
    p.ellipse(0.145, 0.36, 0.2, 0.45, "ink")
    p.arc((0.12, 0.18, 0.34, 0.82), -60, 60, 0.04, "dark")


def _umbrella(p: Pen) -> None:
    p.line([(0.5, 0.05), (0.5, 0.9)], 0.05, "wood")
    p.arc((0.48, 0.8, 0.7, 1.0), 0, 180, 0.05, "wood")
    p.line([(0.5, 0.0), (0.5, 0.1)], 0.05, "ink")
    p.slice((0.0, 0.05, 1.0, 1.07), 180, 360)
    for i in range(4):
        p.ellipse(0.25 * i, 0.48, 0.25 * i + 0.25, 0.64, "hole")
    p.line([(0.505, 0.5), (0.505, 0.66)], 0.05, "wood")
    for x in (0.25, 0.5, 0.75):
        p.line([(0.5, 0.08), (x, 0.55)], 0.02, "dark")


def _ball(p: Pen) -> None:
    p.ellipse(0.0, 0.0, 1.0, 1.0)
    p.arc((-0.62, 0.0, 0.36, 1.0), -50, 50, 0.06, "white")
    p.arc((0.64, 0.0, 1.62, 1.0), 130, 230, 0.06, "white")
    p.ellipse(0.6, 0.1, 0.74, 0.22, "white")


def _star(p: Pen) -> None:
    points = _spokes(5, 0.525, 0.23)
    low = max(y for _, y in points)
    p.polygon([(x, (y + 0.025) / (low + 0.025)) for x, y in points])


def _kite(p: Pen) -> None:
    p.line([(0.5, 0.68), (0.34, 0.78), (0.6, 0.88), (0.42, 1.0)], 0.05, "ink")
    for x, y in ((0.36, 0.79), (0.58, 0.88)):
        p.polygon([(x - 0.12, y - 0.04), (x + 0.12, y + 0.04), (x + 0.12, y - 0.04),
                   (x - 0.12, y + 0.04)], "dark")  # fmt: skip
    p.polygon([(0.5, 0.0), (1.0, 0.3), (0.5, 0.72), (0.0, 0.3)])
    p.line([(0.5, 0.02), (0.5, 0.7)], 0.035, "dark")
    p.line([(0.03, 0.3), (0.97, 0.3)], 0.035, "dark")


def _cup(p: Pen) -> None:
    p.arc((0.58, 0.25, 1.0, 0.78), 0, 360, 0.12, "body")
    p.rectangle(0.0, 0.1, 0.78, 0.6)
    p.slice((0.0, 0.18, 0.78, 1.0), 0, 180)
    p.rectangle(0.16, 0.7, 0.62, 1.0, radius=0.08)
    p.ellipse(0.0, 0.0, 0.78, 0.2, "light")
    p.ellipse(0.08, 0.05, 0.7, 0.17, "dark")


def _clock(p: Pen) -> None:
    p.line([(0.24, 0.85), (0.16, 1.0)], 0.09, "ink")
    p.line([(0.76, 0.85), (0.84, 1.0)], 0.09, "ink")
    p.slice((0.08, 0.0, 0.42, 0.3), 130, 330, "dark")
    p.slice((0.58, 0.0, 0.92, 0.3), 210, 410, "dark")
    p.ellipse(0.0, 0.06, 1.0, 0.96)
    p.ellipse(0.2, 0.24, 0.8, 0.78, "white")
    for i in range(12):
        a = math.radians(30 * i)
        c, s = math.cos(a), math.sin(a)
        p.line([(0.5 + 0.23 * c, 0.51 + 0.21 * s), (0.5 + 0.27 * c, 0.51 + 0.245 * s)], 0.03)
    p.line([(0.5, 0.51), (0.5, 0.32)], 0.05)
    p.line([(0.5, 0.51), (0.64, 0.56)], 0.05)


def _book(p: Pen) -> None:
    p.rectangle(0.0, 0.0, 1.0, 1.0, radius=0.05)
    p.rectangle(0.0, 0.0, 0.16, 1.0, "dark", 0.05)
    p.rectangle(0.16, 0.9, 1.0, 0.97, "white")
    p.rectangle(0.93, 0.04, 0.97, 0.97, "white")
    p.line([(0.34, 0.16), (0.8, 0.16)], 0.06, "dark")
    p.line([(0.4, 0.26), (0.74, 0.26)], 0.04, "dark")


def _lamp(p: Pen) -> None:
    p.line([(0.5, 0.5), (0.5, 0.95)], 0.1, "ink")
    p.line([(0.74, 0.5), (0.74, 0.66)], 0.03, "ink")
    p.ellipse(0.7, 0.65, 0.78, 0.7, "gold")
    p.polygon([(0.28, 0.0), (0.72, 0.0), (1.0, 0.56), (0.0, 0.56)])
    p.line([(0.02, 0.54), (0.98, 0.54)], 0.05, "dark")
    p.ellipse(0.2, 0.88, 0.8, 1.0, "dark")


def _hat(p: Pen) -> None:
    p.ellipse(0.0, 0.68, 1.0, 1.0)
    p.polygon([(0.18, 0.06), (0.82, 0.06), (0.76, 0.84), (0.24, 0.84)])
    p.ellipse(0.18, 0.0, 0.82, 0.14, "light")
    p.polygon([(0.218, 0.58), (0.782, 0.58), (0.765, 0.78), (0.235, 0.78)], "dark")


def _key(p: Pen) -> None:
    p.rectangle(0.4, 0.42, 1.0, 0.6)
    p.rectangle(0.72, 0.5, 0.8, 0.86)
    p.rectangle(0.9, 0.5, 1.0, 0.94)
    p.ellipse(0.0, 0.0, 0.53, 1.0)
    p.ellipse(0.07, 0.36, 0.2, 0.64, "hole")


SHAPES: dict[str, Callable[[Pen], None]] = {
    "sun": _sun, "tree": _tree, "house": _house, "flower": _flower, "cloud": _cloud, "car": _car,
    "boat": _boat, "fish": _fish, "umbrella": _umbrella, "ball": _ball, "star": _star,
    "kite": _kite, "cup": _cup, "clock": _clock, "book": _book, "lamp": _lamp, "hat": _hat,
    "key": _key,
}  # fmt: skip
# where the printed plate stands in the unit box
PLATES = {
    "tree": (0.5, 0.7), "house": (0.5, 0.24), "flower": (0.5, 0.36), "cloud": (0.55, 0.6),
    "car": (0.5, 0.62), "boat": (0.5, 0.86), "fish": (0.45, 0.5), "umbrella": (0.5, 0.34),
    "star": (0.5, 0.56), "kite": (0.5, 0.34), "cup": (0.39, 0.5), "clock": (0.5, 0.72),
    "book": (0.56, 0.6), "lamp": (0.5, 0.36), "hat": (0.5, 0.36), "key": (0.33, 0.5),
}  # fmt: skip


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
