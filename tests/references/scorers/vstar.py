"""V*Bench: the letter of the answer, or the option most like it, against the label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.references.scorers import answers as said_by


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    rights: dict[str, list[bool]] = {"direct_attributes": [], "relative_position": []}
    text = (root / "vstar_bench" / "test_questions.jsonl").read_text()
    for line, row in enumerate(map(json.loads, text.splitlines())):
        answer = answers[row["category"], line]
        if options["parser"] == "lmms":
            said = said_by.letter(answer)
        else:
            choices = [part for part in row["text"].split("\n") if part.startswith("(")]
            said = "ABCD"[said_by.nearest(answer, choices)]
        rights[row["category"]].append(said == row["label"])
    scores = {f"{kind}/accuracy": 100 * sum(r) / len(r) for kind, r in rights.items()}
    everything = [right for r in rights.values() for right in r]
    return {**scores, "overall/accuracy": 100 * sum(everything) / len(everything)}
