"""TextVQA: the mean over ten people, each left out in turn, of min(1, n / 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.references.scorers import answers as said_by


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    rows = json.loads((root / "textvqa" / "TextVQA_0.5.1_val.json").read_text())["data"]
    values = []
    for line, row in enumerate(rows):
        answer = said_by.normalised(answers["val", line])
        people = [said_by.normalised(person) for person in row["answers"]]
        if options["accuracy"] == "official":
            values.append(left_out(answer, people))
        else:
            values.append(min(1, 0.3 * sum(person == answer for person in people)))
    return {"accuracy": 100 * sum(values) / len(values)}


def left_out(answer: str, people: list[str]) -> float:
    values = []
    for i in range(len(people)):
        others = people[:i] + people[i + 1 :]
        values.append(min(1, sum(other == answer for other in others) / 3))
    return sum(values) / len(values)
