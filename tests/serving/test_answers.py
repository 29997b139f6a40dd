"""What the real OpenAI client gets is what the model says offline, however it is asked."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from foveate import FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.methods.cli.method import CLI
from foveate.serving.app import create_app
from foveate.serving.sampling import sample
from foveate.serving.wire import Settings
from tests.serving.conftest import question, running, scene, wait_for

pytestmark = pytest.mark.long
DESCRIBE = "Please describe this image in detail."
METHODS = ["vanilla", "clvs", "clvs(smoothing=0.7)+vcd", "pai", "vicrop", "opera"]


def text(answer):
    return answer.choices[0].message.content


def ask(client, number=3, words=DESCRIBE, model="pocket", **options):
    return client.chat.completions.create(
        model=model, messages=question(words, scene(number)), **options
    )


def streamed(client, **options):
    """The chunks of a streamed answer, and its text."""
    chunks = list(ask(client, stream=True, **options))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return chunks, said


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_is_that_of_the_model(client, vlm, method):
    words = "Is there a car in the image?"
    offline = vlm.ask(scene(3), words, method, max_new_tokens=20)
    answer = ask(client, words=words, max_tokens=20, extra_body={"method": method})
    assert text(answer) == offline.text
    assert text(ask(client, words=words, max_tokens=20, model=f"pocket:{method}")) == offline.text
    assert answer.model_extra["method"] == method
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(offline.tokens)
    assert answer.usage.prompt_tokens == vlm.inputs([offline.chat])["input_ids"].shape[1]


def test_without_a_picture(client, vlm):
    messages = [{"role": "user", "content": "Is there a car?"}]
    answer = client.chat.completions.create(model="pocket", messages=messages, max_tokens=5)
    assert text(answer) == vlm.ask([], "Is there a car?", max_new_tokens=5).text


def test_a_system_text(client, vlm):
    messages = [{"role": "system", "content": "zebra"}, {"role": "user", "content": "a car"}]
    answer = client.chat.completions.create(model="pocket", messages=messages, max_tokens=5)
    offline = vlm.ask([], "a car", system="zebra", max_new_tokens=5)
    assert text(answer) == offline.text
    assert answer.usage.prompt_tokens == vlm.inputs([offline.chat])["input_ids"].shape[1]


def test_several_pictures(client, vlm):
    pictures = [scene(1), scene(2)]
    answer = client.chat.completions.create(
        model="pocket", messages=question("Is there a car?", *pictures), max_tokens=5
    )
    assert text(answer) == vlm.ask(pictures, "Is there a car?", max_new_tokens=5).text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 7},
        {"stop": [" in the", "zz"]},
        {"temperature": 1.3, "seed": 5, "stop": "or"},
        {"logprobs": True, "top_logprobs": 2, "stop": "striped"},
    ],
)
def test_a_stream_says_the_same(client, options):
    whole = ask(client, **options)
    chunks, said = streamed(client, stream_options={"include_usage": True}, **options)
    assert said == text(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    if options.get("logprobs"):
        told = [t for c in chunks if c.choices and c.choices[0].logprobs
                for t in c.choices[0].logprobs.content]  # fmt: skip
        assert told == whole.choices[0].logprobs.content
    else:
        assert len(chunks) > 5  # it did come piece by piece


def test_the_longest_answer(client, vlm):
    answer = ask(client, max_completion_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4
    assert text(answer) == vlm.ask(scene(3), DESCRIBE, max_new_tokens=4).text


def test_stop_strings_are_cut_off(client, vlm):
    offline = vlm.ask(scene(3), DESCRIBE).text
    answer = ask(client, stop=["zebra", "striped cl"])
    assert text(answer) == offline[: offline.index("striped cl")].strip()
    assert answer.choices[0].finish_reason == "stop"
    assert text(ask(client, stop=offline[:2])) == ""


def test_log_probabilities(client, vlm):
    offline = vlm.ask(scene(3), DESCRIBE, max_new_tokens=6)
    answer = ask(client, max_tokens=6, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [t.token for t in content] == list(offline.tokens)
    assert [math.exp(t.logprob) for t in content] == pytest.approx(offline.probabilities, abs=1e-4)
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].token == token.token  # greedy
        logs = [top.logprob for top in token.top_logprobs]
        assert logs == sorted(logs, reverse=True)
        assert len(logs) == 3
    assert ask(client, max_tokens=2).choices[0].logprobs is None
    bare = ask(client, max_tokens=2, logprobs=True).choices[0].logprobs.content
    assert [t.top_logprobs for t in bare] == [[], []]


def test_a_seed_decides_whatever_else_is_in_the_batch(client, server, gate):
    options = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 24}
    gate.open.set()
    alone = {seed: text(ask(client, seed=seed, **options)) for seed in range(6)}
    assert len(set(alone.values())) > 3
    assert text(ask(client, **options)) != text(ask(client, **options))  # none: another every time
    gate.open.clear()
    gate.batches.clear()
    with ThreadPoolExecutor(7) as pool:
        first = pool.submit(ask, client, seed=0, **options)  # occupies the model
        wait_for(lambda: gate.batches)
        rest = {seed: pool.submit(ask, client, seed=seed, **options) for seed in range(1, 6)}
        greedy = pool.submit(ask, client, number=7, words="Is there a car?", max_tokens=3)
        wait_for(lambda: len(server.service.worker.waiting) == 6)
        gate.open.set()
        assert text(first.result()) == alone[0]
        assert {seed: text(found.result()) for seed, found in rest.items()} == {
            seed: alone[seed] for seed in range(1, 6)
        }
        assert text(greedy.result()) == text(ask(client, 7, "Is there a car?", max_tokens=3))
    assert gate.batches[:2] == [1, 6]


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.3, 0.5, 0.0, 0.2])
    draws = [(i + 0.5) / 1000 for i in range(1000)]
    counts = torch.bincount(
        torch.tensor([sample(probabilities.log(), 1.0, 1.0, u) for u in draws]), minlength=4
    )
    assert counts.tolist() == [300, 500, 0, 200]
    assert {sample(probabilities.log(), 1.0, 0.6, u) for u in draws} == {0, 1}
    assert {sample(probabilities.log(), 1.0, 0.4, u) for u in draws} == {1}
    assert {sample(probabilities.log(), 1e-300, 1.0, u) for u in draws} == {1}
    sharper = [sample(probabilities.log(), 0.5, 1.0, u) for u in draws].count(1)
    assert sharper == pytest.approx(1000 * 0.25 / 0.38, abs=1)


def test_the_models_are_listed(client, vlm):
    ids = [model.id for model in client.models.list()]
    assert ids[0] == "pocket"
    assert {"pocket:clvs", "pocket:vcd", "pocket:vicrop"} <= set(ids)
    assert client.models.retrieve("pocket:clvs").id == "pocket:clvs"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-7")


def test_the_servers_own_methods_are_asked_for_by_name(vlm, tmp_path):
    injection = CLI(seed=0, gate="static").resolve(anatomy(vlm.model)).build(anatomy(vlm.model))
    for gate in injection.gates.values():
        torch.nn.init.constant_(gate.value, 0.5)
    injection.save_pretrained(tmp_path)
    own = f"cli(path={str(tmp_path)!r})"
    offline = vlm.ask(scene(3), DESCRIBE, own, max_new_tokens=20)
    assert offline.text != vlm.ask(scene(3), DESCRIBE, max_new_tokens=20).text
    with running(vlm, methods=(own, "clvs(smoothing=0.5)")) as server:
        client = server.client()
        assert "pocket:cli" in {model.id for model in client.models.list()}
        assert text(ask(client, max_tokens=20, model="pocket:cli")) == offline.text
        with pytest.raises(openai.BadRequestError, match="no files of the server"):
            ask(client, model=f"pocket:{own}")
        both = ask(client, max_tokens=20, model="pocket:clvs+vcd")
    wanted = vlm.ask(scene(3), DESCRIBE, "clvs(smoothing=0.5)+vcd", max_new_tokens=20)
    assert text(both) == wanted.text
    with pytest.raises(FoveateError, match="There is no folder"):
        create_app(vlm, Settings(methods=("cli(path='nowhere')",)))


def test_an_asynchronous_client_and_its_stream(server):
    async def many():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            stream = await client.chat.completions.create(
                model="pocket", messages=question(DESCRIBE, scene(3)), stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(many()) == text(ask(server.client()))
