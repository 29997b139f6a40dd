"""MME, from the description of calculation.py: accuracy of questions plus accuracy of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.references.scorers import answers as said_by

PARSERS = {
    "official": said_by.mme,
    "lmms": said_by.lmms_mme,
    "vlmevalkit": said_by.vlmevalkit,
}
PERCEPTION = [
    *("existence", "count", "position", "color"),
    *("posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def score(root: Path, answers: dict[Any, str], options: dict[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for task in PERCEPTION + COGNITION:
        files = sorted((root / "mme/MME_Benchmark_release_version" / task).rglob("*.txt"))
        right_questions = right_images = line = 0
        for file in files:
            right = 0
            for text in file.read_text().splitlines():
                label = text.split("\t")[1].lower()
                right += PARSERS[options["parser"]](answers[task, line]) == label
                line += 1
            right_questions += right
            right_images += right == 2
        scores[f"{task}/acc"] = 100 * right_questions / line
        scores[f"{task}/acc+"] = 100 * right_images / len(files)
        scores[f"{task}/score"] = scores[f"{task}/acc"] + scores[f"{task}/acc+"]
    scores["perception"] = sum(scores[f"{task}/score"] for task in PERCEPTION)
    scores["cognition"] = sum(scores[f"{task}/score"] for task in COGNITION)
    scores["hallucination"] = sum(scores[f"{task}/score"] for task in PERCEPTION[:4])
    return scores
