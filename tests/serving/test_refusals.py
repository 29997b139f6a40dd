"""Whatever is wrong with a request is one sentence and the right status, in OpenAI's words."""

from __future__ import annotations

import io
import json
import socket

import httpx
import openai
import pytest
from PIL import Image

from tests.serving.conftest import data_uri, encoded, question, running, scene

GOOD = {"model": "pocket", "messages": [{"role": "user", "content": "Is there a car?"}]}
SAID = {"role": "assistant", "content": "no"}
PIXEL = data_uri(Image.new("RGB", (8, 8)))


def user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


def image(url):
    return user(
        {"type": "text", "text": "Is it?"}, {"type": "image_url", "image_url": {"url": url}}
    )


def saved(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
BAD = {  # what is wrong -> (what the body says instead, status, a word of the sentence)
    "model": ({"model": "gpt-7"}, 404, "no model 'gpt-7'"),
    "model prefix": ({"model": "pocketx:clvs"}, 404, "no model"),
    "suffix": ({"model": "pocket:clws"}, 400, "did you mean 'clvs'"),
    "method": ({"method": "clvs(smoothness=1)"}, 400, "no parameter 'smoothness'"),
    "method value": ({"method": "clvs(smoothing=7)"}, 400, "smoothing"),
    "method twice": ({"model": "pocket:clvs", "method": "vcd"}, 400, "given twice"),
    "two methods": ({"method": "clvs+clvs"}, 400, "named twice"),
    "long method": ({"method": "clvs+" * 200}, 400, "500 characters"),
    "method's file": ({"method": "adhh(heads='/etc/passwd')"}, 400, "no files of the server"),
    "many steps": ({"method": "carve(steps=1000000)"}, 400,
                   "steps=1000000 is too much, a request may ask for 64"),
    "long instruction": ({"method": f"vicrop(instruction='{'car ' * 80}')"}, 400, "300 characters"),
    "instruction's token": ({"method": "vicrop(instruction='<image> a')"}, 400, "<image>"),
    "its surrogate": ({"method": r"vicrop(instruction='\ud800')"}, 400, "half a character"),
    "fresh module": ({"method": "cli(seed=0)"}, 400, "a request may not set seed"),
    "large module": ({"method": "cli(rank=1000000000)"}, 400, "a request may ask for 256"),
    "search's temperature": ({"method": "opera", "temperature": 1}, 400, "leave out temperature"),
    "search's logprobs": ({"method": "opera", "logprobs": True}, 400, "leave out temperature and"),
    "untrained module": ({"method": "cli"}, 400, "cli is trained"),
    "trained module": ({"method": "cli(path='/etc/x')"}, 400, "no files of the server"),
    "no messages": ({"messages": []}, 400, "messages"),
    "empty": ({"messages": [{"role": "user", "content": " "}]}, 400, "The question is empty"),
    "null": ({"messages": [{"role": "user", "content": None}]}, 400, "The question is empty"),
    "two questions": ({"messages": GOOD["messages"] * 2}, 400, "speak in turn"),
    "no question": ({"messages": [*GOOD["messages"], SAID]}, 400, "first and last"),
    "no user": ({"messages": [SAID]}, 400, "speak in turn"),
    "assistant first": ({"messages": [SAID, *GOOD["messages"]]}, 400, "speak in turn"),
    "only system": ({"messages": [{"role": "system", "content": "x"}]}, 400, "speak in turn"),
    "tool": ({"messages": [*GOOD["messages"], {"role": "tool", "content": "x"},
                           *GOOD["messages"]]}, 400, "speak in turn"),
    "empty earlier turn": ({"messages": [{"role": "user", "content": " "}, SAID,
                                         *GOOD["messages"]]}, 400, "user message is empty"),
    "long conversation": ({"messages": [*GOOD["messages"], SAID] * 2100 + GOOD["messages"]},
                          400, "4,096 tokens"),
    "role": ({"messages": [{"role": "me", "content": "x"}]}, 400, "messages.0.role"),
    "assistant picture": ({"messages": [*GOOD["messages"], {**image(PIXEL)["messages"][0],
        "role": "assistant"}, *GOOD["messages"]]}, 400, "Images belong"),
    "developer picture": ({"messages": [{**image(PIXEL)["messages"][0], "role": "developer"},
        *GOOD["messages"]]}, 400, "Images belong"),
    "late system": ({"messages": [*GOOD["messages"], SAID, {"role": "system", "content": "x"},
                                  *GOOD["messages"]]}, 400, "system messages"),
    "earlier image token": ({"messages": [{"role": "user", "content": "<image> a"}, SAID,
                                          *GOOD["messages"]]}, 400, "<image>"),
    "image token": ({"messages": [{"role": "user", "content": "<image> a"}]}, 400, "<image>"),
    "surrogate": ('{"model": "pocket", "messages": [{"role": "user", "content": "\\ud800"}]}',
                  400, "body"),
    "part": (user({"type": "input_audio", "input_audio": {}}), 400, "input_audio"),
    "long text": ({"messages": [{"role": "user", "content": "car " * 5000}]}, 400, "4,096 tokens"),
    "very long text": ({"messages": [{"role": "user", "content": "x" * 200_000}]}, 400, "4,096"),
    "n": ({"n": 2}, 400, "n"),
    "unknown": ({"tempature": 1}, 400, "tempature"),
    "tools": ({"tools": [1]}, 400, "tools"),
    "penalty": ({"presence_penalty": 1.5}, 400, "presence_penalty"),
    "temperature": ({"temperature": -1}, 400, "temperature"),
    "temperature type": ({"temperature": "hot"}, 400, "temperature"),
    "top_p": ({"top_p": 0}, 400, "top_p"),
    "seed": ({"seed": 2**64}, 400, "seed"),
    "max_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "too many tokens": ({"max_tokens": 5000}, 400, "1,024 tokens"),
    "stop": ({"stop": ["a"] * 5}, 400, "stop"),
    "empty stop": ({"stop": ""}, 400, "stop string is empty"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "top_logprobs alone": ({"top_logprobs": 2}, 400, "needs logprobs"),
    "not JSON": ("{", 400, "body"),
    "not an object": ("[]", 400, "body"),
    "not UTF-8": (b"\xff\xfe", 400, "body"),
    "deep": ("[" * 100_000, 400, "body"),
    "path": (image("/etc/hostname"), 400, "files are not read"),
    "file": (image("file:///etc/hostname"), 400, "files are not read"),
    "file in capitals": (image("FILE:///etc/hostname"), 400, "files are not read"),
    "remote": (image("https://example.com/a.png"), 400, "fetches no images"),
    "no comma": (image("data:image/png;base64"), 400, "data URI"),
    "not base64": (image("data:image/png;base64,%%%"), 400, "base64"),
    "plain data": (image("data:image/svg+xml,<svg/>"), 400, "data URI"),
    "empty image": (image("data:image/png;base64,"), 400, "empty"),
    "SVG": (image(encoded(SVG, "image/svg+xml")), 400, "picture"),
    "EPS": (image(encoded(saved(Image.new("RGB", (8, 8)), "EPS"))), 400, "picture"),
    "text": (image(encoded(b"hello")), 400, "picture"),
    "cut": (image(encoded(saved(scene(1), "PNG")[:5000])), 400, "damaged"),
    "many pixels": (image(encoded(saved(Image.new("1", (5000, 4000)), "PNG"))), 413, "16,000,000"),
    "a bomb": (image(encoded(saved(Image.new("1", (14000, 14000)), "PNG"))), 413, "pixels"),
    "many bytes": (image(encoded(bytes(10_000_001))), 413, "10,000,000 bytes"),
    "many images": (user(*image(PIXEL)["messages"][0]["content"][1:] * 5), 400, "4 images"),
    "many images in turns": ({"messages": [*image(PIXEL)["messages"], SAID] * 4
                             + image(PIXEL)["messages"]}, 400, "4 images"),
    "two images for one": (
        user({"type": "text", "text": "Is it?"}, *image(PIXEL)["messages"][0]["content"][1:] * 2)
        | {"method": "vicrop"}, 400, "vicrop",
    ),
}  # fmt: skip


def post(server, body, **headers):
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    headers = {"content-type": "application/json", **headers}
    return httpx.post(
        f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=60
    )


def refusal(answer, status, word):
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]
    assert error["message"].endswith((".", '"'))
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_one_sentence(server, what, streamed):
    body, status, word = BAD[what]
    if isinstance(body, dict):
        body = GOOD | body | {"stream": streamed}
    error = refusal(post(server, body), status, word)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "sent",
    [
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"},
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0},
        {"logit_bias": {}, "modalities": ["text"], "parallel_tool_calls": True, "top_k": None},
    ],
)
def test_what_clients_send_by_default_is_accepted(server, sent):
    assert post(server, GOOD | {"max_tokens": 1} | sent).status_code == 200


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({"top_k": 50}, "top_k cannot be used: the server can only do -1 or 0."),
        ({"response_format": {"type": "json_object"}}, "response_format cannot be used"),
        ({"tools": [{"type": "function"}]}, "tools cannot be used: the server can only do []."),
        ({"repetition_penalty": 1.1}, "repetition_penalty cannot be used"),
    ],
)
def test_what_would_change_the_answer_is_refused(server, sent, says):
    assert says in post(server, GOOD | sent).json()["error"]["message"]


def test_the_good_request_of_this_file_is_good(server):
    assert post(server, GOOD | {"max_tokens": 2}).status_code == 200
    assert post(server, GOOD | image(PIXEL) | {"max_tokens": 2}).status_code == 200
    heard = {"user": "me", "n": 1, "presence_penalty": 0, "metadata": {"a": "b"}, "store": False}
    assert post(server, GOOD | heard | {"max_tokens": 2}).status_code == 200


def test_texts_that_name_no_file_are_for_everybody(server):
    about = GOOD | image(PIXEL) | {"max_tokens": 2}
    for method in ("vicrop(instruction='Describe the cars.')", "carve(steps=2, suffix=' Say it.')"):
        assert post(server, about | {"method": method}).json()["method"] == method


def test_the_server_itself_may_offer_what_costs_more(vlm):
    about = GOOD | image(PIXEL) | {"max_tokens": 2}
    with running(vlm, methods=("carve(steps=65)",)) as server:
        assert post(server, about | {"method": "carve"}).json()["method"] == "carve(steps=65)"
        refusal(post(server, about | {"method": "carve(steps=65)"}), 400, "64 at most")


def test_other_paths_and_types(server):
    refusal(httpx.get(f"{server.url}/v2"), 404, "Not Found")
    refusal(httpx.get(f"{server.url}/v1/chat/completions"), 405, "Not Allowed")
    refusal(post(server, GOOD, **{"content-type": "text/plain"}), 415, "application/json")


def test_a_large_body_is_not_read_to_its_end(vlm):
    with running(vlm, body_bytes=1000) as server:
        refusal(post(server, GOOD | {"user": "x" * 2000}), 413, "1,000 bytes")
        assert post(server, GOOD | {"max_tokens": 1}).status_code == 200


def test_a_body_that_does_not_come(vlm):
    with running(vlm, seconds=0.2) as server, socket.create_connection(server.address) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        slow.settimeout(60)
        assert b"408" in slow.recv(100)


def test_the_api_key(vlm):
    with running(vlm, api_key="söcret") as server:
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        for key in ("none", "söcre", "söcrett"):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                server.client("none").models.list()
            wrong = {"authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{server.url}/metrics", headers=wrong).status_code == 401
        refusal(post(server, GOOD), 401, "Bearer")
        right = {"authorization": "Bearer söcret".encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=right).status_code == 200
    with running(vlm, api_key="secret") as server:
        answer = server.client("secret").chat.completions.create(
            model="pocket", messages=question("Is there a car?"), max_tokens=1
        )
        assert answer.choices[0].message.content


def test_what_is_wrong_is_counted(server):
    post(server, GOOD | {"n": 2})
    text = httpx.get(f"{server.url}/metrics").text
    assert 'foveate_requests_total{path="/v1/chat/completions",status="400"}' in text
    assert "foveate_queue_length 0.0" in text
