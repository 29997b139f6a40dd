"""One thread owns the model; requests wait in a bounded queue and are answered in micro-batches."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..evaluation import _out_of_memory as out_of_memory
from ..method import FoveateError, Method, text
from ..vlm import VLM, Chat
from .errors import Busy, Failed, Stopping
from .metrics import Metrics
from .sampling import Choose, Event, Row, Sampling, Take
from .settings import Settings

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """A question for the worker."""

    chat: Chat
    methods: tuple[Method, ...]
    sampling: Sampling
    row: Row = field(init=False)  # its answer, from `Worker.submit` on

    @property
    def kind(self) -> tuple[str, int]:
        """Requests of one kind can share a batch: same methods, same number of images."""
        return text(self.methods), len(self.chat.images)


class Worker:
    """The thread that owns the model.

    It takes the oldest request and up to ``settings.batch - 1`` further ones of its kind as one
    left-padded batch. Requests that come meanwhile wait.
    """

    def __init__(self, vlm: VLM, settings: Settings) -> None:
        self.vlm, self.settings = vlm, settings
        self.waiting: deque[Request] = deque()
        self.stopping = False
        self.pace = 1.0  # seconds of the latest batch
        self.metrics = Metrics(lambda: len(self.waiting))
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="foveate-worker", daemon=True)
        ends = vlm.model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, (list, tuple)) else [ends])

    def start(self) -> None:
        self._thread.start()

    def admit(self) -> None:
        """Raises `Busy` or `Stopping` where a request would not be taken now."""
        if self.stopping:
            raise Stopping
        if len(self.waiting) >= self.settings.queue:
            batches = 1 + len(self.waiting) // self.settings.batch
            raise Busy(max(1, round(self.pace * batches)))

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> None:
        """Put a request into the queue.

        Args:
            deliver: is called on the worker's thread with every `Piece` of the answer, and last
                with its `End` or a `FoveateError`.

        Raises:
            Busy: the queue is full. Stopping: the server stops.
        """
        words = partial(self._decode, skip_special_tokens=True)
        request.row = Row(request.sampling, words, self._decode, deliver)
        with self._changed:
            self.admit()
            self.waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody waits for this answer any more: its place in the queue or batch is free."""
        with self._changed:
            if request in self.waiting:
                self.waiting.remove(request)
            if not request.row.done:
                request.row.done = True
                self.metrics.cancelled.inc()

    def stop(self) -> None:
        """Take nothing new; what is held will be answered."""
        with self._changed:
            self.stopping = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait until everything held is answered, after `stop`."""
        self._thread.join(timeout)

    def _run(self) -> None:
        while batch := self._next():
            self.metrics.batches.observe(len(batch))
            start = time.monotonic()
            self._answer(batch)
            self.pace = time.monotonic() - start

    def _next(self) -> list[Request]:
        """The next batch; none when the server has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self.stopping)
            if not self.waiting:
                return []
            kind = self.waiting[0].kind
            batch = [request for request in self.waiting if request.kind == kind]
            batch = batch[: self.settings.batch]
            for request in batch:
                self.waiting.remove(request)
            return batch

    def _answer(self, batch: list[Request]) -> None:
        """Every request of the batch gets an `End` or an error."""
        for request in batch:
            try:
                [request.chat] = self.vlm.rewrite([request.chat], request.methods)
            except Exception as error:
                self._fail(request, error)
        self._generate(batch)

    def _generate(self, batch: list[Request]) -> None:
        """Where memory does not suffice the batch is halved; after other failures, each alone."""
        batch = [request for request in batch if not request.row.done]
        if not batch:
            return
        rows = [request.row for request in batch]
        try:
            self._attempt(batch, rows)
            return
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            starved = out_of_memory(error)
        # the failure is forgotten by now, and with it the tensors that it held
        if starved:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        log.warning("A batch of %d failed and is taken apart.", len(batch))
        step = -(-len(batch) // 2) if starved else 1
        for row in rows:
            row.restart()
        for i in range(0, len(batch), step):
            self._generate(batch[i : i + step])

    def _attempt(self, batch: list[Request], rows: list[Row]) -> None:
        pad: Any = self.vlm.tokenizer.pad_token_id
        self.vlm.answer(
            [request.chat for request in batch],
            batch[0].methods,
            max(row.sampling.max_tokens for row in rows),
            num_beams=1,
            logits_processor=LogitsProcessorList([Choose(rows, pad)]),
            stopping_criteria=StoppingCriteriaList([Take(rows, self._ends)]),
        )

    def _fail(self, request: Request, error: Exception) -> None:
        if request.row.done:
            return
        request.row.done = True
        if not isinstance(error, FoveateError):
            log.error("The model failed on a request.", exc_info=error)
            starved = out_of_memory(error)
            told = "memory does not suffice for it" if starved else f"{type(error).__name__}"
            error = Failed(f"The model failed on this request: {told}.")
        request.row.deliver(error)

    def _decode(self, ids: list[int], **options: Any) -> str:
        with self.vlm.tokenizing:
            return self.vlm.tokenizer.decode(ids, **options)
