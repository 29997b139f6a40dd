"""Scenes as files: pictures, masks, ground truth, questions, and conversations to train on."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..base.files import make_folder, replacing, writing
from . import questions, world
from .lessons import lesson
from .questions import FIRST_HELD_OUT, OPEN, Question, View, look
from .world import Box, Scene


def conversations(view: View, rng: random.Random, image: str) -> Iterator[dict[str, Any]]:
    """Questions for training about a scene or window, mixed as in the pocket model's last stage.

    Args:
        image: the picture's path, for the rows.

    Yields:
        Rows in LLaVA's format, one question each: {"id", "image", "conversations": [{"from":
        "human", "value": "<image>\n..."}, {"from": "gpt", "value": ...}]}.
    """
    asked = [q for turns in lesson(view, "yesno", rng, view) for q in turns]
    for number, question in enumerate(asked):
        yield {
            "id": f"{Path(image).stem}-{number}",
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question.text}"},
                {"from": "gpt", "value": question.answer},
            ],
        }


def export(
    n: int,
    out: Path | str,
    seed: int = 0,
    habit: str = "both",
    size: int = 768,
    watch: Callable[[int, int], None] | None = None,
) -> Path:
    """Write n scenes with pictures, masks, ground truth and questions; returns the folder.

    images/000000.png (size x size), masks/000000.png (8 bits: 0 background, i + 1 thing i),
    scenes.jsonl (the scene, boxes in pixels, counts, relations), questions.jsonl (id, image,
    question, answer, label, category, split, habit, things, and for print the window to look
    through), conversations.jsonl (other questions, for `foveate train cli`: see `conversations`).
    `habit`: "with", "against" or "both" (halves, marked in every row). `watch` is told how many
    scenes are written, and of how many.
    """
    if n < 1:
        raise ValueError(f"the number of scenes must be at least 1, not {n}")
    if habit not in ("with", "against", "both"):
        raise ValueError(f'habit is "with", "against" or "both", not {habit!r}')
    out = Path(out)
    for folder in ("images", "masks"):
        make_folder(out / folder)
    number = 0
    with writing(out, "its .jsonl files are as they were"), ExitStack() as files:

        def lines(name: str) -> Any:
            part = files.enter_context(replacing(out / f"{name}.jsonl"))
            return files.enter_context(part.open("w", encoding="utf-8"))

        truths, asked, talks = map(lines, ("scenes", "questions", "conversations"))
        for k in range(n):
            half = ("with", "against")[k * 2 // n] if n > 1 else "with"
            scene = world.sample(FIRST_HELD_OUT + seed + k, half if habit == "both" else habit)
            name = f"{k:06d}.png"
            image, mask = f"images/{name}", f"masks/{name}"
            world.draw(scene, size).save(out / image)
            index = np.zeros((size, size), np.uint8)
            for i, inside in enumerate(world.masks(scene, size)):
                index[inside] = i + 1
            Image.fromarray(index).save(out / mask)
            truth = {
                "image": image,
                "mask": mask,
                "scene": scene.to_dict(),
                "boxes": world.boxes(scene, size),
                "counts": world.counts(scene),
                "relations": world.relations(scene),
            }
            truths.write(json.dumps(truth) + "\n")
            for question, box in _asked(scene, random.Random(f"export-{seed}-{k}")):
                row = {"id": number, "image": image, "habit": scene.habit}
                row |= {("question" if k == "text" else k): v for k, v in asdict(question).items()}
                asked.write(json.dumps(row | ({"window": box} if box else {})) + "\n")
                number += 1
            rng = random.Random(f"conversations-{seed}-{k}")
            for row in conversations(look(scene), rng, image):
                talks.write(json.dumps(row) + "\n")
            if watch:
                watch(k + 1, n)
    return out


def _asked(scene: Scene, rng: random.Random) -> Iterator[tuple[Question, Box | None]]:
    """The exam and, for print, an open question with the window that makes it legible."""
    for question in questions.exam(scene, rng):
        yield question, None
    for box, i in questions.print_windows(scene, rng):
        thing = scene.things[i]
        text = questions.phrase(rng, OPEN["print"]["phrases"]).format(kind=thing.kind)
        yield Question(text, thing.print.lower(), "print", "print", None, "", (i,)), box
    described = questions.caption(look(scene), rng)
    if described:
        yield described, None
