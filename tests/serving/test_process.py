"""`foveate serve` as a process: started, asked, stopped."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from foveate import FoveateError, commands
from foveate.serving import app
from foveate.serving.wire import Settings
from tests.serving.conftest import PATIENCE, question, scene, wait_for

DESCRIBE = "Please describe this image in detail."


class Server:
    """The command with its output as it comes."""

    def __init__(self, *options: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "foveate.commands", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line)
                if found := re.search(r"http://\S+/v1", line):
                    self.url = found[0]
                    self.ready.set()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[OpenAI]:
        try:
            assert self.ready.wait(120), "".join(self.lines)
            yield OpenAI(base_url=self.url, api_key="k", max_retries=0, timeout=PATIENCE)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(PATIENCE)


@pytest.mark.long
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_lets_it_finish_what_it_holds(vlm, number):
    server = Server("--batch-size", "1", "--max-tokens", "40")
    with server() as client:
        assert server.url.startswith("http://127.0.0.1:")
        options = {"model": "pocket", "messages": question(DESCRIBE, scene(3))}
        stream = client.chat.completions.create(stream=True, **options)
        found: list[str] = []
        waits = threading.Thread(
            target=lambda: found.append(
                client.chat.completions.create(**options).choices[0].message.content
            )
        )
        said = next(iter(stream)).choices[0].delta.content
        waits.start()
        metrics = server.url.replace("/v1", "/metrics")
        wait_for(lambda: found or "foveate_queue_length 1.0" in httpx.get(metrics).text)
        server.process.send_signal(number)
        said += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        waits.join(PATIENCE)
        offline = vlm.ask(scene(3), DESCRIBE, max_new_tokens=40).text
        assert (said, found) == (offline, [offline])
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in "".join(server.lines)


def test_new_requests_are_refused_while_it_stops(vlm, gate):
    server, sock = app.Server(vlm, Settings()), app.bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    wait_for(lambda: server.started)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    client = OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=PATIENCE)
    options = {"model": "pocket", "messages": question(DESCRIBE, scene(3)), "max_tokens": 3}
    found: list[str] = []
    asks = threading.Thread(
        target=lambda: found.append(
            client.chat.completions.create(**options).choices[0].message.content
        )
    )
    asks.start()
    wait_for(lambda: gate.reached)
    server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: httpx.get(f"{url}/healthz").status_code == 503)
    body = {"model": "pocket", "messages": options["messages"]}
    refused = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert refused.status_code == 503
    assert "stopping" in refused.json()["error"]["message"]
    gate.open.set()
    asks.join(PATIENCE)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert found == [vlm.ask(scene(3), DESCRIBE, max_new_tokens=3).text]


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "foveate.serving.app")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        commands.main(["serve"])
    assert "pip install 'foveate[serve]'" in capsys.readouterr().err


def test_a_port_in_use_is_said(server, capsys):
    with pytest.raises(SystemExit) as exit:
        commands.main(["serve", "--port", str(server.address[1])])
    assert exit.value.code == 2
    assert "give another --host or --port" in capsys.readouterr().err


def test_a_socket_that_got_no_address_is_closed(server):
    def refused() -> None:
        with pytest.raises(FoveateError, match="cannot listen"):
            app.bind("127.0.0.1", server.address[1])

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ResourceWarning)
        refused()
        gc.collect()
    assert not [str(w.message) for w in found if "laddr=('0.0.0.0', 0)" in str(w.message)]
