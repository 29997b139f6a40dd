"""The exam of the pocket model's card: fresh scenes with and against the habit, as a user asks.

evaluate_pocket(folder=WEIGHTS, n=100, seed=0) -> dict               # the card's table
format_report(report) -> str
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from ..scenes import questions, world
from ..vlm.vlm import VLM
from . import build

EXAM_SEED = questions.FIRST_HELD_OUT + 500_000_000


@torch.no_grad()
def evaluate_pocket(
    folder: Path | str = build.WEIGHTS, n: int = 100, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Ask a saved model about n fresh scenes with and n against the habit, as a user would.

    Pictures of 768 pixels go through the processor, windows are cropped out of them, questions
    through the chat template, answers come from greedy `generate` in fp32 and must be right word
    by word. Returns {habit: {row: {"accuracy", "yes" (share of yes answers, else nan), "n"}}}.
    """
    vlm = VLM(*build.load_pocket(folder))
    report: dict[str, dict[str, dict[str, float]]] = {}
    for habit in ("with", "against"):
        given: dict[str, list[tuple[bool, bool | None]]] = defaultdict(list)
        for k in range(n):
            scene = world.sample(EXAM_SEED + seed * 1_000_003 + k, habit)
            rng = random.Random(f"exam-{seed}-{k}")
            image = world.draw(scene, 768)
            asked = [([image], q, rows_of(q)) for q in questions.exam(scene, rng)]
            for box, i in questions.print_windows(scene, rng):
                view, thing = questions.look(scene, box), scene.things[i]
                if i not in view.single():
                    continue
                text = rng.choice(questions.OPEN["print"]["phrases"]).format(kind=thing.kind)
                one = questions.Question(text, thing.print.lower(), "print", "print")
                x0, y0, x1, y1 = (round(768 * edge) for edge in box)
                crop = image.crop((x0, y0, x1, y1))
                asked += [
                    ([image], one, ["print, whole scene"]),
                    ([crop], one, ["print, correct window"]),
                    ([image, crop], one, ["print, scene and window"]),
                ]
            inputs = vlm.inputs([vlm.chat(images, q.text, None) for images, q, _ in asked])
            out = vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers = vlm.tokenizer.batch_decode(new, skip_special_tokens=True)
            for (_, question, rows), answer in zip(asked, answers, strict=True):
                answer = answer.strip().lower()
                yes = answer == "yes" if question.label else None
                for row in rows:
                    given[row].append((answer == question.answer, yes))
        report[habit] = {}
        for row, graded in sorted(given.items()):
            rights, yes = zip(*graded, strict=True)
            report[habit][row] = {
                "accuracy": float(np.mean(rights)),
                "yes": math.nan if yes[0] is None else float(np.mean(yes)),
                "n": len(graded),
            }
    return report


def rows_of(question: questions.Question) -> list[str]:
    """The rows of the table that a question counts in."""
    if question.label is None:
        return ["open", f"open, {question.topic}"]
    if question.category == "existence":
        return ["existence", f"existence, {question.split}"]
    if question.category == "attribute":
        return ["attribute", f"attribute, {question.topic}"]
    return [question.category]


def format_report(report: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of `evaluate_pocket` as markdown."""
    heads = "| questions | with the habit | yes | n | against the habit | yes | n |"
    lines = [heads, "|---|---|---|---|---|---|---|"]

    def percent(x: float) -> str:
        return "" if math.isnan(x) else f"{100 * x:.1f} %"

    for row in sorted({row for part in report.values() for row in part}):
        cells = [row]
        for habit in ("with", "against"):
            entry = report.get(habit, {}).get(row)
            cells += ["", "", ""] if entry is None else [
                percent(entry["accuracy"]), percent(entry["yes"]), str(entry["n"])
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
