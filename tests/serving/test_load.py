"""Many clients at once, some of whom mean harm: no failure, no other answer, no leak."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.serving.conftest import PATIENCE, data_uri, encoded, question, running, scene
from tests.test_images import encode, many_scans, png_header

SECONDS = float(os.environ.get("FOVEATE_LOAD_SECONDS", "10"))  # `make test-serve` takes 120
LONG = SECONDS >= 60
CLIENTS = 64
HOSTILE, LEAVES = 0.2, 0.05
LOG = 1000  # bytes that a request may add to the log
SCENES = range(4)
WORDS = ("Is there a car in the image?", "Please describe this image in detail.", "Is it red?")
METHODS = ("vanilla", "vanilla", "clvs", "pai")
TOKENS = 8
BAD: tuple[dict[str, Any], ...] = (
    {"model": "gpt-7"},
    {"messages": []},
    {"max_tokens": -1},
    {"extra_body": {"method": "clws"}},
    {"extra_body": {"unknown": 1}},
    {"messages": question("Is it?", "data:image/png;base64,AAAA")},
    {"messages": question("Is it?", "file:///etc/hostname")},
    {"messages": question("Is it?", "http://127.0.0.1/")},
    {"messages": question("x" * 200_000)},
    *({"extra_body": {"method": method}} for method in (
        f"clvs(smoothing={'9' * 309})", "clvs(smoothing={[]:1})", f"clvs(top_k={'-' * 400}1)",
        r"vicrop(instruction='\ud800')", f"vcd(seed={'9' * 40})", "vaf(suppress=1e999)",
        "1if 1else " * 40, "(" * 400, "carve(steps=10000000)", "adhh(heads='/etc/passwd')",
    )),
)  # fmt: skip
PICTURES = (
    lambda: encode(Image.new("1", (16_000_000, 1))),
    lambda: many_scans(2000, (4000, 4000)),
    lambda: encode(Image.new("1", (9000, 9000))),
    lambda: png_header(60_000, 60_000),
    lambda: encode(scene(1))[:20_000],
    lambda: os.urandom(5000),
)  # fmt: skip
RAW = (
    b"\x16\x03\x01\x02\x00" * 100, b"GET /" + b"x" * 100_000, b"GET / HTTP/1.1\r\nHost",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000000\r\n\r\n" + b"[" * 50_000,
)  # fmt: skip


@functools.cache
def hostile_pictures() -> list[str]:
    return [encoded(make()) for make in PICTURES]


class Log(logging.Handler):
    """What the server logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += self.format(record).splitlines()


class Clients:
    """What they ask, what they heard, and what was wrong with it."""

    def __init__(self, url: str, expected: dict[Any, str]) -> None:
        self.url, self.expected = url, expected
        self.pictures = [data_uri(scene(number)) for number in SCENES]
        self.count: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self) -> list[float]:
        """All of them for so many seconds; what memory was held meanwhile."""
        end = time.monotonic() + SECONDS
        clients = [asyncio.create_task(self.client(n, end)) for n in range(CLIENTS)]
        held = []
        while time.monotonic() < end:
            await asyncio.sleep(SECONDS / 20)
            held.append(memory())
        await asyncio.gather(*clients)
        return held

    async def client(self, number: int, end: float) -> None:
        """One thing after another, and at least one."""
        draw = random.Random(number)
        async with openai.AsyncOpenAI(
            base_url=self.url, api_key="x", max_retries=0, timeout=10 * PATIENCE
        ) as own:
            for turn in itertools.count():
                if turn and time.monotonic() >= end:
                    return
                key = (draw.choice(SCENES), draw.choice(WORDS), draw.choice(METHODS))
                options: dict[str, Any] = {
                    "model": "pocket",
                    "messages": question(key[1], self.pictures[key[0]]),
                    "max_tokens": TOKENS,
                    "extra_body": {"method": key[2]},
                }
                try:
                    if draw.random() < HOSTILE:
                        await self.harm(own, options, draw)
                    elif turn % 2:
                        answer = await own.chat.completions.create(**options)
                        self.hear(key, answer.choices[0].message.content, left=False)
                    else:
                        await self.stream(own, options, key, draw.random() < LEAVES)
                except openai.APIStatusError as error:
                    self.count[str(error.status_code)] += 1
                    if not 400 <= error.status_code < 500 or error.status_code == 429:
                        self.wrong.append(repr(error))
                except openai.APIConnectionError as error:
                    if isinstance(error, openai.APITimeoutError):
                        raise
                    self.count["closed"] += 1  # an idle line, as it was used again

    async def harm(self, own: Any, options: dict[str, Any], draw: random.Random) -> None:
        """Something that must be refused: a parameter, a picture, or what is no request at all."""
        kind = draw.randrange(3)
        if kind == 2:
            host, port = self.url.split("/")[2].split(":")
            with contextlib.suppress(OSError):  # the server may close first
                answer, line = await asyncio.open_connection(host, int(port))
                line.write(draw.choice(RAW))
                await line.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answer.read(1000), timeout=0.5)
                line.close()
            self.count["raw"] += 1
            return
        bad = draw.choice(BAD)
        if kind == 1:
            bad = {"messages": question("Is it?", draw.choice(hostile_pictures()))}
        await own.chat.completions.create(**options | bad)
        self.wrong.append(f"a hostile request was answered: {str(bad)[:200]}")

    async def stream(self, own: Any, options: dict[str, Any], key: Any, leaves: bool) -> None:
        async with await own.chat.completions.create(stream=True, **options) as stream:
            said = ""
            async for chunk in stream:
                said += chunk.choices[0].delta.content or ""
                if leaves and said:
                    break
        self.hear(key, said, left=leaves)

    def hear(self, key: Any, said: str, left: bool) -> None:
        self.count["left" if left else "good"] += 1
        whole = self.expected[key]
        if not (whole.startswith(said) if left else said == whole):
            self.wrong.append(f"{key}: {said!r} instead of {whole!r}")


def memory() -> float:
    """MiB that this process holds, the server's and the clients'."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0.0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_many_clients(vlm):
    expected = {
        key: vlm.ask(scene(key[0]), key[1], key[2], max_new_tokens=TOKENS).text
        for key in itertools.product(SCENES, WORDS, dict.fromkeys(METHODS))
    }
    hostile_pictures()
    log = Log()
    logging.getLogger().addHandler(log)
    logging.getLogger("uvicorn.error").addHandler(log)
    with running(vlm, queue=2 * CLIENTS) as server:
        clients = Clients(f"{server.url}/v1", expected)
        held = asyncio.run(clients.run())
        assert not server.service.worker.waiting
        metrics = server.service.worker.metrics.registry
        requests, batches = (
            metrics.get_sample_value(f"foveate_batch_size_{name}") for name in ("sum", "count")
        )
    memories = [round(mib) for mib in held]
    print(f"\n{dict(clients.count)}, {requests / batches:.1f} at a time, MiB: {memories}")
    assert not clients.wrong, clients.wrong[:5]
    assert clients.count["good"] > CLIENTS / 2
    assert clients.count["closed"] <= clients.count["good"] / 100
    assert requests > 2 * batches
    assert max(map(len, log.lines), default=0) <= LOG
    assert sum(map(len, log.lines)) <= LOG * sum(clients.count.values())
    assert not [line for line in log.lines if "Traceback" in line]
    if LONG:  # it has stopped growing
        middle = len(held) // 2
        assert max(held[middle:]) < 1.05 * max(held[:middle])
        assert held[-1] < 1.1 * max(held[: len(held) // 4])
