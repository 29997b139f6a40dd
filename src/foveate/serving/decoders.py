"""Pictures of strangers are decoded in processes of their own, with a limit on time and memory.

A process that takes too long, or dies, costs its picture and is replaced. Each runs `main` of this
file, which imports Pillow and numpy, and neither torch nor the server.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ..base.errors import FoveateError
from ..base.images import TooManyPixels, decode

PROMPT = 1.0  # seconds after which a picture leaves its place in the pool to others
SECONDS = 10.0  # that a picture may take
SLOW = 4  # pictures that may take longer than `PROMPT` at a time
SPARE, EACH = 2**27, 32  # bytes that a process may ask for: in any case, and per pixel allowed
READY, PICTURE, REFUSED, LARGE = b"!", b"p", b"r", b"l"
ASKED = struct.Struct("<QQ")  # most pixels, bytes to come
ANSWER = struct.Struct("<cQQQ")  # kind, width, height, bytes to come


class Crowded(Exception):
    """Too many pictures take long at the same time."""


class Decoders:
    """A pool of processes that decode pictures. They are started as they are needed.

    A picture that takes longer than `PROMPT` leaves its place in the pool to others and goes on
    beside it. Of those there are few, and one more is given up.

    Args:
        pixels: most of a picture.
        size: pictures decoded at a time, slow ones not counted.
    """

    def __init__(self, pixels: int, size: int) -> None:
        self.memory, self.size = SPARE + EACH * pixels, size
        self.places, self.slow = threading.BoundedSemaphore(size), threading.BoundedSemaphore(SLOW)
        self.idle: list[Decoder] = []
        self.changing, self.closed = threading.Lock(), False

    def decode(self, data: bytes, pixels: int) -> Image.Image:
        """As `foveate.base.images.decode`, with a limit on the picture's pixels.

        Raises:
            TooManyPixels: over that limit.
            FoveateError: no picture, or one that takes too much time or memory.
            Crowded: too many others take long.
        """
        with self.places:
            decoder = self._take()
            asked = decoder.ask(data, pixels)
            done = _within(asked, PROMPT)
        fit = False
        try:
            if not done and not self._wait(asked):
                raise FoveateError("The image takes too long to decode: save it anew, as a PNG.")
            fit = not isinstance(asked.exception(), EOFError)
            return asked.result()
        except EOFError:
            raise FoveateError("The image cannot be decoded: save it anew, as a PNG.") from None
        finally:
            self._give(decoder, fit)

    def _wait(self, asked: Future[Image.Image]) -> bool:
        """Whether a slow picture is done in time."""
        if not self.slow.acquire(blocking=False):
            raise Crowded
        try:
            return _within(asked, SECONDS - PROMPT)
        finally:
            self.slow.release()

    def _take(self) -> Decoder:
        with self.changing:
            while self.idle:
                if (decoder := self.idle.pop()).alive:
                    return decoder
                decoder.end()
        return Decoder(self.memory)

    def _give(self, decoder: Decoder, fit: bool) -> None:
        with self.changing:
            if fit and not self.closed and len(self.idle) < self.size:
                self.idle.append(decoder)
                return
        decoder.end()

    def close(self) -> None:
        """End the processes; those that decode something end after it."""
        with self.changing:
            self.closed, idle, self.idle = True, self.idle, []
        for decoder in idle:
            decoder.end()


def _within(asked: Future[Any], seconds: float) -> bool:
    """Whether it is done after so many seconds at the latest."""
    with contextlib.suppress(Exception):
        asked.exception(seconds)
    return asked.done()


class Decoder:
    """A process, which decodes one picture after another, and a thread that talks to it."""

    def __init__(self, memory: int) -> None:
        own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | own,
            start_new_session=True,  # Ctrl-C is for the server, which finishes what it holds
        )
        self.talking = ThreadPoolExecutor(1, "foveate-decoder")
        if self.process.stdout.read(1) != READY:  # type: ignore[union-attr]
            self.end()
            raise RuntimeError("The process that decodes pictures does not start.")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, data: bytes, pixels: int) -> Future[Image.Image]:
        """The picture; EOFError if the process dies of it."""
        return self.talking.submit(self._ask, data, pixels)

    def _ask(self, data: bytes, pixels: int) -> Image.Image:
        given: Any = self.process.stdin
        taken: Any = self.process.stdout
        with contextlib.suppress(OSError):  # it has died: nothing comes back, either
            given.write(ASKED.pack(pixels, len(data)) + data)
            given.flush()
        kind, width, height, length = ANSWER.unpack(_exactly(taken, ANSWER.size))
        content = _exactly(taken, length)
        if kind != PICTURE:
            raise (TooManyPixels if kind == LARGE else FoveateError)(content.decode())
        return Image.frombytes("RGB", (width, height), content)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.talking.shutdown()  # what it waits for ends with the process
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was left to write
                pipe.close()  # type: ignore[union-attr]


def _exactly(stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


# -- the process -----------------------------------------------------------------------------------


def main(memory: int) -> None:
    """Decode what comes in, until nothing more does."""
    given, taken = sys.stdin.buffer, sys.stdout.buffer
    _limit(memory)
    taken.write(READY)
    taken.flush()
    while head := given.read(ASKED.size):
        Image.MAX_IMAGE_PIXELS, length = ASKED.unpack(head)
        for part in _answer(given.read(length)):
            taken.write(part)
        taken.flush()


def _answer(data: bytes) -> tuple[bytes, bytes]:
    """What to say about a picture: head and content."""
    try:
        picture = decode(data)
        kind, size, content = PICTURE, picture.size, picture.tobytes()
    except FoveateError as error:
        kind, size = LARGE if isinstance(error, TooManyPixels) else REFUSED, (0, 0)
        content = str(error).encode()
    return ANSWER.pack(kind, *size, len(content)), content


def _limit(memory: int) -> None:
    """Let this process map so many bytes more than it has."""
    try:
        import resource
    except ImportError:  # Windows
        return
    mapped = Path("/proc/self/statm")
    if mapped.exists():  # elsewhere there is no telling what it has
        memory += int(mapped.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


if __name__ == "__main__":
    main(int(sys.argv[1]))
