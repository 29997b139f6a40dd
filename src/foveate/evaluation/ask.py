"""Evaluation: questions, asked with every method, answers appended to a journal, scores derived.

    plan = Plan([POPE()], ["vanilla", "clvs"], Path("runs/x"), root=data)
    results = evaluate(plan, VLM.load("pocket"))

A run that was killed goes on where it stopped, and ends with the records of an undisturbed one
(`foveate.evaluation.run`). Questions about one image share its prefix (`foveate.vlm.prefix`).
A `ServedVLM` is asked about many images at a time; its records are kept as they come in.
"""

from __future__ import annotations

import contextlib
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image

from ..base.errors import FoveateError
from ..base.memory import Size, out_of_memory
from ..core.method import Method
from ..vlm.answering import answer_all, process_ahead
from ..vlm.chat import Answer, Chat
from ..vlm.served import ServedVLM
from ..vlm.vlm import VLM
from .benchmark import EvalRecord
from .environment import environment
from .run import Plan, Question, Run, Stack, Watch, read_stacks, unwatched
from .sampled import Drawing, Sampled

__all__ = ["Asker", "Plan", "evaluate"]

SERVED = 256
"""Questions that vLLM has at a time, where nobody says how many."""

T = TypeVar("T")
R = TypeVar("R")


def evaluate(plan: Plan, vlm: VLM, watch: Watch = unwatched) -> dict[str, Any]:
    """Ask every question with every method; the content of ``results.json``.

    Args:
        watch: called with (questions done, of how many, what was asked).

    Raises:
        FoveateError: missing data, a folder with another configuration, a method that the model
            cannot be served with.
    """
    asker = Asker(vlm, plan.methods, batch_size=plan.batch_size, share=plan.share)
    torch.manual_seed(plan.seed)
    with Run(plan, vlm.source, asker.dtype, watch, vlm.versions) as run:
        answers = _at_once if isinstance(vlm, ServedVLM) else _in_turn
        for records in answers(run, asker):
            run.keep(records)
        return run.finish(environment(vlm.device) | vlm.versions)


@dataclass
class Loaded:
    """Questions with their images opened.

    Attributes:
        chats: what to ask, or what is wrong with the question's image or text.
    """

    questions: list[Question]
    chats: list[Chat | str]


class Asker:
    """Puts jobs of questions to a model, with each of several methods.

    Args:
        methods, batch_size, share: as in `Plan`.

    Attributes:
        stacks: the methods by their text form.
        size: questions at a time, fewer while memory is short.

    Raises:
        FoveateError: a method that the model cannot be served with.
    """

    def __init__(
        self,
        vlm: VLM,
        methods: Sequence[str | Method | Stack],
        *,
        batch_size: int | None = None,
        share: bool = True,
    ) -> None:
        self.vlm, self.share, self.stacks = vlm, share, read_stacks(methods)
        default = 32 if vlm.device.type == "cpu" else 64
        self.size = Size(batch_size or (SERVED if isinstance(vlm, ServedVLM) else default))
        for stack in self.stacks.values():
            with vlm.using(stack):  # refusals come before the first question
                pass

    @property
    def dtype(self) -> str:
        """The model's, as runs note it."""
        return str(self.vlm.model.dtype).removeprefix("torch.")

    def load(self, job: list[Question]) -> Loaded:
        """Open the images of a job. May run in another thread while the model answers."""
        chats: list[Chat | str] = []
        opened: dict[Hashable, list[Image.Image] | str] = {}
        for question in job:
            sample = question.sample
            place = sample.image_name or (sample.split, sample.line)
            if place not in opened:
                try:
                    picture = sample.load()
                    opened[place] = [] if picture is None else [picture]
                except Exception as error:
                    opened[place] = _reason(error)
            images = opened[place]
            if isinstance(images, str):
                chats.append(images)
                continue
            try:
                chat = self.vlm.chat(images, sample.prompt, None)
                chat.images = images  # one list for all questions about it
                chats.append(chat)
            except FoveateError as error:
                chats.append(str(error))
        good = [chat for chat in chats if isinstance(chat, Chat)]
        if self.share and good:
            with contextlib.suppress(Exception):  # then it fails again where that is recorded
                process_ahead(self.vlm, good, self.stacks.values())
        return Loaded(job, chats)

    def answer(self, loaded: Loaded, method: str) -> list[EvalRecord]:
        """One record per question: an answer, or an error."""
        asked = [chat for chat in loaded.chats if isinstance(chat, Chat)]
        start, limit = time.perf_counter(), loaded.questions[0].limit  # one for the whole job
        stack, drawing = self.stacks[method], None
        sampled = next((m for m in stack if isinstance(m, Sampled)), None)
        if sampled is not None:
            named = [
                f"{q.benchmark}, {q.sample.split}, {q.sample.line}"
                for q, chat in zip(loaded.questions, loaded.chats, strict=True)
                if isinstance(chat, Chat)
            ]
            stack, drawing = (), Drawing(sampled, named)
        given = answer_all(
            self.vlm, asked, stack, limit,
            size=self.size, share=self.share, decoding=drawing,
        )  # fmt: skip
        ms, answers = 1e3 * (time.perf_counter() - start) / max(1, len(asked)), iter(given)
        records = []
        for question, chat in zip(loaded.questions, loaded.chats, strict=True):
            if isinstance(chat, str):
                records.append(as_record(question, method, chat, 0.0))
            else:
                records.append(as_record(question, method, next(answers), ms))
        return records


def as_record(
    question: Question, method: str, answer: Answer | Exception | str, ms: float
) -> EvalRecord:
    """The record of an answer, or of what went wrong."""
    sample = question.sample
    if isinstance(answer, Exception):
        answer = _reason(answer)
    record: EvalRecord = {
        "benchmark": question.benchmark,
        "split": sample.split,
        "line": sample.line,
        "id": sample.id,
        "image": sample.image_name,
        "question": sample.question,
        "prompt": sample.prompt,
        "label": sample.label,
        "meta": sample.meta,
        "method": method,
        "answer": None,
        "error": answer if isinstance(answer, str) else None,
        "yes": None,
        "probability": None,
        "tokens": None,
        "ms": round(ms, 3),
        "notes": {},
    }
    if isinstance(answer, str):
        return record
    if any(map(math.isnan, answer.probabilities)):
        record["error"] = "the model's logits are NaN: try another --dtype"
        return record
    kinds = (str, int, float, bool, list, tuple, type(None))  # what JSON can hold of the notes
    record["answer"], record["yes"] = answer.text, answer.yes
    record["probability"], record["tokens"] = answer.probability, len(answer.tokens)
    record["notes"] = {k: v for k, v in answer.chat.notes.items() if isinstance(v, kinds)}
    return record


def _in_turn(run: Run, asker: Asker) -> Iterator[list[EvalRecord]]:
    """The records that a run lacks, job by job."""
    jobs = run.jobs(asker.size.most)
    for job, loaded in zip(jobs, _ahead(jobs, asker.load), strict=True):
        for name in run.missing(job):
            yield asker.answer(loaded, name)


def _at_once(run: Run, asker: Asker) -> Iterator[list[EvalRecord]]:
    """The records that a run lacks, as they come in, from an engine that batches by itself.

    It has `asker.size` questions or more at a time, in order. Each job is a thread, which waits.

    Raises:
        Stopped: the engine answers no more.
    """
    came: queue.SimpleQueue[list[EvalRecord] | int | BaseException] = queue.SimpleQueue()

    def work(job: list[Question], names: list[str]) -> None:
        try:
            loaded = asker.load(job)
            for name in names:
                came.put(asker.answer(loaded, name))
        except BaseException as error:
            came.put(error)
        came.put(len(job))

    jobs, asked, most = deque(run.jobs(1)), 0, asker.size.most
    pool = ThreadPoolExecutor(most, "foveate-asking")
    try:
        while jobs or asked:
            while jobs and asked < most:
                job = jobs.popleft()
                pool.submit(work, job, run.missing(job))
                asked += len(job)
            found = came.get()
            if isinstance(found, BaseException):
                raise found
            if isinstance(found, int):
                asked -= found
            else:
                yield found
    except BaseException:
        asker.vlm.engine.close()  # type: ignore[attr-defined]  # so that no thread waits on
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(jobs: list[T], load: Callable[[T], R]) -> Iterator[R]:
    """`load` of every job, in order; a background thread loads the next two ahead."""
    pool = ThreadPoolExecutor(1, "foveate-images")
    try:
        waiting = [pool.submit(load, job) for job in jobs[:2]]
        for number in range(len(jobs)):
            if number + 2 < len(jobs):
                waiting.append(pool.submit(load, jobs[number + 2]))
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)


def _reason(error: Exception) -> str:
    """An error for a record: our sentences as they are, other failures with their type."""
    if isinstance(error, FoveateError):
        return str(error)
    return "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {error}"
