"""The seam by itself: rows edited without any model, and what methods see of a prompt or stream."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError
from foveate.core import Method, Prompt, Rows, Sequences
from foveate.core.edit import Acting, edit_rows, products
from foveate.core.sequence import Stack, State

B, H, G, R, K, D = 2, 4, 2, 3, 7, 8
SCALE = 0.3


@dataclass(frozen=True)
class Louder(Method, register=False):
    """Scores of visual columns times a factor."""

    factor: float = 2.0

    def scores(self, rows: Rows) -> Tensor:
        return torch.where(rows.visual[:, None, None], self.factor * rows.x, rows.x)


@dataclass(frozen=True)
class Even(Method, register=False):
    """Half of every weight, and half of an even row."""

    def weights(self, rows: Rows) -> Tensor:
        return (rows.x + 1 / rows.x.shape[3]) / 2


def state(*methods: Method, phase: Any = "decode") -> State:
    """Two sequences; the second has no image."""
    anatomy: Any = SimpleNamespace(
        depth=1,
        kind="none",
        layer_kinds=("full_attention",),
        full_layers=(0,),
        placed=True,
        tower=None,
    )
    visual = torch.zeros(B, 5, dtype=torch.bool)
    visual[0, 1:3] = True
    return State(Stack(anatomy, methods), visual, phase)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, R, D), (B, G, K, D), (B, G, K, D)
    query, key, value = (torch.randn(*shape, generator=generator) for shape in shapes)
    return query, key, value


def edited(known: State, mask: Tensor | None, counts: list[int]) -> Tensor:
    query, key, value = tensors()
    acting = [
        Acting(known.stack.methods[i], known.seen_by(i), count, known.touched(i, count))
        for i, count in enumerate(counts)
    ]
    x = products(query, key, SCALE)
    rows = Rows(x, 0, query, key, value, mask, SCALE, known.seen_by(0))
    return edit_rows(rows, acting)


def by_hand(known: State, mask: Tensor | None, counts: list[int]) -> Tensor:
    """The same, one sample, head, row and method at a time."""
    query, key, value = tensors()
    out = torch.zeros(B, H, R, D)
    for b in range(B):
        for h in range(H):
            k, v = key[b, h // (H // G)], value[b, h // (H // G)]
            for r in range(R):
                z = (k @ query[b, h, r]) * SCALE
                here = [
                    method
                    for method, count in zip(known.stack.methods, counts, strict=True)
                    if r >= R - count and (b == 0 or not method.needs_image)
                ]
                for method in here:
                    if isinstance(method, Louder):
                        z[1:3] *= method.factor
                if mask is not None:
                    z[~mask[b if len(mask) > 1 else 0, 0, r]] = -torch.inf
                a = z.softmax(-1)
                for method in here:
                    if isinstance(method, Even):
                        a = (a + 1 / K) / 2
                out[b, h, r] = a @ v
    return out


MASK = torch.ones(B, 1, R, K, dtype=torch.bool)
MASK[0, :, :2, 6:] = False
MASK[1, :, :, 0] = False


@pytest.mark.parametrize("mask", [None, MASK, MASK[:1]])
@pytest.mark.parametrize("counts", [[3, 3], [1, 2], [2, 1]])
@pytest.mark.parametrize("stack", [(Louder(), Even()), (Even(), Louder(factor=0.5))])
def test_edited_rows_are_those_of_plain_loops(
    stack: tuple[Method, ...], counts: list[int], mask: Tensor | None
) -> None:
    known = state(*stack)
    assert torch.allclose(edited(known, mask, counts), by_hand(known, mask, counts), atol=1e-6)


def test_a_mask_of_numbers_is_added() -> None:
    numbers = torch.zeros(MASK.shape).masked_fill(~MASK, torch.finfo(torch.float32).min)
    known = state(Louder())
    assert torch.allclose(edited(known, numbers, [3]), edited(known, MASK, [3]), atol=1e-6)


class Turn:
    """Stands in for rotary positions: a key moves by adding its difference of positions."""

    def rotation(self, by: Tensor) -> tuple[Tensor, Tensor]:
        return by[0].float()[:, None, :, None], torch.empty(0)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return x + rotation[0]


def test_moved_rows_are_kept_for_decode_steps() -> None:
    known = state(Louder(), phase="prompt")
    query, key, value = tensors()
    x = products(query, key, SCALE)
    columns, by = torch.tensor([[1, 2], [1, 1]]), torch.tensor([[[-1, -2], [0, 0]]])
    later = torch.tensor([[[-3], [0]]])
    rows = Rows(x, 0, query, key, value, None, SCALE, known.seen_by(0), Turn)  # type: ignore[arg-type]
    rows.move(columns, by, later)
    turned, shifted = query.clone(), key.clone()
    turned[0] -= 3
    shifted[0, :, 1] -= 1
    shifted[0, :, 2] -= 2
    shifted[0, :, 3:] -= 3  # the text after the image moves with the query
    want = products(turned, shifted, SCALE)
    want[0, :, :, 3:] = x[0, :, :, 3:]
    assert torch.allclose(rows.moved(), want, atol=1e-5)
    known.phase = "decode"
    again = Rows(x, 0, query, key * torch.nan, value, None, SCALE, known.seen_by(0), Turn)  # type: ignore[arg-type]
    assert torch.allclose(again.moved()[0, :, :, 1:3], want[0, :, :, 1:3], atol=1e-5)
    unturned = Rows(x, 0, query, key, value, None, SCALE, known.seen_by(0))
    with pytest.raises(FoveateError, match="no rotary position embedding"):
        unturned.move(columns, by)


def test_memory_is_selected_and_forked_with_the_batch() -> None:
    known = state(Louder(), Even())
    one, two = known.seen_by(0), known.seen_by(1)
    one.memory["m"], two.memory["m"] = torch.tensor([1.0, 2.0]), [torch.tensor([3.0, 4.0])]
    fork = known.select(torch.tensor([1, 1, 0]))
    assert fork.seen_by(0).memory["m"].tolist() == [2, 2, 1]
    assert fork.seen_by(1).memory["m"][0].tolist() == [4, 4, 3]
    fork.seen_by(0).memory["m"] = torch.zeros(3)
    assert one.memory["m"].tolist() == [1, 2]
    one.rest()
    assert two.rests(Louder)
    assert not two.rests(Even)
    assert [known.acts(0), known.acts(1)] == [False, True]


def test_a_prompt_without_some_tokens_is_padded_on_the_left_again() -> None:
    ids = torch.tensor([[0, 11, 12, 13], [21, 22, 23, 24]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    visual = torch.tensor([[False, True, False, False], [False, True, True, True]])
    pixels, rest = {"pixel_values": torch.ones(2)}, {"grid": torch.ones(2), "flag": True}
    prompt = Prompt(
        mask, visual, ids, None, pixels, None, lambda p: iter([[p["pixel_values"]]]), rest
    )
    text = prompt.only(~visual)
    assert text.ids is not None
    assert text.ids.tolist() == [[12, 13], [0, 21]]
    assert text.mask.tolist() == [[1, 1], [0, 1]]
    assert (text.pixels, text.inputs) == ({}, {"flag": True})
    assert not text.visual.any()
    dark = prompt.repainted(lambda tiles: [tile.zero_() for tile in tiles] and None)
    assert dark.pixels["pixel_values"].tolist() == [0, 0]
    assert prompt.pixels["pixel_values"].tolist() == [1, 1]


def test_sequences_know_whose_memory_they_mean() -> None:
    known = state(Louder(), Even())
    seen: list[Sequences] = [known.seen_by(0), known.seen_by(1)]
    seen[0].scratch["s"] = 1
    assert "s" not in seen[1].scratch
    assert seen[0].scratch["s"] == 1
    known.renew()
    assert seen[0].scratch == {}, "it is of one forward"
