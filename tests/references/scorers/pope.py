"""POPE, from the description of evaluate.py: TP, FP, TN, FN around "yes", per split."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Any

from tests.references.scorers import answers as said_by

PARSERS = {
    "official": said_by.pope,
    "lmms": said_by.lmms,
    "vlmevalkit": said_by.vlmevalkit,
    "opera": said_by.opera,
    "vicrop": said_by.vicrop,
}


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    harness = options["parser"] in ("lmms", "vlmevalkit")
    scores, everything = {}, []
    for split in options["splits"]:
        pairs = []
        for line, row in enumerate(_rows(root, split, options)):
            pairs.append((PARSERS[options["parser"]](answers[split, line]), row["label"]))
        everything += pairs
        for name, value in _metrics(pairs, options["parser"]).items():
            scores[f"{split}/{name}"] = value
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        per_split = [scores[f"{split}/{name}"] for split in options["splits"]]
        scores[f"average/{name}"] = sum(per_split) / len(per_split)
    if harness:
        for name, value in _metrics(everything, options["parser"]).items():
            scores[f"pooled/{name}"] = value
    return scores


def _rows(root: Path, split: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    source = options["source"]
    if source == "coco":
        folder = "output/coco" if options["version"] == "head" else f"coco_{options['version']}"
        text = (root / "pope" / folder / f"coco_pope_{split}.json").read_text()
        return [json.loads(line) for line in text.splitlines()]
    path = root / "pope/output/seem" / source / f"{source}_pope_seem_{split}.json"
    return json.loads(path.read_text())


def _metrics(pairs: list[tuple[str | None, str]], parser: str) -> dict[str, float]:
    tp = fp = tn = fn = 0
    for said, truth in pairs:
        if truth == "yes" and said == "yes":
            tp += 1
        elif truth == "yes" and (said == "no" or parser != "lmms"):  # lmms-eval skips unread ones
            fn += 1
        elif truth == "no" and said == "yes":
            fp += 1
        elif truth == "no" and said == "no":
            tn += 1
    undefined = 0.0 if parser in ("lmms", "vlmevalkit") else nan
    precision = tp / (tp + fp) if tp + fp else undefined
    recall = tp / (tp + fn) if tp + fn else undefined
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else undefined
    return {
        "accuracy": 100 * (tp + tn) / len(pairs),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * f1,
        "yes_ratio": 100 * (tp + fp) / len(pairs),
        "label_yes_ratio": 100 * sum(truth == "yes" for _, truth in pairs) / len(pairs),
    }
