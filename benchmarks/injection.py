"""Does cross-layer injection help the pocket model? Equal trainings with it and without it.

    python benchmarks/injection.py --out docs/cli

Every run is a `foveate train cli` of its own, from the pocket model before its training on yes/no
questions, on the same scenes with the same number of steps; then it answers pocket-bench. Two runs
are under way at a time, with a thread each. A run that was stopped goes on where it was, and what
is finished in ``--run`` is kept; the tables are made again every time.

* base: no injection; AMP only: a learned number per pair of layers; AMP+AGF: a gate that looks at
  the content; one-to-one and one-to-many: fixed numbers again, with fewer pairs.
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
import functools
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
if __name__ in ("__main__", "__mp_main__"):
    sys.path.insert(0, str(ROOT))

from benchmarks.crops import opened, write  # noqa: E402
from foveate import VLM, FoveateError  # noqa: E402
from foveate.base.journal import Journal, difference, write_json  # noqa: E402
from foveate.base.stats import interval  # noqa: E402
from foveate.benchmarks.pocket import CATEGORIES, HABITS, PocketBench  # noqa: E402
from foveate.evaluation.ask import Plan, evaluate  # noqa: E402
from foveate.evaluation.benchmark import Benchmark, EvalRecord, Sample  # noqa: E402
from foveate.evaluation.data import Data  # noqa: E402
from foveate.evaluation.run import RECORDS, RESULTS, key  # noqa: E402
from foveate.insight.analysis import parse  # noqa: E402
from foveate.insight.analysis import run as analyse  # noqa: E402
from foveate.insight.plots.analysis import SERIES, Sheet  # noqa: E402
from foveate.insight.plots.style import BLUE, INK, QUIET, RED  # noqa: E402
from foveate.insight.truth import pocket_pictures  # noqa: E402
from foveate.pocket import build  # noqa: E402
from foveate.scenes import lessons, questions  # noqa: E402

SHAPE = "rank=16, alpha=32, heads=2, width=64, summary=image"  # the defaults, scaled to its width
START, BASE, FULL = "start", "base", "AMP+AGF"
SHOWN = {FULL: "gates", "AMP only": "static"}  # whose gates are shown, and under what name
CONFIGURATIONS = {
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
DENSITY = {  # what is compared with one seed: decoder layers that are injected into, of 12
    BASE: "0 (base)",
    "density 1": "1",
    "density 2": "2",
    FULL: "4",
    "density 8": "8",
    "half open": "4, gates\nhalf open",
}
TOGETHER = 5  # steps of which the loss is shown as one mean
GRADED = tuple(c for c in CATEGORIES if c != "captions")  # captions are graded in another way
PARTS = {  # rows of the tables
    **{name: name.replace("-", ", ") for name in GRADED},
    "captions": "captions without an invention",
    **{habit: f"all, {habit} the habit" for habit in HABITS},
    "all": "all",
}


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
    found = []
    for seed in SEEDS[:seeds]:
        chosen = {n: o for n, o in CONFIGURATIONS.items() if not only or n in only}
        if seed == SEEDS[0] and not only:
            chosen |= {n: f"{CONFIGURATIONS[FULL]}, {options}" for n, options in ONCE.items()}
        found += [Training(name, options, seed) for name, options in chosen.items()]
    return found


# -- what is trained on, and what is asked ---------------------------------------------------------


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
            for row in itertools.islice(questions.conversations(view, rng, image), settings.each):
                file.write(json.dumps(row) + "\n")
    part.replace(folder / "conversations.jsonl")
    shutil.rmtree(folder / "pool")


def make_base(folder: Path) -> None:
    """The pocket model before its yes/no training, as a folder of its own."""
    if not folder.exists():
        part = folder.with_suffix(".part")
        build.save_pocket(*build.load_open(), part)
        part.replace(folder)


@dataclass(frozen=True)
class Kept(PocketBench):
    """pocket-bench with its pictures kept as files, as every run is asked about them.

    Attributes:
        pictures: their folder.
    """

    pictures: str = ""

    def read(self, data: Data) -> Iterator[Sample]:
        for sample in super().read(data):
            path = Path(self.pictures) / f"{sample.image_name}.png"
            assert callable(sample.image)
            yield replace(sample, image=functools.partial(opened, path, sample.image, {}))


def benches(run: Path, settings: Settings) -> list[Benchmark]:
    """Short answers, and fewer captions, which take longer."""
    kept = functools.partial(Kept, pictures=str(run / "pictures"))
    return [
        kept(categories=GRADED, questions=settings.questions),
        kept(categories=("captions",), questions=settings.captions, max_new_tokens=64),
    ]


def draw(run: Path, settings: Settings, number: int, of: int) -> None:
    """Draw every `of`-th picture of the questions."""
    samples = {s.image_name: s for bench in benches(run, settings) for s in bench.samples()}
    for sample in list(samples.values())[number::of]:
        sample.load()


# -- running ---------------------------------------------------------------------------------------


def command(run: Path, training: Training, settings: Settings) -> list[str]:
    """The training as a command line."""
    return [
        *("foveate", "train", "cli"),
        *("--model", str(run / "open")),
        *("--data", str(run / "data" / "conversations.jsonl")),
        *("--out", str(run / training.name)),
        *("--method", training.method),
        *("--base", "full"),
        *("--steps", str(settings.steps)),
        *("--batch-size", str(settings.batch)),
        "--packed",
        *("--precision", settings.precision),
        *("--seed", str(training.seed)),
        *("--rate", f"{settings.rate:g}"),
        *("--base-rate", f"{settings.base_rate:g}"),
    ]


def stack(run: Path, training: Training) -> str:
    """The method that a trained model answers with."""
    return (
        f"cli(path={str(run / training.name / 'injection')!r})" if training.options else "vanilla"
    )


def work(run: Path, training: Training, settings: Settings) -> str:
    """Train and ask, or go on with it; what was done, in words."""
    torch.set_num_threads(1)
    folder, began = run / training.name, time.monotonic()
    folder.mkdir(exist_ok=True)
    if not (folder / "trained").exists():
        program = [sys.executable, "-m", "foveate.commands"]
        with (folder / "train.txt").open("a") as log:
            done = subprocess.run(
                program + command(run, training, settings)[1:],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            last = (folder / "train.txt").read_text().strip().splitlines()[-1:]
            raise FoveateError(f"{training.name} ended with {done.returncode}: {' '.join(last)}")
        (folder / "trained").touch()
    trained = time.monotonic() - began
    ask(run, folder / "model", stack(run, training), folder / "eval", settings)
    return f"{training.name}: trained in {trained:.0f} s, all in {time.monotonic() - began:.0f} s"


def ask(run: Path, model: Path, method: str, out: Path, settings: Settings) -> str:
    """Put all questions to a model that has not answered them yet."""
    if (out / RESULTS).exists():
        return f"{model}: known"
    torch.set_num_threads(1)
    vlm = VLM.load(str(model), device="cpu", dtype=torch.float32)
    evaluate(Plan(benches(run, settings), [method], out), vlm)
    return f"{model}: asked"


def complete(
    run: Path, known: list[Training], settings: Settings, workers: int, console: Console
) -> None:
    """Bring every training to its end."""
    run.mkdir(parents=True, exist_ok=True)
    begun = run / "settings.json"
    if begun.exists() and json.loads(begun.read_text()) != asdict(settings):
        raise FoveateError(f"{run} {difference(json.loads(begun.read_text()), asdict(settings))}.")
    write_json(begun, asdict(settings))
    make_data(run / "data", settings)
    make_base(run / "open")
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, Progress() as bar:
        list(pool.map(functools.partial(draw, run, settings, of=workers), range(workers)))
        jobs = [pool.submit(work, run, training, settings) for training in known]
        jobs.append(pool.submit(ask, run, run / "open", "vanilla", run / START / "eval", settings))
        task = bar.add_task("runs", total=len(jobs))
        try:
            for job in as_completed(jobs):
                console.print(job.result())
                bar.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# -- numbers ---------------------------------------------------------------------------------------


def answers(run: Path, name: str, settings: Settings) -> list[EvalRecord]:
    """Every answer of a run, each with "right", in the order of the questions."""
    asked = {str(bench): bench for bench in benches(run, settings)}
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

    found = {}
    for name in PARTS:
        rows = {seed: part(own, name) for seed, own in runs.items()}
        images = [r["image"] for r in next(iter(rows.values()))]
        rights = np.array([[r["right"] for r in own] for own in rows.values()])
        entry: dict[str, Any] = {
            "n": len(images),
            "pictures": len(set(images)),
            "seeds": (100 * rights.mean(1)).tolist(),
            "accuracy": 100 * float(rights.mean()),
            "interval": percent(interval(rights.mean(0), images)),
        }
        if runs is not base:
            before = np.array([[r["right"] for r in part(base[seed], name)] for seed in runs])
            change = rights - before
            own = 100 * change.mean(1)
            over = [percent(interval(change.mean(0), images)), None]
            if len(own) > 1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # of equal differences
                    ends = stats.ttest_1samp(own, 0).confidence_interval(0.95)
                over[1] = [float(ends.low), float(ends.high)]
            entry |= {
                "difference": 100 * float(change.mean()),
                "differences": own.tolist(),
                "over_pictures": over[0],
                "over_seeds": over[1],
                "beyond": all(e is not None and e[0] * e[1] > 0 for e in over),
            }
        found[name] = entry
    return found


def percent(ends: tuple[float, float] | None) -> list[float] | None:
    return None if ends is None else [100 * end for end in ends]


def about(run: Path, training: Training) -> dict[str, Any]:
    """What a training left beside its model."""
    folder = run / training.name
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    settings = Settings(**json.loads((run / "settings.json").read_text()))
    found = {
        "configuration": training.configuration,
        "command": shlex.join(command(run, training, settings)),
        "seconds": json.loads((folder / "run.json").read_text())["seconds"],
        "losses": [row["loss"] for row in rows if "loss" in row],
        "parameters": 0,
        "static": [],
    }
    if training.options:
        tensors = load_file(folder / "injection" / "model.safetensors")
        found["parameters"] = sum(t.numel() for t in tensors.values())
        found["static"] = [t.item() for name, t in tensors.items() if name.endswith(".value")]
    return found


def gates(run: Path, known: list[Training], pictures: int) -> dict[str, dict[str, Any]]:
    """`foveate analyze gates` of what injects into all pairs, by the training's name."""
    found = {}
    for training in known:
        if training.configuration in SHOWN:
            folder, method = run / training.name, stack(run, training)
            count = pictures if training.configuration == FULL else 2  # the others never vary
            (folder / "gates").mkdir(exist_ok=True)
            told = ["foveate", "analyze", "gates", "--model", str(folder / "model")]
            told += ["--method", method, "--limit", str(count)]
            vlm = VLM.load(str(folder / "model"), device="cpu", dtype=torch.float32)
            read = analyse(
                parse("gates"),
                vlm,
                pocket_pictures(count),
                folder / "gates",
                methods=[method],
                data="drawn scenes, half against the pocket model's habits",
                command=shlex.join(told),
            )
            found[training.name] = read["numbers"]["methods"][method]
    return found


def collect(run: Path, known: list[Training], settings: Settings, pictures: int) -> dict[str, Any]:
    """Everything that the page shows."""
    right = {t.name: answers(run, t.name, settings) for t in known}
    of = {
        name: {t.seed: right[t.name] for t in known if t.configuration == name}
        for name in dict.fromkeys(t.configuration for t in known)
    }
    base = of[BASE]
    results = json.loads((run / known[0].name / "eval" / RESULTS).read_text())
    return {
        "settings": asdict(settings),
        "environment": results["environment"],
        "runs": {t.name: about(run, t) for t in known},
        "start": compared({SEEDS[0]: answers(run, START, settings)}, base),
        "accuracy": {name: compared(of[name], base) for name in CONFIGURATIONS if name in of},
        "density": {
            name: compared({SEEDS[0]: of[name][SEEDS[0]]}, base) for name in DENSITY if name in of
        },
        "gates": gates(run, known, pictures),
    }


# -- tables and figures ----------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    """Markdown, the first row as heads."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ends(found: list[float] | None) -> str:
    return "" if found is None else f"{found[0]:+.1f} to {found[1]:+.1f}"


def accuracy_table(report: dict[str, Any]) -> str:
    """Rows are categories, columns configurations."""
    rows = [["", "n", "no training", *report["accuracy"]]]
    for name, title in PARTS.items():
        cells = [title, f"{report['accuracy'][BASE][name]['n']:,}"]
        cells.append(f"{report['start'][name]['accuracy']:.1f}")
        for found in report["accuracy"].values():
            entry = found[name]
            told = f"{entry['accuracy']:.1f}"
            if "difference" in entry:
                told += f", {entry['difference']:+.1f} ({ends(entry['over_pictures'])})"
                told += "\\*" * entry["beyond"]
            cells.append(told)
        rows.append(cells)
    return table(rows)


def seeds_table(report: dict[str, Any]) -> str:
    """Rows are configurations, of all questions but captions."""
    seeds = [f"seed {seed}" for seed, _ in enumerate(report["accuracy"][BASE]["all"]["seeds"])]
    rows = [["", *seeds, "difference", "over pictures", "over seeds"]]
    rows[0] += ["last loss", "mean gate", "parameters added", "s per training"]
    for name, found in report["accuracy"].items():
        entry, versus = found["all"], ["", "", ""]
        runs = [own for own in report["runs"].values() if own["configuration"] == name]
        values = [abs(value) for own in runs for value in own["static"]]
        if name == FULL:
            values = [
                report["gates"][run]["gate"]["mean"]
                for run, own in report["runs"].items()
                if own["configuration"] == FULL
            ]
        if "difference" in entry:
            intervals = map(ends, (entry["over_pictures"], entry["over_seeds"]))
            versus = [f"{entry['difference']:+.2f}", *intervals]
        rows.append(
            [
                name,
                *(f"{value:.1f}" for value in entry["seeds"]),
                *versus,
                f"{np.mean([np.mean(own['losses'][-TOGETHER:]) for own in runs]):.3f}",
                f"{np.mean(values):.2g}" if values else "",
                f"{runs[0]['parameters']:,}",
                f"{np.mean([own['seconds'] for own in runs]):.0f}",
            ]
        )
    return table(rows)


def density_table(report: dict[str, Any]) -> str:
    """Rows are numbers of decoder layers, with one seed."""
    rows = [["decoder layers", "all", "difference", "over pictures", *HABITS]]
    for name, found in report["density"].items():
        entry, versus = found["all"], ["", ""]
        if name != BASE:
            versus = [f"{entry['difference']:+.2f}", ends(entry["over_pictures"])]
        rows.append(
            [
                DENSITY[name].replace("\n", " "),
                f"{entry['accuracy']:.1f}",
                *versus,
                *(f"{found[habit]['accuracy']:.1f}" for habit in HABITS),
            ]
        )
    return table(rows)


def differences_figure(report: dict[str, Any], path: Path) -> None:
    """A panel per configuration: every category's difference with its interval, and the seeds."""
    base = report["accuracy"][BASE]
    caption = (
        f"Right answers more than the base's, in points: mean of {len(base['all']['seeds'])} seeds "
        "(large), their "
        "95 % paired bootstrap interval over pictures (bar), and each seed (small). Random, "
        "popular, adversarial: of existence. With, against: all, by the habit of the scenes. "
        f"n = {base['all']['n']:,} questions about {base['all']['pictures']} pictures, and "
        f"{base['captions']['n']} captions, which are not in `all`."
    )
    sheet = Sheet("Accuracy against the base", caption)
    most = 1.05 * max(
        abs(value)
        for name, found in report["accuracy"].items()
        if name != BASE
        for entry in found.values()
        for value in (*entry["differences"], *(entry["over_pictures"] or ()))
    )
    for name, own in report["accuracy"].items():
        if name == BASE:
            continue

        def panel(axes: Any, found: dict[str, Any] = own) -> None:
            y = np.arange(len(PARTS))[::-1]
            for place, part_name in zip(y, PARTS, strict=True):
                entry = found[part_name]
                if entry["over_pictures"]:
                    axes.hlines(place, *entry["over_pictures"], color=BLUE, alpha=0.5, lw=3)
                axes.plot(entry["differences"], [place] * len(entry["differences"]), ".",
                          color=QUIET, ms=5)  # fmt: skip
                axes.plot(entry["difference"], place, "o", color=BLUE, ms=5)
            axes.axvline(0, color=INK, lw=0.8)
            axes.axhline(2.5, color=QUIET, lw=0.5, ls=":")
            axes.set_yticks(y, [name.split("-")[-1] for name in PARTS])
            axes.tick_params(axis="y", labelsize=7.5, length=0)
            axes.set_xlim(-most, most)

        sheet.add(name, "points against the base", "", panel)
    sheet.save(path)


def loss_figure(report: dict[str, Any], path: Path) -> None:
    """The loss of every configuration, and its difference from the base's on the same batches."""
    curves = {
        name: np.array(
            [own["losses"] for own in report["runs"].values() if own["configuration"] == name]
        )
        for name in report["accuracy"]
    }
    steps = curves[BASE].shape[1] // TOGETHER
    bins = {
        name: own[:, : steps * TOGETHER].reshape(len(own), steps, TOGETHER).mean(2)
        for name, own in curves.items()
    }
    x = TOGETHER * (np.arange(steps) + 0.5)
    caption = (
        f"Training loss per answer token, mean over {TOGETHER} steps and {len(curves[BASE])} "
        "seeds. Right: the difference from the base of the same seed, which learnt from the same "
        "batches in the same order; bands reach from the lowest seed to the highest."
    )
    sheet = Sheet("Training loss", caption)

    def losses(axes: Any) -> None:
        for color, (name, own) in zip(SERIES, bins.items(), strict=False):
            axes.plot(x, own.mean(0), color=color, lw=1.5, label=name)
        axes.set_yscale("log")
        axes.set_yticks(ticks := [0.3, 0.4, 0.6, 1, 2, 4, 6], [f"{tick:g}" for tick in ticks])
        axes.set_ylim(0.9 * min(own.mean(0).min() for own in bins.values()))
        axes.minorticks_off()

    def against(axes: Any) -> None:
        for color, own in list(zip(SERIES, bins.values(), strict=False))[1:]:
            change = own - bins[BASE]
            axes.plot(x, change.mean(0), color=color, lw=1.5)
            axes.fill_between(x, change.min(0), change.max(0), color=color, alpha=0.15, lw=0)
        axes.axhline(0, color=QUIET, lw=0.8)

    sheet.add("", "step", "loss (nats)", losses)
    sheet.add("Against the base", "step", "difference (nats)", against)
    sheet.save(path)


def density_figure(report: dict[str, Any], path: Path) -> None:
    """Accuracy over the number of decoder layers that are injected into."""
    found = report["density"]
    caption = (
        f"{FULL}, seed {SEEDS[0]}, all questions but captions (n = "
        f"{next(iter(found.values()))['all']['n']:,}). Bars: the base's accuracy plus the 95 % "
        "paired bootstrap interval of the difference from it, over pictures. Small: the other "
        "seeds, where there are any."
    )
    sheet = Sheet("Accuracy by the number of decoder layers that are injected into", caption)

    def panel(axes: Any) -> None:
        base = found[BASE]["all"]["accuracy"]
        for x, (name, parts) in enumerate(found.items()):
            entry = parts["all"]
            if name != BASE and entry["over_pictures"]:
                low, high = entry["over_pictures"]
                axes.vlines(x, base + low, base + high, color=BLUE, alpha=0.5, lw=3)
            axes.plot(x, entry["accuracy"], "o", color=BLUE, ms=6)
            others = report["accuracy"].get(name, parts)["all"]["seeds"][1:]
            axes.plot([x] * len(others), others, ".", color=QUIET, ms=6)
        axes.axhline(base, color=RED, dashes=(5, 3), lw=1.4)
        axes.set_xticks(range(len(found)), [DENSITY[name] for name in found])

    sheet.add("", "decoder layers", "right answers (%)", panel)
    sheet.save(path)


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
    differences_figure(report, out / f"{name}accuracy.png")
    loss_figure(report, out / f"{name}loss.png")
    common = {key: report[key] for key in ("command", "settings", "environment", "start")}
    found = common | {"accuracy": report["accuracy"]}
    write(out, f"{name}accuracy", found, accuracy_table(report))
    write(out, f"{name}seeds", {k: report[k] for k in ("runs", "gates")}, seeds_table(report))
    if len(report["density"]) > 2:
        density_figure(report, out / f"{name}density.png")
        write(out, f"{name}density", {"density": report["density"]}, density_table(report))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Trainings with cross-layer injection, and without."
    )
    parser.add_argument("--run", type=Path, help="folder of the runs; default: runs/cli")
    parser.add_argument("--out", type=Path, help="folder for tables and figures; default: none")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--pictures", type=int, default=60, help="that gates are read of")
    parser.add_argument("--configuration", action="append", help="only this; repeatable")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="only so many")
    parser.add_argument("--name", default="", help="of tables and figures, before their own")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default),
                            default=field.default)  # fmt: skip
    args, console = parser.parse_args(given), Console()
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    run = args.run or Path("runs") / "cli"
    try:
        only = {BASE, FULL, *args.configuration} if args.configuration else ()
        known = trainings(sorted(only), args.seeds)
        complete(run, known, settings, args.workers, console)
        report = collect(run, known, settings, args.pictures)
    except FoveateError as error:
        console.print(str(error))
        return 2
    report["command"] = shlex.join(["python", "benchmarks/injection.py", *(given or sys.argv[1:])])
    console.print(Markdown(accuracy_table(report)), Markdown(seeds_table(report)))
    if args.out is not None:
        publish(args.out, run, report, args.name)
        console.print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
