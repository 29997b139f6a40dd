"""Bad weather: whatever happens, no answer is by another method, and none is silently plain."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from tests.hostile.test_texts import NAUGHTY
from tests.vllm import answers
from tests.vllm.serving import Server, body_of, post, serving, stream

METHODS = [
    "",
    "clvs",
    "tarac(beta=1.5, alpha=0.8)",
    "clvs(stop_threshold=0)+tarac",
    "pai(gamma=1.0)",
    "scalingvis(weight=2.0)",
    "vaf(enhance=1.8, suppress=0.4)",
    "devils(alpha=1.0)",
    "vcd(beta=0)",
    "clvs(stop_threshold=0)+m3id(beta=0)",
]
SECONDS = float(os.environ.get("FOVEATE_LOAD_SECONDS", "10"))
CLIENTS = 64
LOG = 1000  # bytes of a line
HOSTILE = [
    *(f"clvs(smoothing={value})" for value in NAUGHTY if len(value) < 9000),
    *(
        "clvs(" * 5000,
        "\ud800",
        "é" * 4000,
        "sid",
        "adhh(heads='/etc/passwd')",
        "clvs(layers=(99,))",
    ),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("storm")
    requests = [one | {"steps": 30} for one in answers.requests(folder, METHODS * 2)]
    model = answers.pocket(folder / "pocket")
    return {"model": str(model), "requests": requests, "out": str(folder / "reference")}


@pytest.fixture(scope="module")
def reference(asked: dict[str, Any]) -> list[list[int]]:
    return [one["tokens"] for one in answers.run("transformers", asked)[0]]


@pytest.fixture(scope="module")
def server(asked: dict[str, Any]) -> Iterator[Server]:
    with serving(asked["model"], Path(asked["out"]).with_suffix(".log")) as running:
        yield running


def test_requests_left_out_of_steps_preempted_and_aborted(
    asked: dict[str, Any], reference: list[list[int]], tmp_path: Path
) -> None:
    """What a method remembers comes back with its request, and goes with it."""
    options = {"kv_cache_memory_bytes": 5 * 2**20, "block_size": 32}
    job = asked | {"options": options, "storms": 3, "out": str(tmp_path / "storm")}
    got = answers.run("storm", job, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    whole: Counter[str] = Counter()
    for number, tokens, came in got["answers"]:
        method = asked["requests"][number]["method"]
        assert tokens == reference[number][: len(tokens)], method
        if came:
            assert len(tokens) == asked["requests"][number]["steps"], method
            whole[method] += 1
    assert set(whole) == set(METHODS)
    assert sum(whole.values()) < len(got["answers"]), "some have left"
    assert min(got["weather"]["put aside"], got["weather"]["preempted"]) > 5
    assert got["held"] == {
        "rows": 0,
        "twins": 0,
        "pairs": 0,
        "lives": 0,
        "stacks": len(METHODS) - 1,
    }


@pytest.mark.slow
def test_hang_ups_and_hostile_texts_spoil_nobodys_answer(
    server: Server, asked: dict[str, Any], reference: list[list[int]]
) -> None:
    requests, end = asked["requests"], time.monotonic() + SECONDS
    before = len(server.log.read_text())
    wrong: list[str] = []

    def check(n: int, status: int, tokens: list[int], whole: bool) -> str:
        expected = reference[n] if whole else reference[n][: len(tokens)]
        if (status, tokens) != (200, expected):
            wrong.append(f"{requests[n]['method']} {status} {tokens}, not {expected}")
        return "whole" if whole else "left"

    def turn(number: int, turn: int) -> str:
        n, kind = (number + turn) % len(requests), (number + 3 * turn) % 8
        one, steps = requests[n], requests[n]["steps"]
        if kind == 0:
            bad = HOSTILE[(number + turn) % len(HOSTILE)]
            status, body = post(server.url, one | {"method": bad})
            if status != 400 or len(body["error"]["message"]) > LOG:
                wrong.append(f"{bad[:80]!r}: {status} {str(body)[:300]}")
            return "refused"
        if kind == 1:
            hang_up(server.url, one)
            return "hung up"
        if kind in (2, 3):
            after = 7 if kind == 2 else float("inf")
            tokens, whole = stream(server.url, one, after, max_tokens=steps)
            return check(n, 200, tokens, whole)
        status, body = post(server.url, one, max_tokens=steps)
        return check(n, status, body["choices"][0]["token_ids"] if status == 200 else [], True)

    def client(number: int) -> Counter[str]:
        done: Counter[str] = Counter()
        while not done or time.monotonic() < end:
            done[turn(number, done.total())] += 1
        return done

    with ThreadPoolExecutor(CLIENTS) as clients:
        count = sum(clients.map(client, range(CLIENTS)), Counter[str]())
    print(f"\n{dict(count)}")
    assert not wrong, wrong[:5]
    assert set(count) == {"whole", "left", "refused", "hung up"}
    assert count["whole"] >= CLIENTS / 4
    status, body = post(server.url, requests[1], max_tokens=requests[1]["steps"])
    assert (status, body["choices"][0]["token_ids"]) == (200, reference[1])
    lines = server.log.read_text()[before:].splitlines()
    assert not [line for line in lines if "Traceback" in line]
    assert max(map(len, lines)) <= LOG


def hang_up(url: str, request: dict[str, Any]) -> None:
    """Ask for a long answer and leave before it comes."""
    host, port = url.removeprefix("http://").split(":")
    data = body_of(request, max_tokens=300)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\ncontent-type: application/json\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "title"),
    [((), "VLLM::EngineCore"), (("--tensor-parallel-size", "2"), "VLLM::Worker_TP1")],
    ids=["the engine's process", "a rank"],
)
def test_a_process_that_is_killed_ends_every_open_request_with_an_error(
    options: tuple[str, ...],
    title: str,
    asked: dict[str, Any],
    reference: list[list[int]],
    tmp_path: Path,
) -> None:
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if options else {}
    with serving(asked["model"], tmp_path / "log", *options, **binding) as server:
        heard: list[int] = []

        def client(n: int) -> tuple[int, list[int], bool]:
            one = asked["requests"][n]
            try:
                if n % 2:
                    return n, [], post(server.url, one, max_tokens=300)[0] == 200
                tokens, whole = stream(server.url, one, max_tokens=300, heard=heard)
                return n, tokens, whole
            except (urllib.error.HTTPError, HTTPException, OSError):
                return n, [], False

        count = len(asked["requests"])
        with ThreadPoolExecutor(count) as clients:
            running = [clients.submit(client, n) for n in range(count)]
            while len(heard) < 5 * count:
                assert not any(one.done() for one in running)
                time.sleep(0.05)
            (pid,) = server.processes(title)
            os.kill(pid, signal.SIGKILL)
            for n, tokens, whole in (one.result() for one in running):
                assert not whole
                both = min(len(tokens), len(reference[n]))
                assert tokens[:both] == reference[n][:both], METHODS[n % len(METHODS)]
        with pytest.raises((OSError, AssertionError)):
            assert post(server.url, asked["requests"][1])[0] == 200
