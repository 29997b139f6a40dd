"""The phrasings of questions (phrases.json), and every word that questions and answers use.

Templates name their slots; the first of a group is the most frequent (see `questions.phrase`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .world import DIGITS, KINDS, LETTERS, VALUES

_FILE: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
# open questions per topic: their category, how often one is drawn, their phrasings
OPEN: dict[str, dict[str, Any]] = _FILE.pop("open")
# what is usual, per topic: what asks for it, and the sentences that tell
TALK: dict[str, dict[str, list[str]]] = _FILE.pop("talk")
PHRASES: dict[str, list[str]] = _FILE
SUFFIXES = PHRASES["suffixes"]  # of POPE's users, MME, LLaVA-1.5, LLaVA-NeXT and ViCrop
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above",
            "top": "bottom", "bottom": "top"}  # fmt: skip


def a(word: str) -> str:
    """The word with its indefinite article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural(kind: str) -> str:
    return {"fish": "fish"}.get(kind, kind + "s")


def texts() -> Iterator[str]:
    """Every phrasing and every word of an answer: what a vocabulary must cover."""
    for group in (*PHRASES.values(), *(topic["phrases"] for topic in OPEN.values())):
        for template in group:
            yield " ".join(part.split("{")[0] for part in template.split("}"))
    values = VALUES["color"] + VALUES["pattern"] + VALUES["size"]
    yield " ".join((*values, *NUMBERS, *OPPOSITE, *KINDS, *map(plural, KINDS)))
    yield " ".join((*LETTERS, *DIGITS, "letter digit center yes no a an and of to in"))
    yield "there is are the side half thing. ,"
