"""`foveate train`: the pocket model from nothing, and any model on conversations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..base.errors import FoveateError
from ..base.files import make_folder
from ..base.progress import Progress
from . import app
from .common import ModelOption, RevisionOption, hint, quiet

train_app = typer.Typer(help="Train a model.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train_app, name="train")

PocketRecipe = Literal["pictures-first", "language-first"]
Stage = Literal["tower", "caption", "open", "yesno", "language", "projector", "tuning"]
Base = Literal["frozen", "lora", "full"]
Precision = Literal["bf16", "fp16", "no"]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")]


@train_app.command("pocket")
def train_pocket(
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, logs and the trained stages.")
    ] = None,
    recipe: Annotated[
        PocketRecipe,
        typer.Option(
            case_sensitive=False,
            help="pictures-first made the shipped model; language-first trains a language model on "
            "text before it sees a picture.",
        ),
    ] = "pictures-first",
    until: Annotated[
        Stage | None,
        typer.Option(case_sensitive=False, help="Last stage to train; default: the recipe's."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.NUMBER=VALUE",
            help="Another rate, batch, steps or minutes of a stage; repeat it for more.",
        ),
    ] = None,
    tower: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Take the vision tower of this trained model instead of training one; pocket is "
            "the shipped one.",
        ),
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Draw so many scenes to learn from.")] = 30_000,
    windows: Annotated[
        int, typer.Option(min=0, help="Draw so many of their windows, too.")
    ] = 14_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, scenes and questions.")] = 0,
    resume: Resume = True,
    evaluate: Annotated[
        bool,
        typer.Option(
            help="Then measure the model on fresh scenes; without --out, measure the shipped one."
        ),
    ] = False,
    criteria: Annotated[
        bool,
        typer.Option(
            help="Then measure what a testbed for attention methods must show, on other scenes."
        ),
    ] = False,
) -> None:
    """Train the pocket model from nothing, stage by stage.

    The stages of pictures-first are tower, caption, open and yesno; those of language-first are
    tower, language, projector and tuning.
    """
    from ..pocket.build import WEIGHTS
    from ..pocket.exam import evaluate_pocket, format_report
    from ..pocket.train import train_pocket as train

    if out is None and not evaluate and not criteria:
        raise FoveateError(
            "Say where to train with --out, or measure the shipped one: --evaluate or --criteria."
        )
    folder = WEIGHTS
    if out is not None:
        with _stoppable():
            folder = train(
                make_folder(out), recipe, until, settings=setting or (), tower=tower, seed=seed,
                resume=resume, scenes=scenes, windows=windows,
            )  # fmt: skip
        print(f"{folder.name}: {folder}")
        hint(f'foveate ask demo "Is there a car in the image?" --model {folder}')
    if evaluate:
        print(format_report(evaluate_pocket(folder)))
    if criteria:
        from ..pocket.criteria import format_criteria, measure

        with Progress("scenes") as progress:
            report = measure(folder, watch=lambda done, of: progress(done, of, "validating"))
        print(format_criteria(report))


@train_app.command("cli")
def train_cli(
    data: Annotated[
        Path, typer.Option(help="Conversations in LLaVA's format: JSON lines, or one JSON list.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the trained injection, checkpoints and the log.")
    ],
    model: ModelOption = "pocket",
    revision: RevisionOption = None,
    method: Annotated[
        str,
        typer.Option(
            help="What to train: cli, cli(gate=static), or cli(path=DIR) to go on from a trained "
            "one; vanilla trains the base alone, to compare with."
        ),
    ] = "cli",
    base: Annotated[
        Base,
        typer.Option(
            case_sensitive=False,
            help="What to train beside the injection: nothing, LoRA on the language model, or the "
            "language model and the projector. The vision tower stays frozen.",
        ),
    ] = "frozen",
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; default: that of the data.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train for so many steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Train for so many epochs; 1 if no budget is given.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for so many minutes.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per process and step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate of the injection.")] = 2e-4,
    base_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of the base; default: 2e-5 (full), 2e-4 (lora)."),
    ] = None,
    lora_rank: Annotated[
        int, typer.Option(min=1, help="Rank of LoRA; its alpha is twice the rank.")
    ] = 128,
    precision: Annotated[
        Precision | None,
        typer.Option(
            case_sensitive=False,
            help="Precision of training; default: bf16 on a GPU, no (fp32) elsewhere.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Save memory: compute activations twice.")
    ] = False,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Put conversations about one image into one sequence; needs cli(summary=image).",
        ),
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(help="Most tokens of a sequence; default: the model's limit, at most 8192."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of a fresh injection and of the order of the data.")
    ] = 0,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave broken rows out instead of refusing them.")
    ] = False,
    save_every: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 10.0,
    resume: Resume = True,
) -> None:
    """Train cross-layer injection on conversations about images, or the base alone.

    For several processes: torchrun --nproc-per-node 2 -m foveate.commands train cli ..., or
    accelerate launch, which also does FSDP.
    """
    from ..training.injection import tune
    from ..training.recipe import Recipe

    quiet()
    recipe = Recipe(
        method=method, base=base, steps=steps, epochs=epochs, minutes=minutes,
        batch_size=batch_size, rate=rate, base_rate=base_rate, lora_rank=lora_rank,
        precision=precision, checkpointing=checkpointing, packed=packed,
        max_length=max_length, seed=seed, skip_broken=skip_broken, checkpoint_every=save_every,
    )  # fmt: skip
    with _stoppable():
        tuned = tune(
            model, data, make_folder(out), recipe, images=images, revision=revision, resume=resume,
            say=_say,
        )  # fmt: skip
    if tuned.main:
        asked = tuned.model or (f"{model} --revision {revision}" if revision else model)
        hint(f'foveate ask IMAGE "QUESTION" --model {asked} --method "{tuned.method}"')


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C ends the command with a note that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            "\nfoveate: stopped; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def _say(line: str) -> None:
    print(f"foveate: {line}", file=sys.stderr, flush=True)
