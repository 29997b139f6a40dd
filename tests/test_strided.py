"""The caches of GPUs, read with torch. Needs no vLLM; for the kernels see tests/vllm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.backends.vllm import rows as paged
from foveate.backends.vllm.plan import Blocks, plan
from foveate.backends.vllm.strided import Strided
from tests.test_paged_rows import DEPTH, REQUESTS, SCALE, SIZE, Cache, lives, plain, slow, stacks


def laid(cache: Cache, layer: int, order: str) -> Tensor:
    """(blocks, Hkv, size, 2 D); its heads, or its tokens, come first in memory."""
    held = torch.cat(list(cache.blocks[layer]), 3)
    return held if order == "HND" else held.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("text", ["devils(alpha=1.0)", "spin(keep=0.5, scale=0.2)"])
def test_rows_of_blocks_equal_rows_of_all_columns(text: str, order: str) -> None:
    cache, made = Cache(), lives(text)
    expected, where = slow(cache, text), (cache.starts, cache.lengths, cache.table, SIZE)
    groups = plan(made, stacks, *where)
    assert any(group.rest is not None for group in groups)
    for layer in range(DEPTH):
        out = plain(cache, layer).clone()
        for group in groups:
            given = cache.queries[layer], Strided(laid(cache, layer, order)), out, SCALE
            paged.edit(group, layer, *given, lambda like: None)
        assert (out - expected[layer]).abs().max() < 2e-5


def test_keys_and_values_lie_side_by_side() -> None:
    cache = Cache()
    n, (prompt, length, _, _) = 4, REQUESTS[4]
    assert length > prompt
    blocks = Blocks(cache.table[n : n + 1, : length // SIZE].long())
    for order in ("HND", "NHD"):
        held = Strided(laid(cache, 1, order))
        whole = length // SIZE * SIZE
        assert torch.equal(held.keys(blocks)[0], cache.keys[n][1][:, :whole])
        assert torch.equal(held.values(blocks)[0], cache.values[n][1][:, :whole])
