"""`foveate analyze`: what the papers' figures measure, on your model and pictures."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import FoveateError
from ..base.files import make_folder
from . import app
from .common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PluginOption,
    Progress,
    RevisionOption,
    hint,
    load,
    load_plugins,
    new_table,
    print_table,
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
    as_json: JsonOption = False,
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
    if as_json:
        print((out / f"{analysis.name}.json").read_text("utf-8"))
        return
    columns = by_layer(content["numbers"])
    if columns:
        table = new_table("layer", *columns)
        table.title, table.title_justify = f"{analysis.title}, {vlm.name}", "left"
        for place, layer in enumerate(content["numbers"]["layers"]):
            values = (column[place] for column in columns.values())
            table.add_row(str(layer), *("" if v is None else f"{v:.3g}" for v in values))
        print_table(table)
    else:
        print(content["caption"])
    print(", ".join(f"{what}: {out / analysis.name}.{end}" for what, end in WRITTEN.items()))
    hint("the same command with a larger --limit adds pictures, with --model M reads yours")


WRITTEN = {"figure": "png", "numbers": "json", "what it shows": "md"}


def by_layer(numbers: dict[str, Any]) -> dict[str, list[float | None]]:
    """What an analysis has counted in every layer, by name: means, where there are intervals."""
    depth, found = len(numbers.get("layers", ())), dict[str, list[float | None]]()

    def walk(value: Any, names: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            if "mean" in value:
                value = {"": value["mean"]}
            for name, part in value.items():
                walk(part, (*names, *filter(None, [name])))
        elif isinstance(value, list) and len(value) == depth and names != ("layers",):
            if all(isinstance(row, list) for row in value):  # a value for each head
                value = [max((v for v in row if v is not None), default=None) for row in value]
                names = (*names, "largest of heads")
            if all(v is None or isinstance(v, (int, float)) for v in value):
                found[" ".join(name for name in names if name != "methods")] = value

    walk(numbers, ())
    return found
