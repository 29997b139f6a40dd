"""The verdict: runs merged, every method held against the plain model, papers' rows beside ours.

    report(["runs/shard-0", "runs/shard-1"], "runs/report")

writes ``report.md``, ``report.json`` and ``report.html``. All of it derives from the records.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from ..base import stats
from ..base.errors import FoveateError
from ..base.journal import write_json
from ..insight.pages.report import html, markdown
from . import benchmark as benchmark_module
from . import published
from .benchmark import Benchmark, Record, Sample
from .merge import Key, RunFolder, by_settings, gaps, merge, read_runs

VANILLA = "vanilla"
EXAMPLES = 4  # of each kind, per method and benchmark
LONG = 8  # words: answers longer than this on average are captions
THUMBNAIL = 160  # pixels


@dataclass
class Test:
    """A method against the plain model, on the questions that both answered.

    Scores are `Benchmark.correct`, in percent; the difference is in percentage points.

    Attributes:
        what: a split, or "all questions".
        low, high: ends of the 95 % bootstrap interval, images resampled; None with one image.
        gained, lost: answers that score higher, and lower, than the plain model's.
        p: McNemar's exact two-sided p.
        corrected: p after Holm's correction.
        verdict: "better", "worse", "not significant" or "no score changed".
    """

    what: str
    questions: int
    images: int
    vanilla: float
    method: float
    difference: float
    low: float | None
    high: float | None
    gained: int
    lost: int
    p: float
    corrected: float = math.nan
    verdict: str = ""


@dataclass
class Example:
    """An answer that changed; `thumbnail` is a data URI, or None without the picture."""

    split: str
    line: int
    image: str | None
    question: str
    label: str
    vanilla: str
    answer: str
    thumbnail: str | None = None


@dataclass
class Captions:
    """How long answers are written.

    Attributes:
        answers: how many.
        words: mean length in words.
        repeated: mean share, in percent, of pairs of neighbouring words that occurred before in
            the same answer.
        longest: mean length, in words, of the longest sequence that occurs again later.
    """

    answers: int
    words: float
    repeated: float
    longest: float


@dataclass
class Result:
    """One method on one benchmark.

    Attributes:
        answered, failed, missing: of the questions that any method was asked.
        yes_ratio: percent of yes among `yes_questions` answers to yes/no questions.
        label_yes_ratio: the same of the labels.
        ms: median milliseconds per answer.
    """

    method: str
    answered: int
    failed: int
    missing: int
    scores: dict[str, float]
    notes: list[str]
    errors: list[str]
    yes_questions: int
    yes_ratio: float
    label_yes_ratio: float
    ms: float
    captions: Captions | None = None
    test: Test | None = None
    splits: list[Test] = field(default_factory=list)
    gained: list[Example] = field(default_factory=list)
    lost: list[Example] = field(default_factory=list)


@dataclass
class Beside:
    """One number of a paper beside ours.

    Attributes:
        difference: ours minus theirs.
        gain, our_gain: what the method adds to the plain model, there and here.
        fewer: how many questions we asked, where the paper asked more.
    """

    score: str
    method: str
    variant: str
    source: str
    paper: float
    ours: float
    difference: float
    gain: float | None
    our_gain: float | None
    questions: int
    fewer: int | None


@dataclass
class Verdict:
    """All methods on one benchmark.

    Attributes:
        heads, rows: the benchmark's own tables in one, with the method behind each row's head.
    """

    benchmark: str
    title: str
    digits: int
    questions: int
    images: int
    results: list[Result]
    heads: list[str]
    rows: list[list[str | float]]
    published: list[Beside]
    notes: list[str]


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
    """Merge runs and write ``report.md``, ``report.json`` and ``report.html`` to `out`.

    Runs with the same model and settings become one section, as the shards of a run do; others get
    sections of their own.

    Args:
        folders: run folders, or folders that hold the shards of a run.
        out: a folder; made where it is missing.
        root: where the benchmarks' data are, for the examples' pictures; None = where the runs
            had them. Without the data there are no pictures.
        images: False leaves out pictures, and reads no data.
        seed: of the bootstrap.

    Raises:
        FoveateError: no run, no records, a damaged file, or runs that contradict each other.
    """
    sections = [_section(runs, root, images, seed) for runs in by_settings(read_runs(folders))]
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "report.json", _plain({"seed": seed, "sections": sections}))
        (out / "report.md").write_text(markdown(sections), "utf-8")
        (out / "report.html").write_text(html(sections), "utf-8")
    except OSError as error:
        raise FoveateError(f"The report cannot be written to {out}: {error.strerror}.") from error
    return sections


# -- one model -------------------------------------------------------------------------------------


def _section(runs: list[RunFolder], root: str | Path | None, images: bool, seed: int) -> Section:
    roots = list(dict.fromkeys([root] if root else [run.settings.get("root") for run in runs]))
    environments: list[dict[str, Any]] = []
    for run in runs:
        if run.environment and run.environment not in environments:
            environments.append(run.environment)
    return Section(
        model=str(runs[0].settings["model"]),
        settings=runs[0].shared,
        folders=[str(run.folder) for run in runs],
        notes=gaps(runs),
        environments=environments,
        verdicts=[
            _verdict(
                runs[0].settings["model"],
                name,
                methods,
                _problems(runs, name),
                roots if images else [],
                seed,
            )
            for name, methods in merge(runs).items()
        ],
    )


def _problems(runs: list[RunFolder], name: str) -> list[str]:
    """What was wrong with a benchmark's data; shards read all of them, so the most counts."""
    counts: dict[str, int] = {}
    for run in runs:
        for kind, count in run.problems.get(name, {}).items():
            counts[kind] = max(count, counts.get(kind, 0))
    return [f"In the data: {count} {kind}." for kind, count in counts.items()]


# -- one benchmark ---------------------------------------------------------------------------------


def _verdict(
    model: str,
    name: str,
    methods: dict[str, dict[Key, Record]],
    problems: list[str],
    roots: list[str | Path | None],
    seed: int,
) -> Verdict:
    b: Benchmark = benchmark_module.parse(name)[0]
    order = sorted(methods, key=lambda method: method != VANILLA)
    asked = {key: record for group in methods.values() for key, record in group.items()}
    results = [_result(b, method, methods[method], asked) for method in order]
    plain = methods.get(VANILLA)
    if plain is not None:
        tested = [r for r in results if r.method != VANILLA and r.scores]
        before = _scored(b, plain) if tested else {}
        for result in tested:
            _compare(result, _pairs(b, plain, before, methods[result.method]), seed)
        _correct([r.test for r in results if r.test])
        _correct([test for r in results for test in r.splits])
        _add_thumbnails(b, results, roots)
    else:
        problems = [*problems, "No vanilla answers are here to compare with."]
    heads, rows = _table(b, results)
    return Verdict(
        benchmark=name,
        title=(b.title or b.name) + ("" if name == b.name else f": {name}"),
        digits=b.digits,
        questions=len(asked),
        images=len({_image(record) for record in asked.values()}),
        results=results,
        heads=heads,
        rows=rows,
        published=_published(model, b, results, len(asked)),
        notes=problems,
    )


def _result(b: Benchmark, method: str, own: dict[Key, Record], asked: dict[Key, Record]) -> Result:
    rows = list(own.values())
    given = [r for r in rows if r["answer"] is not None]
    yes_no = [r for r in given if r["label"] in ("yes", "no")]
    failed = [r for r in rows if r["answer"] is None]
    scores, notes = dict[str, float](), b.notes(rows)
    try:
        scores = b.score(rows) if given else {}
    except FoveateError as error:  # it needs a package or word list that is not here
        notes.append(f"Not scored: {error}")
    return Result(
        method=method,
        answered=len(given),
        failed=len(failed),
        missing=len(asked) - len(rows),
        scores=scores,
        notes=notes,
        errors=list(dict.fromkeys(_brief(str(r.get("error")), 160) for r in failed))[:3],
        yes_questions=len(yes_no),
        yes_ratio=_percent([b.parse(r["answer"]) == "yes" for r in yes_no]),
        label_yes_ratio=_percent([r["label"] == "yes" for r in yes_no]),
        ms=median([r.get("ms") or 0.0 for r in given]) if given else math.nan,
        captions=_captions(given),
    )


def _table(b: Benchmark, results: list[Result]) -> tuple[list[str], list[list[str | float]]]:
    """The benchmark's own tables in one: each of its rows once per method."""
    heads: list[str] = []
    found: dict[str, list[list[str | float]]] = {}
    for result in results:
        if result.scores:
            heads, rows = b.table(result.scores)
            for row in rows:
                found.setdefault(str(row[0]), []).append([row[0], result.method, *row[1:]])
    heads = [*heads[:1], "Method", *heads[1:]]
    return heads, [row for group in found.values() for row in group]


def _image(record: Record) -> Any:
    """What a question shares with others: its image, or nothing."""
    return record.get("image") or (record["split"], record["line"])


def _percent(values: Sequence[float | bool]) -> float:
    return 100 * fmean(values) if values else math.nan


# -- against the plain model -----------------------------------------------------------------------


class _Pair(NamedTuple):
    """One question, answered by the plain model and by a method, with both scores."""

    plain: Record
    own: Record
    before: float
    after: float


def _scored(b: Benchmark, records: dict[Key, Record]) -> dict[Key, float]:
    """The score of every single answer."""
    found = {key: b.correct(record) for key, record in records.items()}
    return {key: score for key, score in found.items() if score is not None}


def _pairs(
    b: Benchmark, plain: dict[Key, Record], before: dict[Key, float], own: dict[Key, Record]
) -> list[_Pair]:
    """The questions that both answered, in order."""
    after = _scored(b, own)
    both = sorted(before.keys() & after.keys())
    return [_Pair(plain[key], own[key], before[key], after[key]) for key in both]


def _compare(result: Result, pairs: list[_Pair], seed: int) -> None:
    """Fill in a method's tests and examples."""
    if not pairs:
        return
    result.test = _test("all questions", pairs, seed)
    splits: dict[str, list[_Pair]] = {}
    for pair in pairs:
        splits.setdefault(pair.plain["split"], []).append(pair)
    if len(splits) > 1:
        result.splits = [_test(split, group, seed) for split, group in splits.items()]
    result.gained = _examples([p for p in pairs if p.after > p.before])
    result.lost = _examples([p for p in pairs if p.after < p.before])


def _test(what: str, pairs: list[_Pair], seed: int) -> Test:
    changes = [pair.after - pair.before for pair in pairs]
    images = [_image(pair.plain) for pair in pairs]
    gained, lost = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    ends = stats.interval(changes, images, seed)
    return Test(
        what=what,
        questions=len(pairs),
        images=len(set(images)),
        vanilla=_percent([pair.before for pair in pairs]),
        method=_percent([pair.after for pair in pairs]),
        difference=_percent(changes),
        low=None if ends is None else 100 * ends[0],
        high=None if ends is None else 100 * ends[1],
        gained=gained,
        lost=lost,
        p=stats.mcnemar(gained, lost),
    )


def _correct(tests: list[Test]) -> None:
    """Holm's correction over these tests, and what they say then."""
    for test, p in zip(tests, stats.holm([t.p for t in tests]), strict=True):
        test.corrected = p
        ends = None if test.low is None or test.high is None else (test.low, test.high)
        if test.gained == test.lost == 0:
            test.verdict = "no score changed"
        elif stats.significant(p, ends):
            test.verdict = "better" if test.difference > 0 else "worse"
        else:
            test.verdict = "not significant"


def _examples(pairs: list[_Pair]) -> list[Example]:
    """A few changed answers about different images, evenly spread over the questions."""
    firsts = list({_image(pair.plain): pair for pair in reversed(pairs)}.values())[::-1]
    count = min(EXAMPLES, len(firsts))
    return [
        Example(
            split=plain["split"],
            line=plain["line"],
            image=plain.get("image"),
            question=plain["question"],
            label=_as_text(plain["label"]),
            vanilla=_brief(plain["answer"]),
            answer=_brief(own["answer"]),
        )
        for plain, own, _, _ in (firsts[i * len(firsts) // count] for i in range(count))
    ]


def _as_text(label: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, label))) if isinstance(label, list) else str(label)


def _brief(text: str, length: int = 400) -> str:
    return text if len(text) <= length else text[: length - 4].rstrip() + " ..."


def _add_thumbnails(b: Benchmark, results: list[Result], roots: list[str | Path | None]) -> None:
    """Pictures of all examples, where the data can still be read."""
    wanted = [example for r in results for example in (*r.gained, *r.lost)]
    samples: dict[Key, Sample] = {}
    for root in roots if wanted else []:
        try:
            samples = {(s.split, s.line): s for s in b.samples(root)}
            break
        except FoveateError:
            continue
    known: dict[Key, str | None] = {}
    for example in wanted:
        key = (example.split, example.line)
        sample = samples.get(key)
        if sample is not None and sample.question == example.question:
            if key not in known:
                known[key] = _thumbnail(sample)
            example.thumbnail = known[key]


def _thumbnail(sample: Sample) -> str | None:
    try:
        picture = sample.load()
    except Exception:  # a report without this picture is better than none, whatever the source says
        return None
    if picture is None:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# -- captions --------------------------------------------------------------------------------------


def _captions(given: list[Record]) -> Captions | None:
    """Length and repetition of long answers; None where there are none.

    Long are the answers in splits whose labels are not yes and no, and whose mean length is more
    than `LONG` words.
    """
    splits: dict[str, list[list[str]]] = {}
    for record in given:
        if record["label"] not in ("yes", "no"):
            splits.setdefault(record["split"], []).append(words(record["answer"]))
    long = [w for group in splits.values() if fmean(map(len, group)) > LONG for w in group]
    if not long:
        return None
    return Captions(
        answers=len(long),
        words=fmean(map(len, long)),
        repeated=_percent([repeated_pairs(w) for w in long]),
        longest=fmean(map(longest_repeat, long)),
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case, without marks."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def repeated_pairs(sequence: Sequence[str]) -> float:
    """Share of the pairs of neighbours that occurred before in the same sequence (RE-2)."""
    pairs = list(itertools.pairwise(sequence))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def longest_repeat(sequence: Sequence[str]) -> int:
    """Length of the longest piece that occurs again later; the two may overlap, as loops do."""

    def twice(length: int) -> bool:
        pieces = [tuple(sequence[i : i + length]) for i in range(len(sequence) - length + 1)]
        return len(set(pieces)) < len(pieces)

    low, high = 0, max(0, len(sequence) - 1)  # a piece that repeats holds shorter ones that do
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if twice(middle) else (low, middle - 1)
    return low


# -- papers ----------------------------------------------------------------------------------------


def _published(model: str, b: Benchmark, results: list[Result], questions: int) -> list[Beside]:
    """Every number of a paper for which we have one too.

    Our method is matched by its name, whatever its parameters: they stand in its text form.
    """
    ours = {r.method: r.scores for r in results}
    plain = ours.get(VANILLA, {})
    known = published.rows(model, b, {name(method) for method in ours})
    bases = {(row.source, key): row.values[key] for row in known if row.method == VANILLA
             for key in row.values}  # fmt: skip
    found = []
    for row in known:
        for method, scores in ours.items():
            for score, value in row.values.items():
                if name(method) != row.method or math.isnan(scores.get(score, math.nan)):
                    continue
                base = bases.get((row.source, score))
                compared = row.method != VANILLA
                found.append(
                    Beside(
                        score=score,
                        method=method,
                        variant=row.variant,
                        source=row.source,
                        paper=value,
                        ours=scores[score],
                        difference=scores[score] - value,
                        gain=value - base if compared and base is not None else None,
                        our_gain=scores[score] - plain[score]
                        if compared and score in plain
                        else None,
                        questions=row.questions,
                        fewer=questions if questions < row.questions else None,
                    )
                )
    return found


def name(method: str) -> str:
    """A method's name without its parameters; stacks stay as they are."""
    return method if "+" in method else method.partition("(")[0]


# -- JSON ------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Dataclasses as dicts; what is not defined is None; pictures stay out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.name != "thumbnail"
        }
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
