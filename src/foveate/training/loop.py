"""Training: one loop on Accelerate, for the pocket model and for cross-layer injection.

    fit(lesson, batches, start("no"), optimizers, folder=, name=, minutes= | steps=, ...) -> Clock
    drawn(count, size, step, seed) -> list[int]     # the items of a step

It runs in one process, in several (torchrun, `accelerate launch`) and under FSDP 2, as Accelerate
is configured. A run that is killed continues from its last checkpoint as if nothing had happened.
Ctrl-C ends the step at work and makes a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import FoveateError
from ..base.files import Lines, make_folder, write_text
from ..base.interrupts import Stop
from .checkpoints import Clock, latest, load_checkpoint, save_checkpoint, what_is_safe

WARM_UP = 40  # steps
TOLD_EVERY = 30.0  # seconds between lines about the progress, where there is no terminal


def start(precision: str) -> Any:
    """This process's Accelerator: "no", "bf16" or "fp16"; on the CPU where there is no GPU."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise FoveateError('Training needs accelerate: pip install "foveate[train]".') from error

    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # while one looks at the data
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[patience])
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise FoveateError(
            f"Training cannot keep checkpoints under {kind} as it is configured: use torchrun, or "
            "FSDP with fsdp_version: 2."
        )
    return accelerator


def fit(
    lesson: nn.Module,
    batches: Callable[[int], dict[str, Tensor]],
    accelerator: Any,
    optimizers: list[torch.optim.Optimizer],
    *,
    folder: Path,
    name: str,
    minutes: float | None = None,
    steps: int | None = None,
    warm_up: int = WARM_UP,
    seed: int = 0,
    resume: bool = True,
    checkpoint_every: float = 120,
    log_every: int = 50,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: float = 180,
    finish: Callable[[nn.Module], None] | None = None,
) -> Clock:
    """Minimise a loss over the trainable parameters of `lesson`.

    `lesson(batch)` gives a sum of losses and its weight, scalars. Minimised is the sum over all
    processes divided by the weight over all processes, however a batch is divided among them.
    `batches(step)` gives this process's batch of a step and must depend on nothing else: a resumed
    run then equals an undisturbed one (bit for bit with `steps`; with `minutes` the budget counts
    only time spent training). The rate warms up, stays, and falls linearly to zero over the last
    30 %. Losses and accuracies go to `folder/log.jsonl`.

    Args:
        accelerator: from `start`.
        optimizers: with the peak rate of each parameter group under "peak".
        minutes, steps: the budget, one of them.
        checkpoint_every, evaluate_every: seconds.
        log_every: steps; with 1 the log has the loss of each step instead of a running mean.
        finish: called in every process with the trained lesson as Accelerate prepared it.

    Raises:
        KeyboardInterrupt: in every process, where one was asked to stop, after the checkpoint.
    """
    if (minutes is None) == (steps is None):
        raise ValueError("give either minutes or steps as the budget of a stage")
    from accelerate.utils import set_seed
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    set_seed(seed)
    lesson, *optimizers = accelerator.prepare(lesson, *optimizers)
    make_folder(folder)
    last = latest(folder, name) if resume else None
    clock = load_checkpoint(last, accelerator, lesson, optimizers) if last else Clock()
    main, journal = accelerator.is_main_process, folder / "log.jsonl"
    lines: Lines | None = None
    if main:
        forget(journal, name, clock.step)
        lines = Lines(journal)

    def done() -> float:
        share = clock.step / steps if steps else clock.seconds / (60 * (minutes or 1))
        return min(1.0, share)

    def log(**row: Any) -> None:
        if lines:
            told = json.dumps({"stage": name, "step": clock.step} | row) + "\n"
            lines.append(told.encode(), what_is_safe(folder, name))
            lines.settle()

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    running, console = math.nan, Console(stderr=True)
    saved = examined = shown = time.monotonic()
    watched = main and console.is_terminal
    with (
        Progress(*columns, TimeElapsedColumn(), console=console, disable=not watched) as bar,
        Stop("saving after this step") as stop,
        contextlib.closing(lines) if lines else contextlib.nullcontext(),
    ):
        task = bar.add_task(name, total=1.0, note="")
        for batch in ahead(batches, clock.step):
            if done() >= 1:
                break
            began = time.monotonic()
            now = rate_at(clock.step, done(), warm_up)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * now
                optimizer.zero_grad()
            total, weight = lesson({k: v.to(accelerator.device) for k, v in batch.items()})
            # the clock is the main process's, and so is the decision to save
            save = main and began - saved > checkpoint_every
            told = torch.stack([total.detach().double(), weight.double()])
            seconds = clock.seconds if main else 0.0
            told = torch.cat([told, told.new_tensor([save, stop.asked, seconds])])
            summed, count, save, stops, clock.seconds = accelerator.reduce(told, "sum").tolist()
            count = count or 1.0
            accelerator.backward(total * (accelerator.num_processes / count))
            accelerator.clip_grad_norm_(lesson.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            value = summed / count
            running = value if math.isnan(running) else running + 0.05 * (value - running)
            clock.step += 1
            clock.seconds += time.monotonic() - began
            note = f"loss {running:.3f}  {clock.seconds / clock.step:.2f} s/step  {clock.step}"
            bar.update(task, completed=done(), note=note)
            if main and not watched and time.monotonic() - shown > TOLD_EVERY:
                print(f"foveate: {name}, {done():.0%}, {note}", file=sys.stderr, flush=True)
                shown = time.monotonic()
            if log_every == 1:
                log(seconds=round(clock.seconds, 2), loss=value, rate=now)
            elif clock.step % log_every == 0:
                log(seconds=round(clock.seconds), loss=round(running, 4))
            if save or stops:
                save_checkpoint(folder, name, clock, accelerator, lesson, optimizers)
                saved = time.monotonic()
            if stops:
                raise KeyboardInterrupt
            if evaluate and time.monotonic() - examined > evaluate_every:
                log(seconds=round(clock.seconds), loss=round(running, 4), **evaluate())
                examined = time.monotonic()
        if log_every > 1:
            log(seconds=round(clock.seconds), loss=round(running, 4), **(evaluate or dict)())
    if finish:
        finish(lesson)
    accelerator.free_memory()
    return clock


def rate_at(step: int, done: float, warm_up: int = WARM_UP) -> float:
    """Share of the peak rate: a warm-up, a plateau, a linear end over the last 30 %."""
    return min(1.0, (step + 1) / warm_up) * min(1.0, (1 - done) / 0.3)


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def drawn(count: int, size: int, step: int, seed: int) -> list[int]:
    """The items of a step: every item once per epoch, in an order of the seed's."""
    places = range(step * size, (step + 1) * size)
    return [int(_shuffled(count, seed, p // count)[p % count]) for p in places]


def ahead(batches: Callable[[int], dict[str, Tensor]], step: int) -> Iterator[dict[str, Tensor]]:
    """The batches from `step` on, each prepared in a thread while the one before is learnt."""
    with ThreadPoolExecutor(1) as worker:
        waiting = [worker.submit(batches, step + i) for i in range(2)]
        while True:
            step += 1
            waiting.append(worker.submit(batches, step + 1))
            yield waiting.pop(0).result()


def forget(journal: Path, name: str, step: int) -> None:
    """Leave out of a log what a stage did after `step`, and lines that are none of a log's."""
    if not journal.exists():
        return
    kept = []
    for line in journal.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["stage"] != name or row["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):  # cut short, or damaged
            continue
    write_text(journal, "".join(kept))
