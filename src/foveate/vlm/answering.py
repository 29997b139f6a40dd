"""Questions to answers, as many at a time as memory allows.

    for result in answer_all(vlm, chats, as_stack("clvs"), max_new_tokens=16):
        print(result.text if isinstance(result, Answer) else f"failed: {result}")

Methods rewrite the questions. Questions about one image share its prefix (`foveate.vlm.prefix`),
others form left-padded batches. Where memory is short, fewer are asked at a time
(`foveate.base.memory`). vLLM gets all questions at once, and does all this by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..backends.vllm.engine import Stopped
from ..base.memory import Size, out_of_memory, release
from ..core.method import Method
from .chat import Answer, Chat
from .prefix import Prompts, ask_together, prepare, same_images
from .served import ServedVLM
from .vlm import VLM

T = TypeVar("T")
Results = dict[int, Answer | Exception]  # by the question's place among those asked


class Unwanted(Exception):
    """Nobody waits for this answer any more."""


class Decoding:
    """How `generate` decodes a batch: here greedily. Rows are places among the chats asked."""

    def wanted(self, row: int) -> bool:
        """Whether somebody still waits for this answer; asked before every attempt."""
        return True

    def options(self, rows: list[int]) -> dict[str, Any]:
        """Further arguments of `generate` for these rows; asked for at every attempt."""
        return {}

    def seeds(self, rows: list[int]) -> list[int] | None:
        """What each row's draws start from, in an engine where every answer has its own."""
        return None

    def failed(self, row: int, error: Exception) -> None:
        """Called as soon as a question has failed for good, while others are still asked."""


def answer_all(
    vlm: VLM,
    chats: Sequence[Chat],
    methods: tuple[Method, ...] = (),
    max_new_tokens: int = 16,
    *,
    size: Size | None = None,
    share: bool = True,
    decoding: Decoding | None = None,
) -> list[Answer | Exception]:
    """Answers to questions about any images, in order. A question that failed has its error.

    A batch that runs out of memory is halved, down to one question. `size` decides how many later
    calls ask at a time. After other failures, and where halving did not help, the questions are
    asked one by one, so that a bad question fails alone.

    Args:
        methods: their `rewrite` is run here, once for all chats about the same images.
        size: how many at a time. None = `vlm.size`, which all reading passes of this model use.
        share: let questions about one image share its prefix, and batch all others by kind. Where
            the question changes image rows (`Method.shares_prefix` is False), each is asked alone.
            False asks one by one, as published code does.
        decoding: how batches are decoded. It needs `generate`, which shared prefixes do without:
            all questions then form padded batches, with any methods.
    """
    shares = share and decoding is None and all(method.shares_prefix for method in methods)
    pads = shares or (share and decoding is not None)
    call = _Call(vlm, methods, max_new_tokens, size or vlm.size, decoding or Decoding(), shares)
    rewritten = call.rewritten(chats)
    ready = {row: chat for row, chat in rewritten.items() if isinstance(chat, Chat)}
    answers: Results = {row: e for row, e in rewritten.items() if isinstance(e, Exception)}
    if isinstance(vlm, ServedVLM):
        answers |= call.asked_at_once(vlm, ready)
        return [answers[row] for row in range(len(chats))]
    batches: dict[Hashable, list[int]] = {}  # of questions that share nothing
    for rows in _grouped(ready, lambda row: (shares and _images(ready[row])) or row):
        prompts = call.prepared([ready[row] for row in rows])
        if prompts is not None:
            answers |= call.asked(rows, ready, prompts)
            continue
        for row in rows:
            batches.setdefault(ready[row].kind if pads else -1 - row, []).append(row)
    for rows in batches.values():
        answers |= call.asked(rows, ready)
    call.size.end()
    return [answers[row] for row in range(len(chats))]


def process_ahead(vlm: VLM, chats: Sequence[Chat], stacks: Iterable[tuple[Method, ...]]) -> None:
    """Process the image that all these chats are about, for `answer_all` to use later.

    Does nothing where `answer_all` would not: with chats about several images, or where every
    stack rewrites the chats or lets the question change image rows. May run in another thread
    while the model answers.
    """

    if isinstance(vlm, ServedVLM):  # which processes images itself
        return

    def plain(method: Method) -> bool:
        return method.shares_prefix and (method.is_neutral or not method.wants("rewrite"))

    if same_images(chats) and any(all(map(plain, stack)) for stack in stacks):
        vlm.processed(chats[0])


def complete(results: Iterable[Answer | Exception]) -> list[Answer]:
    """Answers of `answer_all`. Raises the first error, where there is one."""
    answers = []
    for result in results:
        if isinstance(result, Exception):
            raise result
        answers.append(result)
    return answers


@dataclass(frozen=True)
class _Call:
    """One call of `answer_all`."""

    vlm: VLM
    methods: tuple[Method, ...]
    limit: int
    size: Size
    decoding: Decoding
    shares: bool  # whether questions about one image share its prefix

    def prepared(self, chats: list[Chat]) -> Prompts | None:
        """The chats on a shared prefix, where they have one. What fails here fails again when the
        questions are asked one by one, and is then told of the right question."""
        prompts = _tried(lambda: prepare(self.vlm, chats, self.methods)) if self.shares else None
        return None if isinstance(prompts, Exception) else prompts

    def rewritten(self, chats: Sequence[Chat]) -> dict[int, Chat | Exception]:
        """Chats as the methods want them asked."""

        def conversation(row: int) -> Hashable:
            chat = chats[row]
            return (_images(chat), chat.system, chat.earlier) if chat.images else row

        def rewrite(rows: list[int]) -> dict[int, Chat | Exception]:
            new = _tried(lambda: self.vlm.rewrite([chats[row] for row in rows], self.methods))
            if isinstance(new, Stopped):
                raise new
            if not isinstance(new, Exception):
                return dict(zip(rows, new, strict=True))
            if len(rows) == 1:
                self.decoding.failed(rows[0], new)
                return {rows[0]: new}
            return {row: one for each in rows for row, one in rewrite([each]).items()}

        groups = list(_grouped(range(len(chats)), conversation))
        return {row: one for new in self.vlm.each(rewrite, groups) for row, one in new.items()}

    def asked_at_once(self, vlm: ServedVLM, chats: dict[int, Chat]) -> Results:
        """Answers of an engine that batches by itself, and where a question fails alone.

        Raises:
            Stopped: it answers no more.
        """
        results = Results()
        rows = [row for row in chats if self.decoding.wanted(row)]
        results |= {row: Unwanted() for row in chats if row not in rows}
        answers = vlm.answer_each(
            [chats[row] for row in rows],
            self.methods,
            self.limit,
            seeds=self.decoding.seeds(rows),
            **(self.decoding.options(rows) if rows else {}),
        )
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, Stopped):
                raise answer
            if isinstance(answer, Exception):
                self.decoding.failed(row, answer)
            results[row] = answer
        return results

    def asked(
        self, rows: list[int], chats: dict[int, Chat], prompts: Prompts | None = None
    ) -> Results:
        """Answers to chats of one kind, or to all of these prompts on their prefix."""
        results, size, before = Results(), self.size, self.size.now
        while rows:
            batch = rows if prompts else rows[: size.now]
            if gone := [row for row in batch if not self.decoding.wanted(row)]:
                results |= {row: Unwanted() for row in gone}
                rows = [row for row in rows if row not in gone]
                continue
            new = _tried(lambda: self._answers(batch, chats, prompts))  # noqa: B023
            if not isinstance(new, Exception):
                results |= dict(zip(batch, new, strict=True))
                rows = rows[len(batch) :]
                continue
            starved = out_of_memory(new)
            if starved and size.halve(len(batch)):
                _warn(f"Memory is short: going on with {size.now} questions at a time.")
                continue
            alone = rows if starved else batch
            if len(alone) == 1:
                self.decoding.failed(alone[0], new)
                results[alone[0]] = new
            else:
                _warn(f"{type(new).__name__}: {len(alone)} questions are now asked one by one.")
                for row in alone:
                    results |= self.asked([row], chats)
            if starved and any(isinstance(results[row], Exception) for row in alone):
                size.restore(before)
            rows = rows[len(alone) :]
        return results

    def _answers(
        self, rows: list[int], chats: dict[int, Chat], prompts: Prompts | None
    ) -> list[Answer]:
        if prompts is not None:
            return ask_together(self.vlm, prompts, self.methods, self.limit, self.size.now)
        group = [chats[row] for row in rows]
        inputs = self.vlm.processed(group[0]) if self.shares and len(group) == 1 else None
        options = self.decoding.options(rows)
        return self.vlm.answer(group, self.methods, self.limit, inputs=inputs, **options)


def _grouped(rows: Iterable[int], key: Callable[[int], Hashable]) -> Iterable[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups.values()


def _images(chat: Chat) -> tuple[int, ...]:
    return tuple(map(id, chat.images))


def _tried(work: Callable[[], T]) -> T | Exception:
    """What `work` returns or raises. An exception has let go of its tensors."""
    try:
        return work()
    except Exception as error:
        failure = error
    release(failure)
    return failure


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
