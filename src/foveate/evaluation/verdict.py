"""What a method changes on a benchmark, compared with the plain model, and whether it is real."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..base import stats
from ..base.errors import FoveateError
from . import published
from .benchmark import Benchmark, EvalRecord, Sample, image_of, parse, percent, scored
from .lengths import Lengths, measure_lengths
from .merge import Key
from .published import VANILLA, Comparison
from .words import Captions, measure_captions

EXAMPLES = 4  # of each kind, per method and benchmark
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
class Verdict:
    """All methods on one benchmark.

    Attributes:
        heads, rows: the benchmark's own tables in one, with the method behind each row's head.
        lengths: of captions, methods at equal length; None elsewhere.
    """

    benchmark: str
    title: str
    digits: int
    questions: int
    images: int
    results: list[Result]
    heads: list[str]
    rows: list[list[str | float]]
    published: list[Comparison]
    notes: list[str]
    lengths: Lengths | None = None


def judge(
    model: str,
    name: str,
    methods: dict[str, dict[Key, EvalRecord]],
    problems: list[str],
    roots: list[str | Path | None],
    seed: int,
) -> Verdict:
    """All methods on the benchmark called `name`.

    Args:
        methods: text form -> question -> record, as `merge` gives them.
        problems: notes on the data.
        roots: folders with the data, for thumbnails; the first that serves is used.
        seed: of the bootstrap.
    """
    b: Benchmark = parse(name)[0]
    order = sorted(methods, key=lambda method: method != VANILLA)
    asked = {key: record for group in methods.values() for key, record in group.items()}
    results = [_result(b, method, methods[method], asked) for method in order]
    plain = methods.get(VANILLA)
    if plain is not None:
        tested = [r for r in results if r.method != VANILLA and r.scores]
        scored = any(r.scores for r in results if r.method == VANILLA)
        before = _grades(b, plain) if tested and scored else {}
        for result in tested:
            after = _grades(b, methods[result.method])
            pairs = [
                _Pair(plain[key], methods[result.method][key], before[key], after[key])
                for key in sorted(before.keys() & after.keys())
            ]
            _compare(result, pairs, seed)
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
        images=len(set(map(image_of, asked.values()))),
        results=results,
        heads=heads,
        rows=rows,
        published=published.compare(model, b, {r.method: r.scores for r in results}, len(asked)),
        notes=problems,
        lengths=measure_lengths(b, methods, seed) if plain and results[0].scores else None,
    )


def _result(
    b: Benchmark, method: str, records: dict[Key, EvalRecord], asked: dict[Key, EvalRecord]
) -> Result:
    rows = list(records.values())
    given = [r for r in rows if r["answer"] is not None]
    yes_no = [r for r in given if r["label"] in ("yes", "no")]
    failed = [r for r in rows if r["answer"] is None]
    scores, notes = scored(b, rows)
    return Result(
        method=method,
        answered=len(given),
        failed=len(failed),
        missing=len(asked) - len(rows),
        scores=scores,
        notes=notes,
        errors=list(dict.fromkeys(_brief(str(r.get("error")), 160) for r in failed))[:3],
        yes_questions=len(yes_no),
        yes_ratio=percent(b.parse(r["answer"]) == "yes" for r in yes_no),
        label_yes_ratio=percent(r["label"] == "yes" for r in yes_no),
        ms=median([r.get("ms") or 0.0 for r in given]) if given else math.nan,
        captions=measure_captions(given),
    )


def _table(b: Benchmark, results: list[Result]) -> tuple[list[str], list[list[str | float]]]:
    """The benchmark's own tables in one: each of its rows once per method."""
    heads: list[str] = []
    groups: dict[str, list[list[str | float]]] = {}
    for result in results:
        if result.scores:
            heads, rows = b.table(result.scores)
            for row in rows:
                groups.setdefault(str(row[0]), []).append([row[0], result.method, *row[1:]])
    heads = [*heads[:1], "Method", *heads[1:]]
    return heads, [row for group in groups.values() for row in group]


# -- against the plain model -----------------------------------------------------------------------


class _Pair(NamedTuple):
    """One question, answered by the plain model and by a method, with both scores."""

    plain: EvalRecord
    changed: EvalRecord
    before: float
    after: float


def _grades(b: Benchmark, records: dict[Key, EvalRecord]) -> dict[Key, float]:
    """The score of every single answer."""
    return {k: b.grade(r) for k, r in records.items() if r["answer"] is not None}


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
    images = [image_of(pair.plain) for pair in pairs]
    gained, lost = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    ends = stats.interval(changes, images, seed)
    return Test(
        what=what,
        questions=len(pairs),
        images=len(set(images)),
        vanilla=percent([pair.before for pair in pairs]),
        method=percent([pair.after for pair in pairs]),
        difference=percent(changes),
        low=None if ends is None else 100 * ends[0],
        high=None if ends is None else 100 * ends[1],
        gained=gained,
        lost=lost,
        p=stats.mcnemar(gained, lost),
    )


def _correct(tests: list[Test]) -> None:
    """Fill in Holm's correction over these tests, and the verdicts."""
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
    firsts = list({image_of(pair.plain): pair for pair in reversed(pairs)}.values())[::-1]
    count = min(EXAMPLES, len(firsts))
    return [
        Example(
            split=plain["split"],
            line=plain["line"],
            image=plain.get("image"),
            question=plain["question"],
            label=_as_text(plain["label"]),
            vanilla=_brief(plain["answer"]),
            answer=_brief(changed["answer"]),
        )
        for plain, changed, _, _ in (firsts[i * len(firsts) // count] for i in range(count))
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
    except Exception:  # a missing picture must not cost the report
        return None
    if picture is None:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
