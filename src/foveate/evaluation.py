"""Evaluation: questions, asked with every method, answers appended to a journal, scores derived.

    results = evaluate([POPE()], VLM.load("pocket"), ["vanilla", "clvs"], Path("runs/x"), root=data)

A run that was killed goes on where it stopped, and ends with the records of an undisturbed one
(`foveate.run`). Questions about one image share its prefix (`foveate.shared`).
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from .benchmark import Benchmark, Record
from .form import FoveateError
from .method import Method, as_stack, text
from .run import RECORDS, RESULTS, Question, Run, Watch, environment, key, read_run, run_folders
from .shared import Prompts, ask_together, prepare, shareable
from .vlm import VLM, Answer, Chat

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
        batch_size: questions at a time; None = 64 on an accelerator, 32 on a CPU. Halved, and
            kept so, where memory does not suffice.
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
        jobs = run.jobs(asker.size, share)
        for job, loaded in zip(jobs, _ahead(jobs, asker.load), strict=True):
            for name in run.missing(job):
                run.keep(asker.answer(loaded, name))
        return run.finish(environment(vlm.model.device))


@dataclass
class Loaded:
    """Questions with their images opened.

    Attributes:
        chats: what to ask, or what is wrong with the question's image or text.
        prompts: the good chats as a shared prefix and suffixes, where they have one.
    """

    questions: list[Question]
    chats: list[Chat | str]
    prompts: Prompts | None


class Asker:
    """Puts jobs of questions to a model, with each of several methods.

    Args:
        methods, batch_size, share: as in `evaluate`.

    Attributes:
        stacks: the methods by their text form.
        size: questions at a time, for as long as memory suffices.

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
        self.size = batch_size or (64 if vlm.model.device.type != "cpu" else 32)
        if batch_size is not None and batch_size < 1:
            raise FoveateError(f"The batch size must be 1 or more, got {batch_size}.")
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
        prompts, good = None, [chat for chat in chats if isinstance(chat, Chat)]
        if self.share and good and shareable(self.vlm, good, ()):
            with contextlib.suppress(Exception):  # then it fails again where that is recorded
                prompts = prepare(self.vlm, good)
        return Loaded(job, chats, prompts)

    def answer(self, loaded: Loaded, method: str) -> list[Record]:
        """One record per question: an answer, or an error."""
        pairs = zip(loaded.questions, loaded.chats, strict=True)
        asked = [(q, c) for q, c in pairs if isinstance(c, Chat)]
        found = iter(self._attempt(asked, self.stacks[method], loaded.prompts))
        records = []
        for question, chat in zip(loaded.questions, loaded.chats, strict=True):
            answer, ms = next(found) if isinstance(chat, Chat) else (chat, 0.0)
            records.append(as_record(question, method, answer, ms))
        return records

    def _attempt(
        self, asked: list[tuple[Question, Chat]], stack: Stack, prompts: Prompts | None
    ) -> list[tuple[Answer | str, float]]:
        """Answers or errors, with milliseconds.

        Where memory does not suffice the batch is halved; after other failures, and where halving
        did not help, questions are asked one by one, so that only those fail that must.
        """
        size = self.size
        while asked:
            start = time.perf_counter()
            try:
                answers = self._together(asked, stack, prompts)
                ms = 1e3 * (time.perf_counter() - start) / len(asked)
                return [(answer, ms) for answer in answers]
            except Exception as error:
                starved, why = out_of_memory(error), _told(error)
            # the failure is forgotten by now, and with it the tensors that it held
            if starved:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            most = min(self.size, len(asked))
            if starved and most > 1:
                self.size = most // 2
                warnings.warn(
                    f"Memory is short: going on with {self.size} questions at a time.",
                    stacklevel=2,
                )
                continue
            if len(asked) == 1:
                return [(why, 1e3 * (time.perf_counter() - start))]
            found = [one for pair in asked for one in self._attempt([pair], stack, None)]
            if any(isinstance(answer, str) for answer, _ in found):
                self.size = size  # it was not the batch, but a question in it
            return found
        return []

    def _together(
        self, asked: list[tuple[Question, Chat]], stack: Stack, prompts: Prompts | None
    ) -> list[Answer]:
        """Answers in order: by a shared prefix where there is one, else as padded batches."""
        limit = asked[0][0].limit  # of the whole job
        wanted, found = self._rewritten([c for _, c in asked], stack), dict[int, Answer]()
        together = self.share and all(method.shares_prefix for method in stack)
        groups: dict[Hashable, list[int]] = {}  # of questions about the same images
        for row, chat in enumerate(wanted):
            seen = tuple(map(id, chat.images)) if together and chat.images else row
            groups.setdefault(seen, []).append(row)
        batches: dict[Hashable, list[int]] = {}  # of questions that share nothing
        for rows in groups.values():
            group, ready = [wanted[row] for row in rows], None
            if shareable(self.vlm, group, stack):
                ready = prompts if prompts is not None and prompts.of(group) else None
                ready = ready or prepare(self.vlm, group)
            if ready is not None:
                answers = ask_together(self.vlm, ready, stack, limit, self.size)
                found |= dict(zip(rows, answers, strict=True))
                continue
            for row in rows:
                batches.setdefault(wanted[row].kind if together else -row, []).append(row)
        for rows in batches.values():
            for i in range(0, len(rows), self.size):
                part = rows[i : i + self.size]
                answers = self.vlm.answer([wanted[r] for r in part], stack, limit)
                found |= dict(zip(part, answers, strict=True))
        return [found[row] for row in range(len(asked))]

    def _rewritten(self, chats: list[Chat], stack: Stack) -> list[Chat]:
        """Chats as the methods want them asked; all about one image are rewritten at once."""
        images: dict[int, list[int]] = {}
        for row, chat in enumerate(chats):
            images.setdefault(id(chat.images), []).append(row)
        found: dict[int, Chat] = {}
        for rows in images.values():
            new = self.vlm.rewrite([chats[row] for row in rows], stack)
            found |= dict(zip(rows, new, strict=True))
        return [found[row] for row in range(len(chats))]


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


def out_of_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(sign in said for sign in ("out of memory", "allocate memory", "alloc_failed"))
    )
