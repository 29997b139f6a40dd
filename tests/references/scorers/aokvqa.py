"""A-OKVQA: min(1, n / 3) of equal strings, and the equal choice; lost answers are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.references.scorers import answers as said_by
from tests.references.scorers.textvqa import left_out


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    rows = json.loads((root / "aokvqa" / "aokvqa_v1p0_val.json").read_text())
    direct, choice = [], []
    for line, row in enumerate(rows):
        if not row["difficult_direct_answer"] or options["difficult"]:
            direct.append(_direct(answers["direct", line], row["direct_answers"], options))
        said = _chosen(answers["choice", line], row["choices"], options["parser"])
        choice.append(said == row["choices"][row["correct_choice_idx"]])
    return {
        "direct/accuracy": 100 * sum(direct) / len(direct),
        "choice/accuracy": 100 * sum(choice) / len(choice),
    }


def _direct(answer: str, people: list[str], options: dict[str, Any]) -> float:
    if options["accuracy"] == "official":
        return min(1, sum(person == answer for person in people) / 3)
    answer, people = said_by.normalised(answer), [said_by.normalised(p) for p in people]
    if options["accuracy"] == "vqa":
        return left_out(answer, people)
    return min(1, 0.3 * sum(person == answer for person in people))


def _chosen(answer: str, choices: list[str], parser: str) -> str | None:
    if parser == "official":
        return answer if answer in choices else None
    for choice in choices:
        if choice.lower() == answer.strip().rstrip(".").lower():
            return choice
    named = said_by.letter(answer)
    by_letter = dict(zip("ABCD", choices, strict=False))
    return by_letter.get(named or "")
