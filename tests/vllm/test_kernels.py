"""The Triton kernels of decode rows, in Triton's interpreter, against torch. Not run on a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the interpreter is for a process of its own: make test-vllm", allow_module_level=True
    )
pytest.importorskip("triton", reason="Triton is not installed: make test-vllm")

from foveate.backends.vllm import kernels
from foveate.backends.vllm import rows as paged
from foveate.backends.vllm.plan import Blocks, plan
from foveate.backends.vllm.strided import Strided, together
from foveate.core.edit import Acting, edited_weights
from foveate.core.method import parse
from foveate.core.sequence import Stack, State
from tests.test_paged_rows import ANATOMY, DEPTH, REQUESTS, SCALE, SIZE, lives, plain, slow, stacks
from tests.test_paged_rows import Cache as Requests


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cache(blocks: int, heads: int, size: int, width: int, order: str, dtype: torch.dtype) -> Tensor:
    """(blocks, Hkv, size, 2 D), whose heads or whose tokens come first in memory."""
    if order == "HND":
        return drawn(blocks, heads, size, 2 * width).to(dtype)
    return drawn(blocks, size, heads, 2 * width).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "size"), [(4, 4, 64, 16), (14, 2, 64, 32), (8, 2, 128, 16)]
)
def test_scores_and_sums_are_read_through_the_block_table(
    heads: int, key_heads: int, width: int, size: int, dtype: Any, order: str
) -> None:
    held = cache(9, key_heads, size, width, order, dtype)
    query = drawn(3, heads, 1, width, seed=1).to(dtype)
    blocks = Blocks(torch.tensor([[3, 0, 8, 1], [5, 2, 2, 7], [4, 6, 0, 0]]))
    ours, theirs = Strided(held, kernels), Strided(held)
    x, expected = (one.scores(query, blocks, 0.2) for one in (ours, theirs))
    assert x.dtype == torch.float32
    assert (x - expected).abs().max() < 2e-5
    weights = expected.softmax(-1)
    (new, plain), near = (one.weighted(weights, blocks) for one in (ours, theirs)), 2e-6
    if dtype == torch.bfloat16:
        near = 2e-5  # a weight is two numbers of 8 digits each
    assert (new - plain).abs().max() < near


MEMORY = "clvs(stop_threshold=0, unified_positions=False, smoothing=0.6"
SIMPLE = [
    "pai(alpha=1.0, gamma=1.0)",
    "scalingvis(weight=2.0)",
    "scalingvis(weight=0.3)",
    "devils(alpha=1.0)",
    "vaf(enhance=1.8, suppress=0.4, layers=(0, 1))",
    "vaf(enhance=1.8, suppress=0.4, mode='abs', layers=(0, 1))",
    "tarac(beta=1.5, alpha=0.8, layers=(0, 1))",
    "tarac(beta=1.5, alpha=0.8, inject='previous', pool='mean', layers=(0, 1))",
    MEMORY + ")",
    MEMORY + ", pool='mean', beta=0.3)",
    "clvs(stop_threshold=0, unified_positions=False, smoothing=1.4, mode='add')",
    MEMORY + ")+pai(gamma=1.0, alpha=0.7)",
]
CODE = [
    "spin(keep=0.5)",
    "adhh(threshold=0.1, heads=((1, 0),))",
    "pai(gamma=1.0)+devils",
    "tarac(pool='head', layers=(0, 1))",
    MEMORY + ", memory_norm=True)",
]


def steps(text: str, edit: Any) -> list[tuple[Tensor, list[dict[str, Any]]]]:
    """Weights of layer 1 over three tokens of two rows, and what the methods remember of it."""
    stack, columns, out = Stack(ANATOMY, parse(text)), 40, []
    visual = torch.zeros(2, 30, dtype=torch.bool)
    visual[0, 4:20] = visual[1, 9:26] = True
    state = State(stack, visual, "prompt")
    for step in range(3):
        length = columns + step
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
        mask[0, ..., :2] = mask[1, ..., length - 3 :] = False
        for layer in (0, 1):
            x = drawn(2, 4, 1, length, seed=10 * step + layer) * 3
            share = [Acting(stack.methods[i], state.seen_by(i), 1) for i in stack.edits[layer]]
            if share:
                rows = paged.ServedRows(
                    x, layer, None, None, None, mask, 1.0, share[0].seq, lambda: None
                )
                x = edit(rows, share)
        kept = [{k: v.clone() for k, v in memory.items()} for memory in state.memories]
        out.append((x, kept))
        state.phase = "decode"
        state.renew()
        if step == 1:
            for memory in state.memories:
                if "M" in memory:
                    memory["active"] = torch.tensor([True, False])
    return out


@pytest.mark.parametrize("text", SIMPLE + CODE)
def test_simple_edits_are_those_of_the_methods_own_code(text: str) -> None:
    met = []

    def with_kernel(rows: Any, acting: list[Acting]) -> Tensor:
        met.append(together(rows, acting) is not None)
        held = Strided(torch.zeros(1, 1, 16, 128), kernels)
        return held.edited(rows, acting, Blocks(torch.zeros(2, 1)))

    for ours, theirs in zip(steps(text, with_kernel), steps(text, edited_weights), strict=True):
        assert (ours[0] - theirs[0]).abs().max() < 1e-6
        for one, two in zip(ours[1], theirs[1], strict=True):
            assert one.keys() == two.keys()
            for name in one.keys() & {"M", "layer 0", "layer 1"}:
                off = (one[name] - two[name]).abs()
                assert off[0, ..., 4:20].max() < 1e-6
                assert off[1, ..., 9:26].max() < 1e-6
    assert any(met) == (text in SIMPLE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("pai(alpha=1.0, gamma=1.0)", "HND"),
        ("scalingvis(weight=0.3)", "NHD"),
        ("devils(alpha=1.0)", "NHD"),
        ("tarac(beta=1.5, alpha=0.8, layers=(0, 1))", "NHD"),
        (MEMORY + ")+pai(gamma=1.0, alpha=0.7)", "HND"),
        ("spin(keep=0.5)", "HND"),
    ],
)
def test_rows_of_a_paged_cache_equal_rows_of_all_columns(text: str, order: str) -> None:
    """Several requests, of other lengths, images and blocks."""
    asked, made = Requests(), lives(text)
    expected, where = slow(asked, text), (asked.starts, asked.lengths, asked.table, SIZE)
    for n, (prompt, length, new, _) in enumerate(REQUESTS):
        if length - new >= prompt:
            plan({n: made[n]}, stacks, [0] * (n + 1) + [1], [0] * n + [prompt], asked.table, SIZE)
    groups = plan(made, stacks, *where)
    for layer in range(DEPTH):
        keys, values = asked.blocks[layer]
        held = torch.cat([keys, values], 3)
        if order == "NHD":
            held = held.transpose(1, 2).contiguous().transpose(1, 2)
        out = plain(asked, layer).clone()
        for group in groups:
            if layer in group.layers:
                given = asked.queries[layer], Strided(held, kernels), out, SCALE
                paged.edit(group, layer, *given, lambda like: None)
        assert (out - expected[layer]).abs().max() < 2e-5


def test_a_class_that_changes_the_code_says_anew_what_it_is() -> None:
    pai = type(parse("pai(gamma=1.0)")[0])

    class Other(pai, register=False):  # type: ignore[misc, valid-type]
        def scores(self, rows: Any) -> Tensor:
            return rows.x

    class Same(pai, register=False):  # type: ignore[misc, valid-type]
        pass

    assert Same(gamma=1.0).simple(_rows()) is not None
    assert Other(gamma=1.0).simple(_rows()) is None


def _rows() -> Any:
    class Rows:
        phase, layer, memory = "decode", 1, {}  # type: ignore[var-annotated]

    return Rows()


def test_ranks_pool_over_their_heads_in_code() -> None:
    stack = Stack(ANATOMY, parse("devils"))
    state = State(stack, torch.ones(1, 4, dtype=torch.bool), "decode")
    share = [Acting(stack.methods[0], state.seen_by(0), 1)]
    for ranks, met in ((None, True), (object(), False)):
        given = None, None, 1.0, share[0].seq, lambda: None
        rows = paged.ServedRows(torch.zeros(1, 4, 1, 4), 1, None, ranks, *given)
        assert (together(rows, share) is not None) == met
