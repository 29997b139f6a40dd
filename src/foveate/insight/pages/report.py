"""How a report looks: the same parts as Markdown, and as one HTML page that needs nothing else."""

from __future__ import annotations

import html as markup
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...evaluation.published import PROTOCOLS
from .document import document, fill

if TYPE_CHECKING:
    from ...evaluation.results import Example, Result, Section, Test, Verdict

MARKS = {"better": "▲", "worse": "▼"}
FOLDED = 30  # rows: longer tables of details open on demand
HOW = (
    "Every method is compared with the plain model (vanilla) on the questions that both answered. "
    "A difference is the mean of the benchmark's own score of single answers (right or wrong, or "
    "in parts where answers are graded; a caption is right if it invents nothing), in percentage "
    "points. It may differ from a headline score such as F1.",
    "Intervals are 95 % percentile bootstrap intervals of 10,000 resamples that draw whole images "
    "with all of their questions, as questions about one image are not independent. They are not "
    "corrected for several methods, and with fewer than some 30 images they are too narrow.",
    "p is McNemar's exact two-sided p of answers gained against answers lost, which takes "
    "questions as independent. It is corrected after Holm over all methods of a benchmark; by "
    "split, over all methods and splits.",
    "Better or worse is said only where the corrected p is below 0.05 and the interval leaves out "
    "0; otherwise the difference is not significant, which is no proof that there is none.",
)


# -- parts -----------------------------------------------------------------------------------------


@dataclass
class Heading:
    level: int
    text: str
    anchor: str = ""


@dataclass
class Lines:
    """Sentences, each with a verdict, or none."""

    items: list[tuple[str, str]]


@dataclass
class Span:
    """An interval around a difference; the axis of its column runs from -reach to reach."""

    low: float | None
    middle: float
    high: float | None
    reach: float


@dataclass
class Grid:
    """A table; `grouped` by its first cells; a `folded` one opens on demand."""

    title: str
    heads: list[str]
    rows: list[list[str | Span]]
    grouped: bool = False
    folded: bool = False


@dataclass
class Changed:
    """Examples of one method."""

    method: str
    gained: list[Example] = field(default_factory=list)
    lost: list[Example] = field(default_factory=list)


Part = Heading | Lines | Grid | Changed


def parts(sections: list[Section]) -> Iterator[Part]:
    """The whole report, in order."""
    yield Lines([("", sentence) for sentence in HOW])
    for number, section in enumerate(sections):
        yield Heading(2, section.model, f"section-{number}")
        yield Lines([("", text) for text in _about(section)])
        for index, verdict in enumerate(section.verdicts):
            yield Heading(3, verdict.title, f"benchmark-{number}-{index}")
            yield from _benchmark(verdict)


def _about(section: Section) -> list[str]:
    settings = ", ".join(f"{k} {v}" for k, v in section.settings.items() if k != "model")
    found = [f"Runs: {', '.join(section.folders)}."]
    if settings:
        found.append(f"Settings: {settings}.")
    made: dict[str, list[str]] = {}
    for environment in section.environments:
        for name, value in environment.items():
            if str(value) not in made.setdefault(name, []):
                made[name].append(str(value))
    if made:
        told = ", ".join(f"{name} {' / '.join(values)}" for name, values in made.items())
        found.append(f"Made with: {told}.")
    return found + section.notes


def _benchmark(verdict: Verdict) -> Iterator[Part]:
    asked = f"{verdict.benchmark}: {verdict.questions} questions on {verdict.images} images."
    notes = [asked, *verdict.notes]
    for r in verdict.results:
        if r.failed or r.missing:
            why = f" ({'; '.join(r.errors)})" if r.errors else ""
            notes.append(f"{r.method}: {r.failed} questions failed{why}, {r.missing} are missing.")
    for note, told in _told(verdict.results).items():
        everyone = len(told) == len(verdict.results) > 1
        notes.append(note if everyone else f"{', '.join(told)}: {note}")
    tested = [(r, r.test) for r in verdict.results if r.test]
    yield Lines([(test.verdict, sentence(r, test)) for r, test in tested])
    yield Lines([("", note) for note in notes])
    if tested:
        yield _against(tested)
    if verdict.rows:
        cells: list[list[str | Span]] = [
            [_cell(c, verdict.digits) for c in row] for row in verdict.rows
        ]
        counts = {r.answered for r in verdict.results}
        n = f"n = {counts.pop()}" if len(counts) == 1 else "n of each method below"
        title = f"The benchmark's own table, {n}"
        yield Grid(title, verdict.heads, cells, grouped=True)
    if any(r.splits for r in verdict.results):
        yield _by_split(verdict.results)
    yield _answers(verdict.results)
    if any(r.captions for r in verdict.results):
        yield _captions(verdict.results)
    if verdict.published:
        yield _published(verdict)
        sources = dict.fromkeys(b.source for b in verdict.published)
        yield Lines([("", f"{source}: {PROTOCOLS[source]}") for source in sources])
    for r in verdict.results:
        if r.gained or r.lost:
            yield Changed(r.method, r.gained, r.lost)


def _told(results: list[Result]) -> dict[str, list[str]]:
    """Note -> the methods that it is about."""
    found: dict[str, list[str]] = {}
    for r in results:
        for note in r.notes:
            found.setdefault(note, []).append(r.method)
    return found


def sentence(result: Result, test: Test) -> str:
    """What a test says, in words, with all of its numbers."""
    says = {
        "better": "helps",
        "worse": "hurts",
        "not significant": "makes no significant difference",
        "no score changed": "changes no score",
    }[test.verdict]
    told = [
        f"{result.method} {says}: {test.difference:+.2f} points ({_ends(test.low, test.high)}), "
        f"answers gained {test.gained}, lost {test.lost}; n = {test.questions} questions on "
        f"{test.images} images; p = {p_value(test.p)}, corrected {p_value(test.corrected)}."
    ]
    for verdict in MARKS:
        names = [s.what for s in result.splits if s.verdict == verdict]
        if names:
            told.append(f"By split, {verdict} on {', '.join(names)}.")
    return " ".join(told)


def p_value(p: float) -> str:
    return "< 1e-12" if p < 1e-12 else f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


def _ends(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "no interval from one image"
    return f"95 % interval {low:+.2f} to {high:+.2f}"


def _against(tested: list[tuple[Result, Test]]) -> Grid:
    reach = _reach([test for _, test in tested])
    heads = ["Method", "Verdict", "Difference", "95 % interval", "Gained", "Lost", "p"]
    rows: list[list[str | Span]] = [
        [
            r.method,
            t.verdict,
            f"{t.difference:+.2f}",
            Span(t.low, t.difference, t.high, reach),
            str(t.gained),
            str(t.lost),
            p_value(t.p),
            p_value(t.corrected),
            f"{t.vanilla:.2f}",
            f"{t.method:.2f}",
            str(t.questions),
            str(t.images),
        ]
        for r, t in tested
    ]
    heads += ["p, corrected", "Vanilla", "With it", "n", "Images"]
    return Grid("Against vanilla: right answers, percent", heads, rows)


def _reach(tests: list[Test]) -> float:
    """What the axis of these tests must reach to."""
    return max(abs(x) for t in tests for x in (t.low or 0, t.high or 0, t.difference)) or 1.0


def _by_split(results: list[Result]) -> Grid:
    tests = [(r, t) for r in results for t in r.splits]
    reach = _reach([t for _, t in tests])
    heads = ["Split", "Method", "Verdict", "Difference", "95 % interval", "Gained", "Lost"]
    rows: list[list[str | Span]] = [
        [
            split,
            r.method,
            t.verdict,
            f"{t.difference:+.2f}",
            Span(t.low, t.difference, t.high, reach),
            str(t.gained),
            str(t.lost),
            p_value(t.corrected),
            f"{t.vanilla:.2f}",
            str(t.questions),
        ]
        for split in dict.fromkeys(t.what for _, t in tests)
        for r, t in tests
        if t.what == split
    ]
    heads += ["p, corrected", "Vanilla", "n"]
    return Grid("By split", heads, rows, grouped=True, folded=len(rows) > FOLDED)


def _answers(results: list[Result]) -> Grid:
    heads = ["Method", "Answered", "Failed", "Missing", "ms per answer, median"]
    yes = any(r.yes_questions for r in results)
    heads += ["Yes/no answers", "Yes, %", "Yes labels, %"] if yes else []
    rows: list[list[str | Span]] = []
    for r in results:
        row: list[str | Span] = [r.method, str(r.answered), str(r.failed), str(r.missing)]
        row.append(_cell(r.ms, 1))
        if yes:
            ratios = (_cell(r.yes_ratio, 2), _cell(r.label_yes_ratio, 2))
            row += [str(r.yes_questions), *ratios]
        rows.append(row)
    return Grid("Answers", heads, rows)


def _captions(results: list[Result]) -> Grid:
    heads = ["Method", "Captions", "Words", "Repeated word pairs, %", "Longest repeat, words"]
    rows: list[list[str | Span]] = [
        [r.method, str(c.answers), f"{c.words:.1f}", f"{c.repeated:.2f}", f"{c.longest:.2f}"]
        for r in results
        if (c := r.captions)
    ]
    return Grid("Length and repetition of captions, means", heads, rows)


def _published(verdict: Verdict) -> Grid:
    heads = ["Score", "Method", "n, ours", "Ours", "Paper", "Difference", "Our gain", "Its gain"]
    digits = verdict.digits
    rows: list[list[str | Span]] = [
        [
            b.score,
            f"{b.method}, {b.variant}" if b.variant else b.method,
            str(verdict.questions) if b.fewer is None else f"{b.fewer} of its {b.questions}",
            _cell(b.ours, digits),
            _cell(b.paper, digits),
            f"{b.difference:+.{digits}f}",
            "" if b.our_gain is None else f"{b.our_gain:+.{digits}f}",
            "" if b.gain is None else f"{b.gain:+.{digits}f}",
            b.source,
        ]
        for b in sorted(verdict.published, key=lambda b: b.score)
    ]
    title = "Beside published numbers (difference: ours minus theirs; gain: over vanilla)"
    return Grid(title, [*heads, "Source"], rows, grouped=True)


def _cell(value: str | float, digits: int) -> str:
    if isinstance(value, str):
        return value
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


# -- Markdown --------------------------------------------------------------------------------------


def markdown(sections: list[Section]) -> str:
    """The report as Markdown, without pictures."""
    return "\n".join(["# Report", "", *map(_as_markdown, parts(sections))])


def _as_markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {_escaped(part.text)}\n"
    if isinstance(part, Lines):
        return "".join(f"- {_marked(v)}{_escaped(t)}\n" for v, t in part.items)
    if isinstance(part, Grid):
        return f"**{part.title}**\n\n" + _pipes(part.heads, [[*map(_flat, r)] for r in part.rows])
    found = [f"**Answers that {part.method} changed**\n"]
    for what, examples in (("gained", part.gained), ("lost", part.lost)):
        rows = [
            [
                what,
                f"{e.image or ''} ({e.split} {e.line})",
                e.question,
                e.label,
                e.vanilla,
                e.answer,
            ]
            for e in examples
        ]
        if rows:
            found.append(_pipes(["", "Image", "Question", "Label", "Vanilla", part.method], rows))
    return "\n".join(found)


def _pipes(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines) + ""


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _marked(verdict: str) -> str:
    return f"{MARKS[verdict]} " if verdict in MARKS else ""


def _flat(cell: str | Span) -> str:
    if isinstance(cell, Span):
        known = cell.low is not None and cell.high is not None
        return f"{cell.low:+.2f} to {cell.high:+.2f}" if known else "none"
    return _marked(cell) + cell


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
    if isinstance(part, Grid):
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
    said = f'<b class="{verdict}">{_text(_marked(verdict) + start)}</b>'
    return f"<li>{said}{_text(bracket + rest)}</li>"


def _table(grid: Grid) -> str:
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


def _is_number(cell: str | Span) -> bool:
    return isinstance(cell, Span) or bool(re.fullmatch(r"(< )?[-+]?[\d.e-]*|undefined", cell))


def _td(cell: str | Span, kind: str) -> str:
    if isinstance(cell, Span):
        return f'<td>{_drawn(cell)} <span class="ends">{_flat(cell)}</span></td>'
    kind = f' class="text {cell}"' if cell in MARKS else kind
    return f"<td{kind}>{_text(_flat(cell))}</td>"


def _drawn(span: Span) -> str:
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
