"""Questions and captions about scenes, in the shapes of the real benchmarks.

    look(scene, box=WHOLE) -> Look                      # what can be asked about a scene or window
    pairs(look, rng, category) -> (yes, no) | None      # two questions on the same fact
    opened(look, rng, topic=None) -> Question | None    # an open question
    caption(look, rng) -> Question
    exam(scene, rng) -> list[Question]                  # balanced, for evaluation
    conversations(look, rng, image) -> rows             # for training, in LLaVA's format
    export(n, out, seed=0, habit="both", size=768) -> Path   # `foveate draw N --out DIR`

Categories: existence (splits random, popular, adversarial as in POPE, here by the frequency and
the co-occurrence tables of the world), attribute (color, size, pattern), number, relation,
position, print; open questions carry the same categories and `label` None. A thing is only asked
about where the answer is unambiguous: its kind occurs once, centres are far enough apart, and in
a window at least 70 % of it is seen.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import world
from .world import COLORS, KINDS, PATTERNS, SIZES, Box, Scene, Thing

WHOLE: Box = (0, 0, 1, 1)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
CATEGORIES = ("existence", "attribute", "number", "relation", "position", "print")
FIRST_HELD_OUT = 1_000_000_000  # training seeds are below, evaluation seeds from here on

# The suffixes of POPE's users, MME, LLaVA-1.5, LLaVA-NeXT and ViCrop
WORD = " Answer the question using a single word or phrase."
SUFFIXES = (
    WORD,
    " Please answer yes or no.",
    " Please answer this question with one word.",
    " Please just answer yes or no.",
)
DESCRIBE = (
    "Describe this image.",
    "Describe this image",
    "Describe this image in detail.",
    "Please describe this image in detail.",
    "Write a general description of the image.",
    "Provide a comprehensive overview of the image.",
    "What do you see in this image?",
    "Explain what appears in the image.",
)
LIST = ("What is in the image?", "What is in the picture?", "What can you see?")

EXISTENCE = (
    "Is there {a_kind} in the image?",
    "Is there {a_kind} in this image?",
    "Is there {a_kind}?",
    "Can you see {a_kind} in the picture?",
    "Does the image show {a_kind}?",
)
ATTRIBUTE = (
    "Is the {kind} {value}?",
    "Is the {kind} {value} in this image?",
    "Is there {a_value} {kind} in the image?",
)
NUMBER = (
    "Are there {n} {kinds} in the image?",
    "Are there {n} {kinds}?",
    "Are there exactly {n} {kinds} in this image?",
)
ONE = ("Is there exactly one {kind} in the image?", "Is there only one {kind}?")
BESIDE = (
    "Is the {a} to the {side} of the {b}?",
    "Is the {a} {side} of the {b}?",
    "Is the {a} on the {side} side of the {b}?",
    "Is there {an_a} to the {side} of the {b} in the image?",
)
UPON = ("Is the {a} {side} the {b}?", "Is there {an_a} {side} the {b} in the image?")
POSITION = (
    "Is the {kind} in the {half} half of the image?",
    "Is the {kind} on the {half} side of the image?",
)
PRINT = (
    'Is the {what} "{text}" printed on the {kind}?',
    "Does the {kind} show the {what} {text}?",
    "Is there {a_what} {text} on the {kind}?",
)
PLATE = ("Is something printed on the {kind}?", "Is there a letter or digit on the {kind}?")

OPEN: dict[str, tuple[str, ...]] = {
    "color": (
        "What color is the {kind}?",
        "What is the color of the {kind}?",
        "Which colour does the {kind} have?",
    ),
    "size": ("What size is the {kind}?", "How big is the {kind}?", "How large is the {kind}?"),
    "pattern": (
        "What pattern does the {kind} have?",
        "Is the {kind} plain, striped or dotted?",
        "What is the pattern of the {kind}?",
    ),
    "number": ("How many {kinds} are there in the image?", "How many {kinds} are there?"),
    "place": ("Where is the {kind}?", "Where is the {kind} in the image?"),
    "either": ("Is the {kind} {one} or {other}?",),
    "beside": (
        "Is the {a} to the left or to the right of the {b}?",
        "Is the {a} left or right of the {b}?",
        "Which side of the {b} is the {a} on, left or right?",
    ),
    "upon": ("Is the {a} above or below the {b}?", "Where is the {a}, above or below the {b}?"),
    "half": (
        "Is the {kind} in the left or in the right half of the image?",
        "Is the {kind} in the top or in the bottom half of the image?",
    ),
    "name": ("What is the {color} thing?", "What thing is {color}?"),
    "spot": ("What is in the {place} of the image?", "Which thing is in the {place}?"),
    "neighbor": ("What is {side} the {b}?",),
    "print": (
        "What is printed on the {kind}?",
        "Which letter or digit is on the {kind}?",
        "What does the {kind} say?",
    ),
    "exists": ("Which is in the image, {one} or {other}?", "Do you see {one} or {other}?"),
}
TOPIC_CATEGORY = {
    "color": "attribute", "size": "attribute", "pattern": "attribute", "either": "attribute",
    "number": "number", "place": "position", "half": "position", "beside": "relation",
    "upon": "relation", "neighbor": "relation", "name": "existence", "spot": "position",
    "print": "print", "exists": "existence",
}  # fmt: skip
# how often an open question of each topic is drawn
TOPICS = {
    "color": 4, "size": 2, "pattern": 3, "number": 2, "place": 2, "either": 3, "beside": 4,
    "upon": 4, "half": 1, "name": 1, "spot": 1, "neighbor": 1, "print": 0.7, "exists": 2,
}  # fmt: skip


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


@dataclass(frozen=True)
class Look:
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
        found: dict[str, int] = {}
        for i in self.seen:
            kind = self.thing(i).kind
            if kind not in self.unclear:
                found[kind] = found.get(kind, 0) + 1
        return found

    def single(self) -> list[int]:
        """Things that are the only one of their kind."""
        counts = self.counts()
        return [i for i in self.seen if counts.get(self.thing(i).kind) == 1]

    def absent(self) -> list[str]:
        """Kinds of which nothing is seen."""
        there = {self.thing(i).kind for i in self.seen} | self.unclear
        return [k for k in KINDS if k not in there]


def look(scene: Scene, box: Box = WHOLE) -> Look:
    """What can be asked about `scene` seen through `box` (x0, y0, x1, y1 in 0..1)."""
    shares = world.visible(scene, box)
    seen = tuple(i for i, share in enumerate(shares) if share >= 0.7)
    cut = frozenset(
        t.kind for t, share in zip(scene.things, shares, strict=True) if 0 < share < 0.7
    )
    return Look(scene, box, seen, cut)


def a(word: str) -> str:
    """The word with its indefinite article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural(kind: str) -> str:
    return {"fish": "fish"}.get(kind, kind + "s")


def _phrase(rng: random.Random, templates: tuple[str, ...]) -> str:
    """The first phrasing in half of the cases, any other in the rest."""
    return templates[0] if rng.random() < 0.5 else rng.choice(templates)


def ranked(view: Look, split: str) -> list[str]:
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


# ------------------------------------------------------------------------------ yes and no


def pairs(
    view: Look, rng: random.Random, category: str, split: str = "random"
) -> tuple[Question, Question] | None:
    """Two questions on the same fact, the first answered yes and the second no.

    None where the scene offers no unambiguous one. `split` only concerns existence.
    """
    maker = {
        "existence": lambda: _existence(view, rng, split),
        "attribute": lambda: _attribute(view, rng),
        "number": lambda: _number(view, rng),
        "relation": lambda: _relation(view, rng),
        "position": lambda: _position(view, rng),
        "print": lambda: _print(view, rng),
    }[category]
    return maker()


def _yes_no(
    yes: str, no: str, category: str, topic: str, things: tuple[int, ...], split: str = ""
) -> tuple[Question, Question]:
    return (
        Question(yes, "yes", category, topic, "yes", split, things),
        Question(no, "no", category, topic, "no", split, things),
    )


def _existence(view: Look, rng: random.Random, split: str) -> tuple[Question, Question] | None:
    absent = ranked(view, split)
    if not view.seen or not absent:
        return None
    i, other = rng.choice(view.seen), rng.choice(absent)
    template = _phrase(rng, EXISTENCE)
    texts = [template.format(a_kind=a(k)) for k in (view.thing(i).kind, other)]
    return _yes_no(texts[0], texts[1], "existence", "existence", (i,), split)


def _attribute(view: Look, rng: random.Random) -> tuple[Question, Question] | None:
    single = view.single()
    if not single:
        return None
    i = rng.choice(single)
    thing = view.thing(i)
    # sizes are those of the scene, and a window does not show them
    topic = rng.choices(("color", "pattern", "size"), (5, 3, 3 if view.whole else 0))[0]
    value = getattr(thing, topic)
    wrong = _wrong(view, rng, thing, topic)
    template = _phrase(rng, ATTRIBUTE)
    texts = [template.format(kind=thing.kind, value=v, a_value=a(v)) for v in (value, wrong)]
    return _yes_no(texts[0], texts[1], "attribute", topic, (i,))


def _wrong(view: Look, rng: random.Random, thing: Thing, topic: str) -> str:
    """A wrong value: of another thing in the scene, the kind's habit, or any."""
    right = getattr(thing, topic)
    options = {"color": tuple(COLORS), "pattern": PATTERNS, "size": tuple(SIZES)}[topic]
    others = [getattr(view.thing(j), topic) for j in view.seen]
    pools = (others, [getattr(KINDS[thing.kind], topic)], list(options))
    pool = [v for v in rng.choice(pools) if v != right]
    return rng.choice(pool or [v for v in options if v != right])


def _number(view: Look, rng: random.Random) -> tuple[Question, Question] | None:
    counts = view.counts()
    if not counts:
        return None
    many = [k for k, n in counts.items() if n > 1]
    kind = rng.choice(many) if many and rng.random() < 0.7 else rng.choice(list(counts))
    n = counts[kind]
    wrong = rng.choice([m for m in (1, 2, 3, 4) if m != n and abs(m - n) <= 2])
    style = rng.random()

    def text(m: int) -> str:
        if m == 1:
            return ONE[style > 0.5].format(kind=kind)
        template = NUMBER[0 if style < 0.5 else 1 + (style > 0.75)]
        return template.format(n=NUMBERS[m], kinds=plural(kind))

    things = tuple(i for i in view.seen if view.thing(i).kind == kind)
    return _yes_no(text(n), text(wrong), "number", "number", things)


OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above",
            "top": "bottom", "bottom": "top"}  # fmt: skip


def _related(view: Look, rng: random.Random) -> tuple[int, str, int] | None:
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


def _relation(view: Look, rng: random.Random) -> tuple[Question, Question] | None:
    found = _related(view, rng)
    if found is None:
        return None
    i, side, j = found
    first, second = view.thing(i).kind, view.thing(j).kind
    template = _phrase(rng, BESIDE if side in ("left", "right") else UPON)
    yes = template.format(a=first, b=second, an_a=a(first), side=side)
    if rng.random() < 0.5:
        no = template.format(a=first, b=second, an_a=a(first), side=OPPOSITE[side])
    else:
        no = template.format(a=second, b=first, an_a=a(second), side=side)
    return _yes_no(yes, no, "relation", side, (i, j))


def _halves(view: Look, i: int) -> list[str]:
    """The halves of the picture in which a thing clearly is."""
    thing, (x0, y0, x1, y1) = view.thing(i), view.box
    u, v = (thing.x - x0) / (x1 - x0), (thing.y - y0) / (y1 - y0)
    found = ["left"] * (u < 0.42) + ["right"] * (u > 0.58)
    return found + ["top"] * (v < 0.42) + ["bottom"] * (v > 0.58)


def _position(view: Look, rng: random.Random) -> tuple[Question, Question] | None:
    candidates = [(i, half) for i in view.single() for half in _halves(view, i)]
    if not candidates:
        return None
    i, half = rng.choice(candidates)
    template = POSITION[rng.random() < 0.5] if half in ("left", "right") else POSITION[0]
    kind = view.thing(i).kind
    return _yes_no(
        template.format(kind=kind, half=half),
        template.format(kind=kind, half=OPPOSITE[half]),
        "position",
        half,
        (i,),
    )


def _print(view: Look, rng: random.Random) -> tuple[Question, Question] | None:
    single = view.single()
    printed = [i for i in single if view.thing(i).print]
    bare = [i for i in single if not view.thing(i).print]
    if not printed:
        return None
    i = rng.choice(printed)
    thing = view.thing(i)
    if bare and rng.random() < (0.3 if not view.whole else 0.7):
        template = _phrase(rng, PLATE)
        other = view.thing(rng.choice(bare)).kind
        return _yes_no(
            template.format(kind=thing.kind), template.format(kind=other), "print", "plate", (i,)
        )
    same = world.DIGITS if thing.print in world.DIGITS else world.LETTERS
    wrong = rng.choice([c for c in same if c != thing.print])
    what = "digit" if thing.print in world.DIGITS else "letter"
    template = _phrase(rng, PRINT)
    texts = [
        template.format(what=what, a_what=a(what), text=text, kind=thing.kind)
        for text in (thing.print, wrong)
    ]
    return _yes_no(texts[0], texts[1], "print", "print", (i,))


# ----------------------------------------------------------------------- open and captions


def opened(view: Look, rng: random.Random, topic: str | None = None) -> Question | None:
    """An open question of a topic (drawn by TOPICS where None); None where none is unambiguous."""
    if topic is None:
        topic = rng.choices(list(TOPICS), list(TOPICS.values()))[0]
    found = _open_answer(view, rng, topic)
    if found is None:
        return None
    slots, answer, things = found
    if topic == "half":
        text = OPEN["half"][answer in ("top", "bottom")].format(**slots)
    else:
        text = _phrase(rng, OPEN[topic]).format(**slots)
    return Question(text, answer, TOPIC_CATEGORY[topic], topic, None, "", things)


def _open_answer(
    view: Look, rng: random.Random, topic: str
) -> tuple[dict[str, str], str, tuple[int, ...]] | None:
    single = view.single()
    if topic == "number":
        counts = view.counts()
        if not counts:
            return None
        many = [k for k, n in counts.items() if n > 1]
        kind = rng.choice(many) if many and rng.random() < 0.6 else rng.choice(list(counts))
        things = tuple(i for i in view.seen if view.thing(i).kind == kind)
        return {"kinds": plural(kind)}, NUMBERS[counts[kind]], things
    if topic == "exists":
        absent = view.absent()
        if not view.seen or not absent:
            return None
        i = rng.choice(view.seen)
        both = [view.thing(i).kind, rng.choice(absent)]
        rng.shuffle(both)
        return {"one": a(both[0]), "other": a(both[1])}, view.thing(i).kind, (i,)
    if topic in ("beside", "upon"):
        wanted = ("left", "right") if topic == "beside" else ("above", "below")
        for _ in range(4):
            found = _related(view, rng)
            if found and found[1] in wanted:
                i, side, j = found
                return {"a": view.thing(i).kind, "b": view.thing(j).kind}, side, (i, j)
        return None
    if topic == "neighbor":
        return _neighbor(view, rng)
    if not single:
        return None
    i = rng.choice(single)
    thing = view.thing(i)
    if topic == "name":
        same = [j for j in view.seen if view.thing(j).color == thing.color]
        if len(same) != 1 or view.unclear:
            return None
        return {"color": thing.color}, thing.kind, (i,)
    if topic == "spot":
        spot = world.place(thing, view.box)
        same = [j for j in view.seen if world.place(view.thing(j), view.box) == spot]
        if len(same) != 1 or view.unclear:
            return None
        return {"place": spot}, thing.kind, (i,)
    if topic == "half":
        halves = _halves(view, i)
        return ({"kind": thing.kind}, rng.choice(halves), (i,)) if halves else None
    if topic == "place":
        return {"kind": thing.kind}, world.place(thing, view.box), (i,)
    if topic == "print":
        printed = [j for j in single if view.thing(j).print]
        if not printed:
            return None
        i = rng.choice(printed)
        return {"kind": view.thing(i).kind}, view.thing(i).print.lower(), (i,)
    if topic == "size" and not view.whole:
        return None
    if topic == "either":
        field = rng.choice(("color", "color", "pattern", "size" if view.whole else "color"))
        both = [getattr(thing, field), _wrong(view, rng, thing, field)]
        rng.shuffle(both)
        slots = {"kind": thing.kind, "one": both[0], "other": both[1]}
        return slots, getattr(thing, field), (i,)
    return {"kind": thing.kind}, getattr(thing, topic), (i,)


def _neighbor(view: Look, rng: random.Random) -> tuple[dict[str, str], str, tuple[int, ...]] | None:
    """The only thing on one side of another."""
    single = view.single()
    if not single or len(single) != len(view.seen) or view.unclear:
        return None
    j = rng.choice(single)
    side = rng.choice(("left", "right", "above", "below"))
    there = [i for i in single if side in world.relation(view.thing(i), view.thing(j))]
    near = [i for i in single if i != j and not world.relation(view.thing(i), view.thing(j))]
    if len(there) != 1 or near:
        return None
    words = f"{side} of" if side in ("left", "right") else side
    return {"side": words, "b": view.thing(j).kind}, view.thing(there[0]).kind, (there[0], j)


def caption(view: Look, rng: random.Random, short: bool = False) -> Question | None:
    """All things from left to right; the long form with looks, places and one relation."""
    counts = {k: n for k, n in view.counts().items() if n}
    if not counts:
        return None
    order = sorted(view.seen, key=lambda i: view.thing(i).x)
    parts: list[str] = []
    done: set[str] = set()
    for i in order:
        thing = view.thing(i)
        if thing.kind in done or thing.kind not in counts:
            continue
        done.add(thing.kind)
        if counts[thing.kind] > 1:
            parts.append(f"{NUMBERS[counts[thing.kind]]} {plural(thing.kind)}")
        elif short:
            parts.append(a(thing.kind))
        else:
            looks = [thing.size] if view.whole else []
            looks += [thing.color] + ([thing.pattern] if thing.pattern != "plain" else [])
            where = world.place(thing, view.box)
            parts.append(f"{a(' '.join([*looks, thing.kind]))} in the {where}")
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    if short:
        return Question(rng.choice(LIST), listed, "caption", "list", None, "", tuple(order))
    text = f"there {'is' if parts[0].startswith('a') else 'are'} {listed}."
    found = _related(view, rng)
    if found:
        i, side, j = found
        words = f"to the {side} of" if side in ("left", "right") else side
        text += f" the {view.thing(i).kind} is {words} the {view.thing(j).kind}."
    return Question(rng.choice(DESCRIBE), text, "caption", "caption", None, "", tuple(order))


# ----------------------------------------------------------------------- exams and export


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


def conversations(view: Look, rng: random.Random, image: str) -> Iterator[dict[str, Any]]:
    """Questions for training about a scene or window, mixed as in the pocket model's last stage.

    Args:
        image: the picture's path, for the rows.

    Yields:
        Rows in LLaVA's format, one question each: {"id", "image", "conversations": [{"from":
        "human", "value": "<image>\n..."}, {"from": "gpt", "value": ...}]}.
    """
    from .lessons import Packer  # imports transformers

    asked = [q for turns in Packer.lesson(view, "yesno", rng, view) for q in turns]
    for number, question in enumerate(asked):
        told = ("human", f"<image>\n{question.text}"), ("gpt", question.answer)
        yield {
            "id": f"{Path(image).stem}-{number}",
            "image": image,
            "conversations": [{"from": who, "value": value} for who, value in told],
        }


def export(n: int, out: Path | str, seed: int = 0, habit: str = "both", size: int = 768) -> Path:
    """Write n scenes with pictures, masks, ground truth and questions; returns the folder.

    images/000000.png (size x size), masks/000000.png (8 bits: 0 background, i + 1 thing i),
    scenes.jsonl (the scene, boxes in pixels, counts, relations), questions.jsonl (id, image,
    question, answer, label, category, split, habit, things, and for print the window to look
    through), conversations.jsonl (other questions, for `foveate train cli`: see `conversations`).
    `habit`: "with", "against" or "both" (halves, marked in every row).
    """
    if n < 1:
        raise ValueError(f"the number of scenes must be at least 1, not {n}")
    if habit not in ("with", "against", "both"):
        raise ValueError(f'habit is "with", "against" or "both", not {habit!r}')
    out = Path(out)
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with (
        (out / "scenes.jsonl").open("w", encoding="utf-8") as scenes,
        (out / "questions.jsonl").open("w", encoding="utf-8") as questions,
        (out / "conversations.jsonl").open("w", encoding="utf-8") as lessons,
    ):
        number = 0
        for k in range(n):
            which = ("with", "against")[k * 2 // n] if habit == "both" and n > 1 else habit
            scene = world.sample(FIRST_HELD_OUT + seed + k, "with" if which == "both" else which)
            name = f"{k:06d}.png"
            world.draw(scene, size).save(out / "images" / name)
            index = np.zeros((size, size), np.uint8)
            for i, mask in enumerate(world.masks(scene, size)):
                index[mask] = i + 1
            Image.fromarray(index).save(out / "masks" / name)
            truth = {
                "image": f"images/{name}",
                "mask": f"masks/{name}",
                "scene": scene.to_dict(),
                "boxes": world.boxes(scene, size),
                "counts": world.counts(scene),
                "relations": world.relations(scene),
            }
            scenes.write(json.dumps(truth) + "\n")
            for question, box in _asked(scene, random.Random(f"export-{seed}-{k}")):
                row = {"id": number, "image": f"images/{name}", "habit": scene.habit}
                row |= {("question" if k == "text" else k): v for k, v in asdict(question).items()}
                questions.write(json.dumps(row | ({"window": box} if box else {})) + "\n")
                number += 1
            rng = random.Random(f"conversations-{seed}-{k}")
            for row in conversations(look(scene), rng, f"images/{name}"):
                lessons.write(json.dumps(row) + "\n")
    return out


def _asked(scene: Scene, rng: random.Random) -> Iterator[tuple[Question, Box | None]]:
    """The exam and, for print, an open question with the window that makes it legible."""
    for question in exam(scene, rng):
        yield question, None
    for box, i in print_windows(scene, rng):
        thing = scene.things[i]
        text = _phrase(rng, OPEN["print"]).format(kind=thing.kind)
        yield Question(text, thing.print.lower(), "print", "print", None, "", (i,)), box
    described = caption(look(scene), rng)
    if described:
        yield described, None


def texts() -> Iterator[str]:
    """Every phrasing and every word of an answer: what a vocabulary must cover."""
    for group in (DESCRIBE, LIST, EXISTENCE, ATTRIBUTE, NUMBER, ONE, BESIDE, UPON, POSITION,
                  PRINT, PLATE, SUFFIXES, *OPEN.values()):  # fmt: skip
        for template in group:
            yield " ".join(part.split("{")[0] for part in template.split("}"))
    yield " ".join((*COLORS, *PATTERNS, *SIZES, *NUMBERS, *OPPOSITE, *KINDS, *map(plural, KINDS)))
    yield " ".join((*world.LETTERS, *world.DIGITS, "letter digit center yes no a an and of to in"))
    yield "there is are the side half thing. ,"
