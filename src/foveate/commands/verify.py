"""`foveate verify`: whether a checkpoint does what foveate promises, for who has its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import FoveateError
from . import app
from .common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    PluginOption,
    RevisionOption,
    hint,
    load,
    load_plugins,
    stoppable,
)

MARKS = {True: "ok  ", False: "BAD ", None: "    "}


@app.command()
def verify(
    model: Annotated[
        str, typer.Argument(help="Check pocket, a saved model's folder, or a hub name.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(help="Check this method; repeat it. Default: all that the model takes."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", "--data-root", help="Ask POPE's questions from this folder, with COCO."
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option(min=2, help="With --data: ask so many questions of POPE.")
    ] = 200,
    out: Annotated[Path, typer.Option(help="Write the findings into this folder.")] = Path(
        "verified"
    ),
    as_json: JsonOption = False,
    plugin: PluginOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Check a checkpoint with its weights: every method, every way to run it, and its speed.

    The exit code is 1 if a check fails. You may stop it at any time: the same command goes on.
    """
    from ..insight.verify.report import failures, file_name
    from ..insight.verify.report import verify as check

    load_plugins(plugin)
    if data is not None and not data.is_dir():
        raise FoveateError(f"The data root {data} is not a folder: check the path.")
    vlm = load(model, revision=revision, device=device, dtype=dtype)

    def tell(row: dict[str, Any]) -> None:
        about = ", ".join(filter(None, (row["check"], row["method"])))
        print(f"{MARKS[row['passed']]}{about}: {row['text']}", flush=True)

    silent: Any = (lambda row: None) if as_json else tell
    with stoppable("checks") as watch:
        report = check(
            vlm, method or (), out, data=data, questions=questions, tell=silent, watch=watch
        )
    bad = failures(report)
    if as_json:
        print(json.dumps(report))
        raise typer.Exit(1 if bad else 0)
    judged = [row for row in report["findings"] if row["passed"] is not None]
    print(f"{len(judged) - len(bad)} of {len(judged)} checks passed")
    for row in bad:
        print(f"failed: {', '.join(filter(None, (row['check'], row['method'])))}: {row['text']}")
    print(f"report: {out / file_name(vlm)}.json")
    if data is None:
        hint("--data DIR with POPE and COCO also asks questions, plain and with every method")
    raise typer.Exit(1 if bad else 0)
