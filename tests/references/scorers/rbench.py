"""R-Bench, from the description of eval.py: of an id that comes twice, the last line counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.references.scorers import answers as said_by

PARSERS = {
    "official": said_by.pope,
    "lmms": said_by.lmms,
    "vlmevalkit": said_by.vlmevalkit,
}
NAMES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    home = root / "rbench" / "data_filterd"
    rows = json.loads((home / "image-level_filterd.json").read_text())
    said_of, truth_of, every_line = {}, {}, []
    for line, row in enumerate(rows):
        said = PARSERS[options["parser"]](answers["image", line])
        truth = "no" if "no" in row["label"].lower() else "yes"
        said_of[row["question_id"]], truth_of[row["question_id"]] = said, truth
        every_line.append((said, truth))
    scores = {f"all/{name}": 100 * value for name, value in _metrics(every_line).items()}
    subsets = []
    for i in range(1, 6):
        ids = json.loads((home / f"nocaps_image-level_rel_ids_{i}.json").read_text())
        subsets.append(_metrics([(said_of[name], truth_of[name]) for name in ids]))
        for name in NAMES:
            scores[f"subset{i}/{name}"] = 100 * subsets[-1][name]
    for name in NAMES:
        scores[f"average/{name}"] = round(100 * sum(s[name] for s in subsets) / 5, 2)
    return scores


def _metrics(pairs: list[tuple[str | None, str]]) -> dict[str, float]:
    tp = sum(said == "yes" and truth == "yes" for said, truth in pairs)
    fp = sum(said == "yes" and truth == "no" for said, truth in pairs)
    tn = sum(said == "no" and truth == "no" for said, truth in pairs)
    fn = sum(said != "yes" and truth == "yes" for said, truth in pairs)
    precision = tp / (tp + fp + 1e-5)
    recall = tp / (tp + fn + 1e-5)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + 1e-5),
        "yes_ratio": (tp + fp) / len(pairs),
    }
