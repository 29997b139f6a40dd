"""All checks of a checkpoint, finding by finding into a journal, and what they come to.

    report = verify(vlm, ["clvs", "pai"], Path("verified"))

writes ``verified/NAME.jsonl``, a line per finding, from which a run that was stopped goes on, and
``verified/NAME.json`` at the end. With COCO's data the questions of POPE are an ordinary run in
``verified/NAME-pope-200``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ...backends.transformers.anatomy import anatomy
from ...backends.transformers.handshake import handshake
from ...base.errors import FoveateError
from ...base.files import make_folder
from ...base.journal import Journal, finite, write_json
from ...benchmarks.pope import POPE
from ...core.method import methods as all_methods
from ...core.method import text
from ...evaluation.ask import evaluate
from ...evaluation.environment import environment
from ...evaluation.merge import merge, read_runs
from ...evaluation.run import Plan, Stack, Watch, read_stacks, unwatched
from ...evaluation.verdict import judge
from ...vlm.vlm import VLM
from .checks import METHOD, MODEL, tried
from .lab import Finding, Lab

POPE_CHECK = "POPE"
ASKED = 200
BENCHMARK = POPE(splits=("adversarial",), suffix=" Please answer this question with one word.")
SAFE = "the findings beside it are safe"

Tell = Callable[[dict[str, Any]], None]


def verify(
    vlm: VLM,
    methods: Sequence[str],
    out: Path,
    *,
    data: Path | None = None,
    questions: int = ASKED,
    tell: Tell = lambda row: None,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Check a model, and write and return what was found.

    Args:
        methods: text forms; vanilla is always checked. None given: every method that this model
            can be served with at its published parameters.
        data: the folder with POPE's questions and COCO's pictures; None leaves POPE out.
        questions: how many of POPE's adversarial ones.
        tell: called with every finding as it comes, also with those of an earlier start.
        watch: called with (checks done, of how many, which).

    Raises:
        FoveateError: a method that cannot be read, a folder that cannot be used or that holds the
            findings of another model, device, dtype or version; data without POPE.
    """
    if data is not None:
        BENCHMARK.samples(data)  # refusals come before the first check
    stacks = read_stacks(list(dict.fromkeys(["vanilla", *(methods or served(vlm))])))
    file = make_folder(out) / f"{file_name(vlm)}.json"
    settings = {**vlm.source, "dtype": str(vlm.model.dtype), "environment": _setting(vlm)}
    lab, journal = Lab(vlm), Journal(file.with_suffix(".jsonl"), _key, settings)
    try:
        asked = [(check, "") for check in MODEL]
        asked += [(check, method) for method in stacks for check in METHOD]
        if data is not None:
            asked += [(f"{POPE_CHECK}, {questions} questions", method) for method in stacks]
        for number, (check, method) in enumerate(asked):
            watch(number + 1, len(asked), f"{check}, {method}")
            row = journal.rows.get((check, method))
            if row is None:
                found = _find(lab, check, stacks.get(method, ()), file, data, questions)
                row = finite({"check": check, "method": method, **dataclasses.asdict(found)})
                journal.append(row)
                journal.settle()
            if method == "vanilla" and "gap" in row["numbers"]:
                lab.plain[check] = row["numbers"]["gap"]
            tell(row)
            if check == "handshake" and not row["passed"]:
                break
        rows = list(journal.rows.values())
    finally:
        journal.close()
    report = finite(_report(vlm, rows))
    write_json(file, report, SAFE)
    return report


def served(vlm: VLM) -> list[str]:
    """The methods that act on this model with their published parameters."""
    found = []
    try:
        handshake(vlm.model)
    except FoveateError:  # a finding of its own
        return []
    for name, cls in all_methods().items():
        try:
            cls().resolve(anatomy(vlm.model))
        except FoveateError:
            continue
        found.append(name)
    return found


def file_name(vlm: VLM) -> str:
    """The model's name as a file's: the last two parts of a path, "-" between them."""
    parts = [part for part in re.split(r"[/\\]+", vlm.name) if part not in ("", ".", "..", "~")]
    return "-".join(parts[-2:]) or "model"


def failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The findings that are bad."""
    return [row for row in report["findings"] if row["passed"] is False]


def _find(
    lab: Lab, check: str, stack: Stack, file: Path, data: Path | None, questions: int
) -> Finding:
    if check.startswith(POPE_CHECK):
        folder = file.with_name(f"{file.stem}-pope-{questions}")
        return _pope(lab.vlm, stack, folder, data, questions)
    if check in MODEL:
        return tried(lambda: MODEL[check](lab))
    return tried(lambda: METHOD[check](lab, stack))


def _pope(vlm: VLM, stack: Stack, folder: Path, data: Path | None, questions: int) -> Finding:
    """How many questions of POPE are right, and what the method changes, with its interval."""
    more = (folder / "run.json").exists()
    plan = Plan([BENCHMARK], [stack], folder, root=data, limit=questions, add=more)
    evaluate(plan, vlm)
    records = merge(read_runs([folder]))[str(BENCHMARK)]
    verdict = judge(vlm.name, str(BENCHMARK), records, [], [], 0)
    result = next(r for r in verdict.results if r.method == text(stack))
    accuracy = result.scores.get("adversarial/accuracy")
    numbers: dict[str, Any] = {"questions": result.answered, "accuracy": accuracy}
    if result.failed:
        return Finding(False, f"{result.failed} questions failed: {result.errors[0]}", numbers)
    told = f"{accuracy:.1f} % of {result.answered} right"
    if result.test:
        t = result.test
        numbers |= {"difference": t.difference, "low": t.low, "high": t.high, "images": t.images}
        ends = "" if t.low is None else f" (95 % interval {t.low:+.1f} to {t.high:+.1f})"
        told += f", {t.difference:+.1f} points{ends}"
    return Finding(None, told, numbers)


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["check"], row["method"]


def _setting(vlm: VLM) -> dict[str, Any]:
    """What findings depend on, of the environment."""
    kept = ("foveate", "torch", "transformers", "device", "hardware")
    return {name: value for name, value in environment(vlm.device).items() if name in kept}


def _report(vlm: VLM, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **vlm.source,
        "class": type(vlm.model).__name__,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "date": date.today().isoformat(),
        "environment": environment(vlm.device),
        "passed": not any(row["passed"] is False for row in rows),
        "findings": rows,
    }


def table_row(report: dict[str, Any]) -> list[str]:
    """A report as a row of `COLUMNS`."""
    rows = report["findings"]
    counts = [sum(row["passed"] is state for row in rows) for state in (True, False)]
    named = {row["check"]: row["text"] for row in rows if not row["method"]}
    methods = {row["method"] for row in rows if row["method"] not in ("", "vanilla")}
    worst = sorted({row["check"] for row in rows if row["passed"] is False})
    plain = [row for row in rows if row["method"] == "vanilla"]
    about, commit = report["environment"], report["commit"]
    return [
        f"`{report['model']}`" + (f" at `{commit[:7]}`" if commit else ""),
        f"{about['hardware']}, {report['dtype']}",
        f"{about['foveate']}, transformers {about['transformers']}, torch {about['torch']}",
        report["date"],
        str(len(methods)),
        f"{counts[0]} of {sum(counts)}" + f" ({', '.join(worst)} failed)" * bool(worst),
        named.get("layout", ""),
        next((row["text"] for row in plain if row["check"].startswith(POPE_CHECK)), "not asked"),
    ]


COLUMNS = (
    *("model", "device", "foveate", "date", "methods", "checks passed", "layout"),
    "POPE, plain",
)
"""Of the table of verified checkpoints."""
