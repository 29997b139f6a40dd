"""vLLM inside this program: requests from any thread, answered by continuous batching.

One thread feeds the engine and turns its steps. Others submit requests, and wait for their answers:
whatever is waiting at a time goes through the model together.
"""

from __future__ import annotations

import atexit
import os
import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.errors import FoveateError
from ...core.method import Method, text
from . import compat
from .asked import KEY
from .orphans import FRONT
from .reading import FOLDER, READ, as_text, collect


@dataclass(frozen=True)
class Request:
    """One prompt for the engine.

    Attributes:
        prompt: in the model's template. special: whether the tokenizer adds its special tokens.
        pictures: for its image placeholders, in order.
        methods: that act inside vLLM. readers: whose notes are wanted, besides.
        sampling: further arguments of vLLM's `SamplingParams`.
    """

    prompt: str
    special: bool
    pictures: Sequence[Any]
    methods: tuple[Method, ...]
    readers: tuple[Method, ...]
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Produced:
    """What the engine made of a request.

    Attributes:
        prompt: the prompt's token ids, those of images included.
        tokens: the ids produced, with the end token where it came.
        logs: per token, the log-probabilities of it and of the ids that were asked for.
        notes: per token, what the readers left.
    """

    prompt: list[int]
    tokens: list[int]
    logs: list[dict[int, float]]
    notes: list[dict[str, Any]]


class Stopped(FoveateError):
    """vLLM answers no more."""


class Engine:
    """A running vLLM. Its first request starts it, in a thread of its own; it starts once.

    Args:
        model: a folder or a hub name. options: of `vllm.LLM`.

    Raises:
        FoveateError: vLLM is not installed, or foveate is switched off in it.
    """

    def __init__(self, model: str, **options: Any) -> None:
        compat.check_version()
        compat.refuse_switched_off()
        self.model, self.options = model, options
        self.folder: Path | None = None
        self._inbox: queue.SimpleQueue[tuple[Request, Future[Produced]] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        self._failure: Stopped | None = None
        self._lock = threading.Lock()

    def submit(self, request: Request) -> Future[Produced]:
        """The answer to a request, when it comes.

        The future raises `FoveateError` where the request is refused, `Stopped` where vLLM stops.
        """
        answer: Future[Produced] = Future()
        with self._lock:
            if self._failure is not None:
                answer.set_exception(self._failure)
                return answer
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="foveate-vllm", daemon=True)
                self._thread.start()
            self._inbox.put((request, answer))
        return answer

    def close(self) -> None:
        """Stop the engine for good. Whatever is not answered then fails."""
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()

    # -- in the engine's thread --------------------------------------------------------------------

    def _run(self) -> None:
        self._asked: dict[str, tuple[Request, Future[Produced], Path]] = {}
        llm = None
        try:
            llm = self._start()
            while self._take_in(llm):
                for output in llm.llm_engine.step():
                    if output.finished:
                        self._finish(output)
            failure = Stopped("vLLM was stopped before it had answered.")
        except Exception as error:
            failure = _sentence(error)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        with self._lock:
            self._failure = failure
            waiting = [answer for _, answer, _ in self._asked.values()]
            while not self._inbox.empty():
                left = self._inbox.get()
                waiting += [left[1]] if left else []
        for answer in waiting:
            answer.set_exception(failure)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> Any:
        shared = Path("/dev/shm")  # memory, where there is one
        place = shared if os.access(shared, os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="foveate-readings-", dir=place))
        os.environ[FOLDER] = str(self.folder)  # its processes are started with these
        os.environ[FRONT] = str(os.getpid())
        atexit.register(self.close)  # vLLM then ends what it has started, and is not killed
        # this thread is not the program's first: its copy must not be another's in the middle
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        from vllm import LLM

        return LLM(self.model, **self.options)

    def _take_in(self, llm: Any) -> bool:
        """Add what is waiting to the engine; waits itself where there is nothing else to do."""
        from vllm.exceptions import VLLMValidationError as refusal

        while True:
            try:
                item = self._inbox.get(block=not self._asked)
            except queue.Empty:
                return True
            if item is None:
                return False
            request, answer = item
            assert self.folder is not None
            path = self.folder / uuid.uuid4().hex
            try:
                number = _add(llm, request, path.name)
            except (ValueError, refusal) as error:
                answer.set_exception(FoveateError(f"vLLM refuses the request: {error}"))
            else:
                self._asked[number] = request, answer, path

    def _finish(self, output: Any) -> None:
        request, answer, path = self._asked.pop(output.request_id)
        done = output.outputs[0]
        tokens = list(done.token_ids)
        logs = [{t: log.logprob for t, log in step.items()} for step in done.logprobs or ()]
        try:
            notes = collect(path, len(tokens)) if request.readers else []
            answer.set_result(Produced(list(output.prompt_token_ids), tokens, logs, notes))
        except Exception as error:
            answer.set_exception(error)


def _add(llm: Any, request: Request, name: str) -> str:
    """Give a request to the engine; the number that its outputs will have."""
    from vllm import SamplingParams

    extra: dict[str, Any] = {KEY: text(request.methods)} if request.methods else {}
    if request.readers:
        extra[READ] = {"file": name, "readers": as_text(request.readers)}
    prompt: dict[str, Any] = {"prompt": request.prompt}
    if request.pictures:
        prompt["multi_modal_data"] = {"image": list(request.pictures)}
    (number,) = llm.enqueue(
        [prompt],
        [SamplingParams(**request.sampling, detokenize=False, extra_args=extra or None)],
        use_tqdm=False,
        tokenization_kwargs={"add_special_tokens": request.special},
    )
    return number.partition("-")[0]  # vLLM makes it unique inside by a suffix


def _sentence(error: Exception) -> Stopped:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[-1].strip().rstrip(".")
    return Stopped(f"vLLM has stopped ({type(error).__name__}: {reason}): its log says more.")
