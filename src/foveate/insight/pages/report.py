"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import html as markup
import itertools
import re

from ...evaluation.results import (
    MARKS,
    Heading,
    Interval,
    Lines,
    Part,
    Picture,
    ReportTable,
    Section,
    flat,
    marked,
    parts,
)
from ...evaluation.verdict import Example
from .document import document, fill

FOLDED = 30  # rows: longer tables of details open on demand

# -- HTML ------------------------------------------------------------------------------------------


def html(sections: list[Section]) -> str:
    """The report as one page: no script, no outside resource, pictures embedded."""
    how, *rest = parts(sections)
    links = "".join(
        f'<li class="level{p.level}"><a href="#{p.anchor}">{_text(p.text)}</a></li>'
        for p in rest
        if isinstance(p, Heading)
    )
    title = f"Report: {', '.join(dict.fromkeys(s.model for s in sections))}"
    body = fill(
        "report.html",
        title=_text(title),
        links=links,
        how=_as_html(how),
        body="\n".join(map(_as_html, rest)),
    )
    return document(title, body, "report.css")


def _as_html(part: Part) -> str:
    if isinstance(part, Heading):
        return f'<h{part.level} id="{part.anchor}">{_text(part.text)}</h{part.level}>'
    if isinstance(part, Lines):
        items = "".join(_item(verdict, text) for verdict, text in part.items)
        return f"<ul>{items}</ul>" if items else ""
    if isinstance(part, ReportTable):
        return _table(part)
    if isinstance(part, Picture):
        return f'<img class="figure" src="{part.source}" alt="{_text(part.title)}">'
    lists = "".join(
        f"<h4>{what.capitalize()}</h4>"
        f'<ul class="examples">{"".join(_example(e, part.method) for e in examples)}</ul>'
        for what, examples in (("gained", part.gained), ("lost", part.lost))
        if examples
    )
    count = len(part.gained) + len(part.lost)
    told = f"Examples of answers that {part.method} changed ({count})"
    return f"<details><summary>{_text(told)}</summary>{lists}</details>"


def _item(verdict: str, text: str) -> str:
    """A line; of a verdict, what it says before the numbers in brackets stands out."""
    if verdict not in MARKS:
        kind = "" if verdict else ' class="soft"'
        return f"<li{kind}>{_text(text)}</li>"
    start, bracket, rest = text.partition(" (95")
    said = f'<b class="{verdict}">{_text(marked(verdict) + start)}</b>'
    return f"<li>{said}{_text(bracket + rest)}</li>"


def _table(grid: ReportTable) -> str:
    """A table that scrolls sideways; the first cell of a group is a line of its own."""
    skip = int(grid.grouped)
    columns = list(zip(*grid.rows, strict=True))[skip:]
    kinds = ["" if all(map(_is_number, column)) else ' class="text"' for column in columns]
    heads = "".join(
        f'<th scope="col"{kind}>{_text(head)}</th>'
        for head, kind in zip(grid.heads[skip:], kinds, strict=True)
    )
    bodies = []
    for group, rows in itertools.groupby(grid.rows, key=lambda row: row[0] if skip else ""):
        name = (
            f'<tr class="group"><th scope="rowgroup" colspan="{len(kinds)}">'
            f"<span>{_text(str(group))}</span></th></tr>"
        )
        lines = [
            f'<tr><th scope="row">{_text(str(row[skip]))}</th>'
            f"{''.join(map(_td, row[skip + 1 :], kinds[1:]))}</tr>"
            for row in rows
        ]
        bodies.append(f"<tbody>{name * skip}{''.join(lines)}</tbody>")
    label = _text(grid.title)
    table = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>'
        f"<caption>{label}</caption><thead><tr>{heads}</tr></thead>{''.join(bodies)}</table></div>"
    )
    if grid.folded:
        count = len(grid.rows)
        return f"<details><summary>{label} ({count} lines)</summary>{table}</details>"
    return table


def _is_number(cell: str | Interval) -> bool:
    return isinstance(cell, Interval) or bool(re.fullmatch(r"(< )?[-+]?[\d.e-]*|undefined", cell))


def _td(cell: str | Interval, kind: str) -> str:
    if isinstance(cell, Interval):
        return f'<td>{_drawn(cell)} <span class="ends">{flat(cell)}</span></td>'
    kind = f' class="text {cell}"' if cell in MARKS else kind
    return f"<td{kind}>{_text(flat(cell))}</td>"


def _drawn(span: Interval) -> str:
    """A small drawing: the axis at 0, the interval as a line, the difference as a dot."""

    def x(value: float) -> float:
        return 50 + 46 * value / span.reach

    line = ""
    if span.low is not None and span.high is not None:
        line = (
            f'<line x1="{x(span.low):.1f}" x2="{x(span.high):.1f}" y1="6" y2="6" '
            'stroke="currentColor" stroke-width="2"/>'
        )
    return (
        '<svg viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<line x1="50" x2="50" y1="0" y2="12" stroke="currentColor" stroke-opacity=".4"/>'
        f'{line}<rect x="{x(span.middle) - 1.5:.1f}" y="2.5" width="3" height="7" '
        'fill="currentColor"/></svg>'
    )


def _example(example: Example, method: str) -> str:
    picture = ""
    if example.thumbnail:
        told = _text(f"Image {example.image or ''}")
        picture = f'<img src="{example.thumbnail}" alt="{told}" width="96" height="96">'
    return (
        f"<li>{picture}<div><p><b>{_text(example.question)}</b></p>"
        f"<p>Label: {_text(example.label)}</p><p>vanilla: {_text(example.vanilla)}</p>"
        f"<p>{_text(method)}: {_text(example.answer)}</p>"
        f'<p class="soft">{_text(example.split)}, line {example.line}</p></div></li>'
    )


def _text(text: str) -> str:
    return markup.escape(text)
