"""`foveate directions`: what vti steers along."""

from __future__ import annotations

import random
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import FoveateError
from . import app
from .common import DeviceOption, DtypeOption, Progress, RevisionOption, hint, load, note


class Grouping(StrEnum):
    """Which image states share a principal component."""

    released = "released"
    token = "token"


@app.command()
def directions(
    model: Annotated[
        str, typer.Argument(help="Give pocket, a saved model's folder, or a hub name.")
    ] = "pocket",
    data: Annotated[
        Path | None,
        typer.Option(
            help='Read demonstrations: lines of {"image": "a.jpg", "question": ..., "value": a '
            'true caption, "h_value": a hallucinated one}; the pocket model draws its own.'
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Find the pictures in this folder; default: the data's.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=2, help="Draw so many demonstrations from the data.")
    ] = 50,
    image: Annotated[bool, typer.Option(help="Make directions for the vision tower, too.")] = True,
    grouping: Annotated[
        Grouping,
        typer.Option(
            case_sensitive=False,
            help="Group the tower's states as in the authors' code, or by token as in the paper.",
        ),
    ] = Grouping.released,
    trials: Annotated[int, typer.Option(min=1, help="Mask each picture so many times.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed the draws and the masks.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write this folder; default: directions-MODEL.")
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Find the directions along which vti steers a model, from true and hallucinated captions.

    You can stop it at any time: the same command goes on, from the files beside --out.
    """
    from ..backends.transformers.anatomy import anatomy
    from ..insight.directions import find_directions, pocket_demonstrations, read_demonstrations

    if data is not None:
        found = read_demonstrations(data, images)
        found = random.Random(seed).sample(found, min(limit, len(found)))
    elif model != "pocket" or images:
        raise FoveateError(
            "Say what to compare with --data FILE.jsonl: lines of an image, a question, a true "
            "caption and a hallucinated one; the authors of VTI use 50 to 70."
        )
    else:
        found = pocket_demonstrations(limit)
    path = out or Path(f"directions-{Path(model).resolve().name}")
    given = {"data": data, "images": images, "limit": limit, "grouping": grouping.value,
             "trials": trials, "seed": seed, "dtype": dtype, "revision": revision}  # fmt: skip
    command = ["foveate", "directions", model]
    command += [str(x) for k, v in given.items() if v is not None for x in (f"--{k}", v)]
    command += [] if image else ["--no-image"]
    vlm = load(model, revision=revision, device=device, dtype=dtype)
    if image and anatomy(vlm.model).plain_tower is None:
        note(f"the vision tower of {model} cannot be read, so there will be text directions only")
    with Progress("demonstrations") as watch:
        artifact = find_directions(
            vlm,
            found,
            path,
            grouping=grouping.value,
            trials=trials,
            image=image,
            seed=seed,
            command=shlex.join(command),
            watch=watch,
        )
    for name, tensor in artifact.tensors.items():
        print(f"{name}: {' x '.join(map(str, tensor.shape))}")
    print(f"directions: {path}")
    hint(f"foveate eval BENCHMARK --model {model} --method vanilla --method \"vti(path='{path}')\"")
