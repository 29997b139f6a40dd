"""Strangers' pictures are decoded elsewhere: slow ones make room, and the dead are replaced."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from foveate.base.errors import FoveateError
from foveate.base.images import TooManyPixels, decode
from foveate.serving import decoders
from foveate.serving.decoders import Crowded, Decoders
from tests.serving.conftest import PATIENCE, question, running, scene, wait_for

PIXELS = 16_000_000


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


@pytest.fixture
def pool() -> Iterator[Decoders]:
    pool = Decoders(PIXELS, 2)
    yield pool
    pool.close()


GOOD = encoded(scene(1))


def test_a_picture_is_what_it_is_here(pool):
    for data in (GOOD, encoded(scene(2), "JPEG"), encoded(Image.new("LA", (3, 40)))):
        found = pool.decode(data, PIXELS)
        assert (found.mode, found.size) == ("RGB", decode(data).size)
        assert found.tobytes() == decode(data).tobytes()
    assert len(pool.idle) == 1  # one after another: one process


def test_what_is_refused_here_is_refused_there(pool):
    for data, word in ((b"", "empty"), (b"x", "not a picture"), (GOOD[:2000], "damaged")):
        with pytest.raises(FoveateError, match=word):
            pool.decode(data, PIXELS)
    with pytest.raises(TooManyPixels, match="make it smaller"):
        pool.decode(GOOD, 100)
    assert len(pool.idle) == 1
    assert pool.decode(GOOD, PIXELS).size == scene(1).size


def test_memory_has_a_limit():
    with contextlib.closing(Decoders(1000, 1)) as pool:
        with pytest.raises(FoveateError, match="takes too much memory: make it smaller"):
            pool.decode(encoded(Image.new("1", (8000, 8000))), 10**8)
        assert pool.decode(GOOD, PIXELS).size == scene(1).size


class Hurt:
    """Stops a process that is to decode b"sleep", and kills one that is to decode b"die"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ask, self.pids = decoders.Decoder.ask, list[int]()
        monkeypatch.setattr(decoders.Decoder, "ask", self)

    def __get__(self, decoder, _):
        def ask(data, pixels):
            if data in (b"sleep", b"die"):
                self.pids.append(decoder.process.pid)
                os.kill(self.pids[-1], signal.SIGSTOP if data == b"sleep" else signal.SIGKILL)
            return self.ask(decoder, data, pixels)

        return ask


@pytest.fixture
def hurt(pool, monkeypatch):
    monkeypatch.setattr(decoders, "PROMPT", 0.3)
    monkeypatch.setattr(decoders, "SECONDS", 1.5)
    return Hurt(monkeypatch)


def gone(pids):
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return bool(pids)


def test_a_process_that_dies_is_replaced(pool, hurt):
    assert "cannot be decoded: save it anew" in str(told(pool, b"die"))
    assert gone(hurt.pids)
    assert pool.decode(GOOD, PIXELS).size == scene(1).size
    [decoder] = pool.idle
    decoder.process.kill()
    decoder.process.wait()
    assert pool.decode(GOOD, PIXELS).size == scene(1).size  # one that died while it was idle


def told(pool, data=b"sleep"):
    with pytest.raises((FoveateError, Crowded)) as error:
        pool.decode(data, PIXELS)
    return error.value


def test_time_has_a_limit(pool, hurt):
    assert "takes too long" in str(told(pool))
    assert gone(hurt.pids)
    assert pool.decode(GOOD, PIXELS).size == scene(1).size


def test_slow_pictures_make_room_and_few_may_be_slow(pool, hurt):
    errors = []
    slow = [
        threading.Thread(target=lambda: errors.append(told(pool))) for _ in range(decoders.SLOW + 2)
    ]
    for thread in slow:
        thread.start()
    wait_for(lambda: len(hurt.pids) >= 2)
    assert pool.decode(GOOD, PIXELS).size == scene(1).size  # long before they are given up
    for thread in slow:
        thread.join(PATIENCE)
    assert len(errors) == len(slow)
    assert all(isinstance(e, Crowded) or "too long" in str(e) for e in errors)
    assert gone(hurt.pids)


def test_a_closed_pool_leaves_no_process(pool):
    pool.decode(GOOD, PIXELS)
    [decoder] = pool.idle
    pool.close()
    assert decoder.process.poll() is not None
    pool.decode(GOOD, PIXELS)
    assert pool.idle == []


@pytest.mark.slow
def test_other_clients_wait_a_second_at_most_for_slow_pictures(vlm, monkeypatch):
    """Four clients send pictures that would take for ever."""
    with running(vlm) as server:
        Hurt(monkeypatch)
        client = server.client()

        def ask(image):
            start = time.monotonic()
            client.chat.completions.create(
                model="pocket", messages=question("Is there a car?", image), max_tokens=2
            )
            return time.monotonic() - start

        usual = max(ask(scene(3)) for _ in range(3))
        sleepy = "data:image/png;base64,c2xlZXA="
        refusals = []

        def sleep():
            with pytest.raises(Exception, match=r"too long|busy") as error:
                ask(sleepy)
            refusals.append(error.value)

        hurting = [threading.Thread(target=sleep) for _ in range(4)]
        for thread in hurting:
            thread.start()
        time.sleep(0.1)
        assert ask(scene(3)) < usual + 2 * decoders.PROMPT + 1  # the pool starts two processes anew
        for thread in hurting:
            thread.join(PATIENCE)
        assert len(refusals) == 4
