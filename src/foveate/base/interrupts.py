"""Ctrl-C that waits until what is being entered or left is so as a whole.

    @whole
    def edited(model): ...; yield; ...    # as `contextlib.contextmanager`

Python raises KeyboardInterrupt between any two instructions of the main thread, also between the
steps that restore something. Inside such a block another handler of SIGINT stands before the usual
one. It looks where the main thread is: between entering and leaving it does what the usual one
does; while the block is entered or left it notes the signal, which is raised when that is done. A
block whose entering was interrupted is undone before.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_waits: set[CodeType] = set()  # in these functions and what they call, Ctrl-C waits
_passes: set[CodeType] = set()  # unless one of these was called from there


def interruptible(function: F) -> F:
    """A part of entering that may take its time and leaves nothing to undo: Ctrl-C ends it."""
    _passes.add(function.__code__)  # type: ignore[attr-defined]
    return function


def whole(make: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """`contextlib.contextmanager` whose entering and leaving Ctrl-C does not cut in two."""
    managed = contextmanager(make)

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Whole(make.__name__, managed(*args, **kwargs))

    return made


@contextmanager
def taken(lock: Any) -> Iterator[None]:
    """Hold a lock (not a recursive one); Ctrl-C ends the waiting for it."""
    while not lock.acquire(blocking=False):
        _wait_for(lock)
    try:
        yield
    finally:
        lock.release()


@interruptible
def _wait_for(lock: Any) -> None:
    """Wait until nobody holds a lock, without keeping it."""
    with lock:
        pass


class Stop(AbstractContextManager["Stop"]):
    """Inside the block the first Ctrl-C only sets `asked`; a second one ends at once.

    For loops that finish a step and save it before they stop. Outside of the main thread Ctrl-C
    does what it always does.
    """

    def __init__(self, said: str) -> None:
        self.said, self.asked = said, False
        self.usual: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self.usual = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.usual is not None:
            signal.signal(signal.SIGINT, self.usual)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\nfoveate: {self.said}; Ctrl-C again stops at once", file=sys.stderr, flush=True)


class _Handler:
    """Stands before the usual handler of SIGINT while blocks are open."""

    def __init__(self, usual: Callable[[int, FrameType | None], Any]) -> None:
        self.usual, self.blocks, self.came = usual, 0, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _must_wait(frame):
            self.came = True
        else:
            self.usual(number, frame)

    @interruptible
    def deliver(self, frame: FrameType | None) -> None:
        """Do what has waited, unless `frame` is itself inside an entering or leaving."""
        if self.came and not _must_wait(frame):
            self.came = False
            self.usual(signal.SIGINT, frame)


def _must_wait(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _passes:
        if frame.f_code in _waits:
            return True
        frame = frame.f_back
    return False


def _install() -> _Handler | None:
    """The handler, in place; None outside of the main thread or where nothing would be raised."""
    if threading.current_thread() is not threading.main_thread():
        return None
    usual: Any = signal.getsignal(signal.SIGINT)
    if isinstance(usual, _Handler):
        handler = usual
    elif callable(usual):
        handler = _Handler(usual)
        signal.signal(signal.SIGINT, handler)
    else:
        return None
    handler.blocks += 1
    return handler


def _remove(handler: _Handler | None, frame: FrameType | None) -> None:
    """A block is over: the last one puts the usual handler back. Raises what has waited."""
    if handler is None:
        return
    handler.blocks -= 1
    now: Any = signal.getsignal(signal.SIGINT)
    if not handler.blocks and now is handler:
        signal.signal(signal.SIGINT, handler.usual)
    handler.deliver(frame)


class _Whole(AbstractContextManager[T], Generic[T]):
    used = True  # until it is made

    def __init__(self, name: str, inner: AbstractContextManager[T]) -> None:
        self.name, self.inner = name, inner
        self.handler: _Handler | None = None
        self.used = False

    def __repr__(self) -> str:
        return f"<{self.name}(...), which acts inside a block: with {self.name}(...): ...>"

    def __del__(self) -> None:
        if not self.used:
            warnings.warn(
                f"{self.name}(...) has done nothing, because no block was opened: write "
                f"`with {self.name}(...):` and work inside it.",
                stacklevel=2,
            )

    def __enter__(self) -> T:
        self.used = True
        outside, entered = sys._getframe().f_back, False
        self.handler = _install()
        try:
            given = self.inner.__enter__()
            entered = True
            if self.handler:
                self.handler.deliver(outside)
        except BaseException as error:
            try:
                if entered:
                    self.inner.__exit__(type(error), error, error.__traceback__)
            finally:
                _remove(self.handler, outside)
            raise
        return given

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        try:
            return self.inner.__exit__(kind, error, trace)
        finally:
            _remove(self.handler, sys._getframe().f_back)


_waits |= {_Whole.__enter__.__code__, _Whole.__exit__.__code__}
