"""A run's folder: its configuration, its records, its time, and the scores derived from them.

* ``run.json``: what was asked, written at the start; another configuration is refused. Also the
  versions of foveate and transformers that asked; of another one, a run that goes on says so.
* ``records.jsonl``: the only truth, one line per question and method.
* ``sessions.jsonl``: how long each start of the run has worked, up to its end or its kill.
* ``results.json``: scores and environment, derived when the run ends.

A run of n shards has one such folder per shard, ``shard-i-of-n``, inside its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..base.errors import FoveateError
from ..base.files import make_folder, writing
from ..base.journal import Journal, alike, difference, finite, write_json
from ..core.method import Method, as_stack, text
from .benchmark import Benchmark, EvalRecord, Problems, Sample, scored
from .environment import told, versions
from .records import WRITTEN, check_record, check_run, check_session

RECORDS, RUN, RESULTS, SESSIONS = "records.jsonl", "run.json", "results.json", "sessions.jsonl"
VERSIONS = "versions"  # in run.json
HEARTBEAT = 10.0  # seconds between notes of the time worked; a kill loses no more

Stack = tuple[Method, ...]
Watch = Callable[[int, int, str], None]


def unwatched(done: int, total: int, what: str) -> None:
    """A `Watch` that does nothing."""


@dataclass(frozen=True)
class Plan:
    """Which questions to ask with which methods, how, and where the answers go.

    Attributes:
        methods: text forms, methods, or stacks of them; "vanilla" is the plain model.
        out: the run's folder. A shard of several writes to ``shard-i-of-n`` in it.
        root: the folder with the user's data sets; None reads from the hub.
        limit: only the first so many questions of every split.
        batch_size: questions at a time; None = 64 on an accelerator, 32 on a CPU. Halved where
            memory does not suffice, and grown back (`foveate.base.memory.Size`).
        shard: (i, n): every n-th image, from the i-th on, counted from 0.
        seed: of torch's generator, for methods that draw from it.
        share: False asks one by one, as published code does.
        resume: go on with what the folder holds; False refuses a folder that holds records.
        add: add the methods to those of the run that the folder holds. Its own need not be named.

    Raises:
        FoveateError: a method that cannot be read, numbers that make no sense, or something given
            twice.
    """

    benchmarks: Sequence[Benchmark]
    methods: Sequence[str | Method | Stack]
    out: Path
    root: Path | None = None
    limit: int | None = None
    batch_size: int | None = None
    shard: tuple[int, int] = (0, 1)
    seed: int = 0
    share: bool = True
    resume: bool = True
    add: bool = False

    def __post_init__(self) -> None:
        number, count = self.shard
        names = [str(b) for b in self.benchmarks]
        for name in names:
            if names.count(name) > 1:
                raise FoveateError(f"The benchmark {name} is given twice: give it once.")
        if not 0 <= number < count:
            raise FoveateError(
                f"There is no shard {number}/{count}: shards of {count} are 0/{count} to "
                f"{count - 1}/{count}."
            )
        if self.limit is not None and self.limit < 1:
            raise FoveateError(f"The limit must be 1 or more questions, got {self.limit}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise FoveateError(f"The batch size must be 1 or more, got {self.batch_size}.")
        _ = self.stacks

    @functools.cached_property
    def stacks(self) -> dict[str, Stack]:
        """The methods by their text form."""
        return read_stacks(self.methods)

    @property
    def folder(self) -> Path:
        """Where this shard writes."""
        number, count = self.shard
        return self.out if count == 1 else self.out / f"shard-{number}-of-{count}"


def read_stacks(methods: Sequence[str | Method | Stack]) -> dict[str, Stack]:
    """Stacks of methods by their text form. Raises `FoveateError` for one given twice."""
    stacks: dict[str, Stack] = {}
    for given in methods:
        stack = as_stack(*(given if isinstance(given, tuple) else (given,)))
        if text(stack) in stacks:
            raise FoveateError(f"The method {text(stack)} is given twice: give it once.")
        stacks[text(stack)] = stack
    return stacks


@dataclass(frozen=True)
class Question:
    """A sample of a benchmark.

    Attributes:
        benchmark: its text form.
        limit: of the answer, in tokens; the sample's own limit comes before the benchmark's.
    """

    benchmark: str
    sample: Sample
    limit: int

    def key(self, method: str) -> Hashable:
        """The key of this question's record."""
        return (self.benchmark, self.sample.split, self.sample.line, method)


def key(record: EvalRecord) -> Hashable:
    """What tells records apart. Ids do not, as some benchmarks repeat them."""
    return (record["benchmark"], record["split"], record["line"], record["method"])


class Run:
    """A run's folder while it is filled.

    Args:
        source: the model, as `VLM.source` says it.
        dtype: of the model.
        watch: called with (questions done, of how many, what was asked).
        engine: versions of what answers, beside foveate and transformers.

    Raises:
        FoveateError: missing data, a folder that cannot be used, or that holds another run.
    """

    def __init__(
        self,
        plan: Plan,
        source: Mapping[str, Any],
        dtype: str,
        watch: Watch = unwatched,
        engine: Mapping[str, str] | None = None,
    ) -> None:
        self.versions = versions() | dict(engine or {})
        self.plan, self.watch, self.methods = plan, watch, list(plan.stacks)
        names = [str(b) for b in plan.benchmarks]
        self.problems = {name: Problems() for name in names}
        self.units: list[list[Question]] = []
        for b in plan.benchmarks:
            samples = b.samples(plan.root, self.problems[str(b)])
            self.units += _units(b, limited(samples, plan.limit), plan.shard)
        for name, problems in self.problems.items():
            for line in problems.lines():
                warnings.warn(f"{name}: {line}", stacklevel=3)
        self.configuration: dict[str, Any] = {
            "benchmarks": names,
            **source,
            "dtype": dtype,
            "methods": self.methods,
            "root": None if plan.root is None else str(plan.root),
            "limit": plan.limit,
            "shard": None if plan.shard[1] == 1 else list(plan.shard),
            "seed": plan.seed,
        }
        self.folder = plan.folder
        if plan.add:
            self.configuration["methods"] = self._added()
        self._begin()
        self.journal = Journal(
            self.folder / RECORDS, key, check=functools.partial(check_record, needed=WRITTEN)
        )
        try:
            self._compare()
            self._note_versions()
            self.sessions = Journal(self.folder / SESSIONS, _session, check=check_session)
        except FoveateError:
            self.journal.close()
            raise
        self.total = sum(map(len, self.units)) * len(self.configuration["methods"])
        self.started, self.clock = datetime.now().astimezone().isoformat(), time.monotonic()
        self.number = 1 + len(self.sessions.rows)
        self._note_time()

    # -- filling -----------------------------------------------------------------------------------

    def jobs(self, size: int) -> list[list[Question]]:
        """Questions to ask together, of which some record is missing.

        All questions of a job are about one image, or up to `size` questions about an image each;
        they have one limit. Without `share` they are single questions. Jobs do not depend on the
        records that are there, so a batch that was cut off is asked again as it was.
        """
        jobs: list[list[Question]] = []
        open_: dict[Hashable, list[Question]] = {}  # jobs with room, about an image each
        for unit in self.units:
            if len(unit) > 1 or not self.plan.share:
                jobs += [unit] if self.plan.share else [[question] for question in unit]
                continue
            kind = (unit[0].benchmark, unit[0].limit)
            if kind not in open_:
                jobs.append(open_.setdefault(kind, []))
            open_[kind] += unit
            if len(open_[kind]) >= size:
                del open_[kind]
        return [job for job in jobs if self.missing(job)]

    def missing(self, job: Iterable[Question]) -> list[str]:
        """The methods for which some question of a job has no record."""
        questions, rows = list(job), self.journal.rows
        return [name for name in self.methods if any(q.key(name) not in rows for q in questions)]

    def keep(self, records: Iterable[EvalRecord]) -> None:
        """Write the records that are not there yet."""
        for record in records:
            if key(record) not in self.journal.rows:
                self.journal.append(finite(record))
                what = f"{record['benchmark']}, {record['method']}"
                self.watch(len(self.journal.rows), self.total, what)
            if time.monotonic() - self.beat > HEARTBEAT:
                self._note_time()
        self.journal.settle()

    def finish(self, environment: dict[str, Any]) -> dict[str, Any]:
        """Write ``results.json`` and return its content."""
        self._note_time()
        sessions = list(self.sessions.rows.values())
        records = list(self.journal.rows.values())
        results = summarise(read_run(self.folder), records, self.plan.benchmarks)
        for name, problems in self.problems.items():
            results["benchmarks"][name]["problems"] = problems.counts
        results["environment"] = environment | {
            "seed": self.configuration["seed"],
            "started": sessions[0]["started"],
            "sessions": len(sessions),
            "wall_seconds": round(sum(row["seconds"] for row in sessions), 3),
        }
        results = finite(results)
        write_json(self.folder / RESULTS, results, f"all {len(records)} records are safe")
        return results

    def close(self) -> None:
        try:
            self.journal.close()
        finally:
            self.sessions.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        quiet = contextlib.suppress(FoveateError) if kind else contextlib.nullcontext()
        with quiet:  # a full disk is told once
            self._note_time()
        with quiet:
            self.close()

    def _note_time(self) -> None:
        self.beat = time.monotonic()
        worked = round(self.beat - self.clock, 3)
        self.sessions.append({"started": self.started, "number": self.number, "seconds": worked})

    # -- the folder --------------------------------------------------------------------------------

    def _added(self) -> list[str]:
        """The methods of the run in the folder, then those that it does not have yet."""
        with writing(self.plan.out, "nothing was written"):
            folders = run_folders(self.plan.out)
        if not folders:
            raise FoveateError(f"{self.plan.out} holds no run to add methods to: leave out --add.")
        known = [name for folder in folders for name in read_run(folder)["methods"]]
        return list(dict.fromkeys([*known, *self.methods]))

    def _begin(self) -> None:
        """Make the folder, or check that what is there belongs to this run."""
        shard = self.configuration["shard"]
        with writing(self.plan.out, "nothing was written"):
            others = run_folders(self.plan.out)
        for other in others:
            begun = read_run(other)
            begun.pop(VERSIONS, None)
            if self.plan.add:
                begun["methods"] = self.configuration["methods"]
            shards = begun.get("shard") and shard
            if shards and other != self.folder:  # another shard, whose number differs
                begun = begun | {"shard": [shard[0], begun["shard"][1]]}
            if not alike(begun, self.configuration):
                told = difference(begun, self.configuration)
                only = alike(begun | {"methods": None}, self.configuration | {"methods": None})
                more = ", or add these methods to it with --add" * only
                raise FoveateError(f"{other} {told}{more}.")
        records = make_folder(self.folder) / RECORDS
        size = records.stat().st_size if records.exists() else 0
        if (self.folder / RUN).exists():
            if size and not self.plan.resume:
                raise FoveateError(
                    f"{self.folder} already holds records: go on with --resume, or give "
                    "another --out."
                )
            if self.plan.add:
                begun = read_run(self.folder) | {"methods": self.configuration["methods"]}
                write_json(self.folder / RUN, begun, "nothing is lost")
            return
        if size:
            raise FoveateError(
                f"{self.folder} holds records of an unknown run: give another --out."
            )
        begun = self.configuration | {VERSIONS: [self.versions]}
        write_json(self.folder / RUN, begun, "nothing is lost")

    def _note_versions(self) -> None:
        """Say that other versions answered before, and note ours beside them."""
        ours = self.versions
        unknown = dict.fromkeys(ours, "unknown")
        before = read_run(self.folder).get(VERSIONS) or [unknown] * bool(self.journal.rows)
        if ours in before:
            return
        if before:
            warnings.warn(
                f"{self.folder} was begun by {told(before)} and goes on with {told([ours])}: "
                "answers may differ.",
                stacklevel=4,
            )
        write_json(self.folder / RUN, self.configuration | {VERSIONS: [*before, ours]})

    def _compare(self) -> None:
        """Check that the records answer the questions that the data hold now."""
        methods = self.configuration["methods"]
        questions = {q.key(m): q.sample for unit in self.units for q in unit for m in methods}
        for row_key, row in self.journal.rows.items():
            sample = questions.get(row_key)
            if sample is None or sample.prompt != row["prompt"]:
                raise FoveateError(
                    f"{self.folder} holds an answer to another question for {row['benchmark']}, "
                    f"{row['split']}, line {row['line']}: the data have changed since, give "
                    "another --out."
                )


def run_folders(folder: Path) -> list[Path]:
    """The folder of a run itself, or its shards."""
    if (folder / RUN).exists():
        return [folder]
    return sorted(p for p in folder.glob("shard-*-of-*") if (p / RUN).exists())


def read_run(folder: Path) -> dict[str, Any]:
    """The configuration of a run, and the versions that asked."""
    try:
        content = json.loads((folder / RUN).read_text("utf-8"))
        check_run(content)
    except (OSError, ValueError, RecursionError) as error:
        raise FoveateError(
            f"{folder} is no folder of a run: it has no readable {RUN}; `foveate eval` makes one."
        ) from error
    return content


def _session(row: dict[str, Any]) -> Hashable:
    """What tells sessions apart; early ones have no number."""
    return (row["started"], row.get("number"))


# -- questions -------------------------------------------------------------------------------------


def limited(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first `limit` questions of every split."""
    if limit is None:
        return samples
    taken: dict[str, int] = {}
    kept = []
    for sample in samples:
        taken[sample.split] = taken.get(sample.split, 0) + 1
        if taken[sample.split] <= limit:
            kept.append(sample)
    return kept


def _units(b: Benchmark, samples: list[Sample], shard: tuple[int, int]) -> list[list[Question]]:
    """Questions grouped by image and limit, in the order of first appearance; of this shard."""
    name, groups = str(b), dict[Hashable, list[Question]]()
    numbers: dict[Hashable, int] = {}  # of images: all questions about one go to one shard
    for sample in samples:
        alone = sample.image_name is None or sample.image is None
        image = (sample.split, sample.line) if alone else sample.image_name
        limit = sample.meta.get("max_new_tokens", b.max_new_tokens)
        if numbers.setdefault(image, len(numbers)) % shard[1] == shard[0]:
            groups.setdefault((image, limit), []).append(Question(name, sample, limit))
    return list(groups.values())


# -- results ---------------------------------------------------------------------------------------


def summarise(
    configuration: dict[str, Any], records: Sequence[EvalRecord], benchmarks: Sequence[Benchmark]
) -> dict[str, Any]:
    """Scores of every benchmark and method of a run among its records."""
    results = {}
    parts: dict[tuple[str, str], list[EvalRecord]] = {}
    for record in records:
        parts.setdefault((record["benchmark"], record["method"]), []).append(record)
    for b in benchmarks:
        entries: dict[str, Any] = {}
        for name in configuration["methods"]:
            rows = parts.get((str(b), name), [])
            errors = [r["error"] for r in rows if r["error"] is not None]
            times = sorted(r["ms"] for r in rows)
            scores, notes = scored(b, rows)
            if errors:
                notes.append(f"{len(errors)} of {len(rows)} failed, the first: {errors[0]}")
            entries[name] = {
                "questions": len(rows),
                "errors": len(errors),
                "ms": times[len(times) // 2] if times else None,
                "scores": scores,
                "notes": notes,
            }
        results[str(b)] = {"options": b.parameters(), "methods": entries}
    return {"run": configuration, "benchmarks": results}
