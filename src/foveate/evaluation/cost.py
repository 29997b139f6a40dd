"""What a plan costs: its questions, what every method runs beside the answer, and hours."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ..vlm.vlm import VLM
from .about import passes
from .ask import Asker
from .run import Plan, Run, Watch, unwatched


@dataclass
class Cost:
    """One method of a plan.

    Attributes:
        beside: what it runs beside the answer, in words.
        asked, seconds: of the measurement; 0 without one.
        hours: for all questions; None without a measurement.
    """

    method: str
    questions: int
    beside: str
    asked: int = 0
    seconds: float = 0.0
    hours: float | None = None


def costs(plan: Plan, questions: int) -> list[Cost]:
    """The plan's methods without a measurement.

    Args:
        questions: how many there are.
    """
    return [
        Cost(
            name,
            questions,
            "; ".join(beside for m in stack if (beside := passes(type(m))) != "none") or "nothing",
        )
        for name, stack in plan.stacks.items()
    ]


def measure(plan: Plan, vlm: VLM, seconds: float, watch: Watch = unwatched) -> list[Cost]:
    """The plan's methods with the hours that they take, measured on its own questions.

    Answers from the beginning of the questions, every method in turn, for about so many seconds,
    and at least one batch. The first batch warms up and is not counted where there are more.
    Nothing is kept.
    """
    asker = Asker(vlm, plan.methods, batch_size=plan.batch_size, share=plan.share)
    with (
        tempfile.TemporaryDirectory(prefix="foveate-") as folder,
        Run(replace(plan, out=Path(folder)), vlm.source, asker.dtype) as run,
    ):
        total = sum(map(len, run.units))
        found = costs(plan, total)
        start, done = time.monotonic(), 0
        for number, job in enumerate(run.jobs(asker.size.most)):
            loading = time.perf_counter()
            loaded = asker.load(job)
            loading = time.perf_counter() - loading
            for cost in found:
                before = time.perf_counter()
                asker.answer(loaded, cost.method)
                taken = time.perf_counter() - before + loading
                if number == 1:  # the one before was to warm up
                    cost.asked, cost.seconds = 0, 0.0
                cost.asked += len(job)
                cost.seconds += taken
            done += len(job)
            watch(done, total, "measuring")
            if number and time.monotonic() - start > seconds:
                break
    for cost in found:
        if cost.asked:
            cost.hours = cost.seconds / cost.asked * cost.questions / 3600
    return found
