"""Reports: runs merged, every method compared with the plain model, papers' numbers beside ours.

    report(["runs/shard-0", "runs/shard-1"], Path("runs/report"))

writes ``report.md`` and ``report.json``. All of it derives from the records.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import FoveateError
from ..base.journal import finite, write_json
from .merge import RunFolder, by_settings, gaps, merge, read_runs
from .published import PROTOCOLS
from .verdict import Example, Result, Test, Verdict, judge

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


@dataclass
class Section:
    """Everything that was answered by one model in one configuration."""

    model: str
    settings: dict[str, Any]
    folders: list[str]
    notes: list[str]
    environments: list[dict[str, Any]]
    verdicts: list[Verdict]


def report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    root: str | Path | None = None,
    images: bool = True,
    seed: int = 0,
) -> list[Section]:
    """Merge runs, and write ``report.md`` and ``report.json`` to `out`.

    Runs with the same model and settings, such as the shards of a run, become one section.

    Args:
        folders: run folders, or folders that hold the shards of a run.
        out: a folder; made where it is missing.
        root: the folder with the data sets, for the examples' pictures; None = the runs' own.
            Without the data there are no pictures.
        images: False reads no data and leaves out the pictures.
        seed: of the bootstrap.

    Returns:
        What the files show, for other pages.

    Raises:
        FoveateError: no run, no records, a damaged file, or runs that contradict each other.
    """
    sections = [_section(runs, root, images, seed) for runs in by_settings(read_runs(folders))]
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        told = [dataclasses.asdict(s, dict_factory=_without_pictures) for s in sections]
        write_json(out / "report.json", finite({"seed": seed, "sections": told}))
        (out / "report.md").write_text(markdown(sections), "utf-8")
    except OSError as error:
        raise FoveateError(f"The report cannot be written to {out}: {error.strerror}.") from error
    return sections


def _without_pictures(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in entries if name != "thumbnail"}


# -- one model -------------------------------------------------------------------------------------


def _section(runs: list[RunFolder], root: str | Path | None, images: bool, seed: int) -> Section:
    roots = list(dict.fromkeys([root] if root else [run.settings.get("root") for run in runs]))
    environments: list[dict[str, Any]] = []
    for run in runs:
        if run.environment and run.environment not in environments:
            environments.append(run.environment)
    model = str(runs[0].settings["model"])
    return Section(
        model=model,
        settings=runs[0].shared,
        folders=[str(run.folder) for run in runs],
        notes=gaps(runs),
        environments=environments,
        verdicts=[
            judge(model, name, methods, _problems(runs, name), roots if images else [], seed)
            for name, methods in merge(runs).items()
        ],
    )


def _problems(runs: list[RunFolder], name: str) -> list[str]:
    """What was wrong with a benchmark's data: the largest counts, as every shard reads all data."""
    counts: dict[str, int] = {}
    for run in runs:
        for kind, count in run.problems.get(name, {}).items():
            counts[kind] = max(count, counts.get(kind, 0))
    return [f"In the data: {count} {kind}." for kind, count in counts.items()]


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
class Interval:
    """A difference and its interval; the axis of its column runs from -reach to reach."""

    low: float | None
    middle: float
    high: float | None
    reach: float


@dataclass
class ReportTable:
    """A table, `grouped` by its first cells; a `folded` one opens on demand."""

    title: str
    heads: list[str]
    rows: list[list[str | Interval]]
    grouped: bool = False
    folded: bool = False


@dataclass
class Changed:
    """Examples of one method."""

    method: str
    gained: list[Example] = field(default_factory=list)
    lost: list[Example] = field(default_factory=list)


Part = Heading | Lines | ReportTable | Changed


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
        cells: list[list[str | Interval]] = [
            [_cell(c, verdict.digits) for c in row] for row in verdict.rows
        ]
        counts = {r.answered for r in verdict.results}
        n = f"n = {counts.pop()}" if len(counts) == 1 else "n of each method below"
        title = f"The benchmark's own table, {n}"
        yield ReportTable(title, verdict.heads, cells, grouped=True)
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


def _against(tested: list[tuple[Result, Test]]) -> ReportTable:
    reach = _reach([test for _, test in tested])
    heads = ["Method", "Verdict", "Difference", "95 % interval", "Gained", "Lost", "p"]
    rows: list[list[str | Interval]] = [
        [
            r.method,
            t.verdict,
            f"{t.difference:+.2f}",
            Interval(t.low, t.difference, t.high, reach),
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
    return ReportTable("Against vanilla: right answers, percent", heads, rows)


def _reach(tests: list[Test]) -> float:
    """What the axis of these tests must reach to."""
    return max(abs(x) for t in tests for x in (t.low or 0, t.high or 0, t.difference)) or 1.0


def _by_split(results: list[Result]) -> ReportTable:
    tests = [(r, t) for r in results for t in r.splits]
    reach = _reach([t for _, t in tests])
    heads = ["Split", "Method", "Verdict", "Difference", "95 % interval", "Gained", "Lost"]
    rows: list[list[str | Interval]] = [
        [
            split,
            r.method,
            t.verdict,
            f"{t.difference:+.2f}",
            Interval(t.low, t.difference, t.high, reach),
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
    return ReportTable("By split", heads, rows, grouped=True, folded=len(rows) > FOLDED)


def _answers(results: list[Result]) -> ReportTable:
    heads = ["Method", "Answered", "Failed", "Missing", "ms per answer, median"]
    yes = any(r.yes_questions for r in results)
    heads += ["Yes/no answers", "Yes, %", "Yes labels, %"] if yes else []
    rows: list[list[str | Interval]] = []
    for r in results:
        row: list[str | Interval] = [r.method, str(r.answered), str(r.failed), str(r.missing)]
        row.append(_cell(r.ms, 1))
        if yes:
            ratios = (_cell(r.yes_ratio, 2), _cell(r.label_yes_ratio, 2))
            row += [str(r.yes_questions), *ratios]
        rows.append(row)
    return ReportTable("Answers", heads, rows)


def _captions(results: list[Result]) -> ReportTable:
    heads = ["Method", "Captions", "Words", "Repeated word pairs, %", "Longest repeat, words"]
    rows: list[list[str | Interval]] = [
        [r.method, str(c.answers), f"{c.words:.1f}", f"{c.repeated:.2f}", f"{c.longest:.2f}"]
        for r in results
        if (c := r.captions)
    ]
    return ReportTable("Length and repetition of captions, means", heads, rows)


def _published(verdict: Verdict) -> ReportTable:
    heads = ["Score", "Method", "n, ours", "Ours", "Paper", "Difference", "Our gain", "Its gain"]
    digits = verdict.digits
    rows: list[list[str | Interval]] = [
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
    return ReportTable(title, [*heads, "Source"], rows, grouped=True)


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
        return "".join(f"- {marked(v)}{_escaped(t)}\n" for v, t in part.items)
    if isinstance(part, ReportTable):
        return f"**{part.title}**\n\n" + _pipes(part.heads, [[*map(flat, r)] for r in part.rows])
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


def marked(verdict: str) -> str:
    return f"{MARKS[verdict]} " if verdict in MARKS else ""


def flat(cell: str | Interval) -> str:
    if isinstance(cell, Interval):
        known = cell.low is not None and cell.high is not None
        return f"{cell.low:+.2f} to {cell.high:+.2f}" if known else "none"
    return marked(cell) + cell
