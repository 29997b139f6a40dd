"""Requests to a running server: an answer or a refusal in OpenAI's words, and a quiet log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foveate import VLM
from foveate.scenes import world
from tests.hostile import MANY, tries
from tests.hostile.test_pictures import files
from tests.hostile.test_texts import literals, texts
from tests.serving.conftest import Running, data_uri, encoded, running

LOG = 1000  # bytes that a request may add to the log
SMALL = data_uri(Image.new("RGB", (8, 8)))

anything: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True), st.text(max_size=8),
        st.sampled_from([10**400, -1, "\ud800", "<image>", "pocket", SMALL]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)  # fmt: skip
urls = st.one_of(
    files().map(encoded),
    st.just(SMALL),
    st.text(max_size=30),
    st.sampled_from([
        "data:", "data:,", "data:;base64", "data:image/png;base64,====", "file:///etc/passwd",
        "http://127.0.0.1/", "data:image/png;base64," + "A" * 100_000, "\0", "javascript:1",
    ]),
)  # fmt: skip
parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=20)}),
    st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": urls})}
    ),
    anything,
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.one_of(
                st.sampled_from(["user", "assistant", "system", "tool"]), st.text(max_size=5)
            ),
            "content": st.one_of(st.text(max_size=20), st.lists(parts, max_size=4), anything),
        }
    ),
    max_size=4,
)
FIELDS = (
    "temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs", "n", "stream", "user",
    "stream_options", "metadata", "presence_penalty", "tools", "max_completion_tokens",
)  # fmt: skip


@st.composite
def bodies(draw: Callable[[Any], Any]) -> bytes:
    """A body of a chat completion, with some of its parts made up."""
    body: dict[str, Any] = {
        "model": "pocket",
        "messages": [{"role": "user", "content": "Is there a car?"}],
        "max_tokens": 1,
    }
    for kind in draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)):
        if kind == 0:
            body["messages"] = draw(messages)
        elif kind == 1:
            body["method"] = draw(st.one_of(texts, anything))
        elif kind == 2:
            body["model"] = "pocket:" + draw(st.one_of(texts, st.just("clvs")))
        elif kind == 3:
            body[draw(st.sampled_from(FIELDS))] = draw(anything)
        elif kind == 4:
            image = {"type": "image_url", "image_url": {"url": draw(urls)}}
            about = {"type": "text", "text": "Is it?"}
            body["messages"] = [{"role": "user", "content": [about, image]}]
        else:
            field = draw(st.sampled_from(["smoothing", "beta", "top_k", "layers", "stop_every"]))
            body["method"] = f"clvs({field}={draw(literals)})"
    data = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:  # it may be no JSON any more
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 3)) :]
    return data


class Log(logging.Handler):
    """How much each request logs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.bytes += len(self.format(record))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Running, httpx.Client, Log]]:
    log = Log()
    loggers = [logging.getLogger(name) for name in (None, "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(log)
    with running(VLM.load("pocket"), pixels=2**20) as server, httpx.Client(timeout=60) as client:
        yield server, client, log
    for logger in loggers:
        logger.removeHandler(log)


def ask(server: tuple[Running, httpx.Client, Log], body: bytes, path: str) -> None:
    running, client, log = server
    log.bytes = 0
    answer = client.post(
        f"{running.url}{path}", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.status_code in (400, 404, 413, 429)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.json()["error"]["message"]) < 1000
    elif answer.headers["content-type"] == "text/event-stream; charset=utf-8":
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"server_error"' not in answer.text
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")
    assert log.bytes < LOG


CHAT = "/v1/chat/completions"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@tries(40)
@given(bodies())
def test_bodies(server: Any, body: bytes) -> None:
    ask(server, body, CHAT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@MANY
@given(bodies())
def test_many_bodies(server: Any, body: bytes) -> None:
    ask(server, body, CHAT)


def test_a_good_request_among_them(server: Any) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": data_uri(world.draw(world.sample(1)))}},
        {"type": "text", "text": "Is there a car?"},
    ]
    asked = {"model": "pocket:clvs", "messages": [{"role": "user", "content": content}]}
    ask(server, json.dumps(asked | {"max_tokens": 2}).encode(), CHAT)
