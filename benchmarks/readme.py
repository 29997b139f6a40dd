"""The tables of the README, from the methods themselves and from what speed.py measured.

    python benchmarks/readme.py            # rewrite them
    python benchmarks/readme.py --check    # exit code 1 where the README says something else

A table stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import RESULTS, between, grid  # beside this file

from foveate.core.method import STAGES, Method, methods

ROOT = Path(__file__).resolve().parent.parent
# whose costs the table of methods shows; what reads the vision tower is measured with one
COSTS = {"methods-cpu": "0.5b", "cli-cpu": "0.5b-clip"}
PEERS = "peers-cpu"


def method_table() -> Iterator[list[str]]:
    """Every method that acts inside the model: what it changes, where, and what it costs."""
    measured: dict[str, Any] = {}
    for file, size in COSTS.items():
        measured |= _load(file)["sizes"][size]["figures"]
    yield ["method", "what it does", "stages", "rows", "extra passes", "prefill", "decode"]
    for name, cls in methods().items():
        if cls(**cls.example).wants("rewrite"):
            continue
        stages = ", ".join(f"`{s}`" for s in _stages(cls))
        rows = cls.rows if {"scores", "weights"} & cls.stages else "none"
        cost = next((v for row, v in measured.items() if re.match(rf"{name}\b", row)), None)
        ratios = [_ratio(cost, part) if cost else "not measured" for part in ("prefill", "decode")]
        if "search" in cls.stages:
            ratios = _searched(name)
        yield [f"`{name}`", _about(cls), stages, rows, _passes(cls), *ratios]


def look_table() -> Iterator[list[str]]:
    """Every method that changes the question: its passes, and what an answer costs."""
    costs = ["over a plain answer", "published loop over it"]
    yield ["method", "what it does", "extra passes", "shape", *costs]
    found = [_load(path.stem)["sizes"] for path in sorted(RESULTS.glob("look-*.json"))]
    for name, cls in methods().items():
        measured = [
            (size, row, figures)
            for sizes in found
            for size, entry in sizes.items()
            for row, figures in entry["figures"].items()
            if re.match(rf"{name}\b", row)
        ]
        for size, row, figures in measured:
            ratios = [figures[key]["median"] for key in ("over plain", "published over method")]
            medians = [f"{ratio:.2f}" for ratio in ratios]
            yield [f"`{row}`", _about(cls), figures["passes"], size, *medians]


def speed_table() -> Iterator[list[str]]:
    """CLVS and eager attention beside plain SDPA, at every size."""
    yield ["shape", "row", "prefill", "decode", "peak memory"]
    for size, found in _load("speed-cpu")["sizes"].items():
        about = f"{size}: " + ", ".join(found["note"].split(", ")[i] for i in (0, 2, 3))
        for row, figures in found["figures"].items():
            memory = f"{figures['peak']['ratio']:.2f}"
            costs = [_ratio(figures, part) for part in ("prefill", "decode")]
            yield [about, f"`{row}`", *costs, memory]
            about = ""


def question_table() -> Iterator[list[str]]:
    """Questions per second on a shared prefix, beside the loop of published code."""
    yield ["model", "method", "loop, questions/s", "shared, questions/s", "ratio"]
    for size, found in _load("eval-cpu")["sizes"].items():
        about = f"{size}: {found['note']}"
        for row, figures in found["figures"].items():
            rates = [f"{figures[way]:.3g}" for way in ("loop", "shared")]
            yield [about, f"`{row}`", *rates, f"{figures['ratio']['median']:.1f}"]
            about = ""


def _about(cls: type[Method]) -> str:
    about = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
    return about + (f" ([{cls.paper}](https://arxiv.org/abs/{cls.paper}))" if cls.paper else "")


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "methods": method_table,
    "looks": look_table,
    "speed": speed_table,
    "questions": question_table,
}


def _stages(cls: type[Method]) -> list[str]:
    return [stage for stage in STAGES if stage in cls.stages and stage not in ("begin", "rewrite")]


def _passes(cls: type[Method]) -> str:
    if cls.passes or "contrast" not in cls.stages:
        return cls.passes or "none"
    return "every token once more, " + (
        "in one batch" if cls.needs_pixels else "in one batch, after a prompt of its own"
    )


def _ratio(figures: dict[str, Any], part: str) -> str:
    return f"{figures[part]['ratio']['median']:.2f}"


def _searched(name: str) -> list[str]:
    """What a method that searches costs over a plain answer: its first token, and each later one.

    Single forwards do not show it; `benchmarks/peers.py` measures answers.
    """
    if not (RESULTS / f"{PEERS}.json").exists():
        return ["not measured"] * 2
    entry = _load(PEERS)["sizes"]["pocket"]["figures"][name]["packages"]
    return [f"{entry['foveate'][k] / entry['plain'][k]:.2f}" for k in ("first", "token")]


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def written(text: str) -> str:
    """The README's text with every table as it is now."""
    for name, table in TABLES.items():
        columns, *cells = table()
        text = between(text, name, "\n".join(grid(columns, cells)))
    return text


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of the README.")
    parser.add_argument("--check", action="store_true", help="only say whether they are right")
    readme, check = ROOT / "README.md", parser.parse_args(given).check
    old = readme.read_text("utf-8")
    new = written(old)
    if check and new != old:
        print("README.md is not up to date: run python benchmarks/readme.py", file=sys.stderr)
        return 1
    readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
