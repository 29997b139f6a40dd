"""`foveate draw`: scenes with masks, questions, ground truth and conversations to train on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..base.files import make_folder
from . import app
from .common import ForceOption, hint, refuse_to_replace, stoppable


class Habit(StrEnum):
    """Which scenes to draw: as in training, against it, or half and half."""

    WITH, AGAINST, BOTH = "with", "against", "both"


@app.command()
def draw(
    number: Annotated[int, typer.Argument(min=1, metavar="N", help="Draw this many scenes.")],
    out: Annotated[Path, typer.Option(help="Write to this folder.")],
    seed: Annotated[int, typer.Option(min=0, help="Start with the scene of this number.")] = 0,
    habit: Annotated[
        Habit,
        typer.Option(case_sensitive=False, help="Draw scenes as in training, against it, or both."),
    ] = Habit.BOTH,
    size: Annotated[
        int, typer.Option(min=32, max=4096, help="Make pictures with sides of this many pixels.")
    ] = 768,
    force: ForceOption = False,
) -> None:
    """Draw scenes, with masks, questions and ground truth, for experiments of your own."""
    from ..scenes.export import export

    refuse_to_replace(out / "scenes.jsonl", "scenes", force)
    with stoppable("scenes", "stopped; the scenes' lists are not written yet") as watch:
        export(
            number, make_folder(out), seed, habit.value, size,
            watch=lambda done, total: watch(done, total, habit.value),
        )  # fmt: skip
    print(f"{number} scenes: {out}")
    hint(f'foveate ask {out}/images/000000.png "Is there a car in the image?" --method all')
    hint(f"foveate train cli --data {out}/conversations.jsonl --out runs/cli")
