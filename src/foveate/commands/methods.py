"""`foveate methods`: the methods with their parameters, and all about one of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import FoveateError
from . import app
from .common import RevisionOption, brief, hint, load, new_table, note, print_table

if TYPE_CHECKING:
    from ..evaluation.about import About, Cost

INFERRED = (
    "Inferred: neither the paper nor its authors' code says so; see docs/methods/index.md#inferred."
)


@app.command("methods")
def list_methods(
    name: Annotated[
        str | None, typer.Argument(help="Show all about this method; default: list all methods.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Show the values that this model gets.")
    ] = None,
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods with their parameters, or show all about one: what it does and costs."""
    from ..core.method import get, methods
    from ..evaluation.about import about

    if revision and not model:
        raise FoveateError("A revision is of a model: add --model.")
    classes = methods()
    if name is not None:
        cls = get(name.lower())
        classes = {cls.name: cls}
    here = _resolved(model, revision, {key: cls() for key, cls in classes.items()}) if model else {}
    known = {key: about(cls) for key, cls in classes.items()}
    if as_json:
        entries = [_entry(it, here.get(key)) for key, it in known.items()]
        print(json.dumps(entries[0] if name else entries, indent=2))
    elif name:
        _explain(known[cls.name], here.get(cls.name))
    else:
        _list(known, here)


def _list(known: dict[str, About], here: dict[str, Any]) -> None:
    table = new_table("method", "parameters", "paper", "what it does")
    for name, it in known.items():
        lines = [f"{p.name}={p.default}" for p in it.parameters]
        if here:
            values = _values(here[name])
            lines = [values] if isinstance(values, str) else [f"{k}={v}" for k, v in values.items()]
        table.add_row(name, "\n".join(lines), it.paper and f"arXiv {it.paper}", f"{it.summary}.")
    print_table(table)
    hint("foveate methods NAME tells all about one of them")


def _explain(it: About, here: Any) -> None:
    values = _values(here) if here is not None else {}
    if isinstance(values, str):
        print(_filled(values), end="\n\n")
        values = {}
    for part in (f"{it.name}: {it.summary}.", it.idea, *it.text.split("\n\n")):
        if part:
            laid_out = "\n " in part or part.startswith((" ", "*"))  # an equation, a list
            print(part if laid_out else _filled(part), end="\n\n")
    rows = {
        "paper": it.paper and f"https://arxiv.org/abs/{it.paper}",
        "stages": ", ".join(it.stages),
        "attention rows": it.rows,
        "decoder layers": it.layers,
        "extra passes": it.passes,
        "page": it.page,
    }
    for title, text in rows.items():
        if text:
            print(_filled(text, f"{title + ':':<16}", 16))
    print("\nParameters:")
    for p in it.parameters:
        value = values.get(p.name, p.default)
        now = f", here {value}" if value != p.default else ""
        print(_filled(f"{p.name}={p.default}{now} ({p.kind})", "  ", 4))
        print(_filled(p.text, "      ", 6))
    if it.costs:
        print("\nTime over the plain model's, measured in one run:")
        for cost in it.costs:
            print(_filled(f"{cost.call}: {_ratios(cost)}, on {cost.shape}", "  ", 6))
    if it.citation:
        print(f"\n{it.citation}")
    if it.page and any("nferred" in text for text in (it.text, *(p.text for p in it.parameters))):
        print(f"\n{_filled(INFERRED)}")
    print()
    hint(
        f"foveate ask --method {it.name} tries it; foveate methods {it.name} --model M shows the "
        "values that model M gets"
    )


def _entry(it: About, here: Any) -> dict[str, Any]:
    """All about a method, with the values that a model gets, or why it gets none."""
    entry = dataclasses.asdict(it)
    if here is not None:
        refused = isinstance(here, str)
        entry["here"] = {"refused": here} if refused else here.parameters()
    return entry


def _values(method: Any) -> dict[str, str] | str:
    """The values of a resolved method, or the sentence that refuses it."""
    if isinstance(method, str):
        return method
    values = method.parameters()
    if values["layers"] is None:  # it acts on no layer
        del values["layers"]
    return {key: brief(value) for key, value in values.items()}


def _ratios(cost: Cost) -> str:
    return ", ".join(f"{part} {ratio:.2f}" for part, ratio in cost.ratios.items())


def _filled(text: str, title: str = "", indent: int = 0) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=title, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _resolved(name: str, revision: str | None, chosen: dict[str, Any]) -> dict[str, Any]:
    """Methods resolved for the model `name`, or the sentence that refuses them.

    Most need only the model's outline. The weights are loaded where a value is still None.
    """
    from ..backends.transformers.anatomy import anatomy
    from ..vlm.loading import outline

    def on(model: Any) -> dict[str, Any]:
        resolved: dict[str, Any] = {}
        for key, method in chosen.items():
            try:
                resolved[key] = method.resolve(anatomy(model))
            except FoveateError as error:
                resolved[key] = str(error)
        return resolved

    resolved = on(outline(name, revision))
    open_ends = [
        f"{key}.{k}"
        for key, method in resolved.items()
        if not isinstance(method, str)
        for k, v in method.parameters().items()
        if v is None and k != "layers"
    ]
    if open_ends:
        note(f"loading the weights of {name} for {', '.join(open_ends)}")
        resolved = on(load(name, revision=revision).model)
    return resolved
