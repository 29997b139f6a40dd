"""What papers report (``published.json``), beside our own scores."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from .benchmark import Benchmark

VANILLA = "vanilla"
_DATA = json.loads(files(__package__).joinpath("published.json").read_text("utf-8"))

MODELS: dict[str, list[str]] = _DATA["models"]
"""The models of the papers, and the last parts of the names under which they are shared."""

PROTOCOLS: dict[str, str] = _DATA["protocols"]
"""How each source asked and scored, as far as we know: other prompts and parsers, other scores."""


@dataclass(frozen=True)
class Published:
    """One method on one model and benchmark, as a source reports it.

    Attributes:
        model: a key of `MODELS`.
        benchmark: its name.
        method: our method's name, or "vanilla".
        variant: the setting of the method, where the paper has several.
        values: the benchmark's own score names -> what the paper prints, mostly percent.
        source: a key of `PROTOCOLS`.
        questions: how many the paper asked.
        options: the benchmark's options for which the row is about the same questions.
        ablation: whether the method lacks a part here. Such rows are for who turns it off
            (`foveate.evaluation.reproduce`), not for a comparison by the method's name.
    """

    model: str
    benchmark: str
    method: str
    variant: str
    values: dict[str, float]
    source: str
    questions: int
    options: dict[str, Any]

    @property
    def ablation(self) -> bool:
        return self.variant.startswith("without ")


@dataclass
class Comparison:
    """One number of a paper beside ours.

    Attributes:
        difference: ours minus theirs.
        gain, our_gain: what the method adds to the plain model, there and here.
        fewer: how many questions we asked, where the paper asked more.
    """

    score: str
    method: str
    variant: str
    source: str
    paper: float
    ours: float
    difference: float
    gain: float | None
    our_gain: float | None
    questions: int
    fewer: int | None


ROWS = [
    Published(
        model=model,
        benchmark=table["benchmark"],
        method=name.partition(" ")[0],
        variant=name.partition(" ")[2],
        values=dict(zip(table["scores"], numbers, strict=True)),
        source=table["source"],
        questions=table["questions"],
        options=table["options"],
    )
    for table in _DATA["tables"]
    for model, name, numbers in table["rows"]
]


def model_of(name: str) -> str | None:
    """The papers' model that a hub name or folder means; None for any other.

    One part of the path must be a known last part, in upper or lower case:
    ``llava-hf/llava-1.5-7b-hf``, ``/models/llava-1.5-7b-hf`` and the hub's cache all are
    LLaVA-1.5-7B; a fine-tuned ``llava-1.5-7b-hf-mine`` is not.
    """
    parts = set(re.split(r"[/\\]|--", name.lower()))
    return next((model for model, tails in MODELS.items() if parts & set(tails)), None)


def compare(
    model: str, b: Benchmark, ours: dict[str, dict[str, float]], questions: int
) -> list[Comparison]:
    """Every published number about this model and these questions for which we have one too.

    Methods are matched by name; parameters are ignored.

    Args:
        ours: text form of a method -> its scores.
        questions: how many we asked.
    """
    known, options = model_of(model), b.parameters()
    rows = [
        row
        for row in ROWS
        if (row.model, row.benchmark) == (known, b.name)
        and not row.ablation
        and all(options.get(key) == value for key, value in row.options.items())
    ]
    plain = ours.get(VANILLA, {})
    published_plain = {
        (row.source, score): value
        for row in rows
        if row.method == VANILLA and VANILLA in ours
        for score, value in row.values.items()
    }
    comparisons = []
    for row in rows:
        for method, scores in ours.items():
            for score, paper in row.values.items():
                our = scores.get(score, math.nan)
                if method_name(method) != row.method or math.isnan(our):
                    continue
                base = published_plain.get((row.source, score))
                compared = row.method != VANILLA
                comparisons.append(
                    Comparison(
                        score=score,
                        method=method,
                        variant=row.variant,
                        source=row.source,
                        paper=paper,
                        ours=our,
                        difference=our - paper,
                        gain=paper - base if compared and base is not None else None,
                        our_gain=our - plain[score] if compared and score in plain else None,
                        questions=row.questions,
                        fewer=questions if questions < row.questions else None,
                    )
                )
    return comparisons


def method_name(method: str) -> str:
    """A method's name without its parameters; stacks stay as they are."""
    return method if "+" in method else method.partition("(")[0]
