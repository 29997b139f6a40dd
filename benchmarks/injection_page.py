"""The tables and figures of benchmarks/injection.py, from the numbers that it collects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from foveate.benchmarks.pocket import CATEGORIES, HABITS
from foveate.insight.plots.analysis import SERIES, Sheet, band, zero
from foveate.insight.plots.style import BLUE, QUIET

BASE, FULL = "base", "AMP+AGF"
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
Report = dict[str, Any]


def table(rows: list[list[str]]) -> str:
    """Markdown, the first row as heads."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ends(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def versus(entry: dict[str, Any], *intervals: str) -> list[str]:
    """Cells of the difference from the base; empty for the base itself."""
    if "difference" not in entry:
        return [""] * (1 + len(intervals))
    return [f"{entry['difference']:+.2f}", *(ends(entry[name]) for name in intervals)]


def accuracy_table(report: Report) -> str:
    """Rows are categories, columns configurations."""
    rows = [["", "n", "no training", *report["accuracy"]]]
    for name, title in PARTS.items():
        cells = [title, f"{report['accuracy'][BASE][name]['n']:,}"]
        cells.append(f"{report['start'][name]['accuracy']:.1f}")
        for parts in report["accuracy"].values():
            entry = parts[name]
            cell = f"{entry['accuracy']:.1f}"
            if "difference" in entry:
                cell += f", {entry['difference']:+.1f} ({ends(entry['over_pictures'])})"
                cell += "\\*" * entry["beyond"]
            cells.append(cell)
        rows.append(cells)
    return table(rows)


def seeds_table(report: Report) -> str:
    """Rows are configurations, of all questions but captions."""
    seeds = [f"seed {seed}" for seed, _ in enumerate(report["accuracy"][BASE]["all"]["seeds"])]
    rows = [["", *seeds, "difference", "over pictures", "over seeds"]]
    rows[0] += ["last loss", "mean gate", "parameters added", "s per training"]
    for name, parts in report["accuracy"].items():
        entry = parts["all"]
        runs = {n: run for n, run in report["runs"].items() if run["configuration"] == name}
        gates = [abs(value) for run in runs.values() for value in run["static"]]
        if name == FULL:
            gates = [report["gates"][n]["gate"]["mean"] for n in runs]
        losses = [np.mean(run["losses"][-TOGETHER:]) for run in runs.values()]
        rows.append(
            [
                name,
                *(f"{value:.1f}" for value in entry["seeds"]),
                *versus(entry, "over_pictures", "over_seeds"),
                f"{np.mean(losses):.3f}",
                f"{np.mean(gates):.2g}" if gates else "",
                f"{next(iter(runs.values()))['parameters']:,}",
                f"{np.mean([run['seconds'] for run in runs.values()]):.0f}",
            ]
        )
    return table(rows)


def density_table(report: Report) -> str:
    """Rows are numbers of decoder layers, with one seed."""
    rows = [["decoder layers", "all", "difference", "over pictures", *HABITS]]
    for name, parts in report["density"].items():
        cells = ["", ""] if name == BASE else versus(parts["all"], "over_pictures")
        title = DENSITY[name].replace("\n", " ")
        by_habit = [f"{parts[habit]['accuracy']:.1f}" for habit in HABITS]
        rows.append([title, f"{parts['all']['accuracy']:.1f}", *cells, *by_habit])
    return table(rows)


def differences_figure(report: Report) -> Sheet:
    """A panel per configuration: every category's difference with its interval, and the seeds."""
    base = report["accuracy"][BASE]
    sheet = Sheet(
        "Accuracy against the base",
        f"Right answers more than the base's, in points: mean of {len(base['all']['seeds'])} seeds "
        "(large), their 95 % paired bootstrap interval over pictures (bar), and each seed (small). "
        "Random, popular, adversarial: of existence. With, against: all, by the habit of the "
        f"scenes. n = {base['all']['n']:,} questions about {base['all']['pictures']} pictures, and "
        f"{base['captions']['n']} captions, which are not in `all`.",
    )
    y = np.arange(len(PARTS))[::-1]
    others = [parts for name, parts in report["accuracy"].items() if name != BASE]
    entries = [entry for parts in others for entry in parts.values()]
    most = max(abs(v) for e in entries for v in (*e["differences"], *(e["over_pictures"] or ())))
    for name, parts in report["accuracy"].items():
        if name == BASE:
            continue

        def panel(axes: Any, parts: dict[str, Any] = parts) -> None:
            for place, part_name in zip(y, PARTS, strict=True):
                entry = parts[part_name]
                if entry["over_pictures"]:
                    axes.hlines(place, *entry["over_pictures"], color=BLUE, alpha=0.5, lw=3)
                each = entry["differences"]
                axes.plot(each, [place] * len(each), ".", color=QUIET, ms=5)
                axes.plot(entry["difference"], place, "o", color=BLUE, ms=5)
            axes.axvline(0, color=QUIET, lw=0.8)
            axes.set_xlim(-1.05 * most, 1.05 * most)
            axes.set_yticks(y, [name.split("-")[-1] for name in PARTS])
            axes.tick_params(axis="y", labelsize=7.5, length=0)

        sheet.add(name, "points against the base", "", panel)
    return sheet


def loss_figure(report: Report) -> Sheet:
    """The loss of every configuration, and its difference from the base's on the same batches."""
    means = {}  # (seeds, means of a few steps)
    for name in report["accuracy"]:
        runs = report["runs"].values()
        losses = np.array([run["losses"] for run in runs if run["configuration"] == name])
        steps = losses.shape[1] // TOGETHER
        cut = losses[:, : steps * TOGETHER].reshape(len(losses), steps, TOGETHER)
        means[name] = cut.mean(2)
    x = (TOGETHER * (np.arange(steps) + 0.5)).tolist()
    sheet = Sheet(
        "Training loss",
        f"Training loss per answer token, mean over {TOGETHER} steps and {len(means[BASE])} "
        "seeds. Right: the difference from the base of the same seed, which learnt from the same "
        "batches in the same order; bands reach from the lowest seed to the highest.",
    )

    def draw(axes: Any, minus: Any, only: Sequence[str]) -> None:
        for color, name in zip(SERIES, means, strict=False):
            if name in only:
                values = means[name] - minus
                reach = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
                band(axes, x, reach, color, name, dots=False)

    def losses_panel(axes: Any) -> None:
        draw(axes, 0.0, list(means))
        axes.set_yscale("log")
        axes.set_yticks(ticks := [0.3, 0.4, 0.6, 1, 2, 4], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()

    def against_base(axes: Any) -> None:
        draw(axes, means[BASE], [name for name in means if name != BASE])
        zero(axes)

    sheet.add("", "step", "loss (nats)", losses_panel)
    sheet.add("Against the base", "step", "difference (nats)", against_base)
    return sheet
