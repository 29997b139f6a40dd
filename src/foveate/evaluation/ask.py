"""Evaluation: questions, asked with every method, answers appended to a journal, scores derived.

    results = evaluate([POPE()], VLM.load("pocket"), ["vanilla", "clvs"], Path("runs/x"), root=data)

A run that was killed goes on where it stopped, and ends with the records of an undisturbed one
(`foveate.evaluation.run`). Questions about one image share its prefix (`foveate.vlm.prefix`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from ..base.errors import FoveateError
from ..base.memory import Size, out_of_memory
from ..core.method import Method, as_stack, text
from ..vlm.answering import answer_all, process_ahead
from ..vlm.vlm import VLM, Answer, Chat
from .benchmark import Benchmark, Record
from .run import RECORDS, RESULTS, Question, Run, Watch, environment, key, read_run, run_folders

__all__ = [
    "RECORDS",
    "RESULTS",
    "Asker",
    "Question",
    "Run",
    "evaluate",
    "key",
    "read_run",
    "run_folders",
]

Stack = tuple[Method, ...]
T = TypeVar("T")
R = TypeVar("R")


def evaluate(
    benchmarks: Sequence[Benchmark],
    vlm: VLM,
    methods: Sequence[str | Method | Stack],
    out: Path,
    *,
    root: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    shard: tuple[int, int] = (0, 1),
    seed: int = 0,
    share: bool = True,
    resume: bool = True,
    watch: Watch = lambda done, total, what: None,
) -> dict[str, Any]:
    """Ask every question with every method; the content of ``results.json``.

    Args:
        methods: text forms, methods, or stacks of them; "vanilla" is the plain model.
        out: the run's folder. A shard of several writes to ``shard-i-of-n`` in it.
        root: the folder with the user's data sets; None reads from the hub.
        limit: only the first so many questions of every split.
        batch_size: questions at a time; None = 64 on an accelerator, 32 on a CPU. Halved where
            memory does not suffice, and grown back (`foveate.base.memory.Size`).
        shard: (i, n): every n-th image, from the i-th on, counted from 0.
        seed: of torch's generator, for methods that draw from it.
        share: False asks one by one, as published code does.
        resume: go on with what the folder holds; False refuses a folder that holds records.
        watch: called with (questions done, of how many, what was asked).

    Raises:
        FoveateError: missing data, a folder with another configuration, a method that the model
            cannot be served with.
    """
    asker = Asker(vlm, methods, batch_size=batch_size, share=share)
    names, dtype = list(asker.stacks), str(vlm.model.dtype).removeprefix("torch.")
    torch.manual_seed(seed)
    with Run(
        benchmarks, vlm.name, dtype, names, out, revision=vlm.revision, commit=vlm.commit,
        root=root, limit=limit, shard=shard, seed=seed, resume=resume, watch=watch,
    ) as run:  # fmt: skip
        jobs = run.jobs(asker.size.most, share)
        for job, loaded in zip(jobs, _ahead(jobs, asker.load), strict=True):
            for name in run.missing(job):
                run.keep(asker.answer(loaded, name))
        return run.finish(environment(vlm.model.device))


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
        methods, batch_size, share: as in `evaluate`.

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
        self.vlm, self.share, self.stacks = vlm, share, dict[str, Stack]()
        if batch_size is not None and batch_size < 1:
            raise FoveateError(f"The batch size must be 1 or more, got {batch_size}.")
        self.size = Size(batch_size or (64 if vlm.model.device.type != "cpu" else 32))
        for given in methods:
            stack = as_stack(*(given if isinstance(given, tuple) else (given,)))
            if text(stack) in self.stacks:
                raise FoveateError(f"The method {text(stack)} is given twice: give it once.")
            with vlm.using(stack):  # refusals come before the first question
                self.stacks[text(stack)] = stack

    def load(self, job: list[Question]) -> Loaded:
        """Open the images of a job; may run beside the model, in another thread."""
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
                    opened[place] = _told(error)
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

    def answer(self, loaded: Loaded, method: str) -> list[Record]:
        """One record per question: an answer, or an error."""
        asked = [chat for chat in loaded.chats if isinstance(chat, Chat)]
        start, limit = time.perf_counter(), loaded.questions[0].limit  # one for the whole job
        found = answer_all(
            self.vlm, asked, self.stacks[method], limit,
            size=self.size, share=self.share,
        )  # fmt: skip
        ms, answers = 1e3 * (time.perf_counter() - start) / max(1, len(asked)), iter(found)
        records = []
        for question, chat in zip(loaded.questions, loaded.chats, strict=True):
            if isinstance(chat, str):
                records.append(as_record(question, method, chat, 0.0))
                continue
            answer = next(answers)
            told = answer if isinstance(answer, Answer) else _told(answer)
            records.append(as_record(question, method, told, ms))
        return records


def as_record(question: Question, method: str, answer: Answer | str, ms: float) -> Record:
    """The record of an answer, or of what went wrong."""
    sample, error = question.sample, answer if isinstance(answer, str) else None
    record: Record = {
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
        "error": error,
        "yes": None,
        "probability": None,
        "tokens": None,
        "ms": round(ms, 3),
        "notes": {},
    }
    if isinstance(answer, str):
        return record
    if any(map(math.isnan, answer.probabilities)):
        return record | {"error": "the model's logits are NaN: try another --dtype"}
    kinds = (str, int, float, bool, list, tuple, type(None))  # what JSON can hold of the notes
    return record | {
        "answer": answer.text,
        "yes": answer.yes,
        "probability": answer.probability,
        "tokens": len(answer.tokens),
        "notes": {k: v for k, v in answer.chat.notes.items() if isinstance(v, kinds)},
    }


def _ahead(jobs: list[T], load: Callable[[T], R]) -> Iterator[R]:
    """`load` of every job, in order, the next two already under way in the background."""
    pool = ThreadPoolExecutor(1, "foveate-images")
    try:
        waiting = [pool.submit(load, job) for job in jobs[:2]]
        for number in range(len(jobs)):
            if number + 2 < len(jobs):
                waiting.append(pool.submit(load, jobs[number + 2]))
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)


def _told(error: Exception) -> str:
    """An error in a record: a sentence as it is, another failure with its kind."""
    if isinstance(error, FoveateError):
        return str(error)
    return "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {error}"
