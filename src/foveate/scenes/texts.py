"""Text alone about the drawn world: what a language model reads before it sees a picture.

    documents(scene, rng) -> [[Question, ...], ...]    # conversations, no picture among them

Four kinds of conversation. "habit": questions about a scene that nobody describes, so that the
best answer is what is usual. "reading": a caption, then questions about it, so that the answer
stands in the text before. "caption": a description. "talk": what is usual, said outright.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from . import questions
from .habits import small_talk
from .questions import Question, View
from .world import Scene

SHARES = {"habit": 0.45, "reading": 0.35, "caption": 0.1, "talk": 0.1}  # of the conversations
# what is asked: yes/no pairs as in the last lessons with pictures, open questions beside them
PAIRS = {"existence": 8, "attribute": 6, "number": 4, "relation": 6, "position": 2, "print": 1.5}
READ = {category: share for category, share in PAIRS.items() if category != "print"}
P_OPEN = 0.4


def documents(scene: Scene, rng: random.Random, number: int = 24) -> list[list[Question]]:
    """Conversations about one scene. Those that read, the longest, come first."""
    view, made, read = questions.look(scene), list[list[Question]](), list[list[Question]]()
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=number)
    for kind in kinds:
        if kind == "talk":
            made.append([small_talk(rng)])
        elif kind == "caption":
            described = questions.caption(view, rng, short=rng.random() < 0.4)
            made += [[described]] if described else []
        elif kind == "habit":
            made += [[question] for question in _asked(view, rng, PAIRS)]
        else:
            read += _read(view, rng)
    rng.shuffle(made)
    return read + made


def _asked(view: View, rng: random.Random, shares: dict[str, float]) -> Iterator[Question]:
    """An open question, or both of a yes/no pair, or nothing."""
    if rng.random() < P_OPEN:
        question = questions.opened(view, rng)
        if question and question.category in shares:
            yield question
        return
    category = rng.choices(list(shares), list(shares.values()))[0]
    yield from questions.pairs(view, rng, category) or ()


def _read(view: View, rng: random.Random) -> list[list[Question]]:
    """A caption, and one or more questions that it answers."""
    told = questions.caption(view, rng)
    if told is None:
        return []
    asked: list[Question] = []
    if rng.random() < 0.15:
        short = questions.caption(view, rng, short=True)
        asked += [short] if short else []
    for _ in range(2):
        asked += _asked(view, rng, READ)
    rng.shuffle(asked)
    asked = list(dict.fromkeys(asked))
    conversations = [asked[i : i + 2] for i in range(0, min(4, len(asked)), 2)]
    return [
        [replace(first, text=f"{told.answer} {first.text}"), *rest]
        for first, *rest in conversations
    ]
