"""`foveate doctor`: what is installed, what works here, what works on a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import app
from .common import RevisionOption, quiet


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Say what works on this model instead. Needs no weights."
        ),
    ] = None,
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --model.")] = False,
) -> None:
    """Say what is installed and what works here, or with --model what works on a model.

    The exit code is 1 if foveate itself does not work here, or refuses the model.
    """
    from ..base.errors import FoveateError
    from ..vlm.doctor import check, examine, told

    quiet()
    if (as_json or revision) and not model:
        option = "--json" if as_json else "--revision"
        raise FoveateError(f"{option} is about a model: name one with --model.")
    lines = check()
    if model:
        found = examine(model, revision)
        if as_json:
            print(json.dumps(found, indent=1))
            raise typer.Exit(1 if found["refusal"] else 0)
        lines = told(found)
    healthy = True
    for line in lines:
        healthy &= line.good is not False
        mark = {True: "ok  ", False: "BAD ", None: "    "}[line.good]
        print(f"{mark}{line.what}: {line.found}", flush=True)
    raise typer.Exit(0 if healthy else 1)
