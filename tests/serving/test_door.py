"""Connections: slow, many, half closed, no HTTP at all; and who may ask by which name."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from foveate.serving import door
from foveate.serving.app import Server
from foveate.serving.wire import Settings
from tests.serving.conftest import PATIENCE, data_uri, question, running, scene, wait_for

DESCRIBE = "Please describe this image in detail."
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def request(**options: Any) -> bytes:
    """A whole request as it goes over the line."""
    body = {"model": "pocket", "messages": question(DESCRIBE, scene(3)), "max_tokens": 6} | options
    data = json.dumps(body).encode()
    return f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data


@contextlib.contextmanager
def connected(server: Any) -> Iterator[socket.socket]:
    with socket.create_connection(server.address, timeout=PATIENCE) as sock:
        yield sock


def rest(sock: socket.socket) -> bytes:
    """All that still comes, until the other side closes."""
    data = b""
    while part := sock.recv(2**16):
        data += part
    return data


def error(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    told = json.loads(body)["error"]
    assert set(told) == {"message", "type", "param", "code"}
    return int(head.split()[1]), told


# -- slow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT", HEAD.encode()])
def test_a_head_that_does_not_come(server, monkeypatch, sent):
    monkeypatch.setattr(door, "HEADER_SECONDS", 0.2)
    with connected(server) as sock:
        sock.sendall(sent)
        status, told = error(rest(sock))
    assert status == 408
    assert "head took more than 0.2 seconds" in told["message"]


def test_a_head_that_comes_byte_by_byte(server, monkeypatch):
    monkeypatch.setattr(door, "HEADER_SECONDS", 0.3)
    with connected(server) as sock, contextlib.suppress(OSError):
        start = time.monotonic()
        for byte in HEAD.encode():
            sock.sendall(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - start < 0.05 * len(HEAD)


def test_the_second_head_of_a_connection(server, monkeypatch):
    monkeypatch.setattr(door, "HEADER_SECONDS", 0.3)
    with connected(server) as sock:
        for _ in range(2):
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(2**16)
            assert b"200 OK" in answer
            time.sleep(0.5)  # between requests a client may take its time
        sock.sendall(b"GET /heal")
        assert error(rest(sock))[0] == 408


def test_an_answer_may_take_longer_than_a_head(vlm, server, gate, monkeypatch):
    asked = request()
    monkeypatch.setattr(door, "HEADER_SECONDS", 0.5)
    with connected(server) as sock:
        sock.sendall(asked)
        wait_for(lambda: gate.reached)
        time.sleep(1)
        gate.open.set()
        assert b"200 OK" in sock.recv(2**16)


def test_a_client_that_takes_nothing_is_cut(server, monkeypatch):
    monkeypatch.setattr(door, "STALLED_SECONDS", 0.3)
    with connected(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"GET /page.js HTTP/1.1\r\nHost: a\r\n\r\n" * 2000)
        wait_for(lambda: len(server.server.server_state.connections) == 0)


# -- many ------------------------------------------------------------------------------------------


def test_too_many_connections(vlm):
    with running(vlm, connections=3) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connected(server))
        wait_for(lambda: len(server.server.server_state.connections) == 3)
        answer = httpx.get(f"{server.url}/healthz")
        assert answer.status_code == 429
        assert "busy" in answer.json()["error"]["message"]
        wait_for(lambda: len(server.server.server_state.connections) == 3)
        for _ in range(3):
            stack.enter_context(connected(server))
        with connected(server) as one_more, contextlib.suppress(ConnectionResetError):
            assert rest(one_more) == b""
        stack.close()
        wait_for(lambda: len(server.server.server_state.connections) == 0)
        assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_bodies_in_flight_count(vlm):
    with running(vlm, memory=300_000) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(connected(server))
            sock.sendall(f"{HEAD}Content-Length: 200000\r\n\r\n".encode() + b" " * 120_000)
        wait_for(lambda: server.service.budget.held == 240_000)
        large = {"model": "pocket", "messages": question("x" * 100_000)}
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=large)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        small = {"model": "pocket", "messages": question("a car"), "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=small).status_code == 200
        stack.close()
        wait_for(lambda: server.service.budget.held == 0)


def test_pictures_in_flight_count(vlm, gate):
    held = 3 * scene(3).width * scene(3).height
    with running(vlm, memory=2 * held) as server:
        threads = [threading.Thread(target=post, args=[server]) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.service.budget.held == 2 * held)
        assert post(server).status_code == 429
        gate.open.set()
        for thread in threads:
            thread.join(PATIENCE)
        wait_for(lambda: server.service.budget.held == 0)
        list(server.client().chat.completions.create(
            model="pocket", messages=question(DESCRIBE, scene(3)), max_tokens=2, stream=True
        ))  # fmt: skip
        wait_for(lambda: server.service.budget.held == 0)


def test_a_body_of_very_many_values(server):
    """Each would become an error of its own, and all of them a gigabyte."""
    for body in (b'{"messages": [' + b"1," * 2_000_000, b"{" + b'"a":1,' * 2_000_000, b"[" * 10**6):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", content=body,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert answer.status_code == 413
        assert "262,144 values" in answer.json()["error"]["message"]


def post(server: Any, **options: Any) -> httpx.Response:
    body = {"model": "pocket", "messages": question(DESCRIBE, scene(3)), "max_tokens": 2} | options
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE)


# -- half closed, and no HTTP ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_sends_no_more_gets_its_answer(vlm, server, gate, stream):
    expected = vlm.ask(scene(3), DESCRIBE, max_new_tokens=6).text
    with connected(server) as sock:
        sock.sendall(request(stream=stream))
        sock.shutdown(socket.SHUT_WR)
        wait_for(lambda: gate.reached)
        time.sleep(3 * door.PROBE_SECONDS)
        gate.open.set()
        answer = rest(sock)
    assert b"HTTP/1.1 200 OK" in answer
    if stream:
        chunks = re.findall(rb"data: (\{.*\})", answer)
        parts = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(parts) == expected
    else:
        content = json.loads(answer[answer.index(b'{"') :])
        assert content["choices"][0]["message"]["content"] == expected


def test_half_a_request_gets_no_answer(server):
    with connected(server) as sock:
        sock.sendall(request()[:-10])
        sock.shutdown(socket.SHUT_WR)
        assert b"200" not in rest(sock)


def test_a_client_that_is_gone_altogether_is_noticed(vlm, gate):
    with running(vlm, batch=1, queue=1) as server:
        worker = server.service.worker
        with connected(server) as first, connected(server) as second:
            first.sendall(request())
            wait_for(lambda: gate.reached)
            second.sendall(request())
            wait_for(lambda: worker.waiting)
            second.close()
            wait_for(lambda: not worker.waiting)
            gate.open.set()


@pytest.mark.parametrize("sent", [
    b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00" * 10, b"GET / HTTP/a\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000,
])  # fmt: skip
def test_what_is_no_http_gets_an_error_of_openai(server, sent, caplog):
    with connected(server) as sock:
        sock.sendall(sent)
        status, told = error(rest(sock))
    assert status == 400
    assert told["type"] == "invalid_request_error"
    assert all(len(record.getMessage()) < 1000 for record in caplog.records)


# -- names -----------------------------------------------------------------------------------------

NAMES = {"localhost": 200, "LOCALHOST:8000": 200, "127.0.0.1:80": 200, "[::1]:8000": 200}
NAMES |= {"evil.example": 400, "localhost.evil.example": 400, "127.0.0.1.nip.io": 400, "": 400}
NAMES |= {"evil.example:8000": 400, "localhost:x": 400, "[::1": 400, "friend": 200}


def test_a_page_of_another_site_cannot_ask_by_its_name(vlm):
    with running(vlm, hosts=(*door.LOCAL, "friend")) as server:
        for name, status in NAMES.items():
            answer = httpx.get(f"{server.url}/v1/models", headers={"Host": name})
            assert answer.status_code == status, name
            if status == 400:
                told = answer.json()["error"]
                assert "start it with --allow-host" in told["message"]
                assert told["code"] == "wrong_host"


@pytest.mark.parametrize(("options", "checked"), [
    ((), True), (("--host", "localhost"), True), (("--allow-host", "Friend"), True),
    (("--api-key", "k"), False), (("--host", "0.0.0.0"), False),
])  # fmt: skip
def test_names_are_checked_where_only_this_machine_is_served(run, monkeypatch, options, checked):
    found = []
    monkeypatch.setattr(Server, "run", lambda self, sockets: found.append(self))
    code, _, _ = run("serve", "--port", "0", *options)
    assert code == 0
    hosts = found[0].config.app.state.service.settings.hosts
    assert (hosts is not None) == checked
    if "Friend" in options:
        assert "friend" in hosts


# -- the description -------------------------------------------------------------------------------


def test_the_interface_is_described_on_demand(vlm, server):
    assert httpx.get(f"{server.url}/openapi.json").status_code == 404
    with running(vlm, docs=True) as described:
        document = httpx.get(f"{described.url}/openapi.json").json()
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in document["components"]["schemas"]
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/Completion")
    fields = document["components"]["schemas"]["Completion"]["properties"]
    assert {"model", "messages", "method"} <= fields.keys()


# -- what an idle server holds ---------------------------------------------------------------------


def test_an_idle_worker_holds_no_pictures(vlm, monkeypatch):
    seen: list[Any] = []
    chat = vlm.chat

    def watched(images: Any, *args: Any) -> Any:
        made = chat(images, *args)
        seen.append(weakref.ref(made))
        return made

    monkeypatch.setattr(vlm, "chat", watched)
    with running(vlm) as server:
        picture = data_uri(scene(5))
        assert post(server, messages=question(DESCRIBE, picture)).status_code == 200
        wait_for(lambda: gc.collect() is not None and seen[0]() is None)


def test_settings_have_a_default_for_everything():
    assert Settings().memory > Settings().body_bytes
