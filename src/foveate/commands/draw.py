"""`foveate draw`: scenes with masks, questions, ground truth and conversations to train on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..base.files import make_folder
from . import app


class Habit(StrEnum):
    """Which scenes to draw: as in training, against it, or half and half."""

    WITH, AGAINST, BOTH = "with", "against", "both"


@app.command()
def draw(
    number: Annotated[int, typer.Argument(min=1, metavar="N", help="Draw this many scenes.")],
    out: Annotated[Path, typer.Option(help="Write to this folder.")],
    seed: Annotated[int, typer.Option(min=0, help="Start with the scene of this number.")] = 0,
    habit: Annotated[
        Habit, typer.Option(help="Draw scenes as in training, against it, or both.")
    ] = Habit.BOTH,
    size: Annotated[
        int, typer.Option(min=32, max=4096, help="Make pictures with sides of this many pixels.")
    ] = 768,
) -> None:
    """Draw scenes, with masks, questions and ground truth, for experiments of your own.

    conversations.jsonl is for foveate train cli --data.
    """
    from ..scenes.export import export

    print(f"{number} scenes: {export(number, make_folder(out), seed, habit.value, size)}")
