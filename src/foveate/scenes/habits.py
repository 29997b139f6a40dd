"""What the world's habits say without a picture: answers to questions, and talk about them.

usual(question) -> "yes" | "no" | "yellow" | ... | None   # what who sees nothing should answer
small_talk(rng) -> Question                               # "a sun is often yellow."
"""

import random
import re

from . import world
from .phrases import OPPOSITE, TALK, a, plural
from .questions import Question
from .world import KINDS, THEMES, VALUES

# a kind's frequency in scenes, as a multiple of an even share, from which the answer is yes or no
OFTEN, SELDOM = 1.2, 0.66
HEIGHTS = {"top": 1, "bottom": -1, "any": 0}


def usual(question: Question) -> str | None:
    """The answer of one who knows the habits and sees nothing; None where no habit speaks.

    Existence goes by how often scenes show the kind, attributes by the kind's typical value,
    above and below by the height at which both kinds usually are.
    """
    words = re.findall(r"[a-z0-9]+", question.text.lower())
    kinds = [word for word in words if word in KINDS]
    if not kinds:
        return None
    kind = KINDS[kinds[0]]
    if question.category == "existence" and question.label:
        often = world.frequency(kinds[0]) * len(KINDS)
        return "yes" if often >= OFTEN else "no" if often <= SELDOM else None
    if question.topic in VALUES:
        typical = str(getattr(kind, question.topic))
        if question.label is None:
            return typical
        return "yes" if typical in words else "no"
    if question.category == "relation" and len(kinds) == 2 and question.topic != "neighbor":
        higher = HEIGHTS[kind.height] - HEIGHTS[KINDS[kinds[1]].height]
        if abs(higher) < 2 or not {"above", "below"} & set(words):
            return None
        side = "above" if higher > 0 else "below"
        if question.label is None:
            return side
        return "yes" if side in words else "no"
    return None


def small_talk(rng: random.Random) -> Question:
    """A sentence about what is usual, with what asks for it; the answer is one sentence."""
    topic = rng.choice(list(TALK))
    name = rng.choice(list(KINDS))
    kind = KINDS[name]
    higher = [other for other, k in KINDS.items() if HEIGHTS[k.height] == -HEIGHTS[kind.height]]
    if topic == "height" and kind.height == "any":
        topic = "color"
    if topic == "above" and (kind.height == "any" or not higher):
        topic = "pattern"
    slots = {
        "kind": name,
        "a_kind": a(name),
        "kinds": plural(name),
        "color": kind.color,
        "second": kind.second,
        "size": kind.size,
        "pattern": kind.pattern,
        "height": kind.height,
        "print": kind.print.lower(),
    }
    if topic == "above":
        side = "above" if kind.height == "top" else "below"
        slots |= {"other": a(rng.choice(higher)), "side": side, "opposite": OPPOSITE[side]}
    if topic == "together":
        theme = [k for k in KINDS if KINDS[k].theme == kind.theme and k != name]
        weights = [KINDS[k].weight for k in theme]
        slots |= {"other": a(rng.choices(theme, weights)[0])}
        slots |= {"background": THEMES[kind.theme][1]}
    asked, told = (rng.choice(TALK[topic][part]) for part in ("asked", "told"))
    return Question(asked.format(**slots), told.format(**slots), "talk", topic)
