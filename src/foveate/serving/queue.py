"""One thread owns the model; requests wait in a bounded queue and are answered in micro-batches."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..base.errors import FoveateError
from ..base.memory import Size, out_of_memory
from ..core.method import Method, text
from ..vlm.answering import Decoding, answer_all
from ..vlm.chat import Chat
from ..vlm.vlm import VLM
from .sampling import Choose, Event, Left, PartialAnswer, Sampling, Take, Written
from .wire import Busy, Failed, Settings, Stopping

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """A question for the worker."""

    chat: Chat
    methods: tuple[Method, ...]
    sampling: Sampling
    answer: PartialAnswer = field(init=False)  # from `Worker.submit` on

    @property
    def searches(self) -> bool:
        """Whether a method searches the answer, which it does prompt by prompt."""
        return any(m.wants("search") and not m.is_neutral for m in self.methods)

    @property
    def kind(self) -> tuple[str, int, int]:
        """Requests of one kind are taken together: the same methods, and chats of one kind.

        A searched answer shares nothing.
        """
        return text(self.methods), self.chat.kind, id(self) if self.searches else 0


@dataclass(eq=False)
class Job:
    """Other work for the model. It shares no batch."""

    work: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


class Worker:
    """The thread that owns the model.

    It takes the oldest request and up to ``settings.batch - 1`` further ones of its kind, and
    answers them as one left-padded batch. Where methods turned them into chats of several kinds,
    each kind is a batch. Requests that come meanwhile wait.
    """

    def __init__(self, vlm: VLM, settings: Settings) -> None:
        self.vlm, self.settings = vlm, settings
        self.waiting: deque[Request | Job] = deque()
        self.stopping = False
        self.pace = 1.0  # seconds of the latest batch
        self.size = Size(settings.batch)
        self.metrics = Metrics(lambda: len(self.waiting))
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="foveate-worker", daemon=True)
        ends = vlm.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [ends])

    def start(self) -> None:
        self._thread.start()

    def admit(self) -> None:
        """Raises `Busy` or `Stopping` if a request would be refused now."""
        if self.stopping:
            raise Stopping
        if len(self.waiting) >= self.settings.queue:
            batches = 1 + len(self.waiting) // self.settings.batch
            raise Busy(max(1, round(self.pace * batches)))

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> None:
        """Put a request into the queue.

        Args:
            deliver: gets every `Piece` of the answer, and last its `End` or a `FoveateError`, on
                the worker's thread.

        Raises:
            Busy: the queue is full. Stopping: the server stops.
        """
        words = partial(self._decode, skip_special_tokens=True)
        request.answer = PartialAnswer(request.sampling, words, self._decode, deliver)
        self._put(request)

    def run(self, work: Callable[[], Any]) -> Future[Any]:
        """Put other work for the model into the queue.

        Returns:
            what `work` returns, or raises as a `FoveateError`. Cancelling it frees the place in
            the queue.

        Raises:
            Busy: the queue is full. Stopping: the server stops.
        """
        job = Job(work)
        job.done.add_done_callback(lambda _: self._leave(job))
        self._put(job)
        return job.done

    def _put(self, waiting: Request | Job) -> None:
        with self._changed:
            self.admit()
            self.waiting.append(waiting)
            self._changed.notify()

    def _leave(self, waiting: Request | Job) -> None:
        with self._changed:
            if waiting in self.waiting:
                self.waiting.remove(waiting)

    def cancel(self, request: Request) -> None:
        """Free the request's place in the queue or batch: nobody waits for its answer."""
        with self._changed:
            self._leave(request)
            if not request.answer.done:
                request.answer.done = True
                self.metrics.cancelled.inc()

    def stop(self) -> None:
        """Refuse new requests, and answer those that are held."""
        with self._changed:
            self.stopping = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """After `stop`, wait until everything held is answered."""
        self._thread.join(timeout)

    def _run(self) -> None:
        while self._work():
            pass

    def _work(self) -> bool:
        """Wait for a batch or a job, and do it; False when the server has stopped.

        What it was is forgotten with the frame: an idle worker holds no pictures.
        """
        batch = self._next()
        start = time.monotonic()
        if isinstance(batch, Job):
            self._do(batch)
        elif batch:
            self._answer(batch)
        self.pace = time.monotonic() - start
        return bool(batch)

    def _next(self) -> list[Request] | Job:
        """The next batch or job; none when the server has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self.stopping)
            if not self.waiting:
                return []
            first = self.waiting[0]
            if isinstance(first, Job):
                self.waiting.remove(first)
                return first
            others = (r for r in self.waiting if isinstance(r, Request) and r.kind == first.kind)
            batch = list(itertools.islice(others, self.settings.batch))
            for request in batch:
                self.waiting.remove(request)
            return batch

    def _do(self, job: Job) -> None:
        if not job.done.set_running_or_notify_cancel():
            return
        try:
            job.done.set_result(job.work())
        except Exception as error:
            job.done.set_exception(_for_client(error))

    def _answer(self, batch: list[Request]) -> None:
        """Every request of the batch gets an `End` or an error."""
        answer_all(
            self.vlm,
            [request.chat for request in batch],
            batch[0].methods,
            max(request.sampling.max_tokens for request in batch),
            size=self.size,
            decoding=BatchDecoding([request.answer for request in batch], self, batch[0].searches),
        )

    def _decode(self, ids: list[int], **options: Any) -> str:
        with self.vlm.tokenizing:
            return self.vlm.tokenizer.decode(ids, **options)


class BatchDecoding(Decoding):
    """Decodes each row of a batch as its request says, and starts again with every attempt."""

    def __init__(self, rows: list[PartialAnswer], worker: Worker, searches: bool) -> None:
        self.rows, self.worker, self.searches = rows, worker, searches

    def wanted(self, row: int) -> bool:
        return not self.rows[row].done

    def options(self, rows: list[int]) -> dict[str, Any]:
        batch = [self.rows[row] for row in rows]
        for row in batch:
            row.restart()
        self.worker.metrics.batches.observe(len(batch))
        pad: Any = self.worker.vlm.tokenizer.pad_token_id
        if self.searches:
            (row,) = batch
            return {
                "streamer": Written(row, pad, self.worker.ends),
                "stopping_criteria": StoppingCriteriaList([Left(row)]),
            }
        return {
            "num_beams": 1,
            "logits_processor": LogitsProcessorList([Choose(batch, pad)]),
            "stopping_criteria": StoppingCriteriaList([Take(batch, self.worker.ends)]),
        }

    def failed(self, row: int, error: Exception) -> None:
        answer = self.rows[row]
        if not answer.done:
            answer.done = True
            answer.deliver(_for_client(error))


def _for_client(error: Exception) -> FoveateError:
    """The error that a client gets. What is not the client's mistake is logged."""
    if isinstance(error, FoveateError):
        return error
    log.error("The model failed on a request.", exc_info=error)
    reason = "memory does not suffice for it" if out_of_memory(error) else type(error).__name__
    return Failed(f"The model failed on this request: {reason}.")


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures that `/metrics` gives to Prometheus."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "foveate_requests", "Answered requests.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "foveate_request_seconds", "From request to end of answer, chat completions.",
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self.tokens = Counter(
            "foveate_tokens", "Of answered prompts and of answers.", ["kind"], registry=registry
        )
        self.batches = Histogram(
            "foveate_batch_size", "Requests that went through the model together.",
            registry=registry, buckets=SIZES,
        )  # fmt: skip
        self.cancelled = Counter(
            "foveate_cancelled", "Requests whose client went away.", registry=registry
        )
        queue = Gauge("foveate_queue_length", "Requests that wait.", registry=registry)
        queue.set_function(waiting)
