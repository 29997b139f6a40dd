"""The OpenAI server of vLLM with a method per request, and the prefix cache between requests."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from tests.vllm import answers
from tests.vllm.serving import body_of, post, serving, stream

METHODS = ["", "clvs", "pai(gamma=1.0)", "scalingvis(weight=2.0)", "vaf(enhance=1.8)", "tarac"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("served")
    requests = answers.requests(folder, METHODS * 4)
    model = answers.pocket(folder / "pocket")
    return {"model": str(model), "requests": requests, "out": str(folder / "reference")}


@pytest.fixture(scope="module")
def reference(asked: dict[str, Any]) -> list[dict[str, Any]]:
    answered: list[dict[str, Any]] = answers.run("transformers", asked)[0]
    return answered


@pytest.fixture(scope="module")
def url(asked: dict[str, Any]) -> Iterator[str]:
    with serving(asked["model"], Path(asked["out"]).with_suffix(".log")) as server:
        yield server.url


def test_clients_with_different_methods_get_the_answers_of_transformers(
    url: str, asked: dict[str, Any], reference: list[dict[str, Any]]
) -> None:
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
        ("sid", "to read the attention of its second stream, so it does not run inside vLLM"),
        ("ritual", "to change the chat before it is a prompt"),
        ("vcd+m3id", "there is one"),
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


def test_several_answers_of_one_request(
    url: str, asked: dict[str, Any], reference: list[dict[str, Any]]
) -> None:
    for n in (1, 5):  # clvs, and tarac, which remembers
        one = asked["requests"][n]
        _, body = post(url, one, n=3, temperature=1, top_k=1)  # vLLM refuses n=3 at temperature 0
        assert [c["token_ids"] for c in body["choices"]] == 3 * [reference[n]["tokens"]]
    _, body = post(url, asked["requests"][1], n=3, temperature=2.0, seed=1)
    assert len({tuple(c["token_ids"]) for c in body["choices"]}) > 1


def test_streams(url: str, asked: dict[str, Any], reference: list[dict[str, Any]]) -> None:
    for n, one in enumerate(asked["requests"][:6]):
        assert stream(url, one) == (reference[n]["tokens"], True)


def test_stop_strings(url: str, asked: dict[str, Any]) -> None:
    one = asked["requests"][1]
    _, whole = post(url, one)
    text = whole["choices"][0]["message"]["content"]
    _, stopped = post(url, one, stop=[text[2:4]])
    assert stopped["choices"][0]["message"]["content"] == text[:2]


def test_guided_answers_are_drawn_from_the_method_s_logits(
    url: str, asked: dict[str, Any], reference: list[dict[str, Any]]
) -> None:
    for n, one in enumerate(asked["requests"][:6]):
        guide = {"structured_outputs": {"choice": ["zebra", "quartz"]}, "ignore_eos": False}
        how = {"top_logprobs": 2, "return_tokens_as_token_ids": True}
        status, body = post(url, one, **guide, **how)
        assert status == 200, body
        choice = body["choices"][0]
        assert choice["message"]["content"] in ("zebra", "quartz")
        both = choice["logprobs"]["content"][0]["top_logprobs"]  # among those that are allowed
        tokens = [int(token["token"].removeprefix("token_id:")) for token in both]
        expected = reference[n]["rows"][0][tokens].diff()
        assert abs(both[1]["logprob"] - both[0]["logprob"] - float(expected)) < 2e-4, one["method"]


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


def test_a_beam_search_with_a_method_is_a_bad_request(url: str, asked: dict[str, Any]) -> None:
    beams = {"use_beam_search": True, "n": 2}
    status, body = post(url, asked["requests"][1], **beams)
    assert status == 400
    assert "leave out use_beam_search" in body["error"]["message"]
    assert post(url, asked["requests"][0], **beams)[0] == 200, "the plain model's"


def test_a_follow_up_without_a_picture(
    url: str, asked: dict[str, Any], tmp_path: Path, reference: list[dict[str, Any]]
) -> None:
    """The picture of the first turn is still in the prompt, and the method acts on it."""
    one = asked["requests"][1]
    first = one["prompt"].removeprefix("USER: <image>\n").removesuffix(" ASSISTANT:")
    turns = [("user", first), ("assistant", "yes"), ("user", "Is there a car?")]
    image = json.loads(body_of(one))["messages"][0]["content"][0]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[0]["content"] = [image, {"type": "text", "text": first}]
    status, body = post(url, one, messages=messages)
    assert status == 200, body
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    prompt = tokenizer.decode(body["prompt_token_ids"]).replace("<image>" * 144, "<image>")
    assert prompt.count("<image>") == 1
    again = {"requests": [one | {"prompt": prompt.removeprefix(tokenizer.bos_token or "")}]}
    (turn,) = answers.run("transformers", asked | again | {"out": str(tmp_path / "again")})
    assert turn[0]["ids"] == body["prompt_token_ids"]
    assert body["choices"][0]["token_ids"] == turn[0]["tokens"]
