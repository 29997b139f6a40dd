"""The tables of the README, from the methods themselves and from what speed.py measured.

    python benchmarks/readme.py            # rewrite them
    python benchmarks/readme.py --check    # exit code 1 where the README says something else

A table stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from method_pages import load, look_table, method_table  # beside this file
from report import between, grid

ROOT = Path(__file__).resolve().parent.parent


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


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "methods": method_table,
    "looks": look_table,
    "speed": speed_table,
    "questions": question_table,
}


def _ratio(figures: dict[str, Any], part: str) -> str:
    return f"{figures[part]['ratio']['median']:.2f}"


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
