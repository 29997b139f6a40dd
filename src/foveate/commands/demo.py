"""`foveate demo`: a drawn scene, six questions, and where the model looks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.files import make_folder, replacing
from . import app
from .common import (
    SIDE_BY_SIDE,
    ModelOption,
    RevisionOption,
    draw_attention,
    load,
    new_table,
    print_table,
    said,
)

SIX = (  # category and answer of the demo's questions
    ("existence", "yes"),
    ("existence", "no"),
    ("attribute", "yes"),
    ("relation", "no"),
    ("attribute", None),
    ("number", None),
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Write the pictures to this folder.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Draw the scene of this number.")] = 0,
    model: ModelOption = "pocket",
    revision: RevisionOption = None,
) -> None:
    """Draw a scene, ask six questions about it with vanilla and CLVS, and show the attention."""
    from ..scenes import world

    scene, asked = _six_questions(seed)
    folder = make_folder(out)
    picture = world.draw(scene)
    with replacing(folder / "scene.png") as part:
        picture.save(part)
    vlm = load(model, revision=revision)
    vlm.ask(picture, asked[0].text, max_new_tokens=1)
    table = new_table("question", "truth", *SIDE_BY_SIDE)
    for number, question in enumerate(asked):
        answers = {
            m: vlm.ask(picture, question.text, m, max_new_tokens=16, record=number == 0)
            for m in SIDE_BY_SIDE
        }
        table.add_row(question.text, question.answer, *(said(a) for a in answers.values()))
        if number == 0:
            draw_attention(vlm, question.text, answers, folder / "attention.png")
    print_table(table)
    print(f"scene: {folder / 'scene.png'}\nattention: {folder / 'attention.png'}")


def _six_questions(seed: int) -> tuple[Any, list[Any]]:
    """A held-out scene, and one question of each of six kinds about it."""
    import random

    from ..scenes import questions, world

    scene = world.sample(questions.FIRST_HELD_OUT + seed)
    asked = questions.exam(scene, random.Random(seed))
    chosen: list[Any] = []
    for kind in SIX:
        fitting = [q for q in asked if (q.category, q.label) == kind]
        rest = fitting or [q for q in asked if q not in chosen]
        chosen.append(rest[0])
    return scene, chosen
