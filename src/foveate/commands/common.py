"""What several commands share: options, loading, tables, progress, the picture of attention."""

from __future__ import annotations

import ast
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..base.errors import FoveateError
from ..base.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from ..backends.transformers.record import Record
    from ..vlm.chat import Answer
    from ..vlm.vlm import VLM


def _model(name: str) -> str:
    """The pocket model's name in any case; other names as they are."""
    return "pocket" if name.lower() == "pocket" and not Path(name).exists() else name


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        callback=_model,
        help="Use pocket, a saved model's folder, or a hub name.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Use this branch, tag or commit of a hub model; default: main.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Run on cpu, cuda, cuda:1 or mps; default: a GPU.")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="Load as float32, bfloat16, float16 or auto.")
]


class Engine(StrEnum):
    """What answers: this process, or vLLM."""

    PLAIN, VLLM = "plain", "vllm"


EngineOption = Annotated[
    Engine, typer.Option(help="Answer in this process (plain), or with vLLM (vllm).")
]
TensorParallelOption = Annotated[
    int | None,
    typer.Option(min=1, help="With vllm: spread the model over so many GPUs. Default: 1."),
]
VllmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vllm",
        help="Tell vLLM max_model_len=4096, enforce_eager=True, ...; repeat it.",
    ),
]
PluginOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Use the methods that this Python file of yours defines, too. Repeat it for more."
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Write over what an earlier run left there.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
# of runs over benchmarks
DataRootOption = Annotated[
    Path | None, typer.Option(help="Read data sets from this folder; default: from the hub.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Ask only the first so many questions of every split.")
]
BatchSizeOption = Annotated[str, typer.Option(help="Ask so many questions at a time, or auto.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        help="Take every n-th image: i/n, from 0/n. Default: RANK and WORLD_SIZE, if set."
    ),
]
DrawnOption = Annotated[
    int, typer.Option(min=0, help="Seed methods that draw at random with this number.")
]
ResumeOption = Annotated[bool, typer.Option(help="Go on with the records in --out.")]

SIDE_BY_SIDE = ("vanilla", "clvs")  # compared by default


def note(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"foveate: note: {message}", file=sys.stderr)


def quiet() -> None:
    """Turn off transformers' progress bars; downloads keep theirs on a terminal."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers import logging

    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()


def share_cores() -> None:
    """Compute with as many threads as cores are idle, unless OMP_NUM_THREADS says how many.

    Threads wait for each other after every operation, so one that does not get its core holds up
    all of them.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return
    cores, busy = os.cpu_count() or 1, running_threads()
    free = max(1, round(torch.get_num_threads() * (1 - busy / cores)))
    if free < torch.get_num_threads():
        torch.set_num_threads(free)
        note(
            f"the machine is busy ({busy} threads run on {cores} cores), so this computes with "
            f"{free}: set OMP_NUM_THREADS to choose"
        )


def running_threads() -> int:
    """How many threads of others want a core now, the least of a few looks; 0 where unknown."""
    try:
        looks = []
        for _ in range(3):
            looks.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1)
            time.sleep(0.02)
        return max(0, min(looks))
    except (OSError, ValueError, IndexError):
        return 0


def hint(what: str) -> None:
    """Say what people do next."""
    print(f"next: {what}")


def refuse_to_replace(file: Path, what: str, force: bool) -> None:
    """Refuse a folder in which an earlier run has left `file`, unless that may be lost."""
    if file.exists() and not force:
        raise FoveateError(
            f"{file.parent} already holds {what}: give another --out, or --force to write over "
            "them."
        )


def load_plugins(files: list[Path] | None) -> None:
    """Make known what the user's own files define."""
    if files:
        from ..base.plugins import load_file

        for file in files:
            load_file(file)


def load(name: str, **options: Any) -> VLM:
    from ..vlm.vlm import VLM

    quiet()
    share_cores()
    return VLM.load(name, **options)


def load_with(
    engine: str,
    name: str,
    tensor_parallel: int | None,
    options: list[str] | None,
    device: str | None,
    **more: Any,
) -> VLM:
    """A model in this process, or one that vLLM runs, which starts with the first question.

    Args:
        options: of vLLM, texts such as ``max_model_len=4096``.
    """
    if engine != Engine.VLLM:
        only_with_vllm(tensor_parallel, options)
        return load(name, device=device, **more)
    from ..vlm.served import ServedVLM

    if device is not None:
        raise FoveateError("vLLM chooses its device itself: leave out --device.")
    if "LOCAL_RANK" in os.environ:
        raise FoveateError(
            "vLLM starts its own processes: give --tensor-parallel, or --shard i/n to several "
            "commands, instead of torchrun."
        )
    given: dict[str, Any] = {}
    for text in options or ():
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise FoveateError(f"Cannot read --vllm {text!r}: write it like max_model_len=4096.")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value
    if tensor_parallel is not None:
        given["tensor_parallel_size"] = tensor_parallel
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    quiet()
    return ServedVLM.load(name, **more, **given)


def only_with_vllm(tensor_parallel: int | None, options: list[str] | None) -> None:
    """Refuse what is about vLLM, beside another engine."""
    if tensor_parallel is not None or options:
        raise FoveateError("--tensor-parallel and --vllm are about --engine vllm: add it.")


def note_unknown_words(vlm: VLM, text: str) -> None:
    """Name the words that the pocket model has not learnt; others spell words in pieces."""
    from ..vlm.chat import unknown_words

    if unknown := unknown_words(vlm.tokenizer, text):
        note(
            f"{vlm.name} does not know {', '.join(unknown)}: it reads a gap there. It knows simple "
            "English about its drawn scenes"
        )


def serves(model: Any, stack: tuple[Any, ...]) -> bool:
    """Whether the methods work on this model, or on a `ServedVLM`; prints why not."""
    from ..backends.transformers.anatomy import anatomy
    from ..vlm.served import ServedVLM

    try:
        if isinstance(model, ServedVLM):
            model.check(stack)
            return True
        for method in stack:
            method.resolve(anatomy(model))
    except FoveateError as error:
        note(f"left out: {error}")
        return False
    return True


def read_picture(name: str) -> Any:
    from ..base.images import decode

    if name == "demo" and not Path(name).is_file():
        from ..scenes import questions, world

        return world.draw(world.sample(questions.FIRST_HELD_OUT))
    return decode(name)


def read_shard(text: str | None) -> tuple[int, int]:
    """(i, n) from ``i/n``; without a text from RANK and WORLD_SIZE, as torchrun sets them."""
    if text is None:
        text = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise FoveateError(f"Cannot read the shard {text!r}: write it like 0/8, the first of 8.")
    return int(number), int(count)


def own_card(shard: str | None) -> str | None:
    """The GPU of this process among those that torchrun started."""
    import torch

    local = os.environ.get("LOCAL_RANK", "")
    mine = shard is None and local.isdecimal() and torch.cuda.is_available()
    return f"cuda:{local}" if mine else None


def read_batch_size(text: str) -> int | None:
    if text != "auto" and not text.isdecimal():
        raise FoveateError(f"Cannot read the batch size {text!r}: give a number, or auto.")
    return None if text == "auto" else int(text)


@contextmanager
def stoppable(
    unit: str = "questions", told: str = "stopped; the same command goes on from here"
) -> Iterator[Progress]:
    """A `Progress`; Ctrl-C ends the command with what is `told`."""
    try:
        with Progress(unit) as watch:
            yield watch
    except KeyboardInterrupt:
        print(f"foveate: {told}", file=sys.stderr)
        raise typer.Exit(130) from None


def draw(vlm: VLM, question: str, answers: dict[str, Answer], path: Path) -> None:
    """Draw the chains of methods that look again; without any, attention by layer."""
    chains = {n: a.chat.notes["chain"] for n, a in answers.items() if "chain" in a.chat.notes}
    if not chains:
        draw_attention(vlm, question, answers, path)
        return
    from ..insight.plots.chain import Link, show_chain

    links = [Link(name, said(answers[name]), chain) for name, chain in chains.items()]
    others = {name: said(answer) for name, answer in answers.items() if name not in chains}
    show_chain(question, links, others, path)


def draw_attention(vlm: VLM, question: str, answers: dict[str, Answer], path: Path) -> None:
    """Draw the attention to the first image, mean over the answer's tokens."""
    import torch

    from ..families.layout import Grid, together
    from ..insight.plots.attention import AttentionRow, show_attention

    chat = next(iter(answers.values())).chat
    grids = vlm.grids(chat)
    looks, layers = [], tuple[int, ...]()
    for name, answer in answers.items():
        record = cast("Record", answer.record)
        steps = [record.image(step)[0] for step in range(max(1, len(answer.tokens)))]
        heat, box = together(grids, torch.stack(steps).mean(0))
        looks.append(AttentionRow(name, said(answer), heat.flatten(1)))
        layers = record.layers
    rows, cols = heat.shape[1:]
    grid = Grid(rows, cols, box=box)
    show_attention(chat.images[0], question, looks, layers, grid, path)


def said(answer: Answer) -> str:
    return f"{answer.text} ({rounded(answer.probability)})"


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def brief(value: Any) -> str:
    """A parameter's value; consecutive layers as first..last."""
    whole = isinstance(value, tuple) and all(isinstance(v, int) for v in value)
    if whole and len(value) > 3 and value == (*range(value[0], value[-1] + 1),):
        return f"{value[0]}..{value[-1]}"
    return repr(value)


def new_table(*columns: str) -> Table:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_table(table: Table) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:  # a file has room
        console.width = max(console.width, 160)
    console.print(table)
