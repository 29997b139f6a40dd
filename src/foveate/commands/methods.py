"""`foveate methods`: the methods with their parameters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..base.errors import FoveateError
from . import app
from .common import RevisionOption, brief, load, new_table, note, print_table


@app.command("methods")
def list_methods(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Show the values that this model gets.")
    ] = None,
    revision: RevisionOption = None,
) -> None:
    """List the methods with their parameters; with --model, as resolved for that model."""
    from ..core.method import methods

    table = new_table("method", "parameters", "paper", "what it does")
    if revision and not model:
        raise FoveateError("A revision is of a model: add --model.")
    chosen: dict[str, Any] = {name: cls() for name, cls in methods().items()}
    if model:
        chosen = _resolved(model, revision, chosen)
    for name, cls in methods().items():
        lines = [chosen[name]]
        if not isinstance(lines[0], str):
            values = chosen[name].parameters()
            if model and values["layers"] is None:  # it acts on no layer
                del values["layers"]
            lines = [f"{k}={brief(v)}" for k, v in values.items()]
        about = (cls.__doc__ or "").strip().split("\n")[0]
        table.add_row(name, "\n".join(lines), cls.paper and f"arXiv {cls.paper}", about)
    print_table(table)


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
