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
    ReportTable,
    Section,
    flat,
    marked,
    parts,
)
from ...evaluation.verdict import Example

# -- HTML ------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #595e66; --line: #d5d8dd; --back: #fff;
  --raised: #f4f5f7; --better: #0b6b3a; --worse: #b3261e; --link: #0b57c2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a9afb8; --line: #3a3f47;
  --back: #15171a; --raised: #1f2226; --better: #6fd39b; --worse: #ff9188; --link: #8ab8ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 4rem; color: var(--ink);
  background: var(--back); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.35rem; margin: 2rem 0 .5rem; border-top: 2px solid var(--line);
  padding-top: 1.2rem; }
h3 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
ul { padding-left: 1.2rem; margin: .5rem 0 1rem; }
li { margin: .25rem 0; }
a { color: var(--link); }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: .5rem; background: var(--back); padding: .5rem; z-index: 3; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.soft { color: var(--soft); font-size: .925rem; }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
.level3 { margin-left: 1rem; }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; border: 1px solid var(--line);
  border-radius: .5rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .6rem .75rem; position: sticky; left: 0; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--raised); z-index: 2; font-weight: 600; }
th:first-child, .text { text-align: left; }
tbody th { position: sticky; left: 0; background: var(--back); z-index: 1; font-weight: 400;
  max-width: 16rem; min-width: 4rem; white-space: normal; }
.group th { position: static; max-width: none; font-weight: 600; text-align: left;
  background: var(--raised); }
.group span { position: sticky; left: .75rem; }
@media (min-width: 48rem) { .scroll { max-height: 85vh; } }
@media (max-width: 30rem) { th, td { padding: .35rem .5rem; } tbody th { max-width: 8rem; } }
.ends { display: inline-block; min-width: 8.5rem; }
svg { width: 6rem; height: 1.1rem; vertical-align: middle; color: var(--ink); }
summary { cursor: pointer; padding: .5rem 0; }
.examples { display: grid; gap: .75rem; margin: .5rem 0 1.5rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); align-items: start; }
.examples li { display: flex; gap: .75rem; margin: 0; padding: .75rem; border-radius: .5rem;
  background: var(--raised); }
.examples img { width: 6rem; height: 6rem; object-fit: contain; flex: none; }
.examples p { margin: 0 0 .25rem; font-size: .9rem; min-width: 0; }
.examples div { min-width: 0; }
@media print { .scroll { overflow: visible; max-height: none; } }
"""


def html(sections: list[Section]) -> str:
    """The report as one page: no script, no outside resource, pictures embedded."""
    found = list(parts(sections))
    links = "".join(
        f'<li class="level{p.level}"><a href="#{p.anchor}">{_text(p.text)}</a></li>'
        for p in found
        if isinstance(p, Heading)
    )
    title = f"Report: {', '.join(dict.fromkeys(s.model for s in sections))}"
    how, body = found[0], "\n".join(map(_as_html, found[1:]))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">To the results</a>
<h1>{_text(title)}</h1>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<details><summary>How to read this</summary>
{_as_html(how)}
</details>
<main id="main">
{body}
</main>
</body>
</html>
"""


def _as_html(part: Part) -> str:
    if isinstance(part, Heading):
        return f'<h{part.level} id="{part.anchor}">{_text(part.text)}</h{part.level}>'
    if isinstance(part, Lines):
        items = "".join(_item(verdict, text) for verdict, text in part.items)
        return f"<ul>{items}</ul>" if items else ""
    if isinstance(part, ReportTable):
        return _table(part)
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
