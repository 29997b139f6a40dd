"""`foveate reproduce`: a table of a paper, asked again, its numbers beside ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import FoveateError
from . import app
from .common import (
    BatchSizeOption,
    DeviceOption,
    DrawnOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    RevisionOption,
    ShardOption,
    hint,
    load,
    new_table,
    own_card,
    print_table,
    read_batch_size,
    read_shard,
    stoppable,
)

if TYPE_CHECKING:
    from ..evaluation.reproduce import Outcome, Recipe
    from ..evaluation.run import Plan

MINUTE = 60.0  # of a measurement
OUTCOME = "reproduced.json"


@app.command()
def reproduce(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Which table. Without one: list them.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Ask this model: a hub name, or a saved folder."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root", "--data", help="Read data sets from this folder; default: from the hub."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the run and reproduced.json into this folder.")
    ] = None,
    compared: Annotated[
        str | None,
        typer.Option("--as", help="Compare with the paper's numbers of this model of its."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what it takes; measures up to a minute."),
    ] = False,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    shard: ShardOption = None,
    seed: DrawnOption = 0,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Ask what a paper asked, and print its numbers beside ours with their intervals.

    Without a recipe, list them. You may stop it at any time: the same command goes on.
    """
    from ..evaluation.ask import evaluate
    from ..evaluation.reproduce import compare, get

    if recipe is None:
        _list(as_json)
        return
    chosen = get(recipe)
    if model is None:
        raise FoveateError(f"Say with --model which model to ask: one of {_models(chosen)}.")
    paper_model = chosen.model(model, compared)
    if out is None and not dry_run:
        raise FoveateError("Say with --out which folder the run goes to.")
    plan = chosen.plan(
        paper_model, out or Path(),
        root=data_root, limit=limit, batch_size=read_batch_size(batch_size),
        shard=read_shard(shard), seed=seed,
    )  # fmt: skip
    options = {"revision": revision, "device": device or own_card(shard), "dtype": dtype}
    if dry_run:
        _dry_run(chosen, paper_model, plan, model, options, as_json)
        return
    with stoppable() as watch:
        evaluate(plan, load(model, **options), watch)
    from ..base.journal import finite, write_json

    outcome = compare(chosen, paper_model, plan.out)
    told = finite(dataclasses.asdict(outcome))
    write_json(plan.out / OUTCOME, told, "the run is untouched")
    if as_json:
        print(json.dumps(told))
        return
    _print(outcome)
    print(f"numbers: {plan.out / OUTCOME}")
    hint(f"foveate report {plan.out} tests the differences between the methods")


def _models(recipe: Recipe) -> str:
    from ..evaluation.published import MODELS

    return ", ".join(MODELS[model][0] for model in recipe.asks)


def _list(as_json: bool) -> None:
    from ..evaluation.reproduce import recipes

    if as_json:
        print(json.dumps([dataclasses.asdict(recipe) for recipe in recipes().values()]))
        return
    table = new_table("recipe", "what it compares", "models", "source")
    for recipe in recipes().values():
        table.add_row(recipe.name, recipe.about, _models(recipe), recipe.source)
    print_table(table)
    hint("foveate reproduce RECIPE --model M --data-root DIR --dry-run says what it takes")


def _print(outcome: Outcome) -> None:
    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.{outcome.digits}f}"

    table = new_table("score", "method", "paper", "ours", "95 % interval", "paper inside")
    table.title = f"{outcome.recipe}: {outcome.paper_model} in the paper, {outcome.model} here"
    table.title_justify = "left"
    for n in outcome.numbers:
        ends = "" if n.low is None else f"{shown(n.low)} to {shown(n.high)}"
        said = {True: "yes", False: "no", None: "no interval"}[n.inside]
        table.add_row(n.score, n.row, f"{n.paper:g}", shown(n.ours), ends, said)
    print_table(table)
    known = [n.inside for n in outcome.numbers if n.inside is not None]
    print(f"{sum(known)} of {len(known)} numbers of the paper lie inside our intervals.")
    for note in outcome.notes:
        print(note)


def _dry_run(
    recipe: Recipe, paper_model: str, plan: Plan, model: str, options: dict[str, Any], as_json: bool
) -> None:
    """Print data, questions, passes and hours; what cannot be known here is said."""
    from ..evaluation.cost import costs, measure
    from ..evaluation.environment import hardware
    from ..evaluation.run import limited
    from ..vlm.loading import at_hand

    b = plan.benchmarks[0]
    told: dict[str, Any] = {"recipe": recipe.name, "benchmark": str(b), "data": None}
    questions = max(row.questions for _, row in recipe.rows(paper_model))
    counted = "the paper's number"
    try:
        if plan.root is None and b.hub:
            raise FoveateError(
                "from the hub, of which a dry run fetches nothing: --data-root DIR names a copy."
            )
        samples = limited(b.samples(plan.root), plan.limit)
        images = len({s.image_name for s in samples})
        questions, counted = len(samples), f"on {images} images, all shards together"
    except FoveateError as error:
        told["data"] = str(error)
    found, reason = costs(plan, questions), ""
    if told["data"]:
        reason = "there is no data here to measure on"
    elif not at_hand(model, options["revision"]):
        reason = f"{model} is not on this machine, and nothing is fetched for an estimate"
    else:
        with stoppable(told="stopped; nothing was kept") as watch:
            vlm = load(model, **options)
            found = measure(plan, vlm, MINUTE, watch)
        told["measured_on"] = hardware(vlm.device)
    told |= {"questions": questions, "methods": [dataclasses.asdict(c) for c in found]}
    if as_json:
        print(json.dumps(told | {"no_estimate": reason or None}))
        return
    print(f"{recipe.name}: {recipe.about}, {paper_model}")
    print(f"benchmark: {b}")
    print(f"data: {told['data'] or 'there'}")
    print(f"questions: {questions} per method, {counted}")
    table = new_table("method", "beside the answer", "measured", "hours")
    for cost in found:
        measured = f"{cost.asked} in {cost.seconds:.1f} s" if cost.asked else ""
        hours = "" if cost.hours is None else f"{cost.hours:.3g}"
        table.add_row(cost.method, cost.beside, measured, hours)
    print_table(table)
    if reason:
        print(f"No estimate of hours: {reason}.")
        return
    total = sum(cost.hours or 0.0 for cost in found)
    print(f"About {total:.3g} hours on {told['measured_on']}, measured there on these questions.")
    for departure in recipe.departures:
        print(departure)
