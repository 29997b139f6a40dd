"""The server in Ray Serve, two replicas of it, on a real local Ray; `make test-serve`."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.serving.conftest import question, scene

SECONDS = 600.0  # for all of it
WORDS = "Please describe this image in detail."

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "grpc", "aiohttp_cors")),
    reason="Ray Serve has an environment of its own: make test-serve",
)


def family(root: int) -> dict[int, str]:
    """The processes below `root`, and when they were started."""
    parents, started = dict[int, int](), dict[int, str]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)], started[int(folder.name)] = int(fields[1]), fields[19]
    found, new = dict[int, str](), {root}
    while new := {pid for pid, parent in parents.items() if parent in new}:
        found |= {pid: started[pid] for pid in new}
    return found


def left(seen: dict[int, str]) -> list[int]:
    """Those of these processes that still run."""
    found = []
    for pid, started in seen.items():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and fields[19] == started:
            found.append(pid)
    return found


def test_two_replicas(vlm, tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    out = tmp_path_factory.mktemp("serve") / "out"
    command = ["serve", "--engine", "ray", "--replicas", "2", "--port", str(port)]
    with out.open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "foveate.commands", *command, "--device", "cpu"],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(tmp_path_factory.mktemp("r"))},
        )
    seen: dict[int, str] = {}

    def until(condition: Callable[[], object]) -> None:
        while not condition():
            seen.update(family(process.pid))
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < end, out.read_text()
            time.sleep(0.1)

    try:
        until(lambda: f"2 replicas at {url}/v1" in out.read_text())
        pids: set[int] = set()
        until(lambda: pids.add(httpx.get(f"{url}/healthz").json()["pid"]) or len(pids) == 2)

        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=SECONDS)
        offline = [vlm.ask(scene(n), WORDS, max_new_tokens=12).text for n in range(4)]

        def ask(number: int) -> str:
            stream = client.chat.completions.create(
                model="pocket", messages=question(WORDS, scene(number)), max_tokens=12, stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, [0, 1, 2, 3] * 4)) == offline * 4
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.models.retrieve("gpt-7")
        with pytest.raises(openai.BadRequestError, match="did you mean 'clvs'"):
            client.chat.completions.create(model="pocket:clws", messages=question("Is it?"))

        stream = client.chat.completions.create(
            model="pocket", messages=question(WORDS, scene(3)), stream=True
        )
        said = next(iter(stream)).choices[0].delta.content or ""
        until(lambda: True)
        process.send_signal(signal.SIGTERM)
        said += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert said == vlm.ask(scene(3), WORDS).text  # what it holds is finished
        assert process.wait(max(1.0, end - time.monotonic())) == 0, out.read_text()
        assert "Traceback" not in out.read_text()
        while left(seen):
            assert time.monotonic() < end, "processes are left"
            time.sleep(0.1)
    finally:
        seen.update(family(process.pid))
        process.kill()
        for pid in left(seen):
            os.kill(pid, signal.SIGKILL)
        process.wait(30)
