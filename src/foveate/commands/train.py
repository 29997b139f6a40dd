"""`foveate train`: the pocket model from nothing, and any model on conversations."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import FoveateError
from . import app
from .common import ModelOption, RevisionOption, make_folder, quiet

train_app = typer.Typer(help="Train a model.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train_app, name="train")


class Stage(StrEnum):
    """The pocket model's training, in order."""

    TOWER, CAPTION, OPEN, YESNO = "tower", "caption", "open", "yesno"


class Base(StrEnum):
    """What learns beside the injection."""

    FROZEN, LORA, FULL = "frozen", "lora", "full"


class Precision(StrEnum):
    """Of the arithmetic."""

    BF16, FP16, NO = "bf16", "fp16", "no"


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
    from ..pocket import train as training
    from ..pocket.build import WEIGHTS

    if out is None and not evaluate:
        raise FoveateError("Say where to train with --out, or measure the shipped one: --evaluate.")
    folder = WEIGHTS
    if out is not None:
        folder = training.train_pocket(make_folder(out), until.value, seed=seed, resume=resume)
        print(f"{until.value}: {folder}")
    if evaluate:
        print(training.format_report(training.evaluate_pocket(folder)))


@train_app.command("cli")
def train_cli(
    data: Annotated[
        Path, typer.Option(help="Conversations in LLaVA's format: JSON lines, or one JSON list.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for what is learnt, checkpoints and the log.")],
    model: ModelOption = "pocket",
    revision: RevisionOption = None,
    method: Annotated[
        str,
        typer.Option(
            help="cli, cli(gate=static), cli(path=DIR) to go on from a trained one; or vanilla, "
            "the base alone, to compare with."
        ),
    ] = "cli",
    base: Annotated[
        Base,
        typer.Option(
            help="What learns beside the injection: nothing, LoRA on the language model, or the "
            "language model and the projector. The vision tower never."
        ),
    ] = Base.FROZEN,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; default: that of the data.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Budget in steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Budget in epochs; default: 1, without --steps.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per process and step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate of the injection.")] = 2e-4,
    base_rate: Annotated[
        float | None, typer.Option(help="Of the base; default: 2e-5 (full), 2e-4 (lora).")
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="Of LoRA; alpha is twice that.")] = 128,
    precision: Annotated[
        Precision | None, typer.Option(help="Default: bf16 on a GPU, no (fp32) elsewhere.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Save memory: compute activations twice.")
    ] = False,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed", help="Conversations about one image in one sequence; cli(summary=image)."
        ),
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; default: the model's, at most 8192.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of a fresh injection and the order.")] = 0,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Train on the rows that are not broken.")
    ] = False,
    save_every: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 10.0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = True,
) -> None:
    """Train cross-layer injection on conversations about images, or the base alone.

    For several processes: torchrun --nproc-per-node 2 -m foveate.commands train cli ..., or
    accelerate launch, which also does FSDP.
    """
    from ..training.injection import tune
    from ..training.recipe import Recipe

    quiet()
    recipe = Recipe(
        method=method, base=base.value, steps=steps, epochs=epochs, minutes=minutes,
        batch_size=batch_size, rate=rate, base_rate=base_rate, lora_rank=lora_rank,
        precision=precision and precision.value, checkpointing=checkpointing, packed=packed,
        max_length=max_length, seed=seed, skip_broken=skip_broken, checkpoint_every=save_every,
    )  # fmt: skip
    try:
        tuned = tune(
            model, data, make_folder(out), recipe, images=images, revision=revision, resume=resume,
            progress=_looking(), say=_say,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("\nfoveate: stopped: go on with the same command.", file=sys.stderr)
        raise typer.Exit(130) from None
    if tuned.main:
        asked = tuned.model or (f"{model} --revision {revision}" if revision else model)
        print(f'foveate ask IMAGE "QUESTION" --model {asked} --method "{tuned.method}"')


def _say(line: str) -> None:
    print(f"foveate: {line}", file=sys.stderr, flush=True)


def _looking(every: float = 10.0) -> Callable[[int, int, str], None]:
    """Tells now and then how far the look at the data is."""
    told = time.monotonic()

    def tell(done: int, total: int, what: str) -> None:
        nonlocal told
        if time.monotonic() - told > every:
            told = time.monotonic()
            _say(f"looking at the data: {what}, {100 * done // total} %")

    return tell
