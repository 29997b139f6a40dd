"""AMBER's captions: each noun is neutral, there, a listed hallucination, or invented."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def score(
    root: Path,
    nouns_of: dict[Any, list[str]],
    options: dict[str, Any],
    similar: Callable[[str, str], float] = lambda first, second: float(first == second),
) -> dict[str, float]:
    data = root / "amber" / "data"
    related = json.loads((data / "relation.json").read_text())
    neutral = (data / "safe_words.txt").read_text().split()
    vocabulary = set(related) | {word for words in related.values() for word in words}
    notes = {row["id"]: row for row in json.loads((data / "annotations.json").read_text())}
    queries = json.loads((data / "query" / "query_generative.json").read_text())
    named = invented = covered = there = fallen = listed = bad_captions = 0
    for line, query in enumerate(queries):
        truth, likely = notes[query["id"]]["truth"], notes[query["id"]]["hallu"]
        truth_words = _with_related(truth, related)
        likely_words = _with_related(likely, related)
        is_covered, is_fallen, wrong = [False] * len(truth), [False] * len(likely), 0
        for noun in nouns_of["generative", line]:
            if noun not in vocabulary:
                continue
            named += 1
            if noun in neutral:
                continue
            equal = [owner for word, owner in truth_words if word == noun]
            if equal:
                is_covered[equal[0]] = True
                continue
            equal = [owner for word, owner in likely_words if word == noun]
            if equal:
                is_fallen[equal[0]] = True
            alike = [owner for word, owner in likely_words if similar(noun, word) > 0.8]
            if alike:
                is_fallen[alike[0]] = True
            alike = [owner for word, owner in truth_words if similar(noun, word) > 0.8]
            if alike:
                is_covered[alike[0]] = True
            else:
                wrong += 1
        invented += wrong
        bad_captions += wrong > 0
        covered, there = covered + sum(is_covered), there + len(truth)
        fallen, listed = fallen + sum(is_fallen), listed + len(likely)
    return {
        "chair": round(100 * invented / (named + 0.001), 1),
        "cover": round(100 * covered / (there + 0.001), 1),
        "hal": round(100 * bad_captions / (len(queries) + 0.001), 1),
        "cog": round(100 * fallen / (listed + 0.001), 1),
    }


def _with_related(words: list[str], related: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Related words of every word, then the words themselves, each with its owner's number."""
    pairs = []
    for owner, word in enumerate(words):
        for other in related.get(word, []):
            pairs.append((other, owner))
    for owner, word in enumerate(words):
        pairs.append((word, owner))
    return pairs
