"""Recipes: how to ask what a paper asked, and its numbers beside ours.

A recipe is a TOML file of the folder ``recipes``: the paper's rows with our methods, and per model
the benchmark with the paper's prompt, parser and limit of tokens. It holds no numbers; these are in
``published.json``. A recipe is run by the ordinary evaluation:

    recipe = recipes()["clvs-pope"]
    evaluate(recipe.plan("LLaVA-1.5-7B", Path("runs/pope"), root=data), vlm)
    outcome = compare(recipe, "LLaVA-1.5-7B", Path("runs/pope"))
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..base.errors import FoveateError
from ..base.form import nearest
from ..core.method import as_stack, text
from .benchmark import Benchmark, EvalRecord, answered, image_of, parse, scored
from .merge import merge, read_runs
from .points import intervals
from .published import MODELS, PROTOCOLS, ROWS, Published, model_of
from .run import Plan

FEW = 30  # images


@dataclass(frozen=True)
class Recipe:
    """One table of a paper.

    Attributes:
        about: what it compares, in words.
        source: a key of `published.PROTOCOLS`.
        departures: what we cannot do as the authors did, in sentences.
        methods: the paper's row, such as "carve t_end", -> our method in text form.
        asks: the paper's model -> our benchmark in text form.
    """

    name: str
    about: str
    source: str
    departures: tuple[str, ...]
    methods: dict[str, str]
    asks: dict[str, str]

    def benchmark(self, model: str) -> Benchmark:
        """The benchmark as the paper asked this model of `asks`."""
        return parse(self.asks[model])[0]

    def rows(self, model: str) -> list[tuple[str, Published]]:
        """The paper's numbers of a model, each beside our method's text form."""
        b = self.benchmark(model)
        options = b.parameters()
        return [
            (text(as_stack(self.methods[name])), row)
            for row in ROWS
            if (row.source, row.benchmark, row.model) == (self.source, b.name, model)
            and all(options.get(key) == value for key, value in row.options.items())
            and (name := f"{row.method} {row.variant}".strip()) in self.methods
        ]

    def plan(self, model: str, out: Path, **options: Any) -> Plan:
        """What to run; `options` are those of `Plan`, such as root and limit."""
        methods = dict.fromkeys(method for method, _ in self.rows(model))
        return Plan([self.benchmark(model)], list(methods), out, **options)

    def model(self, name: str, given: str | None = None) -> str:
        """Which of the paper's models a name means, or which one is `given` instead.

        Raises:
            FoveateError: the paper has no numbers of it.
        """
        if given is not None:
            found = next((model for model in self.asks if model.lower() == given.lower()), None)
            if found is None:
                raise FoveateError(
                    f"{self.name} has no model {given!r}{nearest(given, self.asks)}: it has "
                    f"{', '.join(self.asks)}."
                )
            return found
        known = model_of(name)
        if known not in self.asks:
            tails = [MODELS[model][0] for model in self.asks]
            raise FoveateError(
                f"{self.name} has no numbers of {name}: give one of its models "
                f"({', '.join(tails)}), or say with --as which one to compare yours with."
            )
        return known


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name, in alphabetical order."""
    folder = files(__package__) / "recipes"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {r.name: r for f in found if (r := _read(f.name[:-5], f.read_text("utf-8")))}


def _read(name: str, content: str) -> Recipe:
    given = tomllib.loads(content)
    asks = {model: ask["benchmark"] for ask in given["ask"] for model in ask["models"]}
    return Recipe(
        name, given["about"], given["source"], tuple(given["departures"]), given["methods"], asks
    )


def get(name: str) -> Recipe:
    """A recipe by its name. Raises `FoveateError`, which lists them, where there is none."""
    known = recipes()
    if name not in known:
        raise FoveateError(
            f"There is no recipe {name!r}{nearest(name, known)}: there are {', '.join(known)}."
        )
    return known[name]


# -- the paper's numbers beside ours ---------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """One number of the paper.

    Attributes:
        method: ours in text form. row: the paper's name of it.
        ours, low, high: our score and its 95 % interval; None without answers or images enough.
        inside: whether the paper's number lies in the interval, ends included; None without one.
    """

    method: str
    row: str
    score: str
    paper: float
    ours: float | None
    low: float | None
    high: float | None
    inside: bool | None


@dataclass(frozen=True)
class Outcome:
    """A recipe's numbers beside ours, and what a reader must know of them."""

    recipe: str
    paper_model: str
    model: str
    digits: int
    numbers: list[Number]
    notes: list[str]


def compare(recipe: Recipe, model: str, out: Path) -> Outcome:
    """The paper's numbers of `model` beside those of the run in `out`.

    Raises:
        FoveateError: `out` holds no run, or one of another benchmark.
    """
    runs, b = read_runs([out]), recipe.benchmark(model)
    answers: dict[str, list[EvalRecord]] = {
        method: list(records.values()) for method, records in merge(runs).get(str(b), {}).items()
    }
    if not answers:
        raise FoveateError(f"{out} holds no answers to {b}: give the folder of this recipe's run.")
    numbers: list[Number] = []
    rows = recipe.rows(model)
    found = {method: _scores(b, answers.get(method, [])) for method, _ in rows}
    for method, row in rows:
        scores, ends = found[method]
        for score, paper in row.values.items():
            low, high = ends.get(score, (None, None))
            inside = None if low is None or high is None else low <= paper <= high
            name = f"{row.method} {row.variant}".strip()
            ours = scores.get(score)
            numbers.append(Number(method, name, score, paper, ours, low, high, inside))
    used = str(runs[0].settings["model"])
    return Outcome(
        recipe.name, model, used, b.digits, numbers, _notes(recipe, model, used, b, answers)
    )


def _scores(
    b: Benchmark, records: list[EvalRecord]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    given = records if b.unanswered == "count as wrong" else answered(records)
    scores, _ = scored(b, given)
    return scores, intervals(b, given) if scores else {}


def _notes(
    recipe: Recipe, model: str, used: str, b: Benchmark, answers: dict[str, list[EvalRecord]]
) -> list[str]:
    asked = {(r["split"], r["line"]): image_of(r) for rs in answers.values() for r in rs}
    papers = max(row.questions for _, row in recipe.rows(model))
    images = len(set(asked.values()))
    notes = [f"We asked {len(asked)} questions on {images} images."]
    if images < FEW:
        notes.append(f"With fewer than some {FEW} images the intervals are too narrow.")
    if len(asked) < papers:
        notes.append(f"The paper asked {papers}: on fewer, scores may differ by chance.")
    if model_of(used) != model:
        notes.append(f"The paper asked {model}. We asked {used}, which is another model.")
    for method, records in answers.items():
        notes += [f"{method}: {note}" for note in scored(b, records)[1]]
    return [*notes, f"{recipe.source}: {PROTOCOLS[recipe.source]}", *recipe.departures]
