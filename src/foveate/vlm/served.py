"""A `VLM` whose answers come from vLLM: the same chats, methods and answers.

    vlm = ServedVLM.load("llava-hf/llava-1.5-7b-hf", tensor_parallel_size=2)
    vlm.batch([("a.jpg", "Is there a cup?"), ("b.jpg", "Is it red?")], "clvs")

Prompts are made here, with the processor of transformers. vLLM batches them, also those of several
threads, and shares the prefix of questions about one image. Methods that look again (ViCrop, CARVE,
LASER) read and crop here, and their readings are requests like all others.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature

from ..backends.transformers.record import Recorder
from ..backends.vllm import admission, compat
from ..backends.vllm.engine import Engine, Produced, Request
from ..backends.vllm.reading import Reader, as_text, joined, record
from ..base.errors import FoveateError
from ..core.method import Method
from ..core.method import methods as registered
from . import loading
from .chat import Answer, Chat
from .generation import generation_options
from .prefix import PROCESSORS
from .vlm import VLM, R, T

_THREADS = 32  # images whose questions are rewritten at a time
_SAMPLING = ("temperature", "top_k", "top_p")  # as vLLM calls them, too


class ServedVLM(VLM):
    """See the module. vLLM starts with the first question.

    `model` has no weights: it is the shape of what vLLM runs. Calls may come from several threads.

    Attributes:
        engine: vLLM.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        engine: Engine,
        name: str,
        revision: str | None = None,
        commit: str | None = None,
    ) -> None:
        super().__init__(model, processor, name, revision, commit)
        self.engine = engine

    @classmethod
    def load(  # type: ignore[override]
        cls,
        name: str | Path = "pocket",
        *,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> ServedVLM:
        """As `VLM.load`; the weights are loaded by vLLM.

        Args:
            dtype: default bfloat16, and float32 on CPUs. options: of `vllm.LLM`, such as
                `tensor_parallel_size`.

        Raises:
            FoveateError: also where vLLM is not installed, or its version is unknown.
        """
        compat.check_version()
        name = str(name)
        parts = loading.parts(name, revision)
        chosen: Any = loading.as_dtype(dtype, torch.device("cpu" if compat.on_cpus() else "cuda"))
        if chosen == "auto":
            chosen = parts.config.dtype or torch.float32
        model = admission.shape(parts.config).model.to(chosen)
        model.generation_config = parts.generation
        for setting, idle in PROCESSORS:
            if getattr(model.generation_config, setting, None) not in idle:
                raise FoveateError(
                    f"The checkpoint {name} decodes with {setting}, which foveate does not ask of "
                    "vLLM: use the engine plain."
                )
        given = {"dtype": str(chosen).removeprefix("torch."), "revision": revision} | options
        if parts.generation.repetition_penalty not in (None, 1.0):
            given = {"logprobs_mode": "processed_logprobs"} | given  # after the penalty, as here
        engine = Engine(_pocket() if name == "pocket" else parts.source, **given)
        return cls(model, parts.processor, engine, name, revision, loading.commit(name, revision))

    @property
    def source(self) -> dict[str, Any]:
        """Which model and engine this is, for files of results."""
        options = {k: v for k, v in self.engine.options.items() if k not in ("dtype", "revision")}
        return super().source | {"engine": {"name": "vllm", **options}}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if compat.on_cpus() else "cuda")

    @property
    def versions(self) -> dict[str, str]:
        return {"vllm": compat.version()}

    def inputs(self, chats: list[Chat]) -> BatchFeature:
        """Chats as one left-padded batch of tensors, on the CPU."""
        return self._tensors(chats)

    @contextlib.contextmanager
    def using(self, methods: tuple[Method, ...], chats: Sequence[Chat] = ()) -> Iterator[None]:
        """Refuse methods that cannot run inside vLLM; there is no model to change.

        Raises:
            FoveateError: says which engine can.
        """
        self.check(methods)
        yield

    def check(self, methods: tuple[Method, ...]) -> None:
        """Whether vLLM, and what runs here before it, can run these methods.

        Raises:
            FoveateError: says which engine can.
        """
        self._fitting(methods)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Answers come whole.

        Raises:
            FoveateError: always.
        """
        raise FoveateError("Answers of a ServedVLM come whole: use ask, or vLLM's own server.")

    def rewrite(self, chats: list[Chat], methods: tuple[Method, ...]) -> list[Chat]:
        self._fitting(methods)
        return super().rewrite(chats, methods)

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """As `VLM.each`, many at a time: what they ask goes through the model together."""
        if len(items) < 2:
            return super().each(work, items)
        with ThreadPoolExecutor(min(len(items), _THREADS), "foveate-many") as pool:
            return list(pool.map(work, items))

    def answer(
        self,
        chats: list[Chat],
        methods: tuple[Method, ...],
        max_new_tokens: int,
        *,
        rewritten: float = 0.0,
        inputs: BatchFeature | None = None,
        seeds: Sequence[int] | None = None,
        **generation: Any,
    ) -> list[Answer]:
        """Answers to chats as they are. Raises the first error; see `answer_each`."""
        answers = []
        given = self.answer_each(
            chats, methods, max_new_tokens, rewritten=rewritten, seeds=seeds, **generation
        )
        for answer in given:
            if isinstance(answer, Exception):
                raise answer
            answers.append(answer)
        return answers

    def answer_each(
        self,
        chats: list[Chat],
        methods: tuple[Method, ...],
        max_new_tokens: int,
        *,
        rewritten: float = 0.0,
        seeds: Sequence[int] | None = None,
        **generation: Any,
    ) -> list[Answer | Exception]:
        """Answers to chats as they are, or what went wrong with each.

        Args:
            methods: their `rewrite` has been run, which took `rewritten` seconds.
            seeds: of each chat's draws, where `generation` says `do_sample`.
        """
        acting, readers = self._fitting(methods)
        options = self._sampling(max_new_tokens, generation)
        start = time.perf_counter()
        asked = []
        for row, chat in enumerate(chats):
            own = options if seeds is None else options | {"seed": seeds[row]}
            prompt = self.prompt(chat)
            bos = self.tokenizer.bos_token  # most templates write it themselves
            special = not (bos and prompt.startswith(bos))
            asked.append(
                self.engine.submit(Request(prompt, special, chat.images, acting, readers, own))
            )
        answers: list[Answer | Exception] = []
        for chat, future in zip(chats, asked, strict=True):
            try:
                produced = future.result()
            except FoveateError as error:
                answers.append(error)
                continue
            seconds = (time.perf_counter() - start) / len(chats)
            timings = {"rewrite": rewritten / len(chats), "prepare": 0.0, "generate": seconds}
            answers.append(self._answer(chat, produced, timings))
        return answers

    def _answer(self, chat: Chat, produced: Produced, timings: dict[str, float]) -> Answer:
        ends = self._ends
        kept = [t for t in produced.tokens if t not in ends]
        logs, notes = produced.logs, produced.notes
        seen = record(notes)
        for step in notes:
            for name, found in step.items():
                chat.notes.setdefault(name, []).extend(found)
        return Answer(
            text=self._decode(kept, skip_special_tokens=True).strip(),
            tokens=tuple(self._decode([token]) for token in kept),
            probabilities=tuple(
                torch.tensor([log[t] for log, t in zip(logs, kept, strict=False)]).exp().tolist()
            ),
            yes=self._yes_of(logs[0]) if chat.asks_yes_or_no and logs else None,
            timings=timings,
            chat=chat,
            record=seen,
        )

    def _yes_of(self, logs: dict[int, float]) -> float | None:
        yes, no = self._spellings
        if not yes or not no:
            return None
        total = [torch.tensor([logs[token] for token in ids]).logsumexp(0) for ids in (yes, no)]
        return torch.sigmoid(total[0] - total[1]).item()

    @property
    def _ends(self) -> list[int]:
        """The ids of end tokens."""
        ends = self.model.generation_config.eos_token_id
        return list(ends) if isinstance(ends, (list, tuple)) else [ends] * (ends is not None)

    def _sampling(self, max_new_tokens: int, generation: dict[str, Any]) -> dict[str, Any]:
        """Arguments of vLLM's `SamplingParams`."""
        options = generation_options(self.model, self.tokenizer, max_new_tokens, generation)
        sampled = options.pop("do_sample")
        given = {k: v for k in _SAMPLING if (v := options.pop(k, None)) is not None}
        options.pop("pad_token_id"), options.pop("max_new_tokens")
        if options:
            raise FoveateError(
                f"foveate does not ask vLLM for {next(iter(options))}: leave it out, or use the "
                "engine plain."
            )
        penalty = self.model.generation_config.repetition_penalty
        yes, no = self._spellings
        return {
            **(given if sampled else {"temperature": 0.0}),
            "max_tokens": max_new_tokens,
            "repetition_penalty": penalty or 1.0,
            "stop_token_ids": self._ends,
            "ignore_eos": True,  # the tokenizer's, which may be another: these are generate's
            **({"logprob_token_ids": [*yes, *no]} if yes or no else {"logprobs": 0}),
        }

    def _fitting(
        self, methods: tuple[Method, ...]
    ) -> tuple[tuple[Method, ...], tuple[Method, ...]]:
        """Of methods whose `rewrite` is run here, those that act inside vLLM; and the readers.

        Raises:
            FoveateError: one cannot run.
        """
        stack = tuple(method for method in methods if method.stages and not method.is_neutral)
        readers = tuple(map(_as_reader, (m for m in stack if _reads(m))))
        named = [m for m in stack if not _reads(m)]
        acting = tuple(m for m in named if m.edits_attention or not m.wants("rewrite"))
        for method in named:
            admission.fitting(method, ahead=True)
            if method in acting and not _installed(type(method)):
                raise FoveateError(
                    f"{method.name} is defined in this program, and vLLM's processes do not see "
                    "it: install it as a plug-in, or use the engine plain."
                )
        if acting or readers:
            compat.refuse_other_devices()
        asked = joined("+".join(map(str, acting)), as_text(readers) if readers else "")
        admission.checked(asked, admission.shape(self.model.config))
        return acting, readers


def _reads(method: Method) -> bool:
    """Whether this is a reader, which is no method that a text can name."""
    named = registered().get(method.name) is type(method)
    return not named and bool({"before", "weights"} & method.stages)


def _installed(cls: type[Method]) -> bool:
    """Whether every process finds the class: it is foveate's, or a plug-in's."""
    places = [entry.module for entry in entry_points(group="foveate.methods")]
    owners = {place.partition(".")[0] for place in (*places, "foveate.methods")}
    return cls.__module__.partition(".")[0] in owners


@functools.cache
def _pocket() -> str:
    """The folder of the pocket model for vLLM, until this program ends."""
    folder = tempfile.mkdtemp(prefix="foveate-pocket-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(loading.pocket_for_vllm(Path(folder)))


def _as_reader(method: Method) -> Method:
    if not isinstance(method, Recorder):
        return method
    return Reader(layers=method.layers, heads=method.heads, steps=method.steps)
