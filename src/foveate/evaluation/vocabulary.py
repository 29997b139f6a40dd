"""Words for objects in a text, by category."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import FoveateError
from ..scenes import questions, world

_WORD = re.compile(r"[^\W_]+")
_IRREGULAR = {
    "man": "men", "person": "people", "child": "children", "mouse": "mice", "foot": "feet",
    "tooth": "teeth", "goose": "geese", "sheep": "sheep", "fish": "fish", "deer": "deer",
}  # fmt: skip


@dataclass(frozen=True)
class Mention:
    """A word for an object in a text: where it starts (in characters) and what it stands for."""

    start: int
    word: str
    category: str


class Vocabulary:
    """Words for objects, by category.

    A word may have several parts ("hot dog"); of all that fit at a place the longest counts, so a
    hot dog is no dog. Case and hyphens do not matter. Plurals of the last part are found by the
    usual endings (-s, -es, -ies, -ves, -men) and a few irregular ones. A word that two categories
    list belongs to the first.
    """

    def __init__(self, categories: Mapping[str, Iterable[str]]) -> None:
        listed = [
            (tuple(_parts(word)), category)
            for category, words in categories.items()
            for word in (category, *words)
        ]
        self._category: dict[tuple[str, ...], str] = {}
        for phrase, category in listed:
            if phrase:
                self._category.setdefault(phrase, category)
        for phrase, category in listed:  # what is listed wins over a plural that looks like it
            for plural in _plurals(phrase[-1]) if phrase else ():
                self._category.setdefault((*phrase[:-1], plural), category)
        self._longest = max(map(len, self._category), default=0)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """One category per line: its name, then its synonyms, separated by commas.

        CHAIR's synonyms.txt is such a file. Its further rules for compounds are not applied:
        list "baby elephant" with the elephant, or it counts as a baby and an elephant.

        Raises `FoveateError` where the file cannot be read or holds no word.
        """
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise FoveateError(f"The synonyms cannot be read from {path}: {why}.") from error
        rows = [[word.strip() for word in line.split(",") if _parts(word)] for line in lines]
        categories: dict[str, list[str]] = {}
        for row in rows:
            if row:
                categories.setdefault(row[0], []).extend(row[1:])
        vocabulary = cls(categories)
        if not vocabulary._category:
            raise FoveateError(
                f"{path} lists no words: write one category per line, as `person, man, woman`."
            )
        return vocabulary

    def category(self, word: str) -> str | None:
        """What a word stands for, or None."""
        return self._category.get(tuple(_parts(word)))

    def find(self, text: str) -> list[Mention]:
        """Every mention, repeated ones too, in the order of the text."""
        words = [(m.start(), m[0].lower()) for m in _WORD.finditer(text)]
        found, i = [], 0
        while i < len(words):
            for n in range(min(self._longest, len(words) - i), 0, -1):
                phrase = tuple(word for _, word in words[i : i + n])
                if category := self._category.get(phrase):
                    found.append(Mention(words[i][0], " ".join(phrase), category))
                    i += n
                    break
            else:
                i += 1
        return found

    def state(self) -> list[tuple[str, str]]:
        """What two vocabularies that label alike have in common."""
        return sorted((" ".join(phrase), c) for phrase, c in self._category.items())


@functools.cache
def of_scenes() -> Vocabulary:
    """The kinds of things on drawn scenes."""
    return Vocabulary({kind: (questions.plural(kind),) for kind in world.KINDS})


def _parts(word: str) -> list[str]:
    return [part.lower() for part in _WORD.findall(word)]


def _plurals(word: str) -> list[str]:
    for singular, plural in _IRREGULAR.items():
        if word == singular:
            return [plural]
        if singular in ("man", "child") and word.endswith(singular):  # and a human: humans
            return [word.removesuffix(singular) + plural, word + "s"]
    if re.search(r"[^aeiou]y$", word):
        return [word[:-1] + "ies"]
    if re.search(r"(?:[sxz]|ch|sh)$", word):
        return [word + "es"]
    if word.endswith("o"):
        return [word + "s", word + "es"]
    if match := re.search(r"[^f]fe?$", word):
        return [word[: match.start() + 1] + "ves", word + "s"]
    return [word + "s"]
