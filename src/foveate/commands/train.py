"""`foveate train`: the pocket model, from nothing."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..method import FoveateError
from . import app
from .common import make_folder

train_app = typer.Typer(help="Train a model.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train_app, name="train")


class Stage(StrEnum):
    """The pocket model's training, in order."""

    TOWER, CAPTION, OPEN, YESNO = "tower", "caption", "open", "yesno"


@train_app.command("pocket")
def train_pocket(
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, logs and the trained stages.")
    ] = None,
    until: Annotated[Stage, typer.Option(help="Last stage to train.")] = Stage.YESNO,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, scenes and questions.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = True,
    evaluate: Annotated[
        bool, typer.Option(help="Then measure it on fresh scenes; without --out, the shipped one.")
    ] = False,
) -> None:
    """Train the pocket model from nothing: the tower, captions, open questions, yes/no."""
    from ..pocket import training
    from ..pocket.build import WEIGHTS

    if out is None and not evaluate:
        raise FoveateError("Say where to train with --out, or measure the shipped one: --evaluate.")
    folder = WEIGHTS
    if out is not None:
        folder = training.train_pocket(make_folder(out), until.value, seed=seed, resume=resume)
        print(f"{until.value}: {folder}")
    if evaluate:
        print(training.format_report(training.evaluate_pocket(folder)))
