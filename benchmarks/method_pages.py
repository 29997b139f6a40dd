"""What `docs/methods` has from the code and from measurements: tables, diagrams, citations.

    python benchmarks/method_pages.py            # rewrite it
    python benchmarks/method_pages.py --check    # exit code 1 where a page says something else

A generated part stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``; the rest of a page
is written by hand. The measured costs also go to ``foveate/evaluation/costs.json``, for
``foveate methods NAME``.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import RESULTS, between, grid  # beside this file
from stages import diagram

from foveate.core.method import Method, methods
from foveate.evaluation.about import about, passes, stages
from foveate.evaluation.benchmark import registry as benchmarks
from foveate.evaluation.published import PROTOCOLS, ROWS, VANILLA, method_name

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
COSTS = ROOT / "src" / "foveate" / "evaluation" / "costs.json"
BENCH = ROOT / "docs" / "pocket-bench"  # report.json here and in its folders
# whose costs the table of all methods shows; what reads the vision tower is measured with one
SHOWN = {"methods-cpu": "0.5b", "cli-cpu": "0.5b-clip"}
FORWARDS = ("methods-cpu", "cli-cpu", "speed-cpu")
PEERS = "peers-cpu"  # answers, where single forwards do not show what a search costs
TIMED = {
    "prefill": "one forward over the prompt",
    "decode": "one later token",
    "answer": "one question of 16 answer tokens about a new picture",
    "first token": "an answer's first token",
    "later tokens": "each later token",
}
CLAIMS = {"better": "better", "worse": "worse", "not significant": "no significant difference"}


# -- the tables of all methods ---------------------------------------------------------------------


def method_table() -> Iterator[list[str]]:
    """Every method that acts inside the model: what it changes, where, and what it costs."""
    measured: dict[str, Any] = {}
    for file, size in SHOWN.items():
        measured |= load(file)["sizes"][size]["figures"]
    yield ["method", "what it does", "stages", "rows", "extra passes", "prefill", "decode"]
    for name, cls in methods().items():
        if cls(**cls.example).wants("rewrite"):
            continue
        acts = ", ".join(f"`{stage}`" for stage in stages(cls) if stage != "rewrite")
        rows = cls.rows if {"scores", "weights"} & cls.stages else "none"
        found = next((v for row, v in measured.items() if _is(row, name)), None)
        ratios = [_cell(found, part) for part in ("prefill", "decode")]
        if "search" in cls.stages:
            ratios = [f"{ratio:.2f}" for ratio in _searched(name)["ratios"].values()]
        yield [f"`{name}`", _linked(cls), acts, rows, passes(cls), *ratios]


def look_table() -> Iterator[list[str]]:
    """Every method that changes the question: its passes, and what an answer costs."""
    costs = ["over a plain answer", "published loop over it"]
    yield ["method", "what it does", "extra passes", "shape", *costs]
    for name, cls in methods().items():
        for _, size, _, row, figures in _looks(name):
            ratios = [figures[key]["median"] for key in ("over plain", "published over method")]
            medians = [f"{ratio:.2f}" for ratio in ratios]
            yield [f"`{row}`", _linked(cls), figures["passes"], size, *medians]


def _to_pages(table: Iterator[list[str]]) -> str:
    """A table whose first column leads to the pages beside `index.md`, which name the papers."""
    columns, *cells = table
    for cell in cells:
        cell[1] = cell[1].partition(" ([")[0]
        cell[0] = f"[{cell[0]}]({method_name(cell[0].strip('`'))}.md)"
    return "\n".join(grid(columns, cells))


def _linked(cls: type[Method]) -> str:
    summary = about(cls).summary
    return summary + (f" ([{cls.paper}](https://arxiv.org/abs/{cls.paper}))" if cls.paper else "")


# -- the parts of a page ---------------------------------------------------------------------------


def head(name: str) -> str:
    """Title and place of the paper, and how to switch the method on."""
    it = about(methods()[name])
    entry = it.citation
    title, where = (_field(entry, *names) for names in (("title",), ("booktitle", "journal")))
    venue = f"{where} {_field(entry, 'year')}" if "@article" not in entry else "arXiv preprint"
    links = {
        "arXiv " + it.paper: it.paper and f"https://arxiv.org/abs/{it.paper}",
        "paper": "" if it.paper else _field(entry, "url"),
    }
    shown = ", ".join(f"[{text}]({link})" for text, link in links.items() if link)
    return f"*{title}*, {venue} ({shown}). In foveate: `{name}`."


def acts(name: str) -> str:
    it = about(methods()[name])
    listed = ", ".join(f"`{stage}`" for stage in it.stages)
    lines = [
        f"![{name} acts at {', '.join(it.stages)}]({name}.svg)",
        "",
        f"* Stages: {listed}.",
        f"* Rows of attention: {it.rows}.",
        f"* Decoder layers: {it.layers.rstrip('.')}.",
        f"* Extra passes: {it.passes}.",
    ]
    return "\n".join(lines)


def parameters(name: str) -> str:
    cells = [
        [f"`{p.name}`", _safe(p.kind), f"`{_safe(p.default)}`", _safe(p.text)]
        for p in about(methods()[name]).parameters
    ]
    return "\n".join(grid(["parameter", "may be", "default", "meaning"], cells))


def cost(name: str) -> str:
    """Measured times over the plain model's, and where they come from."""
    found = costs()[name]
    parts = list(dict.fromkeys(part for one in found for part in one["ratios"]))
    cells = []
    for one in found:
        ratios = [f"{one['ratios'][p]:.2f}" if p in one["ratios"] else "" for p in parts]
        source = f"[{one['file']}](../../benchmarks/results/{one['file']}.md)"
        cells.append([f"`{one['call']}`", one["shape"], *ratios, source])
    timed = " ".join(f"*{part}*: {TIMED[part]}." for part in parts)
    lead = f"Time over the plain model's in the same run. {timed} The files name machine and date."
    return "\n".join([lead, "", *grid(["call", "model", *parts, "measured in"], cells)])


def bench(name: str) -> str:
    """What the method did on pocket-bench, with the splits that it changed significantly."""
    rows, splits = list[list[str]](), list[list[str]]()
    for verdict in _verdicts():
        for result in verdict["results"]:
            if method_name(result["method"]) != name:
                continue
            call = f"`{result['method']}`"
            rows.append([call, f"{result['test']['questions']:,}", *_compared(result["test"])])
            clear = [s for s in result["splits"] if s["verdict"] in ("better", "worse")]
            splits += [[call, split["what"], *_compared(split)] for split in clear]
    if not rows:
        return f"– `{name}` has not been run on [pocket-bench](../pocket-bench/README.md) yet."
    columns = ["plain, %", "with it, %", "difference, points", "95 % interval", "verdict"]
    lines = [*grid(["call", "questions", *columns], rows), ""]
    if splits:
        lines += ["Categories that changed significantly:", ""]
        lines += [*grid(["call", "category", *columns], splits), ""]
    return "\n".join([*lines, "Method and settings: [pocket-bench](../pocket-bench/README.md)."])


def published(name: str) -> str:
    """What papers report of the method, beside the plain model in the same table."""
    found: dict[tuple[str, str, tuple[str, ...]], list[Any]] = {}
    for row in ROWS:
        if row.method == name:
            found.setdefault((row.source, row.benchmark, tuple(row.values)), []).append(row)
    if not found:
        return "We hold no figures of the paper. They stand in the paper itself."
    parts = []
    for (source, benchmark, scores), rows in found.items():
        plain: dict[str, dict[str, float]] = {}
        for row in ROWS:
            if (row.source, row.benchmark, row.method) == (source, benchmark, VANILLA):
                plain.setdefault(row.model, {}).update(row.values)
        cells = []
        for model in dict.fromkeys(row.model for row in rows):
            known = plain.get(model, {})
            cells.append([model, "plain", *(str(known.get(s, "")) for s in scores)])
            for row in (row for row in rows if row.model == model):
                called = f"`{name}`" + (f", {row.variant}" if row.variant else "")
                cells.append(["", called, *map(str, row.values.values())])
        parts += [f"**{benchmarks.get(benchmark).title}**, reported by the {source}:", ""]
        parts += [*grid(["model", "", *scores], cells), ""]
    notes = [f"{source}: {PROTOCOLS[source]}" for source in dict.fromkeys(key[0] for key in found)]
    return "\n".join([*parts, *notes])


def cite(name: str) -> str:
    return f"```bibtex\n{about(methods()[name]).citation}\n```"


PARTS: dict[str, Callable[[str], str]] = {
    "head": head,
    "acts": acts,
    "parameters": parameters,
    "cost": cost,
    "pocket-bench": bench,
    "published": published,
    "cite": cite,
}


def _safe(text: str) -> str:
    """A text that a cell of a table may hold."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _field(entry: str, *names: str) -> str:
    """A field of a BibTeX entry, without braces."""
    found = re.search(rf"^  (?:{'|'.join(names)}) = {{(.*)}},$", entry, re.MULTILINE)
    return re.sub("[{}]", "", found[1]) if found else ""


def _compared(test: dict[str, Any]) -> list[str]:
    low, high = (f"{test[end]:+.2f}" for end in ("low", "high"))
    claim = CLAIMS.get(test["verdict"], test["verdict"])
    shares = [f"{test[key]:.1f}" for key in ("vanilla", "method")]
    return [*shares, f"{test['difference']:+.2f}", f"{low} to {high}", claim]


# -- what was measured -----------------------------------------------------------------------------


@functools.cache
def costs() -> dict[str, list[dict[str, Any]]]:
    """Method -> its times over the plain model's, see `foveate.evaluation.about.Cost`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, cls in methods().items():
        rows = [_searched(name)] if "search" in cls.stages else list(_forwards(name))
        for file, _, note, row, figures in _looks(name):
            ratios = {"answer": round(figures["over plain"]["median"], 3)}
            rows.append({"call": row, "shape": note, "ratios": ratios, "file": file})
        found[name] = rows
    return found


def _forwards(name: str) -> Iterator[dict[str, Any]]:
    for file in FORWARDS:
        for measured in load(file)["sizes"].values():
            for row, figures in measured["figures"].items():
                if _is(row, name) and not (file == "speed-cpu" and "(" in row):
                    ratios = {
                        part: round(figures[part]["ratio"]["median"], 3)
                        for part in ("prefill", "decode")
                    }
                    call = re.sub(r"\((\d+, \d+), (?:\d+, ){3,}\d+\)", r"(\1, ...)", row)
                    yield {"call": call, "shape": measured["note"], "ratios": ratios, "file": file}


def _searched(name: str) -> dict[str, Any]:
    """What a method that searches costs over a plain answer: its first token, and each later one.

    Single forwards do not show it; `benchmarks/peers.py` measures answers.
    """
    measured = load(PEERS)["sizes"]["pocket"]
    packages = measured["figures"][name]["packages"]
    shape = measured["note"].partition(", mitigv")[0]
    ratios = {
        part: round(packages["foveate"][key] / packages["plain"][key], 3)
        for part, key in (("first token", "first"), ("later tokens", "token"))
    }
    return {"call": name, "shape": shape, "ratios": ratios, "file": PEERS}


def _looks(name: str) -> Iterator[tuple[str, str, str, str, dict[str, Any]]]:
    """(file, size, note, row, figures) of what is measured over answers."""
    for path in sorted(RESULTS.glob("look-*.json")):
        for size, measured in load(path.stem)["sizes"].items():
            for row, figures in measured["figures"].items():
                if _is(row, name):
                    yield path.stem, size, measured["note"], row, figures


def _cell(figures: dict[str, Any] | None, part: str) -> str:
    return f"{figures[part]['ratio']['median']:.2f}" if figures else "not measured"


def _is(row: str, name: str) -> bool:
    """Whether a row of measurements is about the method called `name`."""
    return bool(re.match(rf"{name}\b", row))


@functools.cache
def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


@functools.cache
def _verdicts() -> list[dict[str, Any]]:
    found = [json.loads(path.read_text("utf-8")) for path in sorted(BENCH.rglob("report.json"))]
    return [verdict for report in found for verdict in report["sections"][0]["verdicts"]]


# -- the files -------------------------------------------------------------------------------------


def contents() -> Iterator[tuple[Path, str]]:
    """Every file that is written here, and what it should hold."""
    yield COSTS, json.dumps(costs(), indent=1) + "\n"
    index = PAGES / "index.md"
    text = index.read_text("utf-8")
    for mark, table in (("methods", method_table), ("looks", look_table)):
        text = between(text, mark, _to_pages(table()))
    yield index, text
    for name, cls in methods().items():
        yield PAGES / f"{name}.svg", diagram(name, stages(cls))
        page = PAGES / f"{name}.md"
        text = page.read_text("utf-8")
        for mark, part in PARTS.items():
            text = between(text, mark, part(name))
        yield page, text


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the generated parts of docs/methods.")
    parser.add_argument("--check", action="store_true", help="only say whether they are right")
    check = parser.parse_args(given).check
    old = 0
    for path, text in contents():
        if path.exists() and path.read_text("utf-8") == text:
            continue
        old += 1
        if check:
            print(f"{path.relative_to(ROOT)} is not up to date", file=sys.stderr)
        else:
            path.write_text(text, "utf-8")
    if check and old:
        print("run python benchmarks/method_pages.py", file=sys.stderr)
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
