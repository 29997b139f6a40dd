"""Rows of a paged cache over many steps, and in half precision. Needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from foveate.backends.vllm import rows as paged
from foveate.backends.vllm.cache import Packed
from foveate.backends.vllm.plan import Live, plan
from foveate.core import Method, Rows
from foveate.core.edit import Acting, edit_rows, edited_weights, products
from foveate.core.method import parse
from foveate.core.rows import Rows as SeenRows
from foveate.core.sequence import Stack, State
from tests.test_paged_rows import ANATOMY, DEPTH, HKV, SCALE, SIZE, D, H

STEPS = 9
# prompt's length, image as (first, length), first step, steps
COMING = [(50, (5, 20), 0, 5), (50, (5, 20), 1, 8), (170, (70, 20), 1, 6), (53, (9, 30), 3, 6)]


class Turn:
    """Rotary embeddings of D / 2 frequencies."""

    def rotation(self, by: Tensor) -> tuple[Tensor, Tensor]:
        angle = by[0, :, None, :, None] * 10.0 ** -torch.arange(D // 2)
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        (one, two), (cos, sin) = x.chunk(2, -1), rotation
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


class Story:
    """Requests that come and go, each with its keys, values and queries of all layers."""

    def __init__(self, text: str) -> None:
        draw = torch.Generator().manual_seed(0)
        self.text, self.stack = text, Stack(ANATOMY, parse(text))
        self.lives, self.x, self.blocks = [], [], [[] for _ in range(DEPTH)]  # type: ignore[var-annotated]
        numbers: list[list[int]] = []
        for prompt, (first, count), _, _ in COMING:
            visual = torch.zeros(prompt, dtype=torch.bool)
            visual[first : first + count] = True
            self.lives.append(Live(text, prompt, visual, None))
            length = (prompt + STEPS) // SIZE * SIZE + SIZE
            given = torch.randn(DEPTH, 3, H, length, D, generator=draw)
            self.x.append(given)
            numbers.append([])
            for at in range(0, length, SIZE):
                numbers[-1].append(len(self.blocks[0]))
                for layer in range(DEPTH):
                    keys, values = given[layer, 1:, :HKV, at : at + SIZE]
                    packed = torch.cat([keys.transpose(1, 2).flatten(1), values.flatten(1)], 1)
                    self.blocks[layer].append(packed.view(HKV, SIZE, 2 * D))
        widest = max(map(len, numbers))
        self.table = torch.tensor([one + [0] * (widest - len(one)) for one in numbers])

    def cache(self, layer: int) -> Packed:
        return Packed(torch.stack(self.blocks[layer]))

    def row(self, n: int, position: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.x[n][layer][:, None]
        past = slice(0, position + 1)
        return query[:, :, position : position + 1], key[:, :HKV, past], value[:, :HKV, past]


def alone(story: Story, n: int) -> list[Tensor]:
    """Per step the rows (DEPTH, H, D) of one request, on all its columns."""
    prompt, _, _, steps = COMING[n]
    state, out = State(story.stack, story.lives[n].visual[None], "prompt"), []
    state.positions = torch.arange(prompt)[None, None]
    for step in range(steps):
        state.phase = "decode" if step else "prompt"
        state.renew()
        rows = []
        for layer in range(DEPTH):
            query, key, value = story.row(n, prompt - 1 + step, layer)
            here = story.stack.edits[layer]
            share = [Acting(story.stack.methods[i], state.seen_by(i), 1) for i in here]
            given = (query, key, value, None, SCALE, state.seen_by(0), Turn)
            seen = SeenRows(products(query, key, SCALE), layer, *given)
            rows.append(edit_rows(seen, share)[0, :, 0])
        out.append(torch.stack(rows))
    return out


@pytest.mark.parametrize(
    "text",
    [
        "tarac(beta=1.5, alpha=0.8, layers=(0, 1, 2))",
        "tarac(beta=1.5, alpha=0.8, layers=(0, 1, 2), pool='head', normalise=True)",
        "clvs(stop_threshold=0)",
        "clvs(stop_threshold=0, unified_positions='visual')",
        "clvs(stop_threshold=0, unified_positions=False)+tarac(layers=(0, 1, 2))",
        "devils(alpha=1.0, layers=(0, 1, 2))",
    ],
)
def test_requests_that_come_and_go_are_edited_as_if_they_were_alone(text: str) -> None:
    story = Story(text)
    expected = [alone(story, n) for n in range(len(COMING))]
    sizes = []
    for step in range(STEPS):
        going = [n for n, (_, _, first, steps) in enumerate(COMING) if 0 <= step - first < steps]
        lengths = [COMING[n][0] + step - COMING[n][2] for n in going]
        starts = list(range(len(going) + 1))
        lives = {row: story.lives[n] for row, n in enumerate(going)}
        groups = plan(lives, lambda _: story.stack, starts, lengths, story.table[going], SIZE)
        sizes.append([len(group.rows) for group in groups])
        for layer in range(DEPTH):
            asked = zip(going, lengths, strict=True)
            rows = [story.row(n, length - 1, layer) for n, length in asked]
            query = torch.stack([one[0][0, :, 0] for one in rows])
            out = torch.stack([plain(*one)[0, :, 0] for one in rows])
            for group in groups:
                given = query, story.cache(layer), out, SCALE
                paged.edit(group, layer, *given, lambda like: Turn())
            for row, n in enumerate(going):
                wanted = expected[n][step - COMING[n][2]][layer]
                assert (out[row] - wanted).abs().max() < 2e-5, (step, n, layer)
    assert max(map(max, sizes)) > 1, "requests are edited together"


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The kernel's output."""
    weights = products(query, key, SCALE).softmax(-1)
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)


# -- half precision --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Less(Method, register=False):
    """Takes mass away from the image."""

    by: float = 8.0
    name: ClassVar[str] = "less"
    paper: ClassVar[str] = ""
    columns: ClassVar = "visual"
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"by": 0.0}

    def scores(self, rows: Rows) -> Tensor:
        return torch.where(rows.visual[:, None, None], rows.x - self.by, rows.x)


def off(methods: tuple[Method, ...], shift: float) -> tuple[float, float]:
    """How far a corrected row of bfloat16 is from the exact one, in units of its bound's rounding.

    Args:
        shift: what the image's scores are raised by.

    Returns:
        The error over the rounding of the largest value, and the image's share of the row.
    """
    draw, length, first, count = torch.Generator().manual_seed(1), 320, 40, 30
    query, key, value = torch.randn(3, 1, H, length, D, generator=draw).bfloat16()
    query, key, value = query[:, :, -1:], key[:, :HKV].clone(), value[:, :HKV]
    direction = query.view(HKV, -1, D).float().mean(1)
    direction /= direction.norm(dim=-1, keepdim=True)
    key[0, :, first : first + count] += (shift * direction[:, None]).bfloat16()
    visual = torch.zeros(length, dtype=torch.bool)
    visual[first : first + count] = True
    stack = Stack(ANATOMY, methods)
    scores = products(query.double(), key.double(), 1.0).double()
    state = State(stack, visual[None], "prompt")
    share = [Acting(stack.methods[0], state.seen_by(0), 1)]
    given = query, key, value, None, 1.0, state.seen_by(0)
    exact = edited_weights(SeenRows(scores, 0, *given), share).double()
    repeated = value.repeat_interleave(H // HKV, 1).double()
    exact, kernel = exact @ repeated, (scores.softmax(-1) @ repeated).bfloat16()
    packed = []
    for at in range(0, length, SIZE):
        part = key[0, :, at : at + SIZE].transpose(1, 2), value[0, :, at : at + SIZE]
        packed.append(torch.cat([x.flatten(1) for x in part], 1).view(HKV, SIZE, 2 * D))
    lives, table = {0: Live("x", length, visual, None)}, torch.arange(len(packed))[None]
    (group,) = plan(lives, lambda _: stack, [0, 1], [length], table, SIZE)
    assert group.rest is not None
    out = kernel[0, :, 0][None]
    paged.edit(group, 0, query[0, :, 0][None], Packed(torch.stack(packed)), out, 1.0, Turn)
    share_of_image = scores.softmax(-1)[..., visual].sum(-1).mean()
    rounding = 2**-8 * float(value.float().abs().max())
    return float((out[0] - exact[0, :, 0]).abs().max()) / rounding, float(share_of_image)


@pytest.mark.parametrize(
    "text", ["pai(gamma=1.0)", "clvs(unified_positions=False)", "spin", "less"]
)
def test_a_row_of_half_precision_keeps_its_digits(text: str) -> None:
    methods = (Less(),) if text == "less" else parse(text)
    shares = []
    for shift in (-4.0, 0.0, 2.0, 4.0, 6.0):
        error, share = off(methods, shift)
        assert error < paged.MOST + 1
        shares.append(share)
    assert min(shares) < 0.05
    assert max(shares) > 0.95


def test_without_the_rule_digits_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "MOST", float("inf"))
    error, share = off((Less(),), 6.0)
    assert share > 0.95
    assert error > 5 * (2.0 + 1)
