"""A run's folder: its configuration, its records, its time, and the scores derived from them.

* ``run.json``: what was asked, written at the start; another configuration is refused.
* ``records.jsonl``: the only truth, one line per question and method.
* ``sessions.jsonl``: how long each start of the run has worked, up to its end or its kill.
* ``results.json``: scores and environment, derived when the run ends.

A run of n shards has one such folder per shard, ``shard-i-of-n``, inside its own.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..base import __version__
from ..base.errors import FoveateError
from ..base.journal import Journal, alike, difference, write_json
from .benchmark import Benchmark, Problems, Record, Sample

RECORDS, RUN, RESULTS, SESSIONS = "records.jsonl", "run.json", "results.json", "sessions.jsonl"
HEARTBEAT = 10.0  # seconds between notes of the time worked: what a kill may lose of it

Watch = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Question:
    """A sample of a benchmark.

    Attributes:
        benchmark: its text form.
        limit: length limit of the answer, in tokens; the sample's own stands before the
            benchmark's.
    """

    benchmark: str
    sample: Sample
    limit: int

    def key(self, method: str) -> Hashable:
        """The key of this question's record."""
        return (self.benchmark, self.sample.split, self.sample.line, method)


def key(record: Record) -> Hashable:
    """What tells records apart: ids do not, as some benchmarks repeat them."""
    return (record["benchmark"], record["split"], record["line"], record["method"])


class Run:
    """A run's folder while it is filled.

    Args:
        benchmarks, root, limit: what to ask, see `foveate.evaluation.ask.evaluate`.
        model, dtype, methods: names, who answers; revision, commit: of a model from the hub.
        out: the folder; of a shard of several its parent.

    Raises:
        FoveateError: missing data, a folder that cannot be used, or that holds another run.
    """

    def __init__(
        self,
        benchmarks: Sequence[Benchmark],
        model: str,
        dtype: str,
        methods: Sequence[str],
        out: Path,
        *,
        revision: str | None = None,
        commit: str | None = None,
        root: Path | None = None,
        limit: int | None = None,
        shard: tuple[int, int] = (0, 1),
        seed: int = 0,
        resume: bool = True,
        watch: Watch = lambda done, total, what: None,
    ) -> None:
        names = [str(b) for b in benchmarks]
        for kind, given in (("benchmark", names), ("method", methods)):
            for name in given:
                if list(given).count(name) > 1:
                    raise FoveateError(f"The {kind} {name} is given twice: give it once.")
        if not (0 <= shard[0] < shard[1]):
            raise FoveateError(
                f"There is no shard {shard[0]}/{shard[1]}: shards of {shard[1]} are "
                f"0/{shard[1]} to {shard[1] - 1}/{shard[1]}."
            )
        if limit is not None and limit < 1:
            raise FoveateError(f"The limit must be 1 or more questions, got {limit}.")
        self.benchmarks, self.methods, self.watch = list(benchmarks), list(methods), watch
        self.problems = {name: Problems() for name in names}
        self.units = [
            unit
            for b in benchmarks
            for unit in _units(b, _limited(b.samples(root, self.problems[str(b)]), limit), shard)
        ]
        for name, problems in self.problems.items():
            for line in problems.lines():
                warnings.warn(f"{name}: {line}", stacklevel=3)
        self.configuration: dict[str, Any] = {
            "benchmarks": names,
            "model": model,
            "revision": revision,
            "commit": commit,
            "dtype": dtype,
            "methods": list(methods),
            "root": None if root is None else str(root),
            "limit": limit,
            "shard": None if shard[1] == 1 else list(shard),
            "seed": seed,
        }
        self.folder = out if shard[1] == 1 else out / f"shard-{shard[0]}-of-{shard[1]}"
        self._begin(out, resume)
        self.journal = Journal(self.folder / RECORDS, key)
        try:
            self._compare()
            self.sessions = Journal(self.folder / SESSIONS, lambda row: row["started"])
        except FoveateError:
            self.journal.close()
            raise
        self.total = sum(map(len, self.units)) * len(self.methods)
        self.started, self.clock = datetime.now().astimezone().isoformat(), time.monotonic()
        self._note_time()

    # -- filling -----------------------------------------------------------------------------------

    def jobs(self, size: int, share: bool = True) -> list[list[Question]]:
        """Questions to ask together, of which some record is missing.

        All about one image, or up to `size` about an image each, with one limit; without `share`,
        one by one. They depend on what is asked alone and not on what is there already, so a
        batch that was cut off is asked again as it was.
        """
        jobs: list[list[Question]] = []
        open_: dict[Hashable, list[Question]] = {}  # jobs with room, about an image each
        for unit in self.units:
            if len(unit) > 1 or not share:
                jobs += [unit] if share else [[question] for question in unit]
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

    def keep(self, records: Iterable[Record]) -> None:
        """Write the records that are not there yet."""
        for record in records:
            if key(record) not in self.journal.rows:
                self.journal.append(_finite(record))
                what = f"{record['benchmark']}, {record['method']}"
                self.watch(len(self.journal.rows), self.total, what)
            if time.monotonic() - self.beat > HEARTBEAT:
                self._note_time()

    def finish(self, environment: dict[str, Any]) -> dict[str, Any]:
        """Write ``results.json`` and return its content."""
        self._note_time()
        sessions = list(self.sessions.rows.values())
        results = summarise(self.configuration, list(self.journal.rows.values()), self.benchmarks)
        for name, problems in self.problems.items():
            results["benchmarks"][name]["problems"] = problems.counts
        results["environment"] = environment | {
            "seed": self.configuration["seed"],
            "started": sessions[0]["started"],
            "sessions": len(sessions),
            "wall_seconds": round(sum(row["seconds"] for row in sessions), 3),
        }
        results = _finite(results)
        write_json(self.folder / RESULTS, results)
        return results

    def close(self) -> None:
        self.journal.close()
        self.sessions.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._note_time()
        self.close()

    def _note_time(self) -> None:
        self.beat = time.monotonic()
        self.sessions.append({"started": self.started, "seconds": round(self.beat - self.clock, 3)})

    # -- the folder --------------------------------------------------------------------------------

    def _begin(self, out: Path, resume: bool) -> None:
        """Make the folder, or see that what is there is this run's."""
        own = self.configuration["shard"]
        for other in run_folders(out):
            begun = read_run(other)
            shards = isinstance(begun, dict) and begun.get("shard") and own
            if shards and other != self.folder:  # another shard, whose number differs
                begun = begun | {"shard": [own[0], begun["shard"][1]]}
            if not alike(begun, self.configuration):
                raise FoveateError(f"{other} {difference(begun, self.configuration)}.")
        records = self.folder / RECORDS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            size = records.stat().st_size if records.exists() else 0
            if (self.folder / RUN).exists():
                if size and not resume:
                    raise FoveateError(
                        f"{self.folder} already holds records: go on with --resume, or give "
                        "another --out."
                    )
                return
            if size:
                raise FoveateError(
                    f"{self.folder} holds records of an unknown run: give another --out."
                )
            write_json(self.folder / RUN, self.configuration)
        except OSError as error:
            raise FoveateError(
                f"The folder {self.folder} cannot be used: {error.strerror or error}."
            ) from error

    def _compare(self) -> None:
        """See that the records are about the questions that the data hold now."""
        questions = {q.key(m): q.sample for unit in self.units for q in unit for m in self.methods}
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
    """The configuration of a run."""
    try:
        return json.loads((folder / RUN).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FoveateError(
            f"{folder} is no folder of a run: it has no readable {RUN}; `foveate eval` makes one."
        ) from error


# -- questions -------------------------------------------------------------------------------------


def _limited(samples: list[Sample], limit: int | None) -> list[Sample]:
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
    configuration: dict[str, Any], records: Sequence[Record], benchmarks: Sequence[Benchmark]
) -> dict[str, Any]:
    """Scores of every benchmark and method of a run among its records."""
    found = {}
    parts: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        parts.setdefault((record["benchmark"], record["method"]), []).append(record)
    for b in benchmarks:
        entries: dict[str, Any] = {}
        for name in configuration["methods"]:
            own = parts.get((str(b), name), [])
            errors = [r["error"] for r in own if r["error"] is not None]
            times = sorted(r["ms"] for r in own)
            scores: dict[str, float] = {}
            notes = b.notes(own)
            if errors:
                notes.append(f"{len(errors)} of {len(own)} failed, the first: {errors[0]}")
            try:
                scores = b.score(own) if len(errors) < len(own) else {}
            except FoveateError as error:  # a word list that is not there, a damaged one
                notes.append(f"Not scored: {error}")
            entries[name] = {
                "questions": len(own),
                "errors": len(errors),
                "ms": times[len(times) // 2] if times else None,
                "scores": scores,
                "notes": notes,
            }
        found[str(b)] = {"options": b.parameters(), "methods": entries}
    return {"run": configuration, "benchmarks": found}


def _finite(value: Any) -> Any:
    """The same as JSON knows it: lists, and None for what is no finite number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


# -- environment -----------------------------------------------------------------------------------


def environment(device: Any) -> dict[str, Any]:
    """What a reader needs to repeat a run on this `torch.device`."""
    import numpy
    import torch

    from ..backends.transformers import compat

    return {
        "foveate": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": compat.VERSION,
        "numpy": numpy.__version__,
        "device": str(device),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def hardware(device: Any) -> str:
    """The name of a `torch.device`'s card, or of the processor."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        for line in cpus.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git() -> str | None:
    """The commit of this package's own checkout, with ``-dirty`` where it has been changed."""

    def ask(*words: str) -> str | None:
        try:
            said = subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except OSError:  # there is no git
            return None
        return said.stdout.strip() if said.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
