"""Questions and captions about scenes, in the shapes of the real benchmarks.

    look(scene, box=WHOLE) -> View                      # what can be asked about a scene or window
    pairs(view, rng, category) -> (yes, no) | None      # two questions on the same fact
    opened(view, rng, topic=None) -> Question | None    # an open question
    caption(view, rng) -> Question | None
    exam(scene, rng) -> list[Question]                  # balanced, for evaluation

Categories: existence (splits random, popular, adversarial as in POPE, here by the frequency and
the co-occurrence tables of the world), attribute (color, size, pattern), number, relation,
position, print; open questions carry the same categories and `label` None. A thing is only asked
about where the answer is unambiguous: its kind occurs once, centres are far enough apart, and in
a window at least 70 % of it is seen.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import world
from .phrases import NUMBERS, OPEN, OPPOSITE, PHRASES, a, plural
from .world import KINDS, VALUES, WHOLE, Box, Scene, Thing

CATEGORIES = ("existence", "attribute", "number", "relation", "position", "print")
FIRST_HELD_OUT = 1_000_000_000  # training seeds are below, evaluation seeds from here on
SIDES = ("left", "right")


@dataclass(frozen=True)
class Question:
    """A question and its answer; `label` is "yes", "no", or None for an open question."""

    text: str
    answer: str
    category: str
    topic: str
    label: str | None = None
    split: str = ""
    things: tuple[int, ...] = ()


Pair = tuple[Question, Question]


@dataclass(frozen=True)
class View:
    """A scene seen whole or through a window: what is surely there, and what may be asked."""

    scene: Scene
    box: Box
    seen: tuple[int, ...]  # things at least 70 % inside, all sizes
    unclear: frozenset[str]  # kinds of which some thing is cut by the window's edge

    @property
    def whole(self) -> bool:
        return self.box == WHOLE

    def thing(self, i: int) -> Thing:
        return self.scene.things[i]

    def counts(self) -> dict[str, int]:
        """Seen things per kind, without the kinds that the window cuts."""
        kinds = (self.thing(i).kind for i in self.seen)
        return dict(Counter(kind for kind in kinds if kind not in self.unclear))

    def single(self) -> list[int]:
        """Things that are the only one of their kind."""
        counts = self.counts()
        return [i for i in self.seen if counts.get(self.thing(i).kind) == 1]

    def absent(self) -> list[str]:
        """Kinds of which nothing is seen."""
        there = {self.thing(i).kind for i in self.seen} | self.unclear
        return [k for k in KINDS if k not in there]


def look(scene: Scene, box: Box = WHOLE) -> View:
    """What can be asked about `scene` seen through `box` (x0, y0, x1, y1 in 0..1)."""
    shares = world.visible(scene, box)
    seen = tuple(i for i, share in enumerate(shares) if share >= 0.7)
    cut = frozenset(
        t.kind for t, share in zip(scene.things, shares, strict=True) if 0 < share < 0.7
    )
    return View(scene, box, seen, cut)


def phrase(rng: random.Random, templates: list[str]) -> str:
    """The first phrasing in half of the cases, any of them in the rest."""
    return templates[0] if rng.random() < 0.5 else rng.choice(templates)


def ranked(view: View, split: str) -> list[str]:
    """Absent kinds as POPE's splits want them: the most frequent, or the most co-occurring."""
    absent = view.absent()
    if split == "popular":
        return sorted(absent, key=world.frequency, reverse=True)[:6]
    if split == "adversarial":
        themes = [KINDS[view.thing(i).kind].theme for i in view.seen]
        return sorted(
            absent, key=lambda k: (themes.count(KINDS[k].theme), KINDS[k].weight), reverse=True
        )[:3]
    return absent


# ------------------------------------------------------------------- facts to ask about


def _wrong(view: View, rng: random.Random, thing: Thing, topic: str) -> str:
    """A wrong value: of another thing in the scene, the kind's habit, or any."""
    right, options = getattr(thing, topic), VALUES[topic]
    others = [getattr(view.thing(j), topic) for j in view.seen]
    pools = (others, [getattr(KINDS[thing.kind], topic)], list(options))
    pool = [v for v in rng.choice(pools) if v != right]
    return rng.choice(pool or [v for v in options if v != right])


def _counted(
    view: View, rng: random.Random, several: float
) -> tuple[str, int, tuple[int, ...]] | None:
    """A kind, how many there are, and which.

    Args:
        several: probability of a kind that occurs more than once, where there is one.
    """
    counts = view.counts()
    if not counts:
        return None
    many = [k for k, n in counts.items() if n > 1]
    kind = rng.choice(many) if many and rng.random() < several else rng.choice(list(counts))
    return kind, counts[kind], tuple(i for i in view.seen if view.thing(i).kind == kind)


def _related(view: View, rng: random.Random) -> tuple[int, str, int] | None:
    """Two things and what the first is to the second."""
    single = view.single()
    rng.shuffle(single)
    for i in single:
        for j in single:
            if i != j:
                sides = world.relation(view.thing(i), view.thing(j))
                if sides:
                    return i, rng.choice(sorted(sides)), j
    return None


def _halves(view: View, i: int) -> list[str]:
    """The halves of the picture in which a thing clearly is."""
    u, v = world.within(view.thing(i), view.box)
    halves = ["left"] * (u < 0.42) + ["right"] * (u > 0.58)
    return halves + ["top"] * (v < 0.42) + ["bottom"] * (v > 0.58)


def _of(side: str) -> str:
    return f"{side} of" if side in SIDES else side


# ------------------------------------------------------------------------------ yes and no


def pairs(view: View, rng: random.Random, category: str, split: str = "random") -> Pair | None:
    """Two questions on the same fact, the first answered yes and the second no.

    None where the scene offers no unambiguous one. `split` only concerns existence.
    """
    if category == "existence":
        return _existence(view, rng, split)
    return {
        "attribute": _attribute,
        "number": _number,
        "relation": _relation,
        "position": _position,
        "print": _print,
    }[category](view, rng)


def _pair(
    texts: Iterable[str], category: str, topic: str, things: tuple[int, ...], split: str = ""
) -> Pair:
    yes, no = (
        Question(text, label, category, topic, label, split, things)
        for text, label in zip(texts, ("yes", "no"), strict=True)
    )
    return yes, no


def _existence(view: View, rng: random.Random, split: str) -> Pair | None:
    absent = ranked(view, split)
    if not view.seen or not absent:
        return None
    i, other = rng.choice(view.seen), rng.choice(absent)
    template = phrase(rng, PHRASES["existence"])
    texts = (template.format(a_kind=a(k)) for k in (view.thing(i).kind, other))
    return _pair(texts, "existence", "existence", (i,), split)


def _attribute(view: View, rng: random.Random) -> Pair | None:
    single = view.single()
    if not single:
        return None
    i = rng.choice(single)
    thing = view.thing(i)
    # sizes are those of the scene, and a window does not show them
    topic = rng.choices(("color", "pattern", "size"), (5, 3, 3 if view.whole else 0))[0]
    values = getattr(thing, topic), _wrong(view, rng, thing, topic)
    template = phrase(rng, PHRASES["attribute"])
    texts = (template.format(kind=thing.kind, value=v, a_value=a(v)) for v in values)
    return _pair(texts, "attribute", topic, (i,))


def _number(view: View, rng: random.Random) -> Pair | None:
    counted = _counted(view, rng, 0.7)
    if counted is None:
        return None
    kind, n, things = counted
    wrong = rng.choice([m for m in (1, 2, 3, 4) if m != n and abs(m - n) <= 2])
    style = rng.random()
    one = PHRASES["one"][style > 0.5]
    several = PHRASES["number"][0 if style < 0.5 else 1 + (style > 0.75)]
    texts = (
        (one if m == 1 else several).format(kind=kind, n=NUMBERS[m], kinds=plural(kind))
        for m in (n, wrong)
    )
    return _pair(texts, "number", "number", things)


def _relation(view: View, rng: random.Random) -> Pair | None:
    related = _related(view, rng)
    if related is None:
        return None
    i, side, j = related
    first, second = view.thing(i).kind, view.thing(j).kind
    template = phrase(rng, PHRASES["beside"] if side in SIDES else PHRASES["upon"])
    swapped = rng.random() >= 0.5
    wrong = (second, first, side) if swapped else (first, second, OPPOSITE[side])
    texts = (
        template.format(a=x, an_a=a(x), b=y, side=where)
        for x, y, where in ((first, second, side), wrong)
    )
    return _pair(texts, "relation", side, (i, j))


def _position(view: View, rng: random.Random) -> Pair | None:
    candidates = [(i, half) for i in view.single() for half in _halves(view, i)]
    if not candidates:
        return None
    i, half = rng.choice(candidates)
    template = PHRASES["position"][half in SIDES and rng.random() < 0.5]
    kind = view.thing(i).kind
    texts = (template.format(kind=kind, half=h) for h in (half, OPPOSITE[half]))
    return _pair(texts, "position", half, (i,))


def _print(view: View, rng: random.Random) -> Pair | None:
    single = view.single()
    printed = [i for i in single if view.thing(i).print]
    bare = [i for i in single if not view.thing(i).print]
    if not printed:
        return None
    i = rng.choice(printed)
    thing = view.thing(i)
    if bare and rng.random() < (0.7 if view.whole else 0.3):
        template = phrase(rng, PHRASES["plate"])
        kinds = thing.kind, view.thing(rng.choice(bare)).kind
        return _pair((template.format(kind=k) for k in kinds), "print", "plate", (i,))
    digit = thing.print in world.DIGITS
    glyphs, what = (world.DIGITS, "digit") if digit else (world.LETTERS, "letter")
    wrong = rng.choice([c for c in glyphs if c != thing.print])
    template = phrase(rng, PHRASES["print"])
    texts = (
        template.format(what=what, a_what=a(what), text=text, kind=thing.kind)
        for text in (thing.print, wrong)
    )
    return _pair(texts, "print", "print", (i,))


# ----------------------------------------------------------------------- open and captions

Answer = tuple[dict[str, str], str, tuple[int, ...]]  # slots of the template, answer, things


def opened(view: View, rng: random.Random, topic: str | None = None) -> Question | None:
    """An open question of a topic (drawn where None); None where none is unambiguous."""
    if topic is None:
        topic = rng.choices(list(OPEN), [each["share"] for each in OPEN.values()])[0]
    answered = {
        "number": _open_number,
        "exists": _open_exists,
        "beside": _open_relation,
        "upon": _open_relation,
        "neighbor": _open_neighbor,
    }.get(topic, _open_thing)(view, rng, topic)
    if answered is None:
        return None
    slots, answer, things = answered
    templates = OPEN[topic]["phrases"]
    template = templates[answer not in SIDES] if topic == "half" else phrase(rng, templates)
    category = OPEN[topic]["category"]
    return Question(template.format(**slots), answer, category, topic, None, "", things)


def _open_number(view: View, rng: random.Random, topic: str) -> Answer | None:
    counted = _counted(view, rng, 0.6)
    if counted is None:
        return None
    kind, n, things = counted
    return {"kinds": plural(kind)}, NUMBERS[n], things


def _open_exists(view: View, rng: random.Random, topic: str) -> Answer | None:
    absent = view.absent()
    if not view.seen or not absent:
        return None
    i = rng.choice(view.seen)
    both = [view.thing(i).kind, rng.choice(absent)]
    rng.shuffle(both)
    return {"one": a(both[0]), "other": a(both[1])}, view.thing(i).kind, (i,)


def _open_relation(view: View, rng: random.Random, topic: str) -> Answer | None:
    for _ in range(4):
        related = _related(view, rng)
        if related and (related[1] in SIDES) == (topic == "beside"):
            i, side, j = related
            return {"a": view.thing(i).kind, "b": view.thing(j).kind}, side, (i, j)
    return None


def _open_neighbor(view: View, rng: random.Random, topic: str) -> Answer | None:
    """The only thing on one side of another."""
    single = view.single()
    if not single or len(single) != len(view.seen) or view.unclear:
        return None
    j = rng.choice(single)
    side = rng.choice(("left", "right", "above", "below"))
    sides = {i: world.relation(view.thing(i), view.thing(j)) for i in single if i != j}
    there = [i for i in sides if side in sides[i]]
    if len(there) != 1 or not all(sides.values()):
        return None
    return {"side": _of(side), "b": view.thing(j).kind}, view.thing(there[0]).kind, (there[0], j)


def _open_thing(view: View, rng: random.Random, topic: str) -> Answer | None:
    """About one thing that is the only one of its kind."""
    single = view.single()
    if not single:
        return None
    i = rng.choice(single)
    thing = view.thing(i)
    if topic in ("name", "spot"):  # known by its colour or place alone
        marks = [t.color if topic == "name" else world.place(t, view.box)
                 for t in map(view.thing, view.seen)]  # fmt: skip
        mark = marks[view.seen.index(i)]
        if marks.count(mark) != 1 or view.unclear:
            return None
        return {"color": mark, "place": mark}, thing.kind, (i,)
    slots = {"kind": thing.kind}
    if topic == "half":
        halves = _halves(view, i)
        return (slots, rng.choice(halves), (i,)) if halves else None
    if topic == "place":
        return slots, world.place(thing, view.box), (i,)
    if topic == "print":
        printed = [j for j in single if view.thing(j).print]
        if not printed:
            return None
        i = rng.choice(printed)
        return {"kind": view.thing(i).kind}, view.thing(i).print.lower(), (i,)
    if topic == "either":
        topic = rng.choice(("color", "color", "pattern", "size" if view.whole else "color"))
        both = [getattr(thing, topic), _wrong(view, rng, thing, topic)]
        rng.shuffle(both)
        slots |= {"one": both[0], "other": both[1]}
    return None if topic == "size" and not view.whole else (slots, getattr(thing, topic), (i,))


def caption(view: View, rng: random.Random, short: bool = False) -> Question | None:
    """All things from left to right; the long form with looks, places and one relation."""
    counts = view.counts()
    if not counts:
        return None
    order = sorted(view.seen, key=lambda i: view.thing(i).x)
    parts: dict[str, str] = {}  # by kind
    for thing in map(view.thing, order):
        if thing.kind in parts or thing.kind not in counts:
            continue
        if counts[thing.kind] > 1:
            parts[thing.kind] = f"{NUMBERS[counts[thing.kind]]} {plural(thing.kind)}"
        elif short:
            parts[thing.kind] = a(thing.kind)
        else:
            looks = [thing.size] if view.whole else []
            looks += [thing.color] + ([thing.pattern] if thing.pattern != "plain" else [])
            where = world.place(thing, view.box)
            parts[thing.kind] = f"{a(' '.join([*looks, thing.kind]))} in the {where}"
    *most, last = parts.values()
    listed = f"{', '.join(most)} and {last}" if most else last
    if short:
        asked = rng.choice(PHRASES["list"])
        return Question(asked, listed, "caption", "list", None, "", tuple(order))
    text = f"there {'is' if listed[0] == 'a' else 'are'} {listed}."
    related = _related(view, rng)
    if related:
        i, side, j = related
        words = "to the " * (side in SIDES) + _of(side)
        text += f" the {view.thing(i).kind} is {words} the {view.thing(j).kind}."
    asked = rng.choice(PHRASES["describe"])
    return Question(asked, text, "caption", "caption", None, "", tuple(order))


# ---------------------------------------------------------------------- exams and windows


def exam(scene: Scene, rng: random.Random) -> list[Question]:
    """Balanced yes/no questions of every category and five open ones about a whole scene."""
    view, asked = look(scene), list[Question]()
    for split in ("random", "popular", "adversarial"):
        asked += pairs(view, rng, "existence", split) or ()
    for category in ("attribute", "attribute", "number", "relation", "relation", "position"):
        asked += pairs(view, rng, category) or ()
    for topic in ("color", "pattern", "size", "number", "place"):
        question = opened(view, rng, topic)
        asked += [question] if question else []
    return list(dict.fromkeys(asked))


def print_windows(scene: Scene, rng: random.Random, side: float = 0.5) -> Iterator[tuple[Box, int]]:
    """For each printed, single thing a window of that side that shows it whole."""
    for i in look(scene).single():
        thing = scene.things[i]
        if thing.print and max(thing.width, thing.height) < side:
            yield window_around(thing, rng, side), i


def window_around(thing: Thing, rng: random.Random, side: float) -> Box:
    """A window of the given side inside the scene, holding the thing somewhere in it."""
    corner = []
    for centre, extent in ((thing.x, thing.width), (thing.y, thing.height)):
        low = max(0.0, centre + extent / 2 - side)
        high = min(1 - side, centre - extent / 2)
        corner.append(rng.uniform(low, max(low, high)))
    return (corner[0], corner[1], corner[0] + side, corner[1] + side)
