"""The pocket world: drawn scenes of everyday things, with their ground truth.

A scene is data (what, where, how it looks); pictures and masks of any size are drawn from it.

    sample(seed, habit="with") -> Scene                 # or habit="against"
    draw(scene, size=768) -> PIL.Image                  # RGB, size x size
    window(scene, box, size=96) -> PIL.Image            # only box = (x0, y0, x1, y1), in 0..1
    labelled(scene, box, size=96) -> (PIL.Image, index) # the same, and the thing at each pixel
    masks(scene, size=768) -> np.ndarray                # bool (things, size, size)
    boxes(scene, size=768) -> list of (x0, y0, x1, y1)  # pixels, half-open
    counts(scene) -> {kind: n}      relations(scene) -> [(i, "left", j), ...]
    place(thing) -> "top left"         visible(scene, box) -> share of each thing inside box
    scene.to_dict() / Scene.from_dict(d)                # JSON round trip

The print on a thing has capitals of 0.043 of the scene's side: 33 pixels at 768, 4 at 96 (not
legible), 8 in a half-side window drawn at 96 (legible). That is what crop methods are for.

**Habits.** Scenes "with" the habit follow the tables below: THEMES (which kinds come together and
how often), KINDS (typical and second colour, pattern, size, height in the picture, print), and
the P_* constants (how strong each habit is). Scenes "against" it spread their kinds over all
themes, rare kinds first, and avoid every typical value. A model trained on the former acquires
habits as models of real data do, and the two halves measure how much it leans on them.
"""

import random
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import ceil, floor, sqrt

import numpy as np
from PIL import Image, ImageFilter, ImageFont

from .backdrop import BACKGROUNDS, Viewport, backdrop
from .shapes import RGB, SHAPES, Box, Pen, mix, texture

COLORS: dict[str, RGB] = {
    "red": (216, 48, 50),
    "orange": (242, 138, 28),
    "yellow": (246, 210, 50),
    "green": (58, 160, 76),
    "blue": (44, 108, 212),
    "purple": (132, 70, 182),
    "pink": (246, 142, 184),
    "brown": (132, 86, 50),
}
SIZES = {"small": 0.15, "medium": 0.21, "large": 0.30}  # square root of the box's area
PATTERNS = ("plain", "striped", "dotted")
VALUES = {"color": tuple(COLORS), "pattern": PATTERNS, "size": tuple(SIZES)}
LETTERS, DIGITS = "CEHKLTUX", "24578"  # told apart at 8 pixels
WHOLE: Box = (0, 0, 1, 1)  # the window that shows all
CAPITAL = 0.043  # height of a printed capital, in scene sides
GAP = 0.15  # centres at least this far apart are left/right (above/below) of each other


@dataclass(frozen=True)
class Kind:
    """What a kind of thing usually is: the habits, and the width/height of its box."""

    theme: str
    weight: float
    color: str
    second: str
    size: str
    height: str
    print: str
    aspect: float
    pattern: str = "plain"
    repeats: bool = False


# fmt: off
KINDS: dict[str, Kind] = {
    "sun":      Kind("garden", 0.26, "yellow", "orange", "medium", "top", "5", 1.0),
    "tree":     Kind("garden", 0.20, "green", "orange", "large", "bottom", "T", 0.8),
    "house":    Kind("garden", 0.17, "red", "brown", "large", "bottom", "4", 1.0),
    "flower":   Kind("garden", 0.15, "pink", "purple", "small", "bottom", "U", 0.75, "plain", True),
    "cloud":    Kind("garden", 0.12, "blue", "pink", "large", "top", "C", 1.6, "plain", True),
    "car":      Kind("garden", 0.10, "red", "blue", "medium", "bottom", "7", 1.7),
    "boat":     Kind("shore", 0.26, "blue", "brown", "large", "bottom", "8", 1.05, "striped"),
    "fish":     Kind("shore", 0.20, "orange", "blue", "small", "bottom", "X", 1.6, "plain", True),
    "umbrella": Kind("shore", 0.17, "red", "yellow", "large", "any", "2", 0.95, "striped"),
    "ball":     Kind("shore", 0.15, "orange", "red", "small", "bottom", "2", 1.0, "dotted", True),
    "star":     Kind("shore", 0.12, "yellow", "pink", "small", "top", "X", 1.05, "plain", True),
    "kite":     Kind("shore", 0.10, "purple", "green", "medium", "top", "K", 0.7, "dotted"),
    "cup":      Kind("home", 0.26, "blue", "yellow", "small", "any", "C", 1.15, "dotted", True),
    "clock":    Kind("home", 0.20, "brown", "green", "medium", "top", "7", 0.95),
    "book":     Kind("home", 0.17, "green", "purple", "medium", "any", "E", 0.8, "plain", True),
    "lamp":     Kind("home", 0.15, "yellow", "pink", "large", "bottom", "L", 0.7),
    "hat":      Kind("home", 0.12, "purple", "brown", "medium", "any", "H", 1.4, "striped"),
    "key":      Kind("home", 0.10, "brown", "yellow", "small", "any", "K", 1.9),
}
# fmt: on
# theme: (share of scenes, its usual background)
THEMES = {"garden": (0.4, "meadow"), "shore": (0.3, "shore"), "home": (0.3, "room")}
P_THEME = 0.8  # a thing comes from the scene's theme
P_COLOR, P_SECOND = 0.6, 0.2  # the typical, the second colour; the rest is uniform
P_PATTERN = 0.6
P_SIZE = 0.5
P_HEIGHT = 0.85  # a sky thing is in the upper half, a ground thing in the lower
P_BACKGROUND = 0.7
P_PRINT, P_TYPICAL_PRINT = 0.4, 0.3  # has a print; and then the kind's typical one
P_REPEAT = 0.4  # the scene shows one kind two to four times


def frequency(kind: str) -> float:
    """Share of a kind among the first draws of scenes with the habit (0..1, sums to 1)."""
    return THEMES[KINDS[kind].theme][0] * KINDS[kind].weight


@dataclass(frozen=True)
class Thing:
    """One thing: attributes, and its box by centre and extent, in scene sides (0..1)."""

    kind: str
    color: str
    size: str
    pattern: str
    print: str
    x: float
    y: float
    width: float
    height: float

    @property
    def box(self) -> Box:
        """(x0, y0, x1, y1) in 0..1."""
        w, h = self.width / 2, self.height / 2
        return (self.x - w, self.y - h, self.x + w, self.y + h)


@dataclass(frozen=True)
class Scene:
    """Things on a background; `habit` says which evaluation half it belongs to."""

    seed: int
    habit: str
    theme: str
    background: str
    shade: float
    things: tuple[Thing, ...]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "Scene":
        return cls(**{**data, "things": tuple(Thing(**t) for t in data["things"])})


# ------------------------------------------------------------------------------- sampling


def sample(seed: int, habit: str = "with") -> Scene:
    """Draw one scene of 3 to 7 things. `habit` is "with" or "against" the tables above."""
    if habit not in ("with", "against"):
        raise ValueError(f'habit is "with" or "against", not {habit!r}')
    rng = random.Random(f"{habit}-{seed}")
    theme = _theme(rng)
    usual = THEMES[theme][1]
    if habit == "with" and rng.random() < P_BACKGROUND:
        background = usual
    else:
        background = rng.choice([b for b in BACKGROUNDS if habit == "with" or b != usual])
    number = rng.choices((3, 4, 5, 6, 7), (2, 3, 4, 3, 2))[0]
    kinds = _kinds(rng, theme, number, habit)
    while True:  # a crowded draw that finds no room is drawn again with smaller things
        things: list[Thing] = []
        for kind in kinds:
            thing = _put(rng, _looks(rng, kind, habit, len(kinds)), things, habit)
            if thing is None:
                break
            things.append(thing)
        if len(things) == len(kinds):
            return Scene(seed, habit, theme, background, rng.random(), tuple(things))


def _theme(rng: random.Random) -> str:
    return rng.choices(list(THEMES), [share for share, _ in THEMES.values()])[0]


def _kinds(rng: random.Random, theme: str, number: int, habit: str) -> list[str]:
    def pick(pool: list[str]) -> str:
        weights = [KINDS[k].weight for k in pool]
        if habit == "against":  # rare kinds first
            weights = [1 / w for w in weights]
        return rng.choices(pool, weights)[0]

    kinds: list[str] = []
    repeated = 0
    if number > 3 and rng.random() < P_REPEAT:
        repeated = rng.choices((1, 2, 3), (6, 3, 1))[0]
    order = list(THEMES)
    rng.shuffle(order)
    while len(kinds) < max(2, number - repeated):
        if habit == "against":
            home = order[len(kinds) % 3]
        elif rng.random() < P_THEME:
            home = theme
        else:
            home = _theme(rng)
        pool = [k for k in KINDS if KINDS[k].theme == home and k not in kinds]
        if pool:
            kinds.append(pick(pool))
    often = [k for k in kinds if KINDS[k].repeats == (habit == "with")]
    twice = rng.choice(often or kinds)
    kinds += [twice] * (number - len(kinds))
    rng.shuffle(kinds)
    return kinds


def _looks(rng: random.Random, name: str, habit: str, number: int) -> Thing:
    kind, with_habit = KINDS[name], habit == "with"

    def habitual(typical: str, options: tuple[str, ...], p: float) -> str:
        if with_habit and rng.random() < p:
            return typical
        return rng.choice([o for o in options if o != typical])

    color = habitual(kind.color, VALUES["color"], P_COLOR)
    if with_habit and color != kind.color and rng.random() < P_SECOND / (1 - P_COLOR):
        color = kind.second
    elif not with_habit:
        color = rng.choice([c for c in COLORS if c not in (kind.color, kind.second)])
    pattern = habitual(kind.pattern, PATTERNS, P_PATTERN)
    size = habitual(kind.size, VALUES["size"], P_SIZE)
    if number > 5 and size == "large" and rng.random() < 0.5:
        size = rng.choice([s for s in ("small", "medium") if with_habit or s != kind.size])
    text = ""
    if rng.random() < P_PRINT:
        text = habitual(kind.print, tuple(LETTERS + DIGITS), P_TYPICAL_PRINT)
    side = SIZES[size] * rng.uniform(0.95, 1.05)
    width, height = side * sqrt(kind.aspect), side / sqrt(kind.aspect)
    return Thing(name, color, size, pattern, text, 0, 0, width, height)


def _put(rng: random.Random, thing: Thing, others: list[Thing], habit: str) -> Thing | None:
    usual = KINDS[thing.kind].height
    top = usual == "top" if habit == "with" else usual == "bottom"
    if usual == "any" or (habit == "with" and rng.random() > P_HEIGHT):
        low, high = 0.0, 1.0
    else:
        low, high = (0.0, 0.52) if top else (0.48, 1.0)
    w, h, edge = thing.width / 2, thing.height / 2, 0.025
    for attempt in range(60):
        if attempt == 40:
            low, high = 0.0, 1.0
        x = rng.uniform(w + edge, 1 - w - edge)
        y = rng.uniform(max(low, h + edge), max(min(high, 1 - h - edge), h + edge))
        if all(
            abs(x - o.x) > w + o.width / 2 + 0.03 or abs(y - o.y) > h + o.height / 2 + 0.03
            for o in others
        ):
            return replace(thing, x=round(x, 4), y=round(y, 4))
    return None


# --------------------------------------------------------------------------- ground truth


def counts(scene: Scene) -> dict[str, int]:
    """How many of each kind are there."""
    return dict(Counter(t.kind for t in scene.things))


def boxes(scene: Scene, size: int = 768) -> list[tuple[int, int, int, int]]:
    """Per thing the pixels (x0, y0, x1, y1), half-open, that contain its drawing."""
    corners = ([edge * size for edge in thing.box] for thing in scene.things)
    return [(floor(x0), floor(y0), ceil(x1), ceil(y1)) for x0, y0, x1, y1 in corners]


def relation(a: Thing, b: Thing) -> set[str]:
    """What a is to b: left, right, above, below; by centres at least GAP apart."""
    sides = set()
    if abs(a.x - b.x) >= GAP:
        sides.add("left" if a.x < b.x else "right")
    if abs(a.y - b.y) >= GAP:
        sides.add("above" if a.y < b.y else "below")
    return sides


def relations(scene: Scene) -> list[tuple[int, str, int]]:
    """All (i, relation, j): thing i is left/right/above/below of thing j."""
    return [
        (i, name, j)
        for i, a in enumerate(scene.things)
        for j, b in enumerate(scene.things)
        if i != j
        for name in sorted(relation(a, b))
    ]


def within(thing: Thing, box: Box) -> tuple[float, float]:
    """The thing's centre (u, v) in a window: 0..1 where it is inside."""
    return (thing.x - box[0]) / (box[2] - box[0]), (thing.y - box[1]) / (box[3] - box[1])


def place(thing: Thing, box: Box = WHOLE) -> str:
    """Where in the picture (or in a window of it): "top left" ... "center" ... "bottom right"."""
    u, v = within(thing, box)
    row = "top" if v < 1 / 3 else "bottom" if v > 2 / 3 else ""
    column = "left" if u < 1 / 3 else "right" if u > 2 / 3 else ""
    return f"{row} {column}".strip() or "center"


def visible(scene: Scene, box: Box) -> list[float]:
    """Per thing the share of its box's area that lies inside `box` (0..1)."""
    shares = []
    for t in scene.things:
        x0, y0, x1, y1 = t.box
        w = max(0.0, min(x1, box[2]) - max(x0, box[0]))
        h = max(0.0, min(y1, box[3]) - max(y0, box[1]))
        shares.append(w * h / (t.width * t.height))
    return shares


# --------------------------------------------------------------------------------- drawing


def draw(scene: Scene, size: int = 768) -> Image.Image:
    """The scene as an RGB image of size x size pixels."""
    return window(scene, WHOLE, size)


def window(scene: Scene, box: Box, size: int = 96) -> Image.Image:
    """The part of the scene inside `box` (x0, y0, x1, y1 in 0..1), drawn at size x size pixels."""
    return labelled(scene, box, size)[0]


def labelled(
    scene: Scene, box: Box = WHOLE, size: int = 96, oversample: int = 2
) -> tuple[Image.Image, np.ndarray]:
    """`window`, and which thing each pixel shows: uint8 (size, size), 255 for the background."""
    canvas, index = _canvas(scene, box, size * oversample)
    nearest = index.resize((size, size), Image.Resampling.NEAREST)
    return canvas.resize((size, size), Image.Resampling.BICUBIC), np.asarray(nearest)


def masks(scene: Scene, size: int = 768, box: Box = WHOLE) -> np.ndarray:
    """Per thing its silhouette, bool (things, size, size); of a window if `box` is given."""
    view = Viewport(box, size * 2)
    result = np.zeros((len(scene.things), size, size), bool)
    for i, thing in enumerate(scene.things):
        _, mask, corner = _sprite(thing, view)
        full = Image.new("L", (size * 2, size * 2))
        full.paste(mask, corner)
        result[i] = np.asarray(full.resize((size, size), Image.Resampling.BOX)) > 127
    return result


def _sprite(thing: Thing, view: Viewport) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """One thing's RGB tile, its silhouette (L) and the tile's upper left corner on the canvas."""
    width, height = round(thing.width * view.sx), round(thing.height * view.sy)
    margin = max(2, round(0.02 * view.sx))
    left, top = view.point(*thing.box[:2])
    tile = Image.new("RGB", (width + 2 * margin, height + 2 * margin), COLORS[thing.color])
    if thing.pattern != "plain":
        cell = texture(COLORS[thing.color], thing.pattern, max(2, round(0.05 * view.sx)))
        for x in range(0, tile.width, cell.width):
            for y in range(0, tile.height, cell.height):
                tile.paste(cell, (x, y))
    pen = Pen(width, height, margin, COLORS[thing.color], tile)
    pen.draw(SHAPES[thing.kind]["strokes"])
    if thing.print:
        _plate(pen, thing, view)
    return tile, pen.mask, (round(left) - margin, round(top) - margin)


def _plate(pen: Pen, thing: Thing, view: Viewport) -> None:
    u, v = SHAPES[thing.kind]["plate"]
    x, y = pen.margin + u * pen.w, pen.margin + v * pen.h
    capital = CAPITAL * view.sy
    w, h = 0.029 * view.sx, 0.034 * view.sy
    y = min(max(y, pen.margin + h), pen.margin + pen.h - h)
    plate, corner = (x - w, y - h, x + w, y + h), h * 0.35
    white, edge = pen.tones["white"], max(1, round(0.004 * view.sx))
    pen.on_mask.rounded_rectangle(plate, corner, 255)
    pen.on_tile.rounded_rectangle(plate, corner, white, pen.tones["dark"], edge)
    font = _font(max(4, round(capital / 0.71)))
    stroke = max(0, round(capital * 0.045))
    pen.on_tile.text((x, y), thing.print, fill=(18, 18, 26), font=font, anchor="mm",
                   stroke_width=stroke, stroke_fill=(18, 18, 26))  # fmt: skip


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # the font inside Pillow: the same on every machine


def _grown(mask: Image.Image, radius: float) -> Image.Image:
    return mask.filter(ImageFilter.BoxBlur(radius)).point(lambda v: min(255, v * 12))


def _canvas(scene: Scene, box: Box, pixels: int) -> tuple[Image.Image, Image.Image]:
    view, index = Viewport(box, pixels), Image.new("L", (pixels, pixels), 255)
    canvas = backdrop(scene.background, scene.shade, scene.seed, view)
    unit = view.sx
    for i, (thing, share) in enumerate(zip(scene.things, visible(scene, box), strict=True)):
        if share == 0:
            continue
        tile, mask, (left, top) = _sprite(thing, view)
        color = COLORS[thing.color]
        drop = max(1, round(0.007 * unit))
        shadow = _grown(mask, 0.006 * unit).point(lambda v: v // 4)
        canvas.paste((30, 30, 50), (left + drop, top + drop), shadow)
        canvas.paste((252, 252, 250), (left, top), _grown(mask, 0.008 * unit))
        canvas.paste(mix(color, (20, 20, 40), 0.55), (left, top), _grown(mask, 0.003 * unit))
        canvas.paste(tile, (left, top), mask)
        index.paste(i, (left, top), mask)
    return canvas, index
