"""What the measuring scripts share: ratios with quartiles, tables, and the files they write."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table as Printed

import foveate
from foveate import FoveateError
from foveate.evaluation.environment import hardware

RESULTS = Path(__file__).parent / "results"
Table = tuple[str, list[str], list[list[str]]]  # title, columns, cells
Say = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """A kind of report: its name in the file, the text above its tables, and its tables."""

    name: str
    about: str
    tables: Callable[[dict[str, Any]], Iterator[Table]]


def parsed(parser: argparse.ArgumentParser, given: list[str] | None) -> argparse.Namespace:
    """The arguments with --device, --dtype, --threads (set here) and --out, of every script."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=Path, help="path of the results, without extension")
    args = parser.parse_args(given)
    dtype = args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")
    args.dtype = getattr(torch, dtype, None)
    if not (isinstance(args.dtype, torch.dtype) and args.dtype.is_floating_point):
        parser.error(f"there is no dtype {dtype!r}; use float32, bfloat16 or float16")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def timed(model: Any, call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "low": low, "high": high}


def ratio(quartiles: dict[str, float], digits: int = 3) -> str:
    """A `spread` in a cell."""
    median, low, high = (f"{quartiles[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def grid(columns: list[str], cells: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def between(text: str, mark: str, content: str) -> str:
    """`text` with `content` between ``<!-- mark -->`` and ``<!-- end of mark -->``."""
    start, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
    before, rest = text.split(start)
    return before + start + content + end + rest.split(end)[1]


def size_of(model: Any) -> str:
    return f"{model.num_parameters() / 1e6:,.0f} M parameters"


def dtype_of(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def markdown(report: dict[str, Any], kind: Kind) -> str:
    """The whole report, as the Markdown file holds it."""
    about = report["about"]
    parts = [f"# Speed on {about['machine']}", ""]
    parts += [f"* {key}: {value}" for key, value in about.items()]
    parts += ["", kind.about]
    for title, columns, cells in kind.tables(report["sizes"]):
        parts += [f"## {title}", "", *grid(columns, cells), ""]
    return "\n".join(parts)


def environment(device: torch.device, started: str) -> dict[str, Any]:
    """Where and when this was measured."""
    load = [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {
        "machine": hardware(device),
        "command": shlex.join(["python", *sys.argv]),
        "started": started,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load average at the end (1, 5, 15 minutes)": load,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, foveate {foveate.__version__}",
    }


def run(
    kind: Kind,
    sizes: list[str],
    measured: Callable[[str, Say], dict[str, Any]],
    device: torch.device,
    out: Path,
) -> int:
    """Measure every size, write `out`.json (with every sample) and `out`.md, print the tables.

    Returns:
        The exit code. A size whose weights are not there is left out.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    report: dict[str, Any] = {"kind": kind.name, "about": {}, "sizes": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        try:
            report["sizes"][size] = measured(size, console.print)
        except FileNotFoundError as missing:
            console.print(f"{size} is left out: {missing}.")
            continue
        except FoveateError as error:
            console.print(str(error))
            return 2
        report["about"] = environment(device, started)
        # after every size: a long run may be stopped
        out.with_name(out.name + ".json").write_text(json.dumps(report, indent=1) + "\n")
        out.with_name(out.name + ".md").write_text(markdown(report, kind) + "\n")
    for title, columns, cells in kind.tables(report["sizes"]):
        table = Printed(*columns, title=title)
        for line in cells:
            table.add_row(*line)
        console.print(table)
    if report["sizes"]:
        console.print(f"written: {out}.json and .md")
    return 0
