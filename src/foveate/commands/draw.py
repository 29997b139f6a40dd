"""`foveate draw`: scenes with masks, questions, ground truth and conversations to train on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import app
from .common import make_folder


class Habit(StrEnum):
    """Which scenes to draw: as in training, against it, or half and half."""

    WITH, AGAINST, BOTH = "with", "against", "both"


@app.command()
def draw(
    number: Annotated[int, typer.Argument(min=1, metavar="N", help="How many scenes.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    seed: Annotated[int, typer.Option(min=0, help="First scene's number.")] = 0,
    habit: Annotated[
        Habit, typer.Option(help="Scenes as in training, or against it.")
    ] = Habit.BOTH,
    size: Annotated[int, typer.Option(min=32, max=4096, help="Side in pixels.")] = 768,
) -> None:
    """Draw scenes, with masks, questions and ground truth, for experiments of your own.

    conversations.jsonl is for foveate train cli --data.
    """
    from ..scenes.export import export

    print(f"{number} scenes: {export(number, make_folder(out), seed, habit.value, size)}")
