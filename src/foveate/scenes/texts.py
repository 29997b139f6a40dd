"""Text alone about the drawn world: what a language model reads before it sees a picture.

    hearsay(scene, rng) -> [[Question], ...]     # conversations about a scene that nobody describes
    page(scene, rng) -> sentence, sentence, ...  # its caption, among sentences about what is usual
    reading(scene, rng) -> [[Question], ...]     # questions that the page answers

To hearsay the best answer is what is usual. On a page stands what is so, beside what is usual.
"""

import random
from collections.abc import Iterator

from . import questions
from .habits import small_talk
from .questions import Question, View
from .world import Scene

# what is asked: yes/no pairs as in the last lessons with pictures, open questions beside them
PAIRS = {"existence": 8, "attribute": 6, "number": 4, "relation": 6, "position": 2, "print": 1.5}
READ = {category: share for category, share in PAIRS.items() if category != "print"}
P_OPEN, P_CAPTION, P_TALK = 0.5, 0.12, 0.12


def hearsay(scene: Scene, rng: random.Random, number: int = 24) -> list[list[Question]]:
    """Questions about a scene, captions that might be its, and talk about what is usual."""
    view, made = questions.look(scene), list[Question | None]()
    for _ in range(number):
        drawn = rng.random()
        if drawn < P_TALK:
            made.append(small_talk(rng))
        elif drawn < P_TALK + P_CAPTION:
            made.append(questions.caption(view, rng, short=rng.random() < 0.4))
        else:
            made += _asked(view, rng, PAIRS)
    return [[question] for question in dict.fromkeys(made) if question]


def page(scene: Scene, rng: random.Random) -> Iterator[str]:
    """Sentences without end: at most one about what is usual, the scene's caption, more talk."""
    if rng.random() < 0.5:
        yield small_talk(rng).answer
    told = questions.caption(questions.look(scene), rng)
    if told:
        yield told.answer
    while True:
        yield small_talk(rng).answer


def reading(scene: Scene, rng: random.Random, number: int = 24) -> list[list[Question]]:
    """What a page's caption tells."""
    view, made = questions.look(scene), list[Question | None]()
    if rng.random() < 0.3:
        made.append(questions.caption(view, rng, short=True))
    for _ in range(number):
        made += _asked(view, rng, READ)
    return [[question] for question in dict.fromkeys(made) if question]


def _asked(view: View, rng: random.Random, shares: dict[str, float]) -> Iterator[Question]:
    """An open question, or both of a yes/no pair, or nothing."""
    if rng.random() < P_OPEN:
        question = questions.opened(view, rng)
        if question and question.category in shares:
            yield question
        return
    category = rng.choices(list(shares), list(shares.values()))[0]
    yield from questions.pairs(view, rng, category) or ()
