"""`foveate eval`: all questions of benchmarks, with every method given."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from dataclasses import replace
from enum import StrEnum
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import FoveateError
from . import app
from .common import (
    SIDE_BY_SIDE,
    BatchSizeOption,
    DataRootOption,
    DeviceOption,
    DrawnOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    PluginOption,
    ResumeOption,
    RevisionOption,
    ShardOption,
    TensorParallelOption,
    VllmOption,
    hint,
    load_plugins,
    load_with,
    new_table,
    only_with_vllm,
    own_card,
    print_table,
    read_batch_size,
    read_shard,
    serves,
    stoppable,
)

if TYPE_CHECKING:
    from collections.abc import Callable


WIDTH, COLUMN = 80, 12  # characters of a table, and of a method's column in it


class Engine(StrEnum):
    """What answers the questions: this process, workers of Ray Data, or vLLM."""

    PLAIN, RAY, VLLM = "plain", "ray", "vllm"


@app.command("eval")
def evaluate(
    bench: Annotated[
        list[str],
        typer.Argument(
            metavar="BENCH...", help="Benchmarks as text: pocket, pope(source=gqa), ..."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Write records.jsonl and results.json into this folder.")
    ],
    model: ModelOption = "pocket",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Methods as in ask; repeat it, or give all. Default: vanilla and clvs."),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="Also sample vanilla's answers at this temperature; repeat it."),
    ] = None,
    data_root: DataRootOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    shard: ShardOption = None,
    seed: DrawnOption = 0,
    resume: ResumeOption = True,
    add: Annotated[
        bool, typer.Option("--add", help="Add these methods to the finished run in --out.")
    ] = False,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Ask every question alone, which is slow.")
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(
            case_sensitive=False,
            help="Answer here (plain), on workers of Ray Data (ray), or with vLLM (vllm).",
        ),
    ] = Engine.PLAIN,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Start so many workers, each with a model. Default: one per GPU."),
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option(min=0, help="Give each worker so many CPUs, also 0.5. Default: equal shares."),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="Give each worker so many GPUs, also 0.5. Default: 1 if any."),
    ] = None,
    tensor_parallel: TensorParallelOption = None,
    vllm: VllmOption = None,
    as_json: JsonOption = False,
    plugin: PluginOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Ask all questions of benchmarks with every method given, and score the answers.

    You may stop it at any time, also by force: the same command goes on.
    """
    from ..core.method import as_stack, methods
    from ..evaluation.benchmark import parse
    from ..evaluation.run import Plan
    from ..evaluation.sampled import Sampled

    load_plugins(plugin)
    benchmarks = [b for given in bench for b in parse(given)]
    chosen = ["all" if m.lower() == "all" else m for m in method or SIDE_BY_SIDE]
    stacks = [as_stack(m) for m in chosen if m != "all"]
    stacks += [(Sampled(temperature=value, seed=seed),) for value in temperature or ()]
    plan = Plan(
        benchmarks, stacks, out,
        root=data_root, limit=limit, batch_size=read_batch_size(batch_size),
        shard=read_shard(shard), seed=seed, share=not one_by_one, resume=resume, add=add,
    )  # fmt: skip
    run: Callable[..., dict[str, Any]]
    if engine is not Engine.RAY and (workers or cpus is not None or gpus is not None):
        raise FoveateError("--workers, --cpus and --gpus are about --engine ray: add it.")
    if engine is Engine.RAY:
        only_with_vllm(tensor_parallel, vllm)
        if plugin:
            raise FoveateError(
                "Workers do not see the file of --plugin: install it as a package with an entry "
                "point (foveate.methods), or leave out --engine ray."
            )
        from ..bridges.ray import evaluate as answer
        from ..vlm.loading import outline
        from ..vlm.vlm import VLM

        vlm = functools.partial(VLM.load, model, revision=revision, device=device, dtype=dtype)
        gpus = 0.0 if device == "cpu" and gpus is None else gpus
        run = functools.partial(answer, load=vlm, workers=workers, cpus=cpus, gpus=gpus)
        whole = outline(model, revision) if "all" in chosen else None
    else:
        from ..evaluation.ask import evaluate as answer_here

        if engine is Engine.VLLM and one_by_one:
            raise FoveateError("vLLM batches by itself: leave out --one-by-one.")
        place = device or (own_card(shard) if engine is Engine.PLAIN else None)
        loaded = load_with(
            engine, model, tensor_parallel, vllm, place, revision=revision, dtype=dtype
        )
        run = functools.partial(answer_here, vlm=loaded)
        whole = loaded if engine is Engine.VLLM else loaded.model
    if "all" in chosen:
        known = [(), *((cls(),) for cls in methods().values())]
        stacks += [stack for stack in known if stack not in stacks and serves(whole, stack)]
        plan = replace(plan, methods=stacks)
    with stoppable() as watch, contextlib.redirect_stdout(sys.stderr):  # Ray prints, too
        results = run(plan, watch=watch)
    if as_json:
        print(json.dumps(results))
        return
    for b in benchmarks:
        _print_scores(b, results["benchmarks"][str(b)]["methods"])
    print(f"results: {plan.folder / 'results.json'}")
    hint(f"foveate report {out} tests the differences and writes report.html")
    hint("the same command with --add --method ... adds a method to this run")


def _print_scores(b: Any, entries: dict[str, Any]) -> None:
    """Print the benchmark's scores with a column for every method, and the notes."""
    tables: dict[str, dict[tuple[str, str], str]] = {}
    for name, entry in entries.items():
        if entry["scores"]:
            scores = {k: nan if v is None else v for k, v in entry["scores"].items()}
            heads, rows = b.table(scores)
            tables[name] = {
                (row[0], head): _shown(cell, b.digits)
                for row in rows
                for head, cell in zip(heads[1:], row[1:], strict=True)
            }
    places = dict.fromkeys(p for cells in tables.values() for p, cell in cells.items() if cell)
    taken = sum(max((len(p[i]) for p in places), default=0) + 3 for i in (0, 1))
    fitting = max(2, (WIDTH - taken) // COLUMN)
    first, *others = tables or [""]
    for start in range(0, max(1, len(others)), fitting - 1):
        names = [first, *others[start : start + fitting - 1]]
        if not places:
            break
        table = new_table("", "", *names)
        table.title, table.title_justify = str(b), "left"
        before = None
        for place in places:
            cells = (tables[name].get(place, "") for name in names)
            table.add_row(place[0] if place[0] != before else "", place[1], *cells)
            before = place[0]
        print_table(table)
    for name, entry in entries.items():
        for line in entry["notes"]:
            print(f"{b}, {name}: {line}")


def _shown(cell: str | float, digits: int) -> str:
    if isinstance(cell, str):
        return cell
    return "" if isnan(cell) else f"{cell:.{digits}f}"
