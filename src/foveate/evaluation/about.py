"""What people want to know of a method, from its class, and from the files beside this one.

``citations.bib`` says what to cite. Above an entry stands a comment with the methods that it is
about. ``costs.json`` is what `benchmarks/` measured, written by ``benchmarks/method_pages.py``.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..base.form import described, parameters
from ..core.method import STAGES, Method

PAGES = "docs/methods"
ROWS = {
    "last": "the last one of the prompt, and the one of every later token",
    "prompt": "the last one of the prompt only",
    "text": "all rows after the image",
    "all": "all",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter in words: what it may be, its default as Python writes it, and its meaning."""

    name: str
    kind: str
    default: str
    text: str


@dataclass(frozen=True)
class Cost:
    """Times over the plain model's, measured in one run.

    Attributes:
        call: the method with its parameters.
        shape: of the model.
        ratios: what was timed, such as "prefill", -> times over the plain model's.
        file: of ``benchmarks/results``, without its ending.
    """

    call: str
    shape: str
    ratios: dict[str, float]
    file: str


@dataclass(frozen=True)
class About:
    """A method in words.

    Attributes:
        summary: one line. idea: why it should work. text: what it does exactly.
        paper: its arXiv id, or "".
        stages: that it overrides, in the order of a forward pass.
        rows: query rows whose attention it edits or reads.
        passes: what it runs beside the answer.
        layers: the published ones.
        citation: BibTeX, or "".
        page: its documentation, in the repository, or "".
    """

    name: str
    summary: str
    idea: str
    text: str
    paper: str
    stages: tuple[str, ...]
    rows: str
    passes: str
    layers: str
    parameters: tuple[Parameter, ...]
    costs: tuple[Cost, ...]
    citation: str
    page: str


def about(cls: type[Method]) -> About:
    """A method's class in words."""
    summary, _, text = _prose(cls).partition("\n")
    module = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    citation = citations().get(cls.name, "")
    return About(
        name=cls.name,
        summary=summary.rstrip("."),
        idea=module.partition("\n\n")[2],
        text=text.strip().replace("``", "`"),
        paper=cls.paper,
        stages=stages(cls),
        rows=rows(cls),
        passes=passes(cls),
        layers=layers(cls),
        parameters=tuple(explained(cls)),
        costs=tuple(Cost(**cost) for cost in _costs().get(cls.name, ())),
        citation=citation,
        page=f"{PAGES}/{cls.name}.md" if cls.__module__.startswith("foveate.") else "",
    )


def stages(cls: type[Method]) -> tuple[str, ...]:
    """The stages that a method overrides, without `begin`, which only makes room."""
    return tuple(stage for stage in STAGES if stage in cls.stages and stage != "begin")


def rows(cls: type[Method]) -> str:
    """The rows of attention that a method edits or reads."""
    if cls.looks_again:
        return "none edited; a plain pass ahead is read"
    if "other_row" in cls.stages:
        return "the second stream's last one is read, and columns are hidden from all of its rows"
    return ROWS[cls.rows] if {"scores", "weights"} & cls.stages else "none"


def passes(cls: type[Method]) -> str:
    """What a method runs beside the answer."""
    if cls.passes or "contrast" not in cls.stages:
        return cls.passes or "none"
    return "every token once more, " + (
        "in one batch" if cls.needs_pixels else "in one batch, after a prompt of its own"
    )


def layers(cls: type[Method]) -> str:
    """Published decoder layers, 0-based; from the docstring where they follow no simple rule."""
    if not acts_on_layers(cls):
        return "none"
    if cls.paper_layers is None:
        text = _texts(cls, below=Method).get("layers", "None: all that see the whole image.")
        return text.partition("None: ")[2].rstrip(".") or text
    parts = [_range(cls.paper_layers)]
    for kind, preset in cls.presets.items():
        if kind and preset.get("layers", cls.paper_layers) != cls.paper_layers:
            parts.append(f"{_range(preset['layers'])} on {kind}")
    return "; ".join(parts)


def acts_on_layers(cls: type[Method]) -> bool:
    """Whether `layers` means anything: it is refused else."""
    inside = {"scores", "weights", "other_row", "other_hidden", "before", "mlp"}
    return bool(inside & cls.stages) or cls.looks_again


def explained(cls: type[Method]) -> Iterator[Parameter]:
    """A method's parameters, with what its docstrings say of them."""
    texts = _texts(cls)
    for field, hint in parameters(cls):
        if field.name != "layers" or acts_on_layers(cls):
            default, text = field.default, texts.get(field.name, "")
            if isinstance(default, float):
                default = float(f"{default:.4g}")
            kind = described(hint).replace("a tuple of a whole number", "whole numbers")
            yield Parameter(field.name, kind, repr(default), text)


@functools.cache
def citations() -> dict[str, str]:
    """Method -> its BibTeX entry."""
    text = files(__package__).joinpath("citations.bib").read_text("utf-8")
    found = re.findall(r"^% ([^\n]+)\n(@.+?\n\})$", text, re.MULTILINE | re.DOTALL)
    return {name: entry for names, entry in found for name in names.split(", ")}


@functools.cache
def _costs() -> dict[str, list[dict[str, Any]]]:
    return json.loads(files(__package__).joinpath("costs.json").read_text("utf-8"))


def _prose(cls: type) -> str:
    """The docstring without its list of attributes."""
    return inspect.cleandoc(vars(cls).get("__doc__") or "").partition("\nAttributes:\n")[0]


def _texts(cls: type, below: type = object) -> dict[str, str]:
    """Name -> what the docstrings of a class say of it, and of those it comes from."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(below)]):
        texts |= _attributes(base)
    return texts


def _attributes(cls: type) -> dict[str, str]:
    """Name -> text, of the list of attributes in a class's own docstring."""
    listed = inspect.cleandoc(vars(cls).get("__doc__") or "").partition("\nAttributes:\n")[2]
    entries = re.split(r"^ {4}(?=\w+(?:, \w+)*: )", listed, flags=re.MULTILINE)
    texts = dict[str, str]()
    for entry in entries[1:]:
        names, _, text = entry.partition(": ")
        text = " ".join(text.replace("``", "`").split())
        texts |= dict.fromkeys(names.split(", "), text[:1].upper() + text[1:])
    return texts


def _range(published: tuple[Any, ...]) -> str:
    def one(layer: int) -> str:
        names = {-1: "the last", -2: "the last but one"}
        return names.get(layer, str(layer))

    if len(published) == 3 and published[1] is ...:
        return f"{one(published[0])} to {one(published[2])}"
    return ", ".join(map(one, published))
