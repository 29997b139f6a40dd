"""The worker: who shares a batch, who is refused, and what a failure costs."""

from __future__ import annotations

import functools
import json
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest
import torch

from foveate import VLM, FoveateError
from foveate.core.method import as_stack
from foveate.serving.queue import Request, Worker
from foveate.serving.sampling import End, Piece, Sampling
from foveate.serving.wire import Busy, Failed, Settings, Stopping
from tests.serving.conftest import PATIENCE, question, running, scene, wait_for

DESCRIBE = "Please describe this image in detail."


class Heard(list):
    """What a request was told."""

    @property
    def text(self) -> str:
        return "".join(event.text for event in self if isinstance(event, Piece))

    @property
    def over(self) -> bool:
        return bool(self) and not isinstance(self[-1], Piece)


def asked(vlm: VLM, number: int = 3, method: str = "vanilla", **sampling: Any) -> Request:
    chat = vlm.chat([scene(number)], DESCRIBE, None)
    return Request(chat, as_stack(method), Sampling(**{"max_tokens": 6} | sampling))


@pytest.fixture
def worker(vlm):
    worker = Worker(vlm, Settings(batch=4, queue=6))
    yield worker
    worker.stop()
    if worker._thread.ident is not None:
        worker.join(PATIENCE)
        assert not worker._thread.is_alive()


def submit(worker: Worker, *requests: Request) -> list[Heard]:
    heard = [Heard() for _ in requests]
    for request, events in zip(requests, heard, strict=True):
        worker.submit(request, events.append)
    return heard


@functools.cache
def offline(vlm: VLM, number: int = 3, method: str = "vanilla", tokens: int = 6) -> str:
    return vlm.ask(scene(number), DESCRIBE, method, max_new_tokens=tokens).text


def test_the_oldest_leads_and_its_kind_follows(worker, vlm, gate):
    gate.open.set()
    kinds = ["vanilla", "clvs", "vanilla", "clvs", "vanilla", "clvs(smoothing=0.7)"]
    heard = submit(worker, *(asked(vlm, i, kind) for i, kind in enumerate(kinds)))
    worker.start()
    wait_for(lambda: all(events.over for events in heard))
    assert gate.batches == [3, 2, 1]
    for number, (kind, events) in enumerate(zip(kinds, heard, strict=True)):
        assert events.text == offline(vlm, number, kind)


def test_other_numbers_of_pictures_wait(worker, vlm, gate):
    gate.open.set()
    bare = Request(vlm.chat([], "a car", None), (), Sampling(max_tokens=3))
    heard = submit(worker, asked(vlm), bare, asked(vlm), *(asked(vlm) for _ in range(3)))
    worker.start()
    wait_for(lambda: all(events.over for events in heard))
    assert gate.batches == [4, 1, 1]


def test_what_methods_make_of_the_pictures_decides(worker, vlm, gate):
    gate.open.set()
    method = "vicrop(window=64)"
    requests = [asked(vlm, number, method) for number in range(3)]
    requests[1].chat.text = "Write a general description of the image."  # which finds no crop
    stack = requests[0].methods
    alone = [vlm.rewrite([request.chat], stack)[0] for request in requests]
    assert [chat.kind for chat in alone] == [2, 1, 2]
    heard = submit(worker, *requests)
    worker.start()
    wait_for(lambda: all(events.over for events in heard))
    assert gate.batches == [2, 1]
    for chat, events in zip(alone, heard, strict=True):
        assert events.text == vlm.answer([chat], stack, 6)[0].text
    assert worker.metrics.registry.get_sample_value("foveate_batch_size_count") == 2


def test_rows_of_a_batch_end_on_their_own(worker, vlm, gate):
    limits = (2, 3, 5)
    heard = submit(worker, *(asked(vlm, max_tokens=limit) for limit in limits))
    worker.start()
    for step in range(1, 6):
        wait_for(functools.partial(gate.waits_at, step))
        assert [events.over for events in heard] == [limit < step for limit in limits]
        gate.steps.release()
    wait_for(lambda: heard[2].over)
    for limit, events in zip(limits, heard, strict=True):
        assert events[-1] == End("length", events[-1].prompt_tokens, limit)
        assert events.text == offline(vlm, tokens=limit)


def test_a_full_queue_refuses(worker, vlm):
    requests = [asked(vlm) for _ in range(6)]
    submit(worker, *requests)
    with pytest.raises(Busy) as refused:
        submit(worker, asked(vlm))
    assert refused.value.seconds >= 1
    worker.cancel(requests[2])
    [last] = submit(worker, asked(vlm))  # its place is free at once
    worker.start()
    wait_for(lambda: last.over)


def test_a_cancelled_row_says_nothing_more(worker, vlm, gate):
    requests = [asked(vlm, 3), asked(vlm, 4)]
    gone, stays = submit(worker, *requests)
    worker.start()
    gate.steps.release(3)
    wait_for(lambda: gate.reached == 4)
    worker.cancel(requests[0])
    said = len(gone)
    gate.open.set()
    wait_for(lambda: stays.over)
    assert stays.text == offline(vlm, 4)
    assert len(gone) == said
    assert not gone.over


def test_a_batch_whose_clients_are_all_gone_ends(worker, vlm, gate):
    requests = [asked(vlm, max_tokens=1000), asked(vlm, max_tokens=1000, seed=1, temperature=2)]
    submit(worker, *requests)
    worker.start()
    wait_for(lambda: gate.reached == 1)
    for request in requests:
        worker.cancel(request)
    gate.open.set()
    [last] = submit(worker, asked(vlm, max_tokens=2))
    wait_for(lambda: last.over)
    assert gate.batches == [2, 1]
    assert gate.reached <= 4


class Failing:
    """The model fails on batches of some kind."""

    def __init__(self, vlm: VLM, fails: Any, error: Exception, step: int = 0) -> None:
        self.answer, self.fails, self.error, self.step = vlm.answer, fails, error, step
        self.batches: list[int] = []

    def __call__(self, chats: list[Any], *args: Any, **options: Any) -> Any:
        if "logits_processor" not in options:  # the test itself asks
            return self.answer(chats, *args, **options)
        self.batches.append(len(chats))
        left = [self.step]

        def fail(input_ids: Any, scores: Any) -> Any:
            left[0] -= 1
            if left[0] < 0 and self.fails(chats):
                raise self.error
            return scores

        processors = [fail, *options.pop("logits_processor")]
        return self.answer(chats, *args, logits_processor=processors, **options)


STARVED = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.filterwarnings("ignore:Memory is short")
def test_memory_that_does_not_suffice_halves_the_batch(worker, vlm, monkeypatch):
    failing = Failing(vlm, lambda chats: len(chats) > 1, STARVED, step=3)
    monkeypatch.setattr(vlm, "answer", failing)
    options = {"temperature": 1.0, "top_logprobs": 0}
    drawn = [asked(vlm, 1, seed=7, **options), asked(vlm, 1, seed=7, **options)]
    heard = submit(worker, asked(vlm, 0), *drawn, asked(vlm, 3, stop=("small",)))
    worker.start()
    wait_for(lambda: all(events.over for events in heard))
    assert failing.batches == [4, 2, 1, 1, 1, 1]
    monkeypatch.undo()
    assert heard[0].text == offline(vlm, 0)
    assert heard[1].text == heard[2].text
    for events in heard[1:3]:  # nothing twice, nothing left out
        tokens = [token for event in events[:-1] for token in event.tokens]
        assert len(tokens) == events[-1].completion_tokens
    assert heard[3].text == offline(vlm, 3).partition("small")[0].strip()


@pytest.mark.filterwarnings("ignore:RuntimeError. 3 questions are now asked one by one")
def test_a_row_that_fails_fails_alone(worker, vlm, monkeypatch, caplog):
    bad = asked(vlm, 2)
    failing = Failing(vlm, lambda chats: bad.chat in chats, RuntimeError("index -1 at 0x7f"))
    monkeypatch.setattr(vlm, "answer", failing)
    good = [asked(vlm, i) for i in (0, 1)]
    first, wrong, second = submit(worker, good[0], bad, good[1])
    worker.start()
    wait_for(lambda: first.over and wrong.over and second.over)
    assert (first.text, second.text) == (offline(vlm, 0), offline(vlm, 1))
    [error] = wrong
    assert isinstance(error, Failed)
    assert str(error) == "The model failed on this request: RuntimeError."
    assert "index -1 at 0x7f" in caplog.text  # for whoever runs the server
    monkeypatch.undo()
    [last] = submit(worker, asked(vlm))
    wait_for(lambda: last.over)
    assert last.text == offline(vlm)


@pytest.mark.filterwarnings("ignore:Memory is short")
def test_after_a_shortage_batches_grow_back(worker, vlm, monkeypatch):
    short = [True]
    failing = Failing(vlm, lambda chats: short[0] and len(chats) > 1, STARVED)
    monkeypatch.setattr(vlm, "answer", failing)
    heard = submit(worker, *(asked(vlm, i, max_tokens=2) for i in range(4)))
    worker.start()
    wait_for(lambda: all(events.over for events in heard))
    assert failing.batches == [4, 2, 1, 1, 1, 1]
    short[0] = False
    for expected in ([1, 1, 1, 1], [2, 2], [4], [4]):
        failing.batches.clear()
        with worker._changed:  # the worker waits until all four are there
            heard = submit(worker, *(asked(vlm, i, max_tokens=2) for i in range(4)))
        wait_for(lambda: all(events.over for events in heard))  # noqa: B023
        assert failing.batches == expected
        for number, events in enumerate(heard):
            assert events.text == offline(vlm, number, tokens=2)


@pytest.mark.filterwarnings("ignore:RuntimeError. 3 questions are now asked one by one")
def test_a_failure_is_told_before_the_others_are_answered(worker, vlm, monkeypatch):
    bad = asked(vlm, 2)
    failing = Failing(vlm, lambda chats: bad.chat in chats, RuntimeError("no"))
    monkeypatch.setattr(vlm, "answer", failing)
    told: list[int] = []
    requests = [bad, asked(vlm, 0), asked(vlm, 1)]
    for number, request in enumerate(requests):
        worker.submit(request, lambda _, number=number: told.append(number))
    worker.start()
    wait_for(lambda: all(request.answer.done for request in requests))
    assert told[0] == 0
    assert failing.batches == [3, 1, 1, 1]


def test_what_a_method_refuses_is_the_requests_own_fault(worker, vlm, monkeypatch):
    def rewrite(chats: Any, methods: Any) -> Any:
        if methods:
            raise FoveateError("Not this picture.")
        return chats

    monkeypatch.setattr(vlm, "rewrite", rewrite)
    bad, good = submit(worker, asked(vlm, method="clvs"), asked(vlm))
    worker.start()
    wait_for(lambda: bad.over and good.over)
    assert [str(error) for error in bad] == ["Not this picture."]
    assert good.text == offline(vlm)


def test_a_stop_finishes_what_is_held(worker, vlm, gate):
    heard = submit(worker, *(asked(vlm, i) for i in range(5)))
    worker.start()
    wait_for(lambda: gate.reached == 1)
    worker.stop()
    with pytest.raises(Stopping):
        submit(worker, asked(vlm))
    gate.open.set()
    worker.join(PATIENCE)
    assert [events.text for events in heard] == [offline(vlm, i) for i in range(5)]


# -- the same through the door ---------------------------------------------------------------------


def post(server: Any, **options: Any) -> httpx.Response:
    body = {"model": "pocket", "messages": question(DESCRIBE, scene(3)), "max_tokens": 6}
    body |= options
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE)


def test_too_many_clients(vlm, gate):
    with running(vlm, batch=1, queue=1) as server:
        found: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: found.append(post(server))) for _ in range(2)]
        threads[0].start()
        wait_for(lambda: gate.reached)
        threads[1].start()
        wait_for(lambda: server.service.worker.waiting)
        refused = post(server)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError, match="busy"):
            server.client().chat.completions.create(
                model="pocket", messages=question(DESCRIBE, scene(3))
            )
        gate.open.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert [answer.status_code for answer in found] == [200, 200]
        assert post(server).status_code == 200


def test_a_client_that_hangs_up_frees_its_place(vlm, gate):
    with running(vlm, batch=1, queue=1) as server:
        worker, client = server.service.worker, server.client()
        options = {"model": "pocket", "messages": question(DESCRIBE, scene(3)), "stream": True}
        gate.steps.release(2)
        stream = client.chat.completions.create(**options)  # it has begun
        next(iter(stream))
        wait_for(lambda: gate.reached == 3)
        body = json.dumps(options | {"stream": False}).encode()
        with socket.create_connection(server.address) as waits:  # this one has not
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
            waits.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: worker.waiting)
        wait_for(lambda: not worker.waiting)
        stream.close()
        wait_for(lambda: "foveate_cancelled_total 2.0" in metrics(server))
        before = gate.reached
        gate.open.set()
        assert post(server, max_tokens=2).status_code == 200
        assert gate.reached <= before + 3  # the cancelled row stopped at its next step
        assert 'status="499"' in metrics(server)


def metrics(server: Any) -> str:
    return httpx.get(f"{server.url}/metrics").text


def test_a_failure_of_the_model_is_a_500_with_one_sentence(vlm, monkeypatch):
    with running(vlm) as server:
        monkeypatch.setattr(vlm, "answer", Failing(vlm, lambda chats: True, RuntimeError("a\nb")))
        for streamed in (False, True):
            answer = post(server, stream=streamed)
            assert answer.status_code == 500
            error = answer.json()["error"]
            assert error["message"] == "The model failed on this request: RuntimeError."
            assert error["type"] == "server_error"
        monkeypatch.undo()
        monkeypatch.setattr(vlm, "answer", Failing(vlm, lambda chats: True, STARVED, step=3))
        with pytest.raises(openai.APIError, match="memory does not suffice"):
            list(server.client().chat.completions.create(
                model="pocket", messages=question(DESCRIBE, scene(3)), stream=True
            ))  # fmt: skip
        monkeypatch.undo()
        assert post(server, max_tokens=6).json()["choices"][0]["message"]["content"] == offline(vlm)


def test_the_figures_of_batches(vlm, gate):
    with running(vlm, batch=8) as server:
        threads = [threading.Thread(target=post, args=[server]) for _ in range(4)]
        threads[0].start()
        wait_for(lambda: gate.reached)
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: "foveate_queue_length 3.0" in metrics(server))
        gate.open.set()
        for thread in threads:
            thread.join(PATIENCE)
        text = metrics(server)
        assert "foveate_batch_size_count 2.0" in text
        assert "foveate_batch_size_sum 4.0" in text
        assert "foveate_request_seconds_count 4.0" in text
        assert 'foveate_tokens_total{kind="completion"}' in text


def test_an_idle_worker_takes_a_request_at_once(worker, vlm):
    worker.start()
    time.sleep(0.05)
    [heard] = submit(worker, asked(vlm))
    wait_for(lambda: heard.over)
    assert heard.text == offline(vlm)
