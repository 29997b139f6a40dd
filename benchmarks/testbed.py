"""Tries at a testbed for attention methods: what each was made by, and every criterion.

    python benchmarks/testbed.py record before             # the shipped model
    python benchmarks/testbed.py record first RUN          # a run of foveate train pocket --out RUN
    python benchmarks/testbed.py table                     # all that were recorded, as markdown

A record is one JSON file in results/testbed/; `foveate.pocket.criteria` says what is measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from foveate.base.journal import write_json
from foveate.base.progress import Progress
from foveate.pocket.build import WEIGHTS
from foveate.pocket.criteria import measure, middle, rows
from foveate.pocket.train import NOTE

RESULTS = Path(__file__).with_name("results") / "testbed"


def record(name: str, run: Path | None, n: int, seed: int, results: Path = RESULTS) -> Path:
    """Measure the last finished stage of a run, or the shipped model, and write it down."""
    folder, made = WEIGHTS, {"recipe": "pictures-first", "as": "shipped"}
    if run is not None:
        made = json.loads((run / NOTE).read_text("utf-8")) | told(run)
        finished = [s["name"] for s in made["stages"] if (run / s["name"]).is_dir()]
        folder = run / finished[-1]
        made["stages"] = [s for s in made["stages"] if s["name"] in finished]
    with Progress("scenes") as progress:
        report = measure(folder, n, seed, lambda done, of: progress(done, of, "validating"))
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{name}.json", {"made": made, "report": report})
    return results / f"{name}.json"


def told(run: Path) -> dict[str, Any]:
    """By the run's log, per stage: minutes of training, last accuracies on held-out data."""
    minutes: dict[str, float] = {}
    accuracies: dict[str, dict[str, float]] = {}
    for line in (run / "log.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        stage = row.pop("stage")
        minutes[stage] = round(row.pop("seconds") / 60, 1)
        accuracies[stage] = {k: v for k, v in row.items() if k not in ("step", "loss")}
    return {"minutes": minutes, "held_out": accuracies}


def table(results: Path = RESULTS) -> str:
    """All records side by side: a line for each setting and criterion. Bold is met."""
    files = sorted(results.glob("*.json"), key=lambda f: (f.stem != "before", f.stem))
    records = {f.stem: json.loads(f.read_text("utf-8")) for f in files}
    lines = ["| | wanted | " + " | ".join(records) + " |", "|---" * (len(records) + 2) + "|"]
    stages = dict.fromkeys(s["name"] for r in records.values() for s in r["made"].get("stages", ()))
    for stage in stages:
        cells = [_settings(r["made"], stage) for r in records.values()]
        lines.append(f"| {stage} | | " + " | ".join(cells) + " |")
    reports = [r["report"] for r in records.values()]
    for name, told in (("scenes per habit", _scenes), ("attention to BOS, middle layers", _bos)):
        lines.append(f"| {name} | | " + " | ".join(map(told, reports)) + " |")
    judged = [rows(report) for report in reports]
    for same in zip(*judged, strict=True):
        cells = [f"**{measured}**" if met else measured for _, _, measured, met in same]
        lines.append(f"| {same[0][0]} | {same[0][1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _scenes(report: dict[str, Any]) -> str:
    return str(report["n"])


def _bos(report: dict[str, Any]) -> str:
    values = [report["layers"]["bos"][i] for i in middle(report["depth"])]
    return f"{100 * sum(values) / len(values):.1f} %"


def _settings(made: dict[str, Any], name: str) -> str:
    for stage in made.get("stages", ()):
        if stage["name"] == name:
            if name not in made["minutes"]:
                return "taken"
            steps = f"{stage['steps']} steps of {stage['batch']}" if stage["steps"] else ""
            return f"{steps}, rate {stage['rate']:g}, {made['minutes'][name]:g} min".lstrip(", ")
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="measure a model and write it down")
    recording.add_argument("name")
    recording.add_argument("run", type=Path, nargs="?", help="default: the shipped model")
    recording.add_argument("--scenes", type=int, default=40, help="per habit; default: 40")
    recording.add_argument("--seed", type=int, default=0)
    commands.add_parser("table", help="print all records as markdown")
    given = parser.parse_args()
    if given.command == "record":
        print(record(given.name, given.run, given.scenes, given.seed))
    else:
        print(table())


if __name__ == "__main__":
    main()
