"""Open answers beside ten human ones: the normaliser of the VQA family, and two ways to count.

Also multiple choice: options as lettered lines, and how a letter is found in free text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

LETTERS = "ABCDEFGH"

NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`,?!'

# recognised with an apostrophe missing; the published list, which lacks he'll, she'd, we'd, ...
_ONE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
    wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    """Word with an apostrophe missing -> with it."""
    known = {word.replace("'", ""): word for word in _ONE.split()}
    for word in _TWO.split():
        first, second, third = word.split("'")
        known[f"{first}{second}'{third}"] = known[f"{first}'{second}{third}"] = word
    known |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    known |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    known["somebody'd"] = "somebodyd"  # the wrong way round in the published list, and kept
    return known


CONTRACTIONS = _contractions()


def punctuation(text: str) -> str:
    """VQA's rule for marks.

    A mark beside a space somewhere in the text vanishes, another one becomes a space; a digit,
    comma, digit anywhere makes all marks vanish. Full stops that no digit follows vanish too, the
    first 32 of them.
    """
    number, out = re.search(r"\d,\d", text), text
    for mark in MARKS:
        vanishes = number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if vanishes else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def normalise(answer: str) -> str:
    """The EvalAI normaliser: case, marks, numbers up to ten, articles, contractions."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def leave_one_out(answer: str, people: Sequence[str]) -> float:
    """VQA accuracy: the mean over people of ``min(1, n / 3)``, n others having said `answer`."""
    if not people:
        return 0.0
    same = [person == answer for person in people]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(people)


def three_tenths(answer: str, people: Sequence[str]) -> float:
    """ViCrop's accuracy ``min(0.3 n, 1)``: `leave_one_out` where there are ten people."""
    return min(0.3 * people.count(answer), 1.0)


def thirds(answer: str, people: Sequence[str]) -> float:
    """A-OKVQA's accuracy ``min(1, n / 3)``, nobody left out."""
    return min(1.0, people.count(answer) / 3)


# -- multiple choice -------------------------------------------------------------------------------


def lettered(options: Sequence[str]) -> str:
    """One line per option, ``A. red``."""
    return "\n".join(f"{x}. {option}" for x, option in zip(LETTERS, options, strict=False))


def letter(answer: str) -> str | None:
    """The letter A to D that lmms-eval finds in an answer; None without one.

    The first of these in the upper-cased answer: its first character; the letter after "answer",
    "choice" or "option"; one in brackets; one before a full stop or closing bracket; a word of its
    own; the only such letter anywhere. Words count too: "blue" is B, "Answer: C" is A.
    """
    text = answer.strip().upper()
    for place in (
        r"^([A-D])",
        r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\s*[.)\]]",
        r"(?:^|\s)([A-D])(?:\s|$)",
    ):
        if match := re.search(place, text):
            return match[1]
    letters = re.findall(r"[A-D]", text)
    return letters[0] if len(letters) == 1 else None


def nearest(answer: str, options: Sequence[str]) -> int:
    """Index of the option most like the answer by difflib's ratio, as ViCrop chooses."""
    ratios = [difflib.SequenceMatcher(None, answer, option).ratio() for option in options]
    return ratios.index(max(ratios))
