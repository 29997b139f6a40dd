"""Second streams in vLLM, without vLLM: their prompts, their logits, and what is remembered."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.backends.vllm import logits as stage
from foveate.backends.vllm.logits import MAIN, TWINS, Twin, say_the_same, speaking
from foveate.backends.vllm.plan import Live
from foveate.backends.vllm.second import Second, second
from foveate.base.errors import FoveateError
from foveate.base.perturb import noise_levels
from foveate.core.method import parse
from foveate.core.sequence import Stack
from tests.test_paged_rows import ANATOMY

IDS = [1, 2, 7, 7, 7, 7, 3, 4]
VISUAL = torch.tensor([token == 7 for token in IDS])


@dataclass
class Elem:
    """A field of a picture, as vLLM holds it."""

    data: Any


@dataclass
class Feature:
    """A picture, as vLLM holds it."""

    data: Any
    identifier: str = "picture"
    mm_hash: str | None = None
    mm_position: Any = field(default_factory=lambda: SimpleNamespace(get_num_embeds=lambda: 4))


def stack(text: str) -> Stack:
    return Stack(ANATOMY, parse(text))


def read(text: str, *features: Any) -> Second:
    return second(stack(text), None, IDS, VISUAL, features)


def test_a_second_stream_without_the_picture() -> None:
    for text in ("m3id", "pai"):
        assert read(text, Feature({})) == Second([1, 2, 3, 4], [], False)


def test_a_second_stream_with_other_text() -> None:
    picture = Feature({"pixel_values": Elem(torch.ones(3, 2, 2))})
    found = read("icd(prefix=(8, 9), where='question')", picture)
    assert found.ids == [1, 2, 7, 7, 7, 7, 8, 9, 3, 4]
    assert found.features == [picture]


def test_a_second_stream_with_other_pixels() -> None:
    pixels = torch.ones(3, 4, 4)
    found = read("vcd(noise_step=300)", Feature({"pixel_values": Elem(pixels)}))
    kept, strength = noise_levels(300)
    noise = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    (picture,) = found.features
    assert torch.allclose(picture.data["pixel_values"].data, kept * pixels + strength * noise)
    assert torch.equal(pixels, torch.ones(3, 4, 4)), "the request's own stay"
    assert found.ids == IDS
    assert picture.identifier != "picture"
    assert (
        picture.identifier
        != read("vcd", Feature({"pixel_values": Elem(pixels)})).features[0].identifier
    )


def test_a_front_end_that_has_sent_the_pixels_still_knows_the_text() -> None:
    assert read("vcd", Feature(None)).ids == IDS


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("icd", "changes nothing in this prompt"), ("avisc", "by what the model finds")],
)
def test_a_second_stream_that_vllm_cannot_read_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(FoveateError, match=sentence):
        read(text, Feature({"pixel_values": Elem(torch.ones(3, 2, 2))}))


# -- the worker's side -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def batch() -> Any:
    yield TWINS.clear()
    TWINS.clear()


def live(text: str, prompt: int = 8) -> Live:
    made = Live(text, prompt, torch.ones(prompt, dtype=torch.bool), None)
    made.pair = "a"
    MAIN["a"] = made
    return made


def speak(rows: dict[int, Live], starts: list[int], lengths: list[int], x: Tensor) -> Tensor:
    new = x.clone()
    for group in speaking(rows, stack, starts, lengths):
        group.edit(new, x, [])
    return new


def test_a_method_gets_the_logits_of_its_twin_and_the_twin_its_token() -> None:
    TWINS[0] = Twin("a", 4, ahead=False)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    new = speak({1: live("vcd(alpha=0.5, beta=0)")}, [0, 4, 12], [4, 8], x)
    assert torch.allclose(new[1], 1.5 * x[1] - 0.5 * x[0])
    assert torch.equal(new[0], x[0])
    tokens = torch.tensor([[1], [2]])
    say_the_same(tokens)
    assert tokens.tolist() == [[2], [2]]
    assert not stage._same


@pytest.mark.parametrize("lengths", [[3, 8], [5, 8]])
def test_a_step_with_one_of_two_streams_stops_the_engine(lengths: list[int]) -> None:
    TWINS[0] = Twin("a", 4, ahead=False)
    with pytest.raises(RuntimeError, match="one of the two streams"):
        speak({1: live("vcd")}, [0, 4, 12], lengths, torch.zeros(2, 5))
    TWINS.clear()
    with pytest.raises(RuntimeError, match="one of the two streams"):
        speak({1: live("vcd")}, [0, 4, 12], [4, 8], torch.zeros(2, 5))


def test_what_is_remembered_counts_tokens_and_not_how_often_they_were_chosen() -> None:
    """As after a preemption, when the last token is chosen anew."""
    TWINS[1] = Twin("a", 4, ahead=False)
    mine = live("m3id(forgetting=0.5, beta=0)")
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))

    def token(number: int) -> Tensor:
        mine.said[:] = [0] * number
        return speak({0: mine}, [0, 1, 2], [8 + number, 4 + number], x)[0]

    first, next_one, again, third = token(0), token(1), token(1), token(2)
    assert torch.equal(next_one, again)
    p, q = x.log_softmax(-1)
    for t, found in enumerate((first, next_one, third)):
        g = torch.tensor(0.5 * (t + 1)).expm1()
        assert torch.allclose(found, p + g * (p - q), atol=1e-5)
    mine.said[:] = [0] * 7
    with pytest.raises(RuntimeError, match="remembers of this answer is lost"):
        speak({0: mine}, [0, 1, 2], [15, 11], x)


def test_a_piece_of_an_answer_that_is_computed_again_chooses_nothing() -> None:
    mine = live("m3id")
    mine.said[:] = [0] * 5
    assert speaking({0: mine}, stack, [0, 3], [10]) == []


def test_a_pass_ahead_leaves_its_logits_with_its_request() -> None:
    TWINS[0] = Twin("a", 8, ahead=True)
    mine, x = live("adaptvis"), torch.ones(1, 5)
    assert speaking({}, stack, [0, 3], [3]) == []
    assert torch.equal(speak({}, [0, 5], [8], x), x)
    assert mine.ahead is not None
    assert torch.equal(mine.ahead, x[0])
    del mine
    with pytest.raises(RuntimeError, match="does not know"):
        speaking({}, stack, [0, 5], [8])
