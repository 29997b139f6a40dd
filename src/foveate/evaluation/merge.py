"""Runs put together: the shards of one, or several of one model; the union of their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import FoveateError
from ..base.journal import damage
from .benchmark import EvalRecord
from .environment import told
from .records import check_record, check_results
from .run import RECORDS, RESULTS, VERSIONS, key, read_run, run_folders

APART = ("benchmarks", "methods", "shard", "root", "limit")  # answers do not depend on these

Key = tuple[str, int]  # split and line: a question of a benchmark


@dataclass
class RunFolder:
    """What a run's folder holds.

    Attributes:
        environment: empty for a run that has not ended.
        problems: benchmark -> what was wrong with its data -> how often.
        versions: those of foveate and transformers that asked.
    """

    folder: Path
    settings: dict[str, Any]
    records: list[EvalRecord]
    environment: dict[str, Any]
    problems: dict[str, dict[str, int]]
    versions: list[dict[str, str]]

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that answers depend on, those that are None left out."""
        return {
            name: value
            for name, value in self.settings.items()
            if name not in APART and value is not None
        }


def read_runs(folders: Sequence[str | Path]) -> list[RunFolder]:
    """The runs in and directly inside `folders`, each once.

    Raises:
        FoveateError: a folder holds no run, a file is damaged, or there is no record at all.
    """
    by_path: dict[Path, Path] = {}
    for given in folders:
        inside = run_folders(Path(given)) or [Path(given)]
        by_path |= {folder.resolve(): folder for folder in inside}
    if not by_path:
        raise FoveateError("Name at least one folder of a run: `foveate eval` makes them.")
    runs = [_read(folder) for folder in by_path.values()]
    if not any(run.records for run in runs):
        raise FoveateError(
            f"There is no record in {', '.join(str(run.folder) for run in runs)}: wait until "
            "`foveate eval` has answered something, or name another folder."
        )
    return runs


def _read(folder: Path) -> RunFolder:
    settings = read_run(folder)
    versions = settings.pop(VERSIONS, None) or []
    if "model" not in settings:
        raise FoveateError(f"The configuration in {folder} names no model: it is no run's.")
    environment, problems = {}, {}
    try:
        results = json.loads((folder / RESULTS).read_text("utf-8"))
        check_results(results)
        problems = {name: b.get("problems", {}) for name, b in results["benchmarks"].items()}
        environment = results["environment"]
    except (OSError, ValueError, RecursionError):
        pass  # derived, and written when a run ends
    records = read_records(folder / RECORDS)
    return RunFolder(folder, settings, records, environment, problems, versions)


def read_records(path: Path) -> list[EvalRecord]:
    """The records of a run; of several with one key the last one.

    A run may still be writing to the file: an unfinished last line is left out.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FoveateError(f"{path} cannot be read: {error.strerror}.") from error
    by_key: dict[Any, EvalRecord] = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            check_record(record)
            by_key[key(record)] = record
        except (ValueError, RecursionError) as error:
            raise FoveateError(
                f"Line {number + 1} of {path} is damaged ({damage(error)}): delete that line, and "
                "run `foveate eval` again to ask its question anew."
            ) from error
    return list(by_key.values())


def by_settings(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """Runs grouped by model and settings: answers within a group can be compared."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.shared, sort_keys=True), []).append(run)
    return [group for group in groups.values() if any(run.records for run in group)]


def merge(runs: Sequence[RunFolder]) -> dict[str, dict[str, dict[Key, EvalRecord]]]:
    """Benchmark -> method -> question -> record. An answer replaces a failure.

    Raises:
        FoveateError: two runs have other data for a question, or another answer of one method.
    """
    merged: dict[str, dict[str, dict[Key, EvalRecord]]] = {}
    asked: dict[tuple[str, Key], tuple[EvalRecord, RunFolder]] = {}
    sources: dict[tuple[str, str, Key], RunFolder] = {}
    for run in runs:
        for record in run.records:
            name, question = record["benchmark"], (record["split"], record["line"])
            first, owner = asked.setdefault((name, question), (record, run))
            for what in ("question", "prompt", "label", "image"):
                if first.get(what) != record.get(what):
                    raise _contradiction(owner, run, record, what)
            answers = merged.setdefault(name, {}).setdefault(record["method"], {})
            known = answers.get(question)
            if known is None or known["answer"] is None:
                answers[question] = record
                sources[name, record["method"], question] = run
            elif record["answer"] not in (None, known["answer"]):
                other = sources[name, record["method"], question]
                raise _contradiction(other, run, record, "answer")
    return merged


def _contradiction(one: RunFolder, other: RunFolder, record: EvalRecord, what: str) -> FoveateError:
    return FoveateError(
        f"{one.folder} and {other.folder} contradict each other, with another {what} for "
        f"{record['benchmark']}, {record['split']}, line {record['line']} ({record['method']}): "
        "report them one by one."
    )


def gaps(runs: Sequence[RunFolder]) -> list[str]:
    """What a reader must know about what is not here, in sentences."""
    notes = [
        f"The run in {run.folder} has not ended: questions may be missing."
        for run in runs
        if not run.environment
    ]
    asked: dict[str, list[str]] = {}  # versions -> runs
    for run in runs:
        for each in run.versions:
            asked.setdefault(told([each]), []).append(str(run.folder))
    if len(asked) > 1:
        by = "; ".join(f"{each} ({', '.join(folders)})" for each, folders in asked.items())
        notes.append(f"Several versions answered: {by}.")
    here: dict[int, set[int]] = {}
    for run in runs:
        number, count = run.settings.get("shard") or (0, 1)
        here.setdefault(count, set()).add(number)
    notes += [
        f"Only {len(numbers)} of {count} shards are here: questions are missing."
        for count, numbers in here.items()
        if len(numbers) < count
    ]
    limits = {run.settings["limit"] for run in runs if run.settings.get("limit")}
    notes += [f"Only the first {limit} questions of every split were asked." for limit in limits]
    return notes
