"""`foveate report`: what every method gains and loses over runs."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import FoveateError
from ..base.files import write_text
from . import app
from .common import JsonOption, hint

if TYPE_CHECKING:
    from ..evaluation.results import Section


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Read these folders of runs or shards.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Write report.md, .json and .html into this folder; default: the run's."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(help="Read pictures from the data sets here; default: where the run did."),
    ] = None,
    images: Annotated[bool, typer.Option(help="Show pictures of examples.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed the bootstrap with this number.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Merge runs and tell what every method gains and loses, and whether that is significant."""
    from ..evaluation.results import SAFE, sentence
    from ..evaluation.results import report as write
    from ..insight.pages.report import html

    if out is None and len(runs) > 1:
        raise FoveateError("These are several runs: say where to write their report with --out.")
    out = out or runs[0]
    sections = write(runs, out, root=data_root, images=images, seed=seed)
    figures = _draw_lengths(sections, out)
    write_text(out / "report.html", html(sections), SAFE)
    if as_json:
        print((out / "report.json").read_text("utf-8"))
        return
    for section in sections:
        for verdict in section.verdicts:
            for result in verdict.results:
                if result.test:
                    print(f"{section.model}, {verdict.title}: {sentence(result, result.test)}")
    for told in figures:
        print(told)
    print(f"report: {out / 'report.html'}")
    hint("open it in a browser; foveate sweep tries other values of a method's parameters")


def _draw_lengths(sections: list[Section], out: Path) -> list[str]:
    """Draw recall against CHAIR where there are captions of methods; what to print about it."""
    from ..insight.plots.lengths import show_lengths

    told: list[str] = []
    for section in sections:
        for verdict in section.verdicts:
            if verdict.lengths is None or len(verdict.lengths.curves) < 2:
                continue
            number = f"-{len(told) + 1}" if told else ""
            path = out / f"recall-chair{number}.png"
            try:
                show_lengths(verdict.lengths, f"{verdict.title}, {section.model}", path)
            except FoveateError as error:
                return [*told, f"Recall against CHAIR is not drawn: {error}"]
            picture = base64.b64encode(path.read_bytes()).decode()
            verdict.lengths.figure = f"data:image/png;base64,{picture}"
            told.append(f"figure: {path}")
    return told
