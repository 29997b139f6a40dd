"""`foveate analyze`: what the papers' figures measure, on your model and pictures."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import FoveateError
from ..base.files import make_folder
from . import app
from .common import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    PluginOption,
    Progress,
    RevisionOption,
    load,
    load_plugins,
)


@app.command()
def analyze(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Give decay, convergence, complexity, layers, heads or gates; decay(covered=0.6) "
            "sets an option. CLVS's Figures 7 and 8 are drawn by foveate sweep.",
        ),
    ],
    model: ModelOption = "pocket",
    data: Annotated[
        str,
        typer.Option(
            help="Read COCO from this folder, with annotations/instances_val2014.json and "
            "val2014/; none draws scenes."
        ),
    ] = "none",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare this method with vanilla, where methods are compared; repeat it for more."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Read so many pictures; default: what the analysis says."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Write NAME.png, .json and .md, and the rows they come from, to this folder."
        ),
    ] = Path("."),
    plugin: PluginOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Measure what a figure of a paper shows, on your model: a figure, its numbers, a caption.

    You can stop it at any time: the same command goes on, and a larger --limit adds pictures.
    """
    from ..insight.analysis import parse, run, stacks
    from ..insight.truth import coco_pictures, pocket_pictures

    load_plugins(plugin)
    if name.partition("(")[0].strip() == "sweep":
        raise FoveateError(
            "Figures over a parameter (CLVS, Figures 7 and 8) are drawn by `foveate sweep`: see "
            "`foveate sweep --help`."
        )
    analysis = parse(name)
    stacks(analysis, method or ())  # mistakes are told before anything is read
    count = limit or analysis.pictures
    drawn = data == "none"
    pictures = pocket_pictures(count) if drawn else coco_pictures(Path(data).expanduser(), count)
    folder = make_folder(out)
    given = [("model", model), ("data", data), *(("method", m) for m in method or ())]
    given += [("limit", str(count)), ("out", str(out)), *([("dtype", dtype)] if dtype else [])]
    given += [("revision", revision)] if revision else []
    options = [part for option, value in given for part in (f"--{option}", value)]
    told = "drawn scenes, half against the pocket model's habits" if drawn else "COCO val2014"
    try:
        vlm = load(model, revision=revision, device=device, dtype=dtype)
        with Progress("pictures") as progress:
            content = run(
                analysis,
                vlm,
                pictures,
                folder,
                methods=method or (),
                data=told,
                command=shlex.join(["foveate", "analyze", name, *options]),
                watch=lambda done, total, _: progress(done, total, analysis.name),
            )
    except KeyboardInterrupt:
        print("foveate: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    print(content["caption"])
    print(f"figure: {out / analysis.name}.png, numbers: {out / analysis.name}.json")
