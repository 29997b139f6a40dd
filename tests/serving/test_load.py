"""Many clients at once, some of whom send nonsense: no failure, no other answer, no leak."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving.conftest import PATIENCE, data_uri, question, running, scene

SECONDS = float(os.environ.get("FOVEATE_LOAD_SECONDS", "10"))  # `make test-serve` takes 120
LONG = SECONDS >= 60
CLIENTS = 64
MALFORMED, LEAVES = 0.05, 0.05
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
)


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
                    if draw.random() < MALFORMED:
                        await own.chat.completions.create(**options | draw.choice(BAD))
                        self.wrong.append("a malformed request was answered")
                    elif turn % 2:
                        answer = await own.chat.completions.create(**options)
                        self.hear(key, answer.choices[0].message.content, left=False)
                    else:
                        await self.stream(own, options, key, draw.random() < LEAVES)
                except openai.APIStatusError as error:
                    self.count[str(error.status_code)] += 1
                    if not 400 <= error.status_code < 500 or error.status_code == 429:
                        self.wrong.append(repr(error))

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
    assert requests > 2 * batches
    if LONG:  # it has stopped growing
        middle = len(held) // 2
        assert max(held[middle:]) < 1.05 * max(held[:middle])
