"""`foveate sweep`: values of a method's parameters on a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import FoveateError
from ..base.files import make_folder
from . import app
from .common import (
    BatchSizeOption,
    DataRootOption,
    DeviceOption,
    DrawnOption,
    DtypeOption,
    Engine,
    EngineOption,
    JsonOption,
    LimitOption,
    ModelOption,
    PluginOption,
    ResumeOption,
    RevisionOption,
    ShardOption,
    TensorParallelOption,
    VllmOption,
    brief,
    hint,
    load_plugins,
    load_with,
    new_table,
    own_card,
    print_table,
    read_batch_size,
    read_shard,
    stoppable,
)


@app.command()
def sweep(
    method: Annotated[str, typer.Argument(help="Vary this method: clvs, clvs(top_k=5), ...")],
    over: Annotated[
        list[str],
        typer.Option(
            help="Try smoothing=0.5,0.7 or smoothing=0.5..1.0/0.1; give it twice for a map."
        ),
    ],
    bench: Annotated[
        str, typer.Option(help="Ask the questions of this benchmark: pocket, pope, ...")
    ],
    out: Annotated[
        Path, typer.Option(help="Write the run, sweep.json and sweep.png into this folder.")
    ],
    model: ModelOption = "pocket",
    metric: Annotated[
        str,
        typer.Option(help="Measure accuracy over all questions, or this score of the benchmark."),
    ] = "accuracy",
    figure: Annotated[
        Path | None, typer.Option(help="Draw into this file; default: sweep.png in --out.")
    ] = None,
    data_root: DataRootOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "auto",
    shard: ShardOption = None,
    seed: DrawnOption = 0,
    resume: ResumeOption = True,
    engine: EngineOption = Engine.PLAIN,
    tensor_parallel: TensorParallelOption = None,
    vllm: VllmOption = None,
    as_json: JsonOption = False,
    plugin: PluginOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Try values of a method's parameters on a benchmark, against vanilla, and draw the result.

    One parameter gives a line with its interval, two give a map. Half of the images choose the best
    setting, the other half checks it. You may stop it at any time: the same command goes on.
    """
    from ..evaluation.benchmark import parse
    from ..evaluation.run import Plan
    from ..evaluation.sweep import SweepGrid, best
    from ..evaluation.sweep import sweep as run
    from ..insight.plots.style import check_path
    from ..insight.plots.sweep import show_sweep

    load_plugins(plugin)
    grid, benchmarks = SweepGrid.read(method, over), parse(bench)
    if len(benchmarks) > 1:
        raise FoveateError("A sweep is about one benchmark: run the others with an --out each.")
    plan = Plan(
        benchmarks, grid.methods, out,
        root=data_root, limit=limit, batch_size=read_batch_size(batch_size),
        shard=read_shard(shard), seed=seed, resume=resume,
    )  # fmt: skip
    figure = figure or make_folder(out) / "sweep.png"
    check_path(figure)
    place = device or (own_card(shard) if engine is Engine.PLAIN else None)
    vlm = load_with(engine, model, tensor_parallel, vllm, place, revision=revision, dtype=dtype)
    with stoppable() as watch:
        result = run(grid, plan, vlm, metric=metric, watch=watch)
    show_sweep(result, figure)
    if as_json:
        print((out / "sweep.json").read_text("utf-8"))
        return
    names = [axis.parameter for axis in result.axes]
    table = new_table(*names, f"{metric}, {result.unit}", "difference", "95 % interval", "p (Holm)")
    table.title, table.title_justify = f"{result.method}, {result.model}, {bench}", "left"
    table.add_row("vanilla", *[""] * (len(names) - 1), f"{result.vanilla:.{result.digits}f}")
    for point in result.points:
        change, low, high = (
            "" if value is None else f"{value:+.{result.digits}f}"
            for value in (point.difference, point.low, point.high)
        )
        table.add_row(
            *map(brief, point.values),
            "" if point.value is None else f"{point.value:.{result.digits}f}",
            change,
            low and f"{low} to {high}",
            "" if point.corrected is None else f"{point.corrected:.3g}",
        )
    print_table(table)
    print(f"n = {result.questions} questions about {result.images} images, the same for all")
    for note in result.notes:
        print(note)
    print(best(result))
    print(f"figure: {figure}, numbers: {out / 'sweep.json'}")
    hint(f"foveate report {out} tests every setting; eval --method takes the best one to others")
