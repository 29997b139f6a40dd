"""Which request is in which row of the batch, while requests come, move, wait and go."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from foveate.backends.vllm.asked import IMAGES, KEY
from foveate.backends.vllm.requests import ROWS, Requests


def tarac() -> Any:
    """The parameters of a request."""
    return SimpleNamespace(extra_args={KEY: "tarac", IMAGES: [(1, 3)]})


PLAIN: Any = SimpleNamespace(extra_args=None)
PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture
def requests() -> Iterator[Requests]:
    made: Any = Requests
    yield made(None, None, False)
    ROWS.clear()


def update(requests: Requests, added: Any = (), removed: Any = (), moved: Any = ()) -> None:
    requests.update_state(SimpleNamespace(added=added, removed=removed, moved=moved))


def test_requests_keep_their_row(requests: Requests) -> None:
    update(requests, [(0, tarac(), PROMPT, []), (1, PLAIN, PROMPT, []), (2, tarac(), PROMPT, [])])
    first, last = ROWS[0], ROWS[2]
    assert set(ROWS) == {0, 2}
    update(requests, moved=[(0, 1, MoveDirectionality.SWAP)])
    assert {1: first, 2: last} == ROWS
    update(requests, removed=[1], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert {0: last} == ROWS


def test_a_request_that_waited_for_room_remembers(requests: Requests) -> None:
    mine = tarac()
    update(requests, [(0, mine, PROMPT, [7, 8])])
    live = ROWS[0]
    update(requests, removed=[0])
    update(requests, [(0, tarac(), PROMPT, [7, 8])])
    assert ROWS[0] is not live, "another request of the same prompt and tokens"
    update(requests, [(0, PLAIN, PROMPT, [])], removed=[0])
    update(requests, [(3, mine, PROMPT, [7, 8, 9])])
    assert {3: live} == ROWS


def test_answers_of_one_request_are_told_apart(requests: Requests) -> None:
    first: list[int] = []
    second: list[int] = []
    shared = tarac()
    update(requests, [(0, shared, PROMPT, first), (1, shared, PROMPT, second)])
    one, two = ROWS[0], ROWS[1]
    assert one is not two
    first += [7]
    second += [7]
    update(requests, removed=[0, 1])
    update(requests, [(0, shared, PROMPT, second), (1, shared, PROMPT, first)])
    assert {0: two, 1: one} == ROWS
