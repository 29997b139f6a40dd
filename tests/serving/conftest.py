"""A real server on a free port, in front of the pocket model, and the real OpenAI client."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from openai import OpenAI
from PIL import Image

from foveate import VLM
from foveate.scenes import world
from foveate.serving.app import configuration, create_app
from foveate.serving.service import Service
from foveate.serving.wire import Settings

PATIENCE = 60.0  # seconds for anything that a test waits for


@functools.cache
def scene(number: int) -> Image.Image:
    return world.draw(world.sample(number))


def data_uri(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return encoded(stream.getvalue())


def encoded(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def question(text: str, *images: Image.Image | str) -> list[dict[str, Any]]:
    """One user message about images, which are given as they are or as addresses."""
    urls = [image if isinstance(image, str) else data_uri(image) for image in images]
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": parts}]


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Running:
    """A server in a thread of its own."""

    def __init__(self, vlm: VLM, settings: Settings) -> None:
        app = create_app(vlm, settings)
        self.service: Service = app.state.service
        self.server = uvicorn.Server(configuration(app, settings))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = self.socket.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        wait_for(lambda: self.server.started)

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def vlm() -> VLM:
    return VLM.load("pocket")


@contextlib.contextmanager
def running(vlm: VLM, **settings: Any) -> Iterator[Running]:
    server = Running(vlm, Settings(**settings))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(vlm: VLM) -> Iterator[Running]:
    with running(vlm) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Running) -> OpenAI:
    return server.client()


class Gate:
    """Stops the model before every token of a batch, until it is let through."""

    def __init__(self, vlm: VLM) -> None:
        self.answer, self.steps, self.open = vlm.answer, threading.Semaphore(0), threading.Event()
        self.batches: list[int] = []
        self.reached = 0  # tokens that a batch was about to choose

    def __call__(self, chats: list[Any], *args: Any, **options: Any) -> Any:
        if "logits_processor" not in options:  # the test itself asks
            return self.answer(chats, *args, **options)
        self.batches.append(len(chats))
        processors = options.pop("logits_processor")
        return self.answer(chats, *args, logits_processor=[self.step, *processors], **options)

    def waits_at(self, token: int) -> bool:
        return self.reached == token

    def step(self, input_ids: Any, scores: Any) -> Any:
        self.reached += 1
        while not self.open.is_set():
            if self.steps.acquire(timeout=0.01):
                break
        return scores


@pytest.fixture
def gate(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The model waits for the test; in the end it runs on."""
    gate = Gate(vlm)
    monkeypatch.setattr(vlm, "answer", gate)
    yield gate
    gate.open.set()
