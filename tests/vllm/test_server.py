"""The OpenAI server of vLLM with a method per request, and the prefix cache between requests."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from tests.vllm import answers

METHODS = ["", "clvs", "pai(gamma=1.0)", "scalingvis(weight=2.0)", "vaf(enhance=1.8)", "tarac"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("served")
    requests = answers.requests(folder, METHODS * 4)
    model = answers.pocket(folder / "pocket")
    return {"model": str(model), "requests": requests, "out": str(folder / "reference")}


@pytest.fixture(scope="module")
def url(asked: dict[str, Any]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", asked["model"], "--served-model-name", "pocket", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--max-num-seqs", "16", "--kv-cache-memory-bytes", str(2**28)]
    log = Path(asked["out"]).with_suffix(".log")
    with log.open("w") as out:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()[-4000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def body_of(request: dict[str, Any], **changed: Any) -> bytes:
    """The body of a chat completion."""
    picture = base64.b64encode(Path(request["images"][0]).read_bytes()).decode()
    question = request["prompt"].split("\n", 1)[1].removesuffix(" ASSISTANT:")
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": "pocket",
        "temperature": 0,
        "max_tokens": answers.STEPS,
        "logprobs": True,
        "ignore_eos": True,
        "return_token_ids": True,
        "add_special_tokens": True,
        "messages": [{"role": "user", "content": content}],
    }
    if request["method"]:
        body["vllm_xargs"] = {"foveate": request["method"]}
    return json.dumps(body | changed).encode()


def post(url: str, request: dict[str, Any], **changed: Any) -> tuple[int, dict[str, Any]]:
    """Status and body of a chat completion."""
    data = body_of(request, **changed)
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_clients_with_different_methods_get_the_answers_of_transformers(
    url: str, asked: dict[str, Any]
) -> None:
    (reference,) = answers.run("transformers", asked)
    with ThreadPoolExecutor(24) as clients:
        got = list(clients.map(lambda one: post(url, one), asked["requests"]))
    for request, (status, body), expected in zip(asked["requests"], got, reference, strict=True):
        assert status == 200, body
        choice = body["choices"][0]
        assert choice["token_ids"] == expected["tokens"], request["method"]
        for step, token in enumerate(choice["logprobs"]["content"]):
            best = float(expected["rows"][step].max())
            assert abs(token["logprob"] - best) < 2e-4, request["method"]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("clvs(smoothing=7)", "smoothing must lie between 0 and 1"),
        ("nosuch", "There is no method"),
        ("vcd", "does not run inside vLLM"),
        ("devils(layers=(99,))", "layer 99 does not exist"),
        ("adhh(heads='/etc/passwd')", "name no files"),
    ],
)
def test_a_method_that_cannot_run_is_a_bad_request(
    url: str, asked: dict[str, Any], method: str, sentence: str
) -> None:
    status, body = post(url, asked["requests"][0] | {"method": method})
    assert status == 400
    assert sentence in body["error"]["message"]


def test_a_method_without_an_image_is_a_bad_request(url: str, asked: dict[str, Any]) -> None:
    text = [{"role": "user", "content": "Is there a sun?"}]
    one = asked["requests"][0] | {"method": "clvs"}
    status, body = post(url, one, messages=text)
    assert status == 400
    assert "no image" in body["error"]["message"]


def test_streams_several_answers_and_stop_strings(url: str, asked: dict[str, Any]) -> None:
    one = asked["requests"][1]
    _, body = post(url, one, n=3, temperature=0.7, seed=1)
    assert len({tuple(c["token_ids"]) for c in body["choices"]}) > 1
    _, plain = post(url, one)
    text = plain["choices"][0]["message"]["content"]
    _, stopped = post(url, one, stop=[text[2:4]])
    assert stopped["choices"][0]["message"]["content"] == text[:2]


def test_every_answer_tells_how_many_rows_its_methods_edited(
    url: str, asked: dict[str, Any]
) -> None:
    one, steps = asked["requests"][1] | {"method": "clvs+dola"}, answers.STEPS
    _, body = post(url, one)
    assert body["kv_transfer_params"] == {"foveate": [{"clvs": steps, "dola": steps}]}
    _, body = post(url, one, n=2, temperature=0.7, max_tokens=4)
    assert body["kv_transfer_params"] == {"foveate": [{"clvs": 4, "dola": 4}] * 2}
    _, body = post(url, asked["requests"][0])
    assert body["kv_transfer_params"] is None
    _, plain = post(url, one)
    stop = plain["choices"][0]["message"]["content"][2:4]
    _, body = post(url, one, stop=[stop])
    count = body["usage"]["completion_tokens"]
    assert body["kv_transfer_params"]["foveate"][0]["clvs"] in (count, count + 1)


def test_streamed_answers_tell_it_where_they_end(url: str, asked: dict[str, Any]) -> None:
    head = {"content-type": "application/json"}
    for number, expected in ((2, {"foveate": [{"pai": answers.STEPS}]}), (0, None)):
        data = body_of(asked["requests"][number], stream=True)
        request = urllib.request.Request(f"{url}/v1/chat/completions", data, head)
        with urllib.request.urlopen(request, timeout=300) as answer:
            lines = [x[6:] for x in answer.read().decode().splitlines() if x.startswith("data: {")]
        last = json.loads(lines[-1])
        assert last["choices"][0]["finish_reason"] == "length"
        assert last.get("kv_transfer_params") == expected
        assert not any("kv_transfer_params" in line for line in lines[:-1])


def metrics(url: str) -> dict[str, float]:
    """What /metrics tells about methods."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {x.split()[0]: float(x.split()[1]) for x in lines if x.startswith("foveate_")}


def test_prometheus_counts_rows_and_answers_by_a_methods_name(
    url: str, asked: dict[str, Any]
) -> None:
    one, rows = asked["requests"][1], 'foveate_rows_edited_total{method="devils"}'
    for alpha in (0.5, 1.0):
        post(url, one | {"method": f"devils(alpha={alpha})"})
    told = metrics(url)
    assert told[rows] == 2 * answers.STEPS
    assert told['foveate_answers_total{method="devils"}'] == 2


def test_an_answer_that_no_row_of_was_edited_fails(url: str, asked: dict[str, Any]) -> None:
    """A stop test that always stops before the one layer that CLVS is to edit."""
    never = "clvs(stop_threshold=1.1,layers=(11,))"
    status, body = post(url, asked["requests"][1] | {"method": never})
    assert status == 500, body
    assert "clvs edited no row of this answer" in body["error"]["message"]
    status, body = post(url, asked["requests"][1])
    assert status == 200, "the server goes on"


HOSTILE = [
    "clvs(" * 5000,
    "clvs(smoothing=" + "9" * 400 + ")",
    "clvs(smoothing=[]" * 50,
    "\ud800",
    "é" * 4000,
]


def test_hang_ups_and_hostile_texts_spoil_nobodys_answer(url: str, asked: dict[str, Any]) -> None:
    """Clients that hang up, texts that cannot be read, and 64 clients at once."""
    (reference,) = answers.run("transformers", asked)
    requests = asked["requests"]
    end = time.monotonic() + float(os.environ.get("FOVEATE_LOAD_SECONDS", "20"))
    wrong: list[str] = []

    def client(number: int) -> int:
        right = 0
        while time.monotonic() < end:
            n = (number + right) % len(requests)
            if number % 5 == 0:
                status, body = post(url, requests[n] | {"method": HOSTILE[right % len(HOSTILE)]})
                if status != 400 or len(body["error"]["message"]) > 1000:
                    wrong.append(f"{status} {str(body)[:300]}")
            elif number % 5 == 1:
                hang_up(url, requests[n])
            else:
                status, body = post(url, requests[n])
                if status != 200 or body["choices"][0]["token_ids"] != reference[n]["tokens"]:
                    wrong.append(f"{requests[n]['method']} {status} {str(body)[:300]}")
            right += 1
        return right

    with ThreadPoolExecutor(64) as clients:
        assert sum(clients.map(client, range(64))) > 64
    assert not wrong, wrong[:5]
    status, body = post(url, requests[1])
    assert (status, body["choices"][0]["token_ids"]) == (200, reference[1]["tokens"])


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
