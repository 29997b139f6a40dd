"""AMBER's yes/no part, from the description of inference.py: counters that start at 0.001."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.references.scorers import answers as said_by

PARSERS = {
    "exact": said_by.amber,
    "lmms": said_by.contains,
    "vlmevalkit": said_by.vlmevalkit,
}
KIND_OF_TYPE = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
SPLITS = ("existence", "attribute", "relation")
START = {"questions": 0.001, "said no": 0.001, "no is true": 0.001, "right": 0, "right no": 0}


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    data = root / "amber" / "data"
    notes = {row["id"]: row for row in json.loads((data / "annotations.json").read_text())}
    count = {kind: dict(START) for kind in (*KIND_OF_TYPE.values(), "all")}
    plain: dict[str, list[bool]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        queries = json.loads((data / "query" / f"query_discriminative-{split}.json").read_text())
        for line, query in enumerate(queries):
            note = notes[query["id"]]
            said, truth = PARSERS[options["parser"]](answers[split, line]), note["truth"]
            for counter in (count[KIND_OF_TYPE[note["type"]]], count["all"]):
                counter["questions"] += 1
                counter["said no"] += said == "no"
                counter["no is true"] += truth == "no"
                counter["right"] += said == truth
                counter["right no"] += said == truth == "no"
            plain[split].append(said == truth)
    attributes = [count[kind] for kind in ("state", "number", "action")]
    count["attribute"] = {name: sum(kind[name] for kind in attributes) for name in START}
    scores = {
        f"{group}/{name}": value
        for group, counter in count.items()
        for name, value in _metrics(counter, 0.001 if group == "existence" else 0.0001).items()
    }
    scores["average/accuracy"] = 100 * sum(sum(r) / len(r) for r in plain.values()) / 3
    return scores


def _metrics(counter: dict[str, float], epsilon: float) -> dict[str, float]:
    precision = round(100 * counter["right no"] / counter["said no"], 1)
    recall = round(100 * counter["right no"] / counter["no is true"], 1)
    p, r = precision / 100, recall / 100
    return {
        "accuracy": round(100 * counter["right"] / counter["questions"], 1),
        "precision": precision,
        "recall": recall,
        "f1": round(100 * 2 * p * r / (p + r + epsilon), 1),
    }
