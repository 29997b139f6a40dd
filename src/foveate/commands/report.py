"""`foveate report`: what every method gains and loses over runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import FoveateError
from . import app


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or of a run's shards.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.md, report.json, report.html; default: the run's."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="The data sets, for pictures; default: where the run's are.")
    ] = None,
    images: Annotated[bool, typer.Option(help="Show pictures, read from the data.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Merge runs and say what every method gains and loses, and whether that is significant."""
    from ..evaluation.results import report as write
    from ..evaluation.results import sentence
    from ..insight.pages.report import html

    if out is None and len(runs) > 1:
        raise FoveateError("These are several runs: say where to write their report with --out.")
    out = out or runs[0]
    sections = write(runs, out, root=data_root, images=images, seed=seed)
    try:
        (out / "report.html").write_text(html(sections), "utf-8")
    except OSError as error:
        raise FoveateError(f"The report cannot be written to {out}: {error.strerror}.") from error
    for section in sections:
        for verdict in section.verdicts:
            for result in verdict.results:
                if result.test:
                    print(f"{section.model}, {verdict.title}: {sentence(result, result.test)}")
    print(f"report: {out / 'report.html'}")
