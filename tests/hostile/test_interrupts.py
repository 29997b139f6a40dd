"""Ctrl-C at any moment of entering, using and leaving a block: the model is the one from before.

The generator sends SIGINT at every line that Python runs while a block is entered and left, one
line per block, so that none is left to chance; and, as a timer would, at random moments.
"""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import foveate
from foveate import VLM, enhance
from foveate.backends.transformers import compat, rotary
from foveate.backends.transformers import enhance as enhancing
from foveate.backends.transformers.attention import _users
from foveate.backends.transformers.enhance import _enhanced
from foveate.base import interrupts
from foveate.base.interrupts import whole
from foveate.core.method import as_stack
from tests import models, tiny
from tests.hostile import TRIES

STACKS = ["clvs", "vcd", "clvs+vcd", "dola+pai"]


@pytest.fixture(autouse=True)
def usual() -> Iterator[Any]:
    """Python's own handler; it stands again after every test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    torch.set_grad_enabled(True)  # an interrupt inside PyTorch's own `no_grad` may leave it off
    now = signal.signal(signal.SIGINT, before)
    assert now is signal.default_int_handler, "a handler was left"


class Model:
    """A model, what it is outside of a block, and whether it is so again."""

    def __init__(self, family: str = "llava") -> None:
        self.model = models.build(family, fresh=True)
        self.inputs = models.inputs(family)
        self.logits = self.answer()
        self.before = self.state()

    def answer(self) -> Any:
        with torch.no_grad():
            return self.model(**self.inputs).logits

    def state(self) -> Any:
        hooks = [
            (tuple(m._forward_hooks), tuple(m._forward_pre_hooks)) for m in self.model.modules()
        ]
        name = compat.attention_name(self.model.get_decoder())
        return hooks, name, dict(vars(self.model)), signal.getsignal(signal.SIGINT), dict(_users)

    def check(self, exact: bool = False) -> None:
        assert self.state() == self.before
        assert self.model.get_decoder() not in _enhanced
        if exact:
            assert torch.equal(self.answer(), self.logits)


STEPS = (interrupts._Whole.__enter__.__code__, interrupts._Whole.__exit__.__code__)
LONG = enhancing._prepared.__code__  # thousands of lines that change nothing
FILES = (str(Path(foveate.__file__).parent), contextlib.__file__)


class AtLine:
    """A tracer that raises SIGINT at the n-th line of entering and leaving.

    Counted are the lines of this package and of contextlib, and every call of others.

    Args:
        within: count only what these call.
    """

    def __init__(self, number: int, within: tuple[CodeType, ...] = STEPS) -> None:
        self.left, self.within = number, within
        self.depth, self.asleep, self.at = 0, False, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.asleep or not (self.depth or frame.f_code in self.within):
            return None
        self.count(frame)
        if frame.f_code is LONG:
            self.asleep = True
            return self.wake
        if not frame.f_code.co_filename.startswith(FILES):
            return None
        self.depth += 1
        return self.line

    def wake(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.asleep = event != "return"
        return self.wake

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count(frame)
        elif event == "return":
            self.depth -= 1
        return self.line

    def count(self, frame: FrameType) -> None:
        self.left -= 1
        if self.left == 0:
            self.at = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def traced(tracer: AtLine) -> Iterator[None]:
    usual = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(usual)


def interrupted(tracer: AtLine, block: Callable[[], None]) -> bool:
    """Whether Ctrl-C came out of a block; an interrupt that is swallowed is an error."""
    try:
        with traced(tracer):
            block()
    except KeyboardInterrupt:
        assert tracer.left <= 0
        return True
    assert tracer.left > 0, f"the interrupt at {tracer.at} was lost"
    return False


def at_every_line(block: Callable[[], None], check: Callable[[], None], step: int = 1) -> int:
    """Interrupt a block once at every `step`-th line of its entering and leaving."""
    number = 1
    while interrupted(AtLine(number), block):
        check()
        number += step
    check()
    return number


@pytest.mark.parametrize("stack", STACKS)
def test_at_lines_of_entering_and_leaving(stack: str) -> None:
    """One in thirty lines, others for every stack; `make test-slow` takes all."""
    case, methods = Model(), as_stack(stack)

    def block() -> None:
        with enhance(case.model, *methods):
            pass

    lines = at_every_line(block, case.check, step=31 + STACKS.index(stack))
    assert lines > 300
    case.check(exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("stack", STACKS)
def test_at_every_line_of_entering_and_leaving(stack: str, family: str, fails: bool) -> None:
    case, methods = Model(family), as_stack(stack)

    def block() -> None:
        with contextlib.suppress(ZeroDivisionError), enhance(case.model, *methods):
            if fails:
                raise ZeroDivisionError

    assert at_every_line(block, case.check, step=max(1, 10_000 // TRIES)) > 300
    case.check(exact=True)


def test_looking_how_keys_turn_leaves_attention_as_it_was() -> None:
    case = Model()
    decoder = case.model.get_decoder()

    def block() -> None:
        rotary._turning.clear()
        rotary.turns(case.model, decoder, 0, torch.device("cpu"))

    assert at_every_line(block, case.check) > 20
    case.check(exact=True)


def test_before_the_first_line_of_leaving() -> None:
    """What a handler that is only set while leaving would miss."""
    case = Model()

    def block() -> None:
        with enhance(case.model, "clvs"):
            pass

    gc.disable()  # a generator that was left open must not be closed by luck
    try:
        assert interrupted(AtLine(1, STEPS[1:]), block)
        case.check(exact=True)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "step", [97, pytest.param(max(1, 10_000 // TRIES), marks=pytest.mark.slow)]
)
def test_nested_blocks_of_two_models(step: int) -> None:
    cases, (first, second) = [Model(), Model("qwen2_5_vl")], as_stack("clvs+vcd")

    def block() -> None:
        with enhance(cases[0].model, first), enhance(cases[1].model, second):
            pass

    def check() -> None:
        for case in cases:
            case.check()

    assert at_every_line(block, check, step) > 200
    for case in cases:
        case.check(exact=True)


def test_a_block_is_interrupted_at_once_inside() -> None:
    case, reached = Model(), []
    try:
        with enhance(case.model, "clvs"):
            reached.append(1)
            signal.raise_signal(signal.SIGINT)
            reached.append(2)
    except KeyboardInterrupt:
        reached.append(3)
    assert reached == [1, 3]
    case.check(exact=True)


def test_asking_is_restored_too() -> None:
    vlm = tiny.vlm()

    def block() -> None:
        with vlm.using(()):
            pass

    def check() -> None:
        assert vlm._using is None
        assert vlm._one_at_a_time.acquire(blocking=False)
        vlm._one_at_a_time.release()

    assert at_every_line(block, check) > 20


def test_waiting_for_another_thread_can_be_interrupted() -> None:
    vlm: VLM = tiny.vlm()
    taken, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with vlm.using(()):
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    taken.wait(60)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt), vlm.using(()):
        pass
    assert not done.is_set()
    done.set()
    thread.join()
    with vlm.using(()):
        pass


@pytest.mark.parametrize("raises", [False, True])
def test_a_handler_of_ones_own_is_called_and_comes_back(raises: bool) -> None:
    calls = []

    def own(number: int, frame: FrameType | None) -> None:
        calls.append(number)
        if raises:
            raise ConnectionAbortedError

    signal.signal(signal.SIGINT, own)
    case = Model()
    for when in ("enter", "inside", "leave"):

        @whole
        def block(when: str = when) -> Iterator[None]:
            if when == "enter":
                signal.raise_signal(signal.SIGINT)
            with enhance(case.model, "clvs"):
                yield
                if when == "leave":
                    signal.raise_signal(signal.SIGINT)

        reached = False
        with contextlib.suppress(ConnectionAbortedError), block():
            if when == "inside":
                signal.raise_signal(signal.SIGINT)
            reached = True
        assert reached == (not raises or when == "leave")
        case.check()
    assert calls == [signal.SIGINT] * 3
    assert signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_who_ignores_interrupts_goes_on_doing_so(ignored: Any) -> None:
    signal.signal(signal.SIGINT, ignored)
    case = Model()
    with enhance(case.model, "clvs"):
        assert signal.getsignal(signal.SIGINT) is ignored
    case.check(exact=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_sets_no_handler() -> None:
    case, seen = Model(), []

    def elsewhere() -> None:
        with enhance(case.model, "clvs"):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    case.check(exact=True)


def signalled(case: Model, tries: int, seed: int) -> int:
    """Blocks with a forward, each with a signal at a random moment; how many were interrupted."""
    rng, came = random.Random(seed), 0
    try:
        for number in range(tries):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 8e-3))
                with enhance(case.model, STACKS[number % len(STACKS)]):
                    if number % 4 == 0:
                        case.answer()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                came += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            case.check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return came


@pytest.mark.parametrize("tries", [60, pytest.param(TRIES, marks=pytest.mark.slow)])
def test_at_random_moments(tries: int) -> None:
    """A timer's signal becomes Ctrl-C, as `kill -INT` would send it."""
    alarm = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        case = Model()
        came = signalled(case, tries, seed=tries)
        case.check(exact=True)
    finally:
        signal.signal(signal.SIGALRM, alarm)
    assert came > tries // 20
