"""`foveate doctor`: what is installed, what works here."""

from __future__ import annotations

import typer

from . import app
from .common import quiet


@app.command()
def doctor() -> None:
    """Say what is installed and what works here; exit code 1 if foveate itself does not."""
    from ..doctor import check

    quiet()
    healthy = True
    for line in check():
        healthy &= line.good is not False
        mark = {True: "ok  ", False: "BAD ", None: "    "}[line.good]
        print(f"{mark}{line.what}: {line.found}", flush=True)
    raise typer.Exit(0 if healthy else 1)
