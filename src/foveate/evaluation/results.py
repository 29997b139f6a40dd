"""Reports: runs merged, every method compared with the plain model, papers' numbers beside ours.

    report(["runs/shard-0", "runs/shard-1"], Path("runs/report"))

writes ``report.md`` and ``report.json``. All of it derives from the records.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.files import make_folder, write_text
from ..base.journal import finite, write_json
from .lengths import Lengths, length_sentences
from .merge import RunFolder, by_settings, gaps, merge, read_runs
from .published import PROTOCOLS, Comparison
from .verdict import Example, Result, Test, Verdict, judge

SAFE = "the runs are untouched"
MARKS = {"better": "▲", "worse": "▼"}
RECALL_CHAIR = "Recall against CHAIR, captions cut to so many words"
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
    out = make_folder(Path(out))
    told = [dataclasses.asdict(s, dict_factory=_without_pictures) for s in sections]
    write_json(out / "report.json", finite({"seed": seed, "sections": told}), SAFE)
    write_text(out / "report.md", markdown(sections), SAFE)
    return sections


def _without_pictures(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in entries if name not in ("thumbnail", "figure")}


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


@dataclass
class Picture:
    """A figure as a data URI, and what it shows."""

    title: str
    source: str


Part = Heading | Lines | ReportTable | Changed | Picture


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
    lines = [f"Runs: {', '.join(section.folders)}."]
    if settings:
        lines.append(f"Settings: {settings}.")
    made: dict[str, dict[str, None]] = {}  # name -> its values, each once
    for environment in section.environments:
        for name, value in environment.items():
            made.setdefault(name, {})[str(value)] = None
    if made:
        values = ", ".join(f"{name} {' / '.join(values)}" for name, values in made.items())
        lines.append(f"Made with: {values}.")
    return lines + section.notes


def _benchmark(verdict: Verdict) -> Iterator[Part]:
    results, digits = verdict.results, verdict.digits
    tested = [(r, r.test) for r in results if r.test]
    yield Lines([(test.verdict, sentence(r, test)) for r, test in tested])
    yield Lines([("", note) for note in _notes(verdict)])
    if tested:
        yield _tests("Against vanilla: right answers, percent", tested, without=("Split",))
    if verdict.rows:
        counts = {r.answered for r in results}
        n = f"n = {counts.pop()}" if len(counts) == 1 else "n of each method below"
        cells: list[list[str | Interval]] = [[_cell(c, digits) for c in r] for r in verdict.rows]
        yield ReportTable(f"The benchmark's own table, {n}", verdict.heads, cells, grouped=True)
    if splits := [(r, test) for r in results for test in r.splits]:
        order = list(dict.fromkeys(test.what for _, test in splits))
        splits.sort(key=lambda row: order.index(row[1].what))
        table = _tests("By split", splits, without=("p", "With it", "Images"))
        table.grouped, table.folded = True, len(splits) > FOLDED
        yield table
    yield _answers(results)
    if any(r.captions for r in results):
        yield _captions(results)
    if verdict.lengths:
        yield Lines([("", told) for told in length_sentences(verdict.lengths)])
        if verdict.lengths.figure:
            yield Picture(RECALL_CHAIR, verdict.lengths.figure)
        yield _cuts(verdict.lengths, digits)
    if verdict.published:
        yield _published(verdict)
        sources = dict.fromkeys(c.source for c in verdict.published)
        yield Lines([("", f"{source}: {PROTOCOLS[source]}") for source in sources])
    yield from (Changed(r.method, r.gained, r.lost) for r in results if r.gained or r.lost)


def _notes(verdict: Verdict) -> list[str]:
    notes = [f"{verdict.benchmark}: {verdict.questions} questions on {verdict.images} images."]
    notes += verdict.notes
    methods: dict[str, list[str]] = {}  # note -> the methods that it is about
    for r in verdict.results:
        if r.failed or r.missing:
            why = f" ({'; '.join(r.errors)})" if r.errors else ""
            notes.append(f"{r.method}: {r.failed} questions failed{why}, {r.missing} are missing.")
        for note in r.notes:
            methods.setdefault(note, []).append(r.method)
    for note, names in methods.items():
        everyone = len(names) == len(verdict.results) > 1
        notes.append(note if everyone else f"{', '.join(names)}: {note}")
    return notes


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


# -- tables: the head of each column, and what stands in it ----------------------------------------


def _table(
    title: str, columns: dict[str, Callable[[Any], str | Interval]], items: Iterable[Any]
) -> ReportTable:
    """One row per item."""
    rows = [[cell(item) for cell in columns.values()] for item in items]
    return ReportTable(title, list(columns), rows)


def _tests(
    title: str, tested: Sequence[tuple[Result, Test]], without: Sequence[str]
) -> ReportTable:
    tests = [test for _, test in tested]
    reach = max(abs(x) for t in tests for x in (t.low or 0, t.high or 0, t.difference)) or 1.0
    columns: dict[str, Callable[[tuple[Result, Test]], str | Interval]] = {
        "Split": lambda row: row[1].what,
        "Method": lambda row: row[0].method,
        "Verdict": lambda row: row[1].verdict,
        "Difference": lambda row: f"{row[1].difference:+.2f}",
        "95 % interval": lambda row: Interval(row[1].low, row[1].difference, row[1].high, reach),
        "Gained": lambda row: str(row[1].gained),
        "Lost": lambda row: str(row[1].lost),
        "p": lambda row: p_value(row[1].p),
        "p, corrected": lambda row: p_value(row[1].corrected),
        "Vanilla": lambda row: f"{row[1].vanilla:.2f}",
        "With it": lambda row: f"{row[1].method:.2f}",
        "n": lambda row: str(row[1].questions),
        "Images": lambda row: str(row[1].images),
    }
    return _table(title, {h: cell for h, cell in columns.items() if h not in without}, tested)


def _answers(results: list[Result]) -> ReportTable:
    columns: dict[str, Callable[[Result], str | Interval]] = {
        "Method": lambda r: r.method,
        "Answered": lambda r: str(r.answered),
        "Failed": lambda r: str(r.failed),
        "Missing": lambda r: str(r.missing),
        "ms per answer, median": lambda r: _cell(r.ms, 1),
    }
    if any(r.yes_questions for r in results):
        columns |= {
            "Yes/no answers": lambda r: str(r.yes_questions),
            "Yes, %": lambda r: _cell(r.yes_ratio, 2),
            "Yes labels, %": lambda r: _cell(r.label_yes_ratio, 2),
        }
    return _table("Answers", columns, results)


def _captions(results: list[Result]) -> ReportTable:
    heads = ["Method", "Captions", "Words", "Repeated word pairs, %", "Longest repeat, words"]
    rows: list[list[str | Interval]] = [
        [r.method, str(c.answers), f"{c.words:.1f}", f"{c.repeated:.2f}", f"{c.longest:.2f}"]
        for r in results
        if (c := r.captions)
    ]
    return ReportTable("Length and repetition of captions, means", heads, rows)


def _cuts(lengths: Lengths, digits: int) -> ReportTable:
    rows: list[list[str | Interval]] = [
        [
            curve.method,
            "whole" if cut.words is None else str(cut.words),
            f"{cut.length:.1f}",
            *(_cell(value, digits) for value in (cut.recall, cut.chair_i, cut.chair_s)),
        ]
        for curve in lengths.curves
        for cut in curve.cuts
    ]
    heads = ["Method", "Cut to words", "Length", "Recall", "CHAIRi", "CHAIRs"]
    title = f"{RECALL_CHAIR}, n = {lengths.captions}"
    return ReportTable(title, heads, rows, grouped=True, folded=len(rows) > FOLDED)


def _published(verdict: Verdict) -> ReportTable:
    def signed(value: float | None) -> str:
        return "" if value is None else f"{value:+.{verdict.digits}f}"

    columns: dict[str, Callable[[Comparison], str | Interval]] = {
        "Score": lambda c: c.score,
        "Method": lambda c: f"{c.method}, {c.variant}" if c.variant else c.method,
        "n, ours": lambda c: (
            str(verdict.questions) if c.fewer is None else f"{c.fewer} of its {c.questions}"
        ),
        "Ours": lambda c: _cell(c.ours, verdict.digits),
        "Paper": lambda c: _cell(c.paper, verdict.digits),
        "Difference": lambda c: signed(c.difference),
        "Our gain": lambda c: signed(c.our_gain),
        "Its gain": lambda c: signed(c.gain),
        "Source": lambda c: c.source,
    }
    title = "Beside published numbers (difference: ours minus theirs; gain: over vanilla)"
    table = _table(title, columns, sorted(verdict.published, key=lambda c: c.score))
    table.grouped = True
    return table


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
    if isinstance(part, Picture):
        return ""  # its table stands beside it
    if isinstance(part, ReportTable):
        return f"**{part.title}**\n\n" + _pipes(part.heads, [[*map(flat, r)] for r in part.rows])
    lines = [f"**Answers that {part.method} changed**\n"]
    for what, examples in (("gained", part.gained), ("lost", part.lost)):
        rows = [[what, _place(e), e.question, e.label, e.vanilla, e.answer] for e in examples]
        if rows:
            lines.append(_pipes(["", "Image", "Question", "Label", "Vanilla", part.method], rows))
    return "\n".join(lines)


def _place(example: Example) -> str:
    return f"{example.image or ''} ({example.split} {example.line})"


def _pipes(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)


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
