"""Evaluation on many workers: an actor pool of Ray Data around `foveate.evaluation.ask`.

    load = functools.partial(VLM.load, "llava-hf/llava-1.5-7b-hf")
    plan = Plan([POPE()], ["vanilla", "clvs"], Path("runs/x"), root=data)
    evaluate(plan, load, workers=8)

Every worker is a process with its own model. It gets the questions about one image at a time. The
calling process needs no GPU: it writes the records into the run's folder as they come in
(`foveate.evaluation.run`), and a later run, with or without Ray, goes on from there. On a cluster,
model and data must have the same paths on all machines.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..base.errors import FoveateError
from ..core.method import Method
from ..evaluation.ask import Asker, as_record
from ..evaluation.benchmark import EvalRecord
from ..evaluation.environment import environment, hardware
from ..evaluation.run import (
    Plan,
    Question,
    Run,
    Stack,
    Watch,
    unwatched,
)
from ..vlm.vlm import VLM

TRIES = 2  # attempts at a job whose workers die, in each of the two rounds
LOSSES = 16  # jobs that may kill workers; more must have another cause

Job = tuple[list[Question], list[str]]  # questions, and the methods that are missing


def evaluate(
    plan: Plan,
    load: Callable[[], VLM],
    *,
    workers: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    patience: float = 3600.0,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """`foveate.evaluation.ask.evaluate` on workers: the same records, in the order they come in.

    Uses the Ray that this process is connected to, or the cluster that RAY_ADDRESS names, else
    starts Ray on this machine and stops it at the end. A worker that dies is started again and
    asked again what it had not answered; questions that keep killing workers become errors.

    Args:
        load: gives the model; called once in every worker, and once before in a process that
            tells its name, dtype and batch size.
        workers: how many; None = one per GPU, or one.
        cpus, gpus: of each worker, also fractions. None = one GPU where there are any, with one
            CPU; else an equal share of the CPUs.
        patience: seconds without any answer after which the run ends.
        watch: as in `foveate.evaluation.ask.evaluate`.

    Raises:
        FoveateError: also where Ray is missing, the workers do not fit, or Ray gives up; what has
            been answered is kept.
    """
    with running_ray() as ray:
        workers, needs = _divide(ray.cluster_resources(), workers, cpus, gpus)
        asker = (load, plan.methods, plan.batch_size, plan.share, plan.seed)
        with _one_sentence(ray):
            look = ray.remote(**needs, max_retries=0)(_look).remote(*asker)
            source, dtype, size, place = ray.get(look, timeout=patience)
        with Run(plan, source, dtype, watch) as run:
            for at_once in (2, 1):  # images are read while other questions are answered
                jobs = [(job, run.missing(job)) for job in run.jobs(size)]
                pool = ray.data.ActorPoolStrategy(
                    size=workers,
                    max_tasks_in_flight_per_actor=at_once,
                    max_concurrent_calls_per_actor=at_once,
                    enable_true_multi_threading=True,
                )
                with _one_sentence(ray):
                    for records in _answers(ray, jobs, asker, pool, needs, patience):
                        run.keep(records)
            for job in run.jobs(size):
                for method in run.missing(job):
                    run.keep(as_record(q, method, "every worker asked has died", 0.0) for q in job)
            place |= {"ray": ray.__version__, "workers": workers}
            return run.finish(environment(torch.device("cpu")) | place)


class Worker:
    """A process of the pool and its model. Calls may come from several threads."""

    def __init__(self, *asker: Any) -> None:
        self.asker, self.turn = _asker(*asker), threading.Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Records of pickled jobs, as JSON."""
        answers = []
        for item in batch["item"]:
            questions, methods = pickle.loads(item)
            loaded = self.asker.load(questions)
            with self.turn:
                answers.append([r for m in methods for r in self.asker.answer(loaded, m)])
        return {"records": [json.dumps(records) for records in answers]}


def _asker(
    load: Callable[[], VLM],
    methods: Sequence[str | Method | Stack],
    batch_size: int | None,
    share: bool,
    seed: int,
) -> Asker:
    torch.manual_seed(seed)
    return Asker(load(), methods, batch_size=batch_size, share=share)


def _look(*args: Any) -> tuple[dict[str, Any], str, int, dict[str, Any]]:
    """What a worker says of itself: `VLM.source`, dtype, batch size, and where it runs."""
    asker = _asker(*args)
    device = asker.vlm.model.device
    place = {
        "device": str(device),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
    }
    return asker.vlm.source, asker.dtype, asker.size.most, place


def _answers(
    ray: Any,
    jobs: list[Job],
    asker: tuple[Any, ...],
    pool: Any,
    needs: dict[str, float],
    patience: float,
) -> Iterator[list[EvalRecord]]:
    """The records of jobs as they come in, without jobs that killed their workers."""
    if not jobs:
        return
    items = [ray.cloudpickle.dumps(job) for job in jobs]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    data.context.max_errored_blocks = LOSSES
    data.context.execution_no_progress_timeout_s = patience
    with warnings.catch_warnings():  # Ray warns that 2.64 will not take max_task_retries
        warnings.simplefilter("ignore")
        answers = data.map_batches(
            Worker,
            batch_size=1,
            compute=pool,
            fn_constructor_args=asker,
            max_task_retries=TRIES - 1,
            **needs,
        )
    for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
        for records in batch["records"]:
            yield json.loads(records)


def _divide(
    have: dict[str, float], workers: int | None, cpus: float | None, gpus: float | None
) -> tuple[int, dict[str, float]]:
    """How many workers, and what Ray must keep for each."""
    if gpus is None:
        gpus = 1.0 if have.get("GPU") else 0.0
    if workers is None:
        workers = max(1, int(have.get("GPU", 0) / gpus)) if gpus else 1
    if workers < 1 or gpus < 0 or (cpus or 0) < 0:
        raise FoveateError("Workers must be 1 or more, their CPUs and GPUs 0 or more.")
    if cpus is None:
        cpus = 1.0 if gpus else max(1.0, have.get("CPU", 0) // workers)
    if workers * cpus > have.get("CPU", 0) or workers * gpus > have.get("GPU", 0):
        raise FoveateError(
            f"{workers} workers of {cpus:g} CPUs and {gpus:g} GPUs do not fit on the "
            f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs that Ray has: take fewer "
            "workers (--workers), or less for each (--cpus, --gpus)."
        )
    return workers, {"num_cpus": cpus, "num_gpus": gpus}


def set_environment() -> None:
    """Set what Ray reads when it is imported and started, unless the user has set it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # a busy machine takes its time


@contextmanager
def running_ray() -> Iterator[Any]:
    """A running Ray; stopped afterwards unless it ran before."""
    set_environment()
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise FoveateError("This needs the package ray: pip install 'foveate[ray]'.") from None
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    quiet = logging.CRITICAL  # what matters is raised
    logging.getLogger("ray.data").setLevel(quiet)
    try:
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=quiet)
        except Exception as error:  # no such cluster, no room, a machine too busy to start it
            raise FoveateError(
                f"Ray cannot be had at {address!r} ({last_line(error)}): check RAY_ADDRESS, "
                "'local' starts it on this machine."
            ) from error
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _one_sentence(ray: Any) -> Iterator[None]:
    """Turn what Ray raises into one sentence; the rest stays in the cause."""
    try:
        yield
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, FoveateError):
            raise cause from error
        raise FoveateError(
            f"Ray gave up ({type(cause).__name__}: {last_line(cause)}): the same command goes on "
            "with what is missing."
        ) from error


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().rstrip(".")
