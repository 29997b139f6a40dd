"""HallusionBench: questions, groups of questions about several figures, and figures.

The official judge is GPT-4; here an answer is right, wrong, or unclear where it says neither. A
visual supplement whose figure is not shown (VS, figure 0) may be answered unclearly.
"""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Any

from tests.references.scorers import answers as said_by

PARSERS = {
    "vlmevalkit": said_by.vlmevalkit,
    "contains": lambda answer: "yes" if "yes" in answer.lower() else "no",
}


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    rows = json.loads((root / "hallusion_bench" / "HallusionBench.json").read_text())
    judged = []
    for line, row in enumerate(rows):
        if options["figures"] == "only" and row["visual_input"] == "0":
            continue
        said = PARSERS[options["parser"]](answers[row["category"], line])
        truth = "yes" if row["gt_answer"] == "1" else "no"
        verdict = "unclear" if said is None else "right" if said == truth else "wrong"
        hidden = row["category"] == "VS" and row["figure_id"] == "0"
        ok = verdict == "right" or (hidden and verdict == "unclear")
        pair = tuple(row[k] for k in ("category", "subcategory", "set_id", "question_id"))
        figure = tuple(row[k] for k in ("category", "subcategory", "set_id", "figure_id"))
        judged.append(
            {**row, "pair": pair, "figure": figure, "hidden": hidden}
            | {"said": said, "truth": truth, "verdict": verdict, "ok": ok}
        )
    scores = _summary(judged)
    for category in ("VD", "VS"):
        part = _summary([row for row in judged if row["category"] == category])
        for name in ("aAcc", "qAcc", "fAcc", "easy/qAcc", "hard/qAcc"):
            scores[f"{category}/{name}"] = part[name]
    return scores


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    easy = [row for row in rows if row["visual_input"] != "2"]
    hard = [row for row in rows if row["visual_input"] == "2"]
    figures = _groups([row for row in rows if not row["hidden"]], "figure")
    wrong = [row for row in rows if not row["ok"]]
    yes_labels = _mean([row["truth"] == "yes" for row in rows])
    # a wrong answer counts as the other word, an unclear one too
    yes_said = _mean([(row["truth"] == "yes") == row["ok"] for row in rows])
    causes = [_cause(row, rows) for row in wrong]
    return {
        "aAcc": _mean([row["ok"] for row in rows]),
        "qAcc": _mean([all(group) for group in _groups(rows, "pair")]),
        "fAcc": _mean([all(group) for group in figures]),
        "easy/qAcc": _mean([all(group) for group in _groups(easy, "pair")]),
        "hard/qAcc": _mean([all(group) for group in _groups(hard, "pair")]),
        "yes/difference": yes_said - yes_labels,
        "yes/false_positive": _mean([row["truth"] == "no" for row in wrong]),
        "figures/wrong": _mean([not any(group) for group in figures]),
        "figures/inconsistent": _mean([True in group and False in group for group in figures]),
        "figures/score": _mean([sum(group) / len(group) for group in figures]),
        **{
            f"cause/{name}": _mean([cause == name for cause in causes])
            for name in ("language", "vision", "mixed")
        },
    }


def _groups(rows: list[dict[str, Any]], key: str) -> list[list[bool]]:
    names = {row[key] for row in rows}
    return [[row["ok"] for row in rows if row[key] == name] for name in names]


def _mean(values: list[float]) -> float:
    return 100 * sum(values) / len(values) if values else nan


# what an answer that is not right shows on a changed figure: the verdict on the original figure,
# this verdict, whether both say the same -> cause; anything else is a visual illusion
DEPENDENT = {("right", "wrong", True): "mixed"}
SUPPLEMENT = {
    ("wrong", "wrong", True): "language",
    ("wrong", "wrong", False): "mixed",
    ("wrong", "unclear", True): "mixed",
    ("wrong", "unclear", False): "mixed",
}


def _cause(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if row["figure_id"] == "0":
        return "vision" if row["category"] == "VD" else "language"
    first = [r for r in rows if r["pair"] == row["pair"] and r["figure_id"] == "0"]
    verdict, said = (first[-1]["verdict"], first[-1]["said"]) if first else (None, "not asked")
    case = (verdict, row["verdict"], said == row["said"])
    if row["category"] == "VD":
        return DEPENDENT.get(case, "vision")
    if case == ("right", "wrong", True) and row["visual_input"] == "2":
        return "language"
    return SUPPLEMENT.get(case, "vision")
