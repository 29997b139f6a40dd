"""Pictures from the network: never from this machine, its neighbours, or without limits."""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from foveate import FoveateError
from foveate.serving import pictures
from foveate.serving.pictures import fetch, is_public
from tests.serving.conftest import question, running, scene

PRIVATE = (
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1",
    "192.0.2.1", "192.168.1.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
    "2001:db8::1", "2002:7f00:1::", "fc00::1", "fd12::1", "fe80::1", "fe80::1%1", "fec0::1",
    "ff02::1", "168.63.129.16", "::ffff:168.63.129.16",
)  # fmt: skip
PUBLIC = ("8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8")


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
    assert is_public(address)


REFUSED = {
    "http://127.0.0.1/a.png": "not a public one",
    "http://localhost:8000/v1/models": "not a public one",
    "http://[::1]/": "not a public one",
    "http://[::ffff:7f00:1]/": "not a public one",
    "http://2130706433/": "not a public one",  # 127.0.0.1 as one number
    "http://0x7f.1/": "not a public one",
    "http://169.254.169.254/latest/meta-data/": "not a public one",
    "http://no.such.host.invalid/": "cannot be found",
    "http://user:secret@127.0.0.1/": "user name",
    "http:///a": "names a host",
    "ftp://example.com/a.png": "http:// or https://",
    "http://exa mple.com/": "percent-encoded",
    "http://example.com/\r\nX: y": "percent-encoded",
    "http://exämple.com/": "percent-encoded",
    "http://example.com:99999/": "cannot be read",
    "http://[::1/": "cannot be read",
}


@pytest.mark.parametrize("url", REFUSED)
def test_addresses_that_are_refused(url):
    with pytest.raises(FoveateError, match=REFUSED[url]):
        fetch(url, 1000, 5)


class Host(ThreadingHTTPServer):
    """A host that does what `pages` say, and remembers what it was asked for."""

    daemon_threads = True

    def __init__(self, pages: dict[str, Callable[[BaseHTTPRequestHandler], None]]) -> None:
        self.asked: list[tuple[str, str | None]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append((self.path, self.headers["Host"]))
                with contextlib.suppress(OSError):
                    pages[self.path](self)

            def log_message(self, *_: Any) -> None:
                pass

        host = self
        super().__init__(("127.0.0.1", 0), Handler)


def page(status: int = 200, body: bytes = b"", **headers: str) -> Any:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, each well within any time limit of a socket."""
    page()(handler)
    for _ in range(200):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def drip_headers(handler: BaseHTTPRequestHandler) -> None:
    for _ in range(200):
        handler.wfile.write(b"X")
        time.sleep(0.05)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host that counts as public here, under the name pictures.test; 127.0.0.2 stays private."""
    stream = io.BytesIO()
    scene(3).save(stream, "PNG")
    pages = {
        "/a.png": page(body=stream.getvalue(), Content_Length=str(len(stream.getvalue()))),
        "/a.png?b=c%20d": page(body=b"query"),
        "/large": page(body=b"x" * 5000),
        "/cut": page(body=b"x", Content_Length="10"),
        "/none": page(404),
        "/again": page(302, Location="/a.png?b=c%20d"),
        "/loop": page(301, Location="/loop"),
        "/inside": page(307, Location="http://127.0.0.2:1/secret"),
        "/file": page(302, Location="file:///etc/hostname"),
        "/nowhere": page(302),
        "/drip": drip,
        "/drip-headers": drip_headers,
        "/rebound": page(body=b"pinned"),
    }
    with Host(pages) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        look_up = socket.getaddrinfo
        monkeypatch.setattr(pictures, "is_public", lambda address: address == "127.0.0.1")
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda name, *args, **kwargs: look_up(
                "127.0.0.1" if name == "pictures.test" else name, *args, **kwargs
            ),
        )
        host.url = f"http://pictures.test:{host.server_port}"
        yield host
        host.shutdown()


def test_a_picture_is_fetched(host):
    assert fetch(f"{host.url}/a.png", 10**6, 30)[:4] == b"\x89PNG"
    assert host.asked == [("/a.png", f"pictures.test:{host.server_port}")]
    assert fetch(f"{host.url}/again#part", 100, 30) == b"query"


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/large", "more than 1,000 bytes"),
        ("/cut", "IncompleteRead"),
        ("/none", "answered 404"),
        ("/loop", "redirects more than 3 times"),
        ("/inside", "not a public one"),
        ("/file", "http:// or https://"),
    ],
)
def test_what_a_host_may_not_do(host, path, word):
    with pytest.raises(FoveateError, match=word):
        fetch(f"{host.url}{path}", 1000, 30)


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_a_host_that_takes_its_time_is_cut_off(host, path):
    with pytest.raises(FoveateError, match=r"longer than 0.3 seconds"):
        fetch(f"{host.url}{path}", 1000, 0.3)


def test_all_addresses_of_a_name_must_be_public(host, monkeypatch):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, host.server_port))
            for address in ("127.0.0.1", "10.0.0.1")]  # fmt: skip
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    with pytest.raises(FoveateError, match="not a public one"):
        fetch(f"{host.url}/a.png", 10**6, 30)
    assert not host.asked


def test_a_name_is_looked_up_once_and_the_checked_address_used(host, monkeypatch):
    answers = iter(["127.0.0.1", "10.0.0.1"])
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda name, port, *args, **kwargs: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "",
             (name if name[0].isdigit() else next(answers), port))
        ],
    )  # fmt: skip
    assert fetch(f"{host.url}/rebound", 1000, 30) == b"pinned"
    assert next(answers) == "10.0.0.1"


def test_a_certificate_must_fit(host):
    with pytest.raises(FoveateError, match="cannot be fetched"):  # it speaks no TLS at all
        fetch(f"https://pictures.test:{host.server_port}/a.png", 1000, 30)
    assert ssl.create_default_context().check_hostname


def ask(server, url):
    body = {"model": "pocket", "messages": question("Is there a car?", url), "max_tokens": 3}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_through_the_server(vlm, host):
    with running(vlm, remote_images=True, image_bytes=10**6) as server:
        answer = ask(server, f"{host.url}/a.png")
        offline = vlm.ask(scene(3), "Is there a car?", max_new_tokens=3)
        assert answer.json()["choices"][0]["message"]["content"] == offline.text
        for path, word in (("/inside", "public"), ("/again", "picture"), ("/none", "404")):
            answer = ask(server, f"{host.url}{path}")
            assert answer.status_code == 400
            assert word in answer.json()["error"]["message"]
        for url in ("/etc/hostname", "file:///etc/hostname"):
            assert "files are not read" in ask(server, url).json()["error"]["message"]
