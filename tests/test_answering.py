"""Questions to answers: what a failure costs, what memory that is short costs, and for how long."""

from __future__ import annotations

import functools
import gc
import itertools
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from foveate import VLM, FoveateError, Method
from foveate.base.memory import Size, out_of_memory, release
from foveate.core.method import as_stack
from foveate.insight.analysis import parse
from foveate.insight.truth import pocket_pictures
from foveate.scenes import world
from foveate.vlm import answering
from foveate.vlm.answering import Decoding, Unwanted, answer_all, complete, process_ahead
from foveate.vlm.chat import Chat
from foveate.vlm.look import read

TEXTS = ("Is there a car?", "Is there a tree in the image?", "What color is the cup?", "Why?")


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


def about(number: int, texts: tuple[str, ...] = TEXTS) -> list[Chat]:
    """Chats about one scene, whose images are one list."""
    images = [world.draw(world.sample(number), 96)]
    return [Chat(images, text) for text in texts]


class Batches:
    """The model's forward: the rows of every prompt and step are noted, and it may fail."""

    def __init__(self, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.fails: Callable[[int], Exception | None] = lambda rows: None
        forward = vlm.model.forward

        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            held = torch.zeros(3)  # what a failure would keep alive
            self.held.append(weakref.ref(held))
            self.rows.append(len(kwargs["input_ids"]))
            if error := self.fails(self.rows[-1]):
                raise error
            return forward(*args, **kwargs)

        self.held: list[weakref.ref[torch.Tensor]] = []
        monkeypatch.setattr(vlm.model, "forward", noted)

    def room(self, rows: int) -> None:
        """Memory suffices for so many rows."""
        self.fails = lambda asked: starved() if asked > rows else None


@pytest.fixture
def batches(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(vlm, monkeypatch)


def starved() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def texts(found: list[Any]) -> list[str]:
    return [answer.text for answer in complete(found)]


# -- how many at a time ----------------------------------------------------------------------------


def test_a_size_halves_and_grows_back() -> None:
    size = Size(32)
    assert size.halve(20)
    assert size.now == 10, "half of what was asked"
    assert size.halve(20)
    assert size.now == 5, "half of what went at a time"
    grown = []
    for _ in range(6):
        size.end()
        grown.append(size.now)
    assert grown == [5, 10, 20, 32, 32, 32], "not by the call that ran short"
    size.halve(1)
    assert not Size(1).halve(8)
    assert not size.halve(1), "a question alone cannot be halved"
    assert size.now == 32


def test_a_lasting_shortage_is_tried_ever_more_rarely() -> None:
    size, failures = Size(8), []
    for call in range(1000):
        if size.now > 4:
            failures.append(call)
            size.halve(8)
        size.end()
    assert failures[:6] == [0, 2, 5, 10, 19, 36]
    gaps = [b - a for a, b in itertools.pairwise(failures)]
    assert max(gaps) == gaps[-1] == 65, "but it is tried again"


def test_rare_shortages_are_forgotten() -> None:
    size = Size(8)
    for _ in range(9):
        size.halve(8)
        size.end()
        size.end()
        assert size.now == 8, "grown back after one call"
        for _ in range(64):
            size.end()


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (starved(), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_failures_of_memory_are_told_from_others(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) == expected


def test_a_failure_lets_go_of_its_tensors_and_keeps_its_traceback() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def inner() -> None:
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        raise ZeroDivisionError("inner")

    def outer() -> None:
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        try:
            inner()
        except ZeroDivisionError as error:
            raise ValueError("outer") from error

    try:
        outer()
    except ValueError as error:
        failure = error
    assert all(ref() is not None for ref in alive)
    release(failure)
    assert all(ref() is None for ref in alive)
    told = "".join(traceback.format_exception(failure))
    assert "in inner" in told
    assert "in outer" in told


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:(Memory is short|.* questions are now asked one by one)")
@pytest.mark.parametrize("error", [starved(), ZeroDivisionError("no")])
def test_a_question_that_always_fails_fails_alone(
    vlm: VLM, batches: Batches, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whether it shares a prefix with others, or a batch."""
    lone = [about(number, ("What is this?",))[0] for number in (5, 6, 7)]
    chats = [lone[0], *about(3), lone[1], lone[2]]
    calm = texts(answer_all(vlm, chats, max_new_tokens=3))
    bad, asked = {2, 5}, VLM.answer

    def answer(self: VLM, group: list[Chat], *rest: Any, **options: Any) -> Any:
        if any(chat is chats[row] for row in bad for chat in group):
            raise error
        return asked(self, group, *rest, **options)

    def together(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(VLM, "answer", answer)
    monkeypatch.setattr(answering, "ask_together", together)
    size = Size(8)
    with pytest.warns(UserWarning, match="4 questions are now asked one by one"):
        found = answer_all(vlm, chats, max_new_tokens=3, size=size)
    for row, (one, text) in enumerate(zip(found, calm, strict=True)):
        if row in bad:
            assert one is error
        else:
            assert one.text == text  # type: ignore[union-attr]
    assert size.now == 8, "it was not the batch, but a question in it"
    with pytest.raises(type(error)):
        complete(found)


class Picky(Method, register=False):
    """Refuses to rewrite one question."""

    name = "picky"

    def rewrite(self, vlm: Any, chats: list[Chat]) -> list[Chat]:
        if any("tree" in chat.text for chat in chats):
            raise FoveateError("No trees.")
        return [Chat(chat.images, chat.text + " Say it.") for chat in chats]


def test_a_question_that_cannot_be_rewritten_fails_alone(vlm: VLM) -> None:
    found = answer_all(vlm, [*about(3), *about(4)], (Picky(),), 3)
    for row, one in enumerate(found):
        if row % 4 == 1:
            assert isinstance(one, FoveateError)
        else:
            assert not isinstance(one, Exception)
            assert one.chat.text == TEXTS[row % 4] + " Say it."


# -- memory that is short --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Memory is short")
def test_a_shared_prefix_halves_and_recovers(vlm: VLM, batches: Batches) -> None:
    chats, size = about(3), Size(8)
    calm = texts(answer_all(vlm, chats, max_new_tokens=1, size=size))
    assert batches.rows == [1, 4], "the prefix, and the questions on it"
    batches.room(2)
    batches.rows.clear()
    assert texts(answer_all(vlm, chats, max_new_tokens=1, size=size)) == calm
    assert batches.rows == [1, 4, 1, 2, 2]
    batches.room(4)
    seen = []
    for _ in range(2):
        batches.rows.clear()
        assert texts(answer_all(vlm, chats, max_new_tokens=1, size=size)) == calm
        seen.append(list(batches.rows))
    assert seen == [[1, 2, 2], [1, 4]]
    assert size.now == 8


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Memory is short")
def test_a_padded_batch_halves_and_keeps_what_it_has(vlm: VLM, batches: Batches) -> None:
    chats = [about(number, ("What is this?",))[0] for number in range(6)]
    calm = texts(answer_all(vlm, chats, max_new_tokens=1))
    failed = [0]

    def once(rows: int) -> Exception | None:
        failed[0] += rows == 2
        return starved() if rows > 2 or (rows == 2 and failed[0] == 2) else None

    batches.fails = once
    batches.rows.clear()
    assert texts(answer_all(vlm, chats, max_new_tokens=1, size=Size(4))) == calm
    assert batches.rows == [4, 2, 2, 1, 1, 1, 1], "the first two are not asked again"


@pytest.mark.filterwarnings("ignore:Memory is short")
def test_what_failed_is_free_before_the_next_attempt(vlm: VLM, batches: Batches) -> None:
    kept: list[int] = []

    def short(rows: int) -> Exception | None:
        kept.append(sum(ref() is not None for ref in batches.held))
        return starved() if rows > 1 else None

    batches.fails = short
    complete(answer_all(vlm, about(3), max_new_tokens=1, size=Size(4)))
    assert batches.rows[:4] == [1, 4, 1, 2], "two attempts failed"
    assert set(kept) == {1}, "what a forward holds goes with it"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:(Memory is short|OutOfMemoryError)")
def test_memory_that_one_question_exceeds_is_told_of_that_question(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [about(number, ("What is this?",))[0] for number in range(4)]
    sizes: list[int] = []
    plain = VLM.answer

    def answer(self: VLM, group: list[Chat], *rest: Any, **options: Any) -> Any:
        sizes.append(len(group))
        if any(chat is chats[1] for chat in group):
            raise starved()
        return plain(self, group, *rest, **options)

    monkeypatch.setattr(VLM, "answer", answer)
    size = Size(4)
    found = answer_all(vlm, chats, max_new_tokens=1, size=size)
    assert [isinstance(one, Exception) for one in found] == [False, True, False, False]
    assert sizes == [4, 2, 1, 1, 1, 1, 1]
    assert size.now == 4


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Memory is short")
@pytest.mark.parametrize("analysis", ["convergence", "decay", "heads", "complexity", "layers"])
def test_an_analysis_goes_on_where_memory_is_short(
    vlm: VLM, batches: Batches, monkeypatch: pytest.MonkeyPatch, analysis: str
) -> None:
    monkeypatch.setattr(vlm, "size", Size(64))
    (picture,) = pocket_pictures(1)
    measured = parse(analysis)
    calm = measured.measure(vlm, picture, {"vanilla": ()})
    most = max(batches.rows)
    assert most > 1
    batches.room(most - 1)
    vlm.readings.clear()
    assert same(measured.measure(vlm, picture, {"vanilla": ()}), calm)
    assert vlm.size.now < 64


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == (pytest.approx(other, rel=1e-3, abs=1e-5) if isinstance(one, float) else other)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:(Memory is short|OutOfMemoryError)")
def test_a_reading_that_cannot_be_is_the_failure_itself(vlm: VLM, batches: Batches) -> None:
    batches.room(0)
    with pytest.raises(torch.OutOfMemoryError):
        read(vlm, about(3), (3,))


# -- who shares what -------------------------------------------------------------------------------


def test_answers_come_in_order_whatever_is_shared(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = about(3), about(4)
    chats = [first[0], second[0], about(5)[0], first[1], second[1], about(6)[3], first[2]]
    shared: list[int] = []
    plain = answering.ask_together

    def counted(vlm: VLM, prompts: Any, *rest: Any) -> Any:
        shared.append(len(prompts.chats))
        return plain(vlm, prompts, *rest)

    monkeypatch.setattr(answering, "ask_together", counted)
    found = complete(answer_all(vlm, chats, as_stack("clvs"), 4))
    assert shared == [3, 2]
    assert all(answer.chat is chat for answer, chat in zip(found, chats, strict=True))
    alone = complete(answer_all(vlm, chats, as_stack("clvs"), 4, share=False))
    assert shared == [3, 2], "one by one, nothing is shared"
    assert [a.tokens for a in found] == [a.tokens for a in alone]
    assert answer_all(vlm, []) == []


def test_an_image_processed_ahead_is_not_processed_again(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, lone = about(3), about(4)[:1]
    process_ahead(vlm, chats, [()])
    process_ahead(vlm, lone, [(Picky(),), as_stack("clvs")])

    def fail(*_: Any) -> Any:
        raise AssertionError("processed")

    with monkeypatch.context() as patched:
        patched.setattr(VLM, "inputs", fail)
        for stack in ((), as_stack("clvs")):
            assert len(complete(answer_all(vlm, [*chats, *lone], stack, 1))) == 5


def test_what_nobody_asks_is_not_processed_ahead(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("processed")

    monkeypatch.setattr(VLM, "inputs", fail)
    process_ahead(vlm, about(3), [(Picky(),), as_stack("vicrop")])
    process_ahead(vlm, [*about(3), *about(4)], [()])
    process_ahead(vlm, [Chat([], "Why?")], [()])


def test_what_was_processed_goes_with_its_chat(vlm: VLM) -> None:
    before = len(vlm._processed)
    chat = about(3)[0]
    kept = vlm.processed(chat)
    assert vlm.processed(chat) is kept
    assert torch.equal(kept["input_ids"], vlm.inputs([chat])["input_ids"])
    chat.text = "Is it red?"
    assert vlm.processed(chat) is not kept, "of another question"
    del chat
    gc.collect()
    assert len(vlm._processed) <= before
    chats = [about(number)[0] for number in range(12)]
    for one in chats:
        vlm.processed(one)
    assert len(vlm._processed) == 8


class Told(Decoding):
    """Wants some rows only, and notes what it is told."""

    def __init__(self, gone: set[int]) -> None:
        self.gone, self.batches, self.failures = gone, list[list[int]](), list[int]()

    def wanted(self, row: int) -> bool:
        return row not in self.gone

    def options(self, rows: list[int]) -> dict[str, Any]:
        self.batches.append(rows)
        return {"logits_processor": []}

    def failed(self, row: int, error: Exception) -> None:
        self.failures.append(row)


@pytest.mark.filterwarnings("ignore:(Memory is short|ZeroDivisionError)")
def test_a_decoding_of_ones_own_is_told_of_every_attempt(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, plain = about(3), VLM.answer
    decoding = Told({0})

    def answer(self: VLM, group: list[Chat], *rest: Any, **options: Any) -> Any:
        assert "logits_processor" in options
        if len(group) == 3:
            decoding.gone.add(2)  # whoever asked has left meanwhile
            raise starved()
        if any(chat is chats[3] for chat in group):
            raise ZeroDivisionError
        return plain(self, group, *rest, **options)

    monkeypatch.setattr(VLM, "answer", answer)
    found = answer_all(vlm, chats, max_new_tokens=1, size=Size(3), decoding=decoding)
    assert decoding.batches == [[1, 2, 3], [1], [3]]
    assert decoding.failures == [3]
    kinds = [type(one) for one in found]
    assert kinds == [Unwanted, answering.Answer, Unwanted, ZeroDivisionError]


def test_what_a_method_sees_of_the_image_is_rewritten_once_for_all(vlm: VLM) -> None:
    seen: list[list[str]] = []

    class Noting(Method, register=False):
        name = "noting"
        needs_image = False

        def rewrite(self, vlm: Any, chats: list[Chat]) -> list[Chat]:
            seen.append([chat.text for chat in chats])
            return chats

    image = Image.new("RGB", (96, 96))
    chats = [Chat([image], "What is it?"), Chat([], "a"), Chat([image], "Why?"), Chat([], "b")]
    complete(answer_all(vlm, chats, (Noting(),), 1))
    assert seen == [["What is it?", "Why?"], ["a"], ["b"]]
