"""The tables of README and site, from the methods themselves and from what was measured.

    python benchmarks/readme.py            # rewrite them
    python benchmarks/readme.py --check    # exit code 1 where a page says something else

A table stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from method_pages import load, look_table, method_table  # beside this file
from report import between, grid

from foveate.core.method import Method, methods
from foveate.evaluation.published import ROWS, Published
from foveate.insight.verify.report import COLUMNS, table_row

ROOT = Path(__file__).resolve().parent.parent
CROPS = ROOT / "docs" / "look-again" / "crops.json"
VERIFIED = ROOT / "verified"  # what `foveate verify` wrote
SHOWN = ("vanilla", "vicrop", "carve", "laser", "oracle")  # of CROPS; the last is the ceiling
KINDS = {  # of the short table of methods
    "look again": "read where the model looks, then show it that part of the picture, enlarged",
    "attention": "change the attention of some rows in one pass",
    "second stream": "compare the prediction with one from a changed picture or text",
    "inner states": "use or change what the layers predict or pass on",
    "search": "choose tokens by a beam search that looks at attention",
    "trained": "bring layers of the vision tower into the language model, by a trained gate",
}
READER = ("LLaVA-1.5-7B", "Qwen2.5-VL-7B")  # whose published rows are shown
TROUBLES = {  # trouble -> (benchmark, score) of a published row
    "things that are not there": (
        ("amber", "existence/accuracy"),
        ("pope", "adversarial/accuracy"),
    ),
    "attributes": (("amber", "attribute/accuracy"), ("mme", "color/score"), ("mme", "count/score")),
    "relations": (("amber", "relation/accuracy"), ("rbench", "subset1/accuracy")),
    "all of AMBER's yes/no questions": (("amber", "all/accuracy"),),
    "small print, small things": (("textvqa", "accuracy"), ("vstar", "overall/accuracy")),
}


def speed_table() -> Iterator[list[str]]:
    """CLVS and eager attention beside plain SDPA, at every size."""
    yield ["shape", "row", "prefill", "decode", "peak memory"]
    for size, found in load("speed-cpu")["sizes"].items():
        about = f"{size}: " + ", ".join(found["note"].split(", ")[i] for i in (0, 2, 3))
        for row, figures in found["figures"].items():
            memory = f"{figures['peak']['ratio']:.2f}"
            costs = [_ratio(figures, part) for part in ("prefill", "decode")]
            yield [about, f"`{row}`", *costs, memory]
            about = ""


def question_table() -> Iterator[list[str]]:
    """Questions per second on a shared prefix, beside the loop of published code."""
    yield ["model", "method", "loop, questions/s", "shared, questions/s", "ratio"]
    for size, found in load("eval-cpu")["sizes"].items():
        about = f"{size}: {found['note']}"
        for row, figures in found["figures"].items():
            rates = [f"{figures[way]:.3g}" for way in ("loop", "shared")]
            yield [about, f"`{row}`", *rates, f"{figures['ratio']['median']:.1f}"]
            about = ""


def kind_table() -> Iterator[list[str]]:
    """The methods by what they do, with the range of their costs over plain."""
    yield ["kind", "what it does", "methods", "prompt", "token", "answer"]
    inside = {_name(row): row[-2:] for row in list(method_table())[1:]}
    looks = [(_name(row), row[-2]) for row in list(look_table())[1:]]
    for kind, about in KINDS.items():
        names = [name for name, cls in methods().items() if _kind(cls) == kind]
        known = [inside[name] for name in names if name in inside]
        costs = [_range(cost[i] for cost in known) for i in range(2)]
        answers = _range(cost for name, cost in looks if name in names)
        yield [kind, about, ", ".join(f"`{name}`" for name in names), *costs, answers]


def print_table() -> Iterator[list[str]]:
    """Fine print on drawn scenes: right answers, plain and with the methods that look again."""
    report = json.loads(CROPS.read_text("utf-8"))
    yield ["method", "with the habit", "against it", f"all {report['questions']}"]
    for name in SHOWN:
        figures = report["figures"][name]
        shares = [f"{figures[part]['right']:.1f}" for part in ("with", "against", "all")]
        yield [f"`{name}`" + " (crop from the ground truth)" * (name == "oracle"), *shares]


def gain_table() -> Iterator[list[str]]:
    """What papers report for a trouble: the plain model's score, and what methods add to it."""
    yield ["trouble", "score", "model", "plain", "methods add", "source"]
    for trouble, wanted in TROUBLES.items():
        for benchmark, score in wanted:
            for model in READER:
                rows = [
                    p
                    for p in ROWS
                    if (p.benchmark, p.model) == (benchmark, model)
                    and score in p.values
                    and not p.ablation
                ]
                for source in dict.fromkeys(p.source for p in rows):
                    given = [p for p in rows if p.source == source]
                    plain = next((p for p in given if p.method == "vanilla"), None)
                    others = [p for p in given if p.method != "vanilla"]
                    if plain and others:
                        added = ", ".join(_added(p, plain, score) for p in others)
                        value = f"{plain.values[score]:.1f}"
                        yield [trouble, f"{benchmark}, {score}", model, value, added, source]
                        trouble = ""


def _added(row: Published, plain: Published, score: str) -> str:
    name = f"`{row.method}`" + f" ({row.variant})" * bool(row.variant)
    return f"{name} {row.values[score] - plain.values[score]:+.1f}"


def _kind(cls: type[Method]) -> str:
    stages = cls.stages
    if "search" in stages:
        return "search"
    if "training" in cls.passes:
        return "trained"
    if cls.looks_again:
        return "look again"
    if "mlp" in stages or {"before", "logits"} <= stages:
        return "inner states"
    return "second stream" if {"contrast", "logits"} <= stages else "attention"


def _name(row: list[str]) -> str:
    return re.findall(r"\w+", row[0])[0]


def _range(ratios: Iterable[str]) -> str:
    values = sorted(float(ratio) for ratio in ratios)
    ends = dict.fromkeys(f"{value:.1f}" for value in (values[:1] + values[-1:]))
    return " to ".join(ends)


def verified_table() -> Iterator[list[str]]:
    """Checkpoints of the hub that somebody has verified."""
    yield list(COLUMNS)
    rows = [table_row(report) for report in _verified() if report["commit"]]
    yield from rows or [["nobody has verified real weights yet", *[""] * (len(COLUMNS) - 1)]]


def small_table() -> Iterator[list[str]]:
    """Models from elsewhere that were verified: they show that the command works."""
    yield list(COLUMNS)
    yield from (table_row(report) for report in _verified() if not report["commit"])


def _verified() -> list[dict[str, Any]]:
    return [json.loads(file.read_text("utf-8")) for file in sorted(VERIFIED.glob("*.json"))]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "kinds": kind_table,
    "speed": speed_table,
    "questions": question_table,
    "print": print_table,
    "gains": gain_table,
    "verified": verified_table,
    "verified, small": small_table,
}
PAGES = {  # a page, and the tables in it
    "README.md": ("print", "kinds"),
    "docs/guides/which-method.md": ("gains", "print"),
    "docs/evidence/speed.md": ("speed", "questions"),
    "docs/guides/verify.md": ("verified", "verified, small"),
}


def _ratio(figures: dict[str, Any], part: str) -> str:
    return f"{figures[part]['ratio']['median']:.2f}"


def written(text: str, tables: tuple[str, ...]) -> str:
    """A page's text with its tables as they are now."""
    for name in tables:
        columns, *cells = TABLES[name]()
        text = between(text, name, "\n".join(grid(columns, cells)))
    return text


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of README and site.")
    parser.add_argument("--check", action="store_true", help="only say whether they are right")
    check, outdated = parser.parse_args(given).check, 0
    for name, tables in PAGES.items():
        page = ROOT / name
        old = page.read_text("utf-8")
        new = written(old, tables)
        if new != old and check:
            print(f"{name} is not up to date: run python benchmarks/readme.py", file=sys.stderr)
            outdated = 1
        elif new != old:
            page.write_text(new, "utf-8")
    return outdated


if __name__ == "__main__":
    sys.exit(main())
