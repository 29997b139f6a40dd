"""Every place of vLLM that foveate replaces for second streams; see `compat` and `twins`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .compat import _replace


def install() -> None:
    """Put second streams into this process."""
    _birth()
    _scheduler()
    _tokens()


def _birth() -> None:
    """Where the engine has made a request of what a front end sent."""
    from vllm.v1.engine.core import EngineCore

    from .twins import couple

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def preprocess_add_request(self: Any, request: Any) -> Any:
            made, wave = plain(self, request)
            couple(self, made, made._block_hasher)
            return made, wave

        return preprocess_add_request

    _replace(EngineCore, "preprocess_add_request", ("self", "request"), wrap)


def _scheduler() -> None:
    """Where the scheduler takes requests, plans a step, and lets requests go."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from . import twins

    def adding(plain: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(self: Any, request: Any) -> None:
            twins.add(plain, self, request)

        return add_request

    def planning(plain: Callable[..., Any]) -> Callable[..., Any]:
        def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
            def preempt(request: Any) -> None:
                self._preempt_request(request, time.monotonic())

            return twins.schedule(plain, preempt, self, *args, **kwargs)

        return schedule

    def planned(plain: Callable[..., Any]) -> Callable[..., Any]:
        def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
            twins.release(self)
            plain(self, scheduler_output)

        return _update_after_schedule

    def finishing(plain: Callable[..., Any]) -> Callable[..., Any]:
        def finish_requests(self: Any, request_ids: Any, finished_status: Any) -> Any:
            return twins.finish(plain, self, request_ids, finished_status)

        return finish_requests

    _replace(Scheduler, "add_request", ("self", "request"), adding)
    _replace(Scheduler, "schedule", ("self", "throttle_prefills"), planning)
    _replace(Scheduler, "_update_after_schedule", ("self", "scheduler_output"), planned)
    asked = ("self", "request_ids", "finished_status")
    _replace(Scheduler, "finish_requests", asked, finishing)


def _tokens() -> None:
    """Where a worker has sampled the next tokens; of the V1 runner."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from .logits import say_the_same

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
            out = plain(self, logits, spec_decode_metadata)
            say_the_same(out.sampled_token_ids)
            return out

        return _sample

    _replace(GPUModelRunner, "_sample", ("self", "logits", "spec_decode_metadata"), wrap)
