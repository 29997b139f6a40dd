"""How published scorers read an answer: yes, no or None (neither), restated word by word."""

from __future__ import annotations

import difflib


def pope(answer: str) -> str:
    """POPE and R-Bench: no if one of three words stands before the first full stop, else yes."""
    sentence = answer[: answer.index(".")] if "." in answer else answer
    words = sentence.replace(",", "").split(" ")
    return "no" if "No" in words or "no" in words or "not" in words else "yes"


def opera(answer: str) -> str:
    """POPE in OPERA: every sentence counts, and so do "NO" and words that end in n't."""
    for word in answer.replace(".", "").replace(",", "").split(" "):
        if word in ("No", "no", "NO", "not") or word[-3:] == "n't":
            return "no"
    return "yes"


def vicrop(answer: str) -> str:
    """POPE in ViCrop: what the answer is more like by difflib's ratio, yes on a tie."""
    likeness = {w: difflib.SequenceMatcher(None, answer, w).ratio() for w in ("yes", "no")}
    return "no" if likeness["no"] > likeness["yes"] else "yes"


def lmms(answer: str) -> str | None:
    """POPE in lmms-eval: the word alone, in any case, with spaces around it."""
    for word in ("yes", "no"):
        if answer.strip().lower() == word:
            return word
    return None


def amber(answer: str) -> str | None:
    """AMBER: exactly Yes or exactly No."""
    return answer.lower() if answer in ("Yes", "No") else None


def contains(answer: str) -> str | None:
    """AMBER in lmms-eval: yes anywhere, else no anywhere."""
    for word in ("yes", "no"):
        if word in answer.lower():
            return word
    return None


def mme(answer: str) -> str | None:
    """MME: yes, else no, within the first four characters, unstripped."""
    return contains(answer[:4])


def lmms_mme(answer: str) -> str | None:
    """MME in lmms-eval: the same without full stops and spaces around, or one letter."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return mme(text)


def vlmevalkit(answer: str) -> str | None:
    """VLMEvalKit: one of the two words without the other."""
    words = without_marks(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def without_marks(text: str) -> str:
    """VQA's rule for punctuation.

    A mark that has a space on one side, anywhere in the text, is deleted everywhere; others become
    spaces. If the text has a digit, a comma and a digit in a row, all marks are deleted. Then the
    first 32 full stops that no digit follows are deleted.
    """
    thousands = any(
        text[i].isdigit() and text[i + 1] == "," and text[i + 2].isdigit()
        for i in range(len(text) - 2)
    )
    result = ""
    for mark in text:
        if mark not in ';/[]"{}()=+\\_-><@`,?!':
            result += mark
        elif not (thousands or mark + " " in text or " " + mark in text):
            result += " "
    kept, deleted = "", 0
    for i, character in enumerate(result):
        if character == "." and deleted < 32 and not result[i + 1 : i + 2].isdigit():
            deleted += 1
        else:
            kept += character
    return kept


def normalised(answer: str) -> str:
    """The EvalAI normaliser, with the few contractions that the question files here have."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = without_marks(text.strip().replace("\n", " ").replace("\t", " ").strip())
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    contractions = {"dont": "don't", "cant": "can't", "whats": "what's"}
    words = []
    for word in text.split():
        if word in numbers:
            word = str(numbers.index(word))
        word = {"none": "0", "ten": "10"}.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(contractions.get(word, word))
    return " ".join(words)


def letter(answer: str) -> str | None:
    """lmms-eval's letter of a choice: the first of six places where an A, B, C or D stands."""
    text = answer.strip().upper()
    if text[:1] and text[0] in "ABCD":
        return text[0]
    for i in range(len(text)):
        for word in ("ANSWER", "CHOICE", "OPTION"):
            if not text[i:].startswith(word):
                continue
            rest = text[i + len(word) :]
            if rest.lstrip().startswith("IS") and rest[0].isspace():
                after = rest.lstrip()[2:]
                if (found := _after_a_gap(after)) is not None:
                    return found
            if (found := _after_a_gap(rest)) is not None:
                return found
    for i in range(len(text) - 2):
        if text[i] == "(" and text[i + 1] in "ABCD" and text[i + 2] == ")":
            return text[i + 1]
    for i, character in enumerate(text):
        if character in "ABCD" and text[i + 1 :].lstrip()[:1] in (".", ")", "]"):
            return character
    for word in text.split():
        if word in ("A", "B", "C", "D"):
            return word
    everywhere = [character for character in text if character in "ABCD"]
    return everywhere[0] if len(everywhere) == 1 else None


def _after_a_gap(text: str) -> str | None:
    """The letter after at least one space or colon."""
    rest = text.lstrip(": \t\n")
    return rest[0] if rest != text and rest[:1] and rest[0] in "ABCD" else None


def nearest(answer: str, options: list[str]) -> int:
    """The first option with the largest difflib ratio."""
    best, best_ratio = 0, -1.0
    for i, option in enumerate(options):
        ratio = difflib.SequenceMatcher(None, answer, option).ratio()
        if ratio > best_ratio:
            best, best_ratio = i, ratio
    return best
