"""Inside vLLM nothing is silent: what is counted, what fails, what is refused at the start.

Needs no vLLM: its parts are stand-ins here. ``make test-vllm`` runs the same inside of it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from foveate import FoveateError
from foveate.backends.vllm import compat, count, watch
from foveate.backends.vllm import settings as refusals
from foveate.backends.vllm.asked import KEY
from foveate.backends.vllm.logits import _noted, speaking
from foveate.backends.vllm.plan import Live
from foveate.backends.vllm.prompts import readings
from foveate.core.method import parse
from foveate.core.rows import Stream
from foveate.core.sequence import Stack
from tests.test_paged_rows import ANATOMY

DEPTH = ANATOMY.depth


class Request:
    """A request of vLLM's scheduler, or the front end's state of one."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


# -- the scheduler adds up -------------------------------------------------------------------------


def test_every_position_counts_once() -> None:
    requests: dict[str, Any] = {"a": Request()}

    def step(first: int, end: int) -> int:
        return count.take_in(requests, {"a": {"vaf": (first, end)}})["a"]["vaf"]

    assert step(40, 52) == 12, "a piece of a prompt"
    assert step(52, 60) == 20, "its end"
    assert step(60, 61) == 21
    assert step(40, 60) == 21, "computed again after a preemption"
    assert step(60, 62) == 22
    assert count.take_in(requests, {"b": {"vaf": (0, 1)}}) == {}, "its client has gone"


def test_a_step_without_an_edit_is_told_as_none() -> None:
    requests: dict[str, Any] = {"a": Request()}
    assert count.take_in(requests, {"a": {"clvs": (9, 9)}}) == {"a": {"clvs": 0}}
    assert count.take_in(requests, {"a": {"clvs": (10, 11)}}) == {"a": {"clvs": 1}}


def test_the_sum_goes_with_the_tokens_and_keeps_what_vllm_sends() -> None:
    one, other = output("a", params={"remote": 1}), output("b")
    count.attach({0: SimpleNamespace(outputs=[one, other])}, {"a": {"clvs": 3}})
    assert one.kv_transfer_params == {"remote": 1, KEY: {"clvs": 3}}
    assert other.kv_transfer_params is None


# -- the front end checks --------------------------------------------------------------------------


def output(name: str, params: Any = None, tokens: tuple[int, ...] = (5,)) -> Any:
    return SimpleNamespace(request_id=name, kv_transfer_params=params, new_token_ids=list(tokens))


class Processor:
    """vLLM's `OutputProcessor` with requests of a method."""

    def __init__(self, text: str, names: list[str], parent: Any = None, queue: Any = None) -> None:
        self.request_states: dict[str, Any] = {}
        for n, name in enumerate(names):
            given = {"request_index": n, "parent_req": parent, "queue": queue}
            state: Any = Request(request_id=name, **given)
            count.begin(state, text)
            self.request_states[name] = state

    def abort_requests(self, names: list[str], internal: bool) -> list[str]:
        return [name for name in names if self.request_states.pop(name, None)]

    def process(self, outputs: list[Any], over: tuple[str, ...] = ()) -> Any:
        found = count.show(self, outputs)
        done = SimpleNamespace(reqs_to_abort=[])
        for name in over:
            self.request_states.pop(name)
        count.refuse_silent(self, found, done)
        return done


class Queue:
    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def put(self, error: Exception) -> None:
        self.errors.append(error)


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's exceptions and the counters of Prometheus, where they are not installed."""

    class GracefulHTTPError(Exception):
        def __init__(self, message: str, http_status: int) -> None:
            super().__init__(message)
            self.http_status = http_status

    made = ModuleType("vllm.exceptions")
    made.GracefulHTTPError = GracefulHTTPError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", made)


class Counter:
    """A counter of Prometheus with one label."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def labels(self, name: str) -> Any:
        def inc(by: int = 1) -> None:
            self.values[name] = self.values.get(name, 0) + by

        return SimpleNamespace(inc=inc)


@pytest.fixture(autouse=True)
def counters(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter, Counter]:
    rows, answers = Counter(), Counter()
    monkeypatch.setattr(count, "_rows", lambda: rows)
    monkeypatch.setattr(count, "_answers", lambda: answers)
    return rows, answers


def test_an_answer_carries_the_rows_of_each_method(counters: tuple[Counter, Counter]) -> None:
    processor = Processor("clvs+pai(gamma=1)", ["a"])
    for rows in (1, 2, 3):
        one = output("a", {KEY: {"clvs": rows, "pai": rows}})
        processor.process([one], over=("a",) if rows == 3 else ())
        assert one.kv_transfer_params == {KEY: [{"clvs": rows, "pai": rows}]}
    assert counters[0].values == {"clvs": 3, "pai": 3}
    assert counters[1].values == {"clvs": 1, "pai": 1}


def test_several_answers_to_a_prompt_are_told_apart() -> None:
    processor = Processor("clvs", ["0_a", "1_a"], Request(n=2, request_id="a"))
    one, two = output("0_a", {KEY: {"clvs": 4}}), output("1_a", {KEY: {"clvs": 1}})
    processor.process([one, two])
    assert two.kv_transfer_params == {KEY: [{"clvs": 4}, {"clvs": 1}]}


def test_a_method_that_did_not_arrive_fails_at_the_first_token(
    errors: None, counters: tuple[Counter, Counter]
) -> None:
    queue = Queue()
    processor = Processor("clvs+pai(gamma=1)", ["a"], queue=queue)
    done = processor.process([output("a", {KEY: {"clvs": 1}})])
    (error,) = queue.errors
    assert "pai did not reach this answer" in str(error)
    assert done.reqs_to_abort == ["a"]
    assert not counters[1].values


def test_an_answer_without_an_edited_row_fails_when_it_is_over(errors: None) -> None:
    queue = Queue()
    processor = Processor("clvs", ["a"], queue=queue)
    processor.process([output("a", {KEY: {"clvs": 0}})])
    assert not queue.errors, "the next token may be edited"
    processor.process([output("a", {KEY: {"clvs": 0}})], over=("a",))
    assert "clvs edited no row of this answer" in str(queue.errors[0])


def test_without_a_server_the_call_fails() -> None:
    processor = Processor("clvs", ["a"])
    with pytest.raises(RuntimeError, match="clvs did not reach"):
        processor.process([output("a")])
    assert not processor.request_states


def test_a_plain_request_is_left_alone() -> None:
    processor = Processor("clvs", [])
    processor.request_states["a"] = Request()
    one = output("a")
    processor.process([one])
    assert one.kv_transfer_params is None


def test_a_stream_tells_the_rows_where_an_answer_ends() -> None:
    def line(index: int, reason: str | None) -> str:
        text = 'He said "finish_reason": "é"'
        choice = {"index": index, "delta": {"content": text}, "finish_reason": reason}
        chunk = json.dumps({"choices": [choice]}, ensure_ascii=False, separators=(",", ":"))
        return f"data: {chunk}\n\n"

    lines = [line(0, None), line(1, "stop"), "data: [DONE]\n\n"]

    async def results() -> AsyncIterator[Any]:
        for rows in (1, 2):
            yield SimpleNamespace(kv_transfer_params={KEY: [{"clvs": rows}]})

    async def stream(given: AsyncIterator[Any]) -> AsyncIterator[str]:
        async for _ in given:
            pass
        for one in lines:
            yield one

    async def collect() -> list[str]:
        seen: dict[int, Any] = {}
        given = count.seeing(results(), seen)
        return [one async for one in count.told(stream(given), seen, 2)]

    got = asyncio.run(collect())
    assert (got[0], got[2]) == (lines[0], lines[2])
    end = json.loads(got[1].removeprefix("data: "))
    assert end["kv_transfer_params"] == {KEY: [{"clvs": 2}]}
    assert end["choices"] == json.loads(lines[1].removeprefix("data: "))["choices"]


# -- logits ----------------------------------------------------------------------------------------


def test_only_the_last_row_of_a_request_speaks() -> None:
    deco = "deco(alpha=0.0, top_p=2.0, top_k=2)"
    rows = {
        0: Live(deco, 5, torch.zeros(5, dtype=torch.bool), None),
        1: Live("devils", 4, torch.zeros(4, dtype=torch.bool), None),
        2: Live(deco, 9, torch.zeros(9, dtype=torch.bool), None),  # a piece that is not the end
        3: Live(deco, 3, torch.zeros(3, dtype=torch.bool), None),
    }
    (prompt, decode) = speaking(
        rows, lambda text: Stack(ANATOMY, parse(text)), [0, 5, 6, 12, 13], [5, 5, 6, 8]
    )
    assert (prompt.rows.tolist(), prompt.places) == ([4], [(0, 4)])
    assert (decode.rows.tolist(), decode.places) == ([12], [(3, 7)])
    logits = torch.arange(20.0).view(4, 5)
    before = logits.clone()
    decode.edit(logits, logits, [])
    assert logits[3].tolist() == [-torch.inf] * 3 + [18.0, 19.0]
    assert torch.equal(logits[:3], before[:3])
    assert decode.spoke


def test_a_step_whose_logits_were_not_edited_stops_the_engine() -> None:
    rows = {0: Live("deco(alpha=0.0)", 3, torch.zeros(3, dtype=torch.bool), None)}
    (group,) = speaking(rows, lambda text: Stack(ANATOMY, parse(text)), [0, 3], [3])
    watch.expect([group])
    with pytest.raises(RuntimeError, match="not applied to the logits"):
        watch.verify(True)
    watch.expect([group])
    group.edit(torch.zeros(1, 7), torch.zeros(1, 7), [])
    watch.verify(True)
    assert watch.counted() == {0: {"deco": (2, 3)}}
    assert watch.counted() == {}


def test_a_step_that_missed_what_enters_a_layer_stops_the_engine() -> None:
    looking = SimpleNamespace(depth=2, at=lambda stage: (0,), methods=[])
    group: Any = SimpleNamespace(stack=looking, acting=(0,))
    watch.expect([group])
    watch.enter(0)
    watch.enter(2)
    with pytest.raises(RuntimeError, match=r"could not read what enters layers \[1\]"):
        watch.check_entered()
    watch.enter(1)
    watch.check_entered()


SINKS = "var(sink_threshold=1.0, sink_dims=(3,), keep=0.1)"


def test_a_prompt_is_read_piece_by_piece() -> None:
    """Also where the last piece has generated tokens, computed again."""
    visual = torch.zeros(10, dtype=torch.bool)
    visual[2:6] = True
    live = Live(SINKS, 10, visual, None)
    stack = Stack(ANATOMY, parse(SINKS))
    whole = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(0))

    def read(start: int, end: int) -> None:
        (piece,) = readings({1: live}, lambda text: stack, [0, 4, 4 + end - start], [4, end])
        assert piece.rows.tolist() == list(range(4, 4 + min(end, 10) - start))
        for layer in range(DEPTH):
            given = Stream(whole[:, start : min(end, 10)], layer)
            stack.methods[0].before(given, piece.state.seen_by(0))

    read(0, 10)
    expected = dict(live.read.memories[0])
    assert any(key.startswith("sets") for key in expected)
    for cut in (1, 4, 9):
        read(0, cut)
        read(cut, 12)
        for key, x in live.read.memories[0].items():
            assert torch.equal(x, expected[key]), (cut, key)
    assert readings({1: live}, lambda text: stack, [0, 4, 5], [4, 13]) == [], "it decodes"


def test_a_prompt_whose_begin_was_not_read_stops_the_engine() -> None:
    live = Live(SINKS, 10, torch.ones(10, dtype=torch.bool), None)
    stack = Stack(ANATOMY, parse(SINKS))
    with pytest.raises(RuntimeError, match="before position 4"):
        readings({0: live}, lambda text: stack, [0, 6], [10])


def test_attention_and_logits_of_one_method_meet_at_the_row() -> None:
    """What ONLY reads of the attention is found by the rows that choose a token, in any order."""
    stack = object()
    group: Any = SimpleNamespace(stack=stack, places=[(0, 2), (1, 2)])
    noted = {"y": torch.tensor([[0.0], [10.0], [11.0]])}
    attention = SimpleNamespace(
        stack=stack,
        acting=(0,),
        speaks=False,
        places=[(1, 1), (1, 2), (0, 2)],
        state=SimpleNamespace(memories=(noted,)),
    )
    assert _noted(group, 0, [attention])["y"].tolist() == [[11.0], [10.0]]


# -- at the start ----------------------------------------------------------------------------------


def settings(**changed: Any) -> Any:
    parallel = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    parallel["prefill_context_parallel_size"] = 1
    given = {
        "parallel_config": SimpleNamespace(**{k: changed.get(k, v) for k, v in parallel.items()}),
        "model_config": SimpleNamespace(use_mla=changed.get("use_mla", False)),
        "cache_config": SimpleNamespace(cache_dtype=changed.get("cache_dtype", "auto")),
        "speculative_config": changed.get("speculative_config"),
    }
    return SimpleNamespace(**given)


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("speculative_config", object(), "speculative decoding leaves out logits processors"),
        ("pipeline_parallel_size", 2, "pipeline parallelism splits the layers"),
        ("decode_context_parallel_size", 2, "context parallelism splits the rows"),
        ("prefill_context_parallel_size", 2, "context parallelism splits the rows"),
        ("use_mla", True, "latent attention"),
        ("cache_dtype", "fp8", "a quantised cache holds rounded keys"),
        ("cache_dtype", "int8_per_token_head", "a quantised cache holds rounded keys"),
    ],
)
def test_settings_that_methods_cannot_run_under_are_refused_at_the_start(
    setting: str, value: Any, sentence: str
) -> None:
    refusals.check_settings(settings())
    with pytest.raises(FoveateError, match=sentence) as refused:
        refusals.check_settings(settings(**{setting: value}))
    assert "FOVEATE_VLLM=off" in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [({"sinks": object()}, "attention sinks"), ({"logits_soft_cap": 50.0}, "soft-capped")],
)
def test_layers_that_do_more_than_softmax_are_refused(
    changed: dict[str, Any], sentence: str
) -> None:
    plain = {"sinks": None, "logits_soft_cap": None}
    refusals.check_layers([SimpleNamespace(**plain)])
    with pytest.raises(FoveateError, match=sentence):
        refusals.check_layers([SimpleNamespace(**plain), SimpleNamespace(**(plain | changed))])


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ("0.32.0", "0.32.1"):
        monkeypatch.setattr(compat, "version", lambda known=known: known)
        compat.check_version()
    monkeypatch.setattr(compat, "version", lambda: "0.33.0")
    with pytest.raises(FoveateError, match=r"knows vLLM 0\.32, and this is 0\.33\.0"):
        compat.check_version()


def test_a_place_that_vllm_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.32.1")

    class Owner:
        def step(self, given: int, other: int) -> int:
            return given

    with pytest.raises(FoveateError, match="has changed step"):
        compat._replace(Owner, "step", ("self", "asked"), lambda plain: plain)
    with pytest.raises(FoveateError, match="has changed gone"):
        compat._replace(Owner, "gone", ("self",), lambda plain: plain)
    for _ in range(2):  # the second time it stands already
        compat._replace(
            Owner, "step", ("self", "given"), lambda plain: lambda self, x: plain(self, x, 0) + 1
        )
    made: Any = Owner()
    assert made.step(3) == 4
