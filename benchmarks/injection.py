"""Does cross-layer injection help the pocket model? Equal trainings with it and without it.

    python benchmarks/injection.py --out docs/cli

Every run is a `foveate train cli` from the pocket model before its training on yes/no questions, on
the same scenes with the same number of steps, and then a `foveate eval` of pocket-bench. Two runs
go on at a time, with a thread each. A stopped benchmark goes on with the same command, as these
commands do; the tables are made again every time.

* base: no injection; AMP only: a learned number per pair of layers; AMP+AGF: a gate that sees the
  content; one-to-one and one-to-many: learned numbers again, with fewer pairs.
* accuracy: the share of right answers, in percent, mean over the seeds.
* interval of pictures: 95 % paired bootstrap interval of the difference from the base, whole
  pictures drawn; a question's difference is the mean over the seeds. It says what other pictures
  would have given with these trained models.
* interval of seeds: 95 % t-interval of the differences of the seeds, each from the base of its own
  seed. It says what other trainings would have given on these questions; three seeds make it wide.
* a difference counts as beyond noise where both intervals leave out 0.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
OPEN = ROOT / "benchmarks" / "weights" / "open.safetensors"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.crops import write  # noqa: E402
from benchmarks.injection_page import (  # noqa: E402
    BASE,
    DENSITY,
    FULL,
    GRADED,
    PARTS,
    accuracy_table,
    density_table,
    differences_figure,
    loss_figure,
    seeds_table,
)
from foveate import FoveateError  # noqa: E402
from foveate.base.journal import Journal, difference, write_json  # noqa: E402
from foveate.base.stats import interval  # noqa: E402
from foveate.benchmarks.pocket import CATEGORIES, PocketBench  # noqa: E402
from foveate.evaluation.benchmark import EvalRecord  # noqa: E402
from foveate.evaluation.run import RECORDS, RESULTS, key  # noqa: E402
from foveate.pocket import build  # noqa: E402
from foveate.scenes import lessons, questions  # noqa: E402
from foveate.scenes.export import conversations  # noqa: E402

SHAPE = "rank=16, alpha=32, heads=2, width=64, summary=image"  # the defaults, scaled to its width
START = "start"
SHOWN = {FULL: "gates", "AMP only": "static"}  # whose gates are shown, and under what name
CONFIGURATIONS = {  # options of the method; none = the base
    BASE: "",
    "AMP only": "gate=static",
    FULL: "gate=scalar",
    "one-to-one": "gate=static, routes='one-to-one'",
    "one-to-many": "gate=static, routes='one-to-many'",
}
SEEDS = (0, 1, 2)
ONCE = {  # variants of AMP+AGF with one seed
    "density 1": "layers=(0,)",
    "density 2": "layers=(0, 6)",
    "density 8": "layers=(0, 1, 3, 4, 6, 7, 9, 10)",
    "half open": "start=0.0",
}
PLACE = ("--device", "cpu", "--dtype", "float32")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; chosen before any accuracy was seen.

    Attributes:
        steps, batch: optimizer steps, and packed pictures per step.
        rate, base_rate: peak learning rates of the injection and of everything else.
        scenes, windows: training pictures, 96 pixels wide: whole scenes, and windows of them; as
            many as the steps take, so that each is seen about once.
        each: at most so many questions about each.
        questions, captions: of pocket-bench, per category and habit.
    """

    steps: int = 64
    batch: int = 8
    rate: float = 5e-3
    base_rate: float = 1e-3
    precision: str = "bf16"
    scenes: int = 370
    windows: int = 160
    each: int = 20
    questions: int = 200
    captions: int = 50


@dataclass(frozen=True)
class Training:
    """One run: a configuration with a seed."""

    configuration: str
    options: str  # of the method; "" = base
    seed: int

    @property
    def name(self) -> str:
        return f"{self.configuration.lower().replace('+', '-').replace(' ', '-')}-{self.seed}"

    @property
    def method(self) -> str:
        """As `foveate train cli` takes it."""
        return f"cli(seed={self.seed}, {self.options}, {SHAPE})" if self.options else "vanilla"


def trainings(only: Sequence[str] = (), seeds: int = len(SEEDS)) -> list[Training]:
    """The runs, a seed at a time, so that what a stopped benchmark leaves can be compared.

    Args:
        only: configurations, the base among them; none = all, and the variants with one seed.
    """
    runs = []
    for seed in SEEDS[:seeds]:
        chosen = {n: o for n, o in CONFIGURATIONS.items() if not only or n in only}
        if seed == SEEDS[0] and not only:
            chosen |= {n: f"{CONFIGURATIONS[FULL]}, {options}" for n, options in ONCE.items()}
        runs += [Training(name, options, seed) for name, options in chosen.items()]
    return runs


# -- running ---------------------------------------------------------------------------------------


def make_data(folder: Path, settings: Settings) -> None:
    """Pictures and conversations.jsonl, of the first scenes of the pocket model's training."""
    if (folder / "conversations.jsonl").exists():
        return
    pool = lessons.Pool(folder / "pool", settings.scenes, settings.windows).build()
    (folder / "images").mkdir(exist_ok=True)
    part = folder / "conversations.part"
    with part.open("w", encoding="utf-8") as file:
        for item in range(len(pool)):
            scene, box = pool.view(item)
            assert scene.seed < questions.FIRST_HELD_OUT
            image = f"images/{item:05d}.png"
            Image.fromarray(np.array(pool.pixels[item])).save(folder / image)
            view, rng = questions.look(scene, box), random.Random(f"injection-{item}")
            for row in itertools.islice(conversations(view, rng, image), settings.each):
                file.write(json.dumps(row) + "\n")
    part.replace(folder / "conversations.jsonl")
    shutil.rmtree(folder / "pool")


def open_model() -> tuple[Any, Any]:
    """The pocket model before its yes/no training: the shipped tower, and what OPEN holds."""
    model, processor = build.load_pocket()
    assert not model.load_state_dict(load_file(OPEN), strict=False).unexpected_keys
    return model, processor


def benches(settings: Settings) -> list[PocketBench]:
    """Short answers, and fewer captions, which take longer."""
    return [
        PocketBench(categories=GRADED, questions=settings.questions),
        PocketBench(categories=("captions",), questions=settings.captions, max_new_tokens=64),
    ]


def stack(run: Path, training: Training) -> str:
    """The method that a trained model answers with."""
    path = str(run / training.name / "injection")
    return f"cli(path={path!r})" if training.options else "vanilla"


def train(run: Path, training: Training, settings: Settings) -> list[str]:
    """The training as a command line."""
    line = ["foveate", "train", "cli", "--model", str(run / "open")]
    line += ["--out", str(run / training.name)]
    line += ["--data", str(run / "data" / "conversations.jsonl"), "--method", training.method]
    line += ["--base", "full", "--steps", str(settings.steps), "--batch-size", str(settings.batch)]
    line += ["--packed", "--precision", settings.precision, "--seed", str(training.seed)]
    return [*line, "--rate", f"{settings.rate:g}", "--base-rate", f"{settings.base_rate:g}"]


def ask(model: Path, method: str, out: Path, settings: Settings) -> list[str]:
    """The questions as a command line."""
    line = ["foveate", "eval", *map(str, benches(settings)), "--out", str(out / "eval")]
    return [*line, "--model", str(model), "--method", method, *PLACE]


def read_gates(run: Path, training: Training, pictures: int) -> list[str]:
    """The analysis of gates as a command line."""
    count = pictures if training.configuration == FULL else 2  # learned numbers never vary
    folder = run / training.name
    line = ["foveate", "analyze", "gates", "--limit", str(count), "--out", str(folder / "gates")]
    return [*line, "--model", str(folder / "model"), "--method", stack(run, training), *PLACE]


def work(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Run commands one after the other; each goes on where it was stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    for line in commands:
        with (folder / "log.txt").open("a") as log:
            done = subprocess.run(
                [sys.executable, "-m", "foveate.commands", *line[1:]],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
            raise FoveateError(f"{folder.name} ended with {done.returncode}: {' '.join(last)}")


def complete(run: Path, runs: list[Training], settings: Settings, workers: int, limit: int) -> None:
    """Bring every run to its end.

    Args:
        limit: pictures that gates are read of.
    """
    run.mkdir(parents=True, exist_ok=True)
    begun = run / "settings.json"
    if begun.exists() and json.loads(begun.read_text()) != asdict(settings):
        raise FoveateError(f"{run} {difference(json.loads(begun.read_text()), asdict(settings))}.")
    write_json(begun, asdict(settings))
    make_data(run / "data", settings)
    if not (run / "open").exists():  # the pocket model before its yes/no training
        build.save_pocket(*open_model(), run / "open.part")
        (run / "open.part").replace(run / "open")
    jobs = [(run / START, [ask(run / "open", "vanilla", run / START, settings)])]
    for training in runs:
        folder = run / training.name
        commands = [train(run, training, settings)]
        commands.append(ask(folder / "model", stack(run, training), folder, settings))
        if training.configuration in SHOWN:
            commands.append(read_gates(run, training, limit))
        jobs.append((folder, commands))
    with ThreadPoolExecutor(workers) as pool:
        done = [pool.submit(work, folder, commands) for folder, commands in jobs]
        try:
            for job in track(done, "runs"):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# -- numbers ---------------------------------------------------------------------------------------


def answers(run: Path, name: str, settings: Settings) -> list[EvalRecord]:
    """Every answer of a run, each with "right", in the order of the questions."""
    asked = {str(bench): bench for bench in benches(settings)}
    with contextlib.closing(Journal(run / name / "eval" / RECORDS, key)) as journal:
        rows = [r | {"right": asked[r["benchmark"]].correct(r)} for r in journal.rows.values()]
    failed = [r["error"] for r in rows if r["right"] is None]
    if failed:
        raise FoveateError(f"{name}: {len(failed)} failed, the first: {failed[0]}")
    return sorted(rows, key=lambda r: (r["split"], r["line"]))


def part(rows: Sequence[EvalRecord], name: str) -> list[EvalRecord]:
    """The answers that a row of the table is about: a category, a habit, or all but captions."""
    if name in CATEGORIES:
        return [r for r in rows if r["meta"]["category"] == name]
    graded = [r for r in rows if r["meta"]["category"] in GRADED]
    return [r for r in graded if name in ("all", r["meta"]["habit"])]


def compared(
    runs: dict[int, list[EvalRecord]], base: dict[int, list[EvalRecord]]
) -> dict[str, Any]:
    """Accuracy of every part, and the difference from the base, of runs by their seed.

    Returns:
        {part: {"n", "pictures", "seeds": accuracy of each, "accuracy": their mean, "interval" over
        pictures; but for the base itself also "difference", "differences" of each seed,
        "over_pictures" and "over_seeds" (the 95 % intervals), "beyond" (both leave out 0)}}, in
        percent and points.
    """
    from scipy import stats

    parts = {}
    for name in PARTS:
        images = [r["image"] for r in part(next(iter(runs.values())), name)]
        rights = np.array([[r["right"] for r in part(rows, name)] for rows in runs.values()])
        entry: dict[str, Any] = {
            "n": len(images),
            "pictures": len(set(images)),
            "seeds": (100 * rights.mean(1)).tolist(),
            "accuracy": 100 * float(rights.mean()),
            "interval": _percent(interval(rights.mean(0), images)),
        }
        if runs is not base:
            change = rights - np.array(
                [[r["right"] for r in part(base[seed], name)] for seed in runs]
            )
            differences = 100 * change.mean(1)
            over = [_percent(interval(change.mean(0), images)), None]
            if len(differences) > 1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # of equal differences
                    ends = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
                over[1] = [float(ends.low), float(ends.high)]
            entry |= {
                "difference": 100 * float(change.mean()),
                "differences": differences.tolist(),
                "over_pictures": over[0],
                "over_seeds": over[1],
                "beyond": all(e is not None and e[0] * e[1] > 0 for e in over),
            }
        parts[name] = entry
    return parts


def _percent(ends: tuple[float, float] | None) -> list[float] | None:
    return None if ends is None else [100 * end for end in ends]


def about(run: Path, training: Training, settings: Settings) -> dict[str, Any]:
    """What a training left beside its model."""
    folder = run / training.name
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    file = folder / "injection" / "model.safetensors"
    tensors = load_file(file) if training.options else {}
    return {
        "configuration": training.configuration,
        "command": shlex.join(train(run, training, settings)),
        "seconds": json.loads((folder / "run.json").read_text())["seconds"],
        "losses": [row["loss"] for row in rows if "loss" in row],
        "parameters": sum(t.numel() for t in tensors.values()),
        "static": [t.item() for name, t in tensors.items() if name.endswith(".value")],
    }


def collect(run: Path, runs: list[Training], settings: Settings) -> dict[str, Any]:
    """Everything that the page shows."""
    by_name: dict[str, dict[int, list[EvalRecord]]] = {}
    for t in runs:
        by_name.setdefault(t.configuration, {})[t.seed] = answers(run, t.name, settings)
    base, first = by_name[BASE], SEEDS[0]
    gates = {}
    for t in runs:
        if t.configuration in SHOWN:
            found = json.loads((run / t.name / "gates" / "gates.json").read_text())
            gates[t.name] = found["numbers"]["methods"][stack(run, t)]
    return {
        "settings": asdict(settings),
        "environment": json.loads((run / START / "eval" / RESULTS).read_text())["environment"],
        "runs": {t.name: about(run, t, settings) for t in runs},
        "start": compared({first: answers(run, START, settings)}, base),
        "accuracy": {n: compared(by_name[n], base) for n in CONFIGURATIONS if n in by_name},
        "density": {n: compared({first: by_name[n][first]}, base) for n in DENSITY if n in by_name},
        "gates": gates,
    }


# -- the command -----------------------------------------------------------------------------------


def publish(out: Path, run: Path, report: dict[str, Any], name: str = "") -> None:
    """The report's numbers, tables and figures in `out`; `name` comes before theirs."""
    out.mkdir(parents=True, exist_ok=True)
    for configuration, title in SHOWN.items():
        first = Training(configuration, "", SEEDS[0]).name
        if first in report["gates"]:
            for ending in ("json", "png"):
                made = run / first / "gates" / f"gates.{ending}"
                shutil.copy(made, out / f"{name}{title}.{ending}")
    differences_figure(report).save(out / f"{name}accuracy.png")
    loss_figure(report).save(out / f"{name}loss.png")
    common = ("command", "settings", "environment", "start", "accuracy")
    write(out, f"{name}accuracy", {k: report[k] for k in common}, accuracy_table(report))
    write(out, f"{name}seeds", {k: report[k] for k in ("runs", "gates")}, seeds_table(report))
    if len(report["density"]) > 2:
        write(out, f"{name}density", {"density": report["density"]}, density_table(report))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Trainings with cross-layer injection, and without."
    )
    parser.add_argument("--run", type=Path, default=Path("runs/cli"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder for tables and figures; default: none")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--pictures", type=int, default=60, help="that gates are read of")
    parser.add_argument("--configuration", action="append", help="only this; repeatable")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="only so many")
    parser.add_argument("--name", default="", help="of tables and figures, before their own")
    for field in fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    args, console = parser.parse_args(given), Console()
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    only = {BASE, FULL, *args.configuration} if args.configuration else ()
    runs = trainings(sorted(only), args.seeds)
    try:
        complete(args.run, runs, settings, args.workers, args.pictures)
        report = collect(args.run, runs, settings)
    except FoveateError as error:
        console.print(str(error))
        return 2
    report["command"] = shlex.join(["python", "benchmarks/injection.py", *(given or sys.argv[1:])])
    console.print(Markdown(accuracy_table(report)), Markdown(seeds_table(report)))
    if args.out is not None:
        publish(args.out, args.run, report, args.name)
        console.print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
