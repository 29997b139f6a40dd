"""`foveate trace`: what the model looks at, layer by layer and token by token."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import FoveateError
from ..base.files import make_folder
from . import app
from .common import (
    SIDE_BY_SIDE,
    DeviceOption,
    DtypeOption,
    Engine,
    EngineOption,
    ForceOption,
    JsonOption,
    ModelOption,
    PluginOption,
    RevisionOption,
    TensorParallelOption,
    VllmOption,
    hint,
    load_plugins,
    load_with,
    new_table,
    note_unknown_words,
    print_table,
    read_picture,
    refuse_to_replace,
    said,
)

if TYPE_CHECKING:
    import numpy as np

    from ..insight.seen import Heads, Seen
    from ..vlm.vlm import VLM

BAR = 40  # characters


@app.command()
def trace(
    image: Annotated[
        str, typer.Argument(help="Give a picture's path, or `demo` for a drawn scene.")
    ],
    question: Annotated[str, typer.Argument(help="Ask this about it.")],
    model: ModelOption = "pocket",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Trace vanilla, clvs, carve+clvs, ...; repeat it to compare. Default: vanilla and "
            "clvs."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--object",
            help="Measure the attention to it: a box left,top,right,bottom (pixels, or fractions "
            "of the sides), a mask file (black is not the object), or on drawn scenes a name.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write figures, numbers and page to this folder; default: trace."
        ),
    ] = None,
    heads: Annotated[
        str, typer.Option(help="Read the mean or max over heads, or the mean of heads such as 0,3.")
    ] = "mean",
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Print how much the question adds in each layer (LASER's VAQ)."
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="End answers after so many tokens.")
    ] = 32,
    force: ForceOption = False,
    as_json: JsonOption = False,
    system: Annotated[str | None, typer.Option(help="Ask with this system prompt.")] = None,
    engine: EngineOption = Engine.PLAIN,
    tensor_parallel: TensorParallelOption = None,
    vllm: VllmOption = None,
    plugin: PluginOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """See where the model looks in every layer while it writes every token of its answer.

    Writes a strip of heat maps, curves over the layers, all numbers, and one page to explore them.
    With --layers and without --out nothing is written.
    """
    from ..insight.target import known, read

    load_plugins(plugin)
    if "all" in (method or ()):
        raise FoveateError("There is no room to trace all methods: name those to compare.")
    if not question.strip():
        raise FoveateError("The question is empty: ask something about the image.")
    picture = read_picture(image)
    sought = None if target is None else read(target, picture.size, known(image))
    folder, chosen = None, _heads(heads)
    if out is not None or not layers:
        from ..insight.plots.style import check_path

        folder = out or Path("trace")
        refuse_to_replace(folder / "trace.json", "a trace", force)
        make_folder(folder)
        check_path(folder / "strip.png")
    vlm = load_with(engine, model, tensor_parallel, vllm, device, revision=revision, dtype=dtype)
    if vlm.name == "pocket":
        note_unknown_words(vlm, question)
    if layers:
        _print_layers(_layers(vlm, picture, question, system), as_json and folder is None)
    if folder is None:
        return
    from ..insight.trace import trace as run

    traced = run(
        vlm,
        picture,
        question,
        method or SIDE_BY_SIDE,
        object=sought,
        heads=chosen,
        max_new_tokens=max_new_tokens,
        system=system,
        watch=lambda what: print(f"foveate: {what}", file=sys.stderr, flush=True),
    )
    written = traced.save(folder)
    if as_json:
        print((folder / "trace.json").read_text("utf-8"))
        return
    _print_trace(traced, max_new_tokens)
    print("\n".join(f"{path.stem}: {path}" for path in written if path.suffix == ".png"))
    print(f"numbers: {folder / 'trace.json'}, {folder / 'trace.npz'}")
    print(f"page: {folder / 'index.html'}")
    hint(f"open {folder / 'index.html'} in a browser and step through layers and tokens")


def _heads(given: str) -> Heads:
    if given in ("mean", "max"):
        return given  # type: ignore[return-value]
    try:
        return tuple(int(number) for number in given.split(","))
    except ValueError:
        raise FoveateError(
            f"Cannot read the heads {given!r}: give mean, max, or numbers such as 0,3."
        ) from None


def _layers(vlm: VLM, picture: object, question: str, system: str | None) -> dict[str, Any]:
    """VAQ of every layer, eq. (5) of LASER, and the layer that it chooses."""
    from ..methods.laser import LASER

    chat = vlm.chat([picture], question, system)  # type: ignore[list-item]
    notes = vlm.rewrite([chat], (LASER(vat="never"),))[0].notes
    return {"layers": list(notes["layers"]), "vaq": list(notes["vaq"]), "chosen": notes["layer"]}


def _print_layers(notes: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(notes))
        return
    most = max(notes["vaq"]) or 1.0
    table = new_table("layer", "VAQ", "", "")
    for layer, value in zip(notes["layers"], notes["vaq"], strict=True):
        mark = "chosen" if layer == notes["chosen"] else ""
        table.add_row(str(layer), f"{value:.4f}", "▇" * round(BAR * value / most), mark)
    print_table(table)
    if notes["chosen"] is None:
        print("The question changes nothing: no layer is chosen.")


def _print_trace(traced: Seen, limit: int) -> None:
    """A line per method: its answer, where its attention to the object peaks, where CLVS stopped.

    Means are over the answer's tokens.
    """
    target = traced.target.name if traced.target else "the image"
    table = new_table("method", "answer", f"most attention to {target}", "CLVS stops after layer")
    for run in traced.runs:
        values: np.ndarray | None = getattr(run, traced.measure)
        peak = "not known"
        if values is not None:
            means = values[: run.said].mean(0)
            most = f"{means.max():.1%} in " if traced.heads != "max" else ""
            peak = f"{most}layer {run.layers[int(means.argmax())]}"
        stops = sorted({"never" if at is None else f"{at:2}" for at in run.stopped[: run.said]})
        told = ", ".join(stop.strip() for stop in stops)
        table.add_row(run.method, said(run.answer), peak, told if run.threshold else "")
    print_table(table)
    if any(len(run.answer.tokens) == limit == len(run.tokens) for run in traced.runs):
        print(f"Answers are cut off after {limit} tokens: --max-new-tokens gives them more.")
