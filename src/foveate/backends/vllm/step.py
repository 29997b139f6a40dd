"""What is edited in a step, from what vLLM says of its batch before the forward, and the edit."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..transformers.rotary import rotary
from . import rows as arithmetic
from .cache import Cache
from .hidden import ranks, served
from .logits import TWINS, speaking
from .plan import Live, plan
from .prompts import readings
from .watch import expect


def planned(common: Any, table: Tensor, size: int, lives: dict[int, Live]) -> list[Any] | None:
    """The groups of a step; None where no row is edited.

    Args:
        common: vLLM's `CommonAttentionMetadata`. table: (requests, blocks), the cache blocks of
            each request. size: of a block.
        lives: the requests that ask for methods. The V1 model runner numbers them by their row of
            the batch. V2 gives each a slot, and says which slot is in which row.
    """
    expect([])
    slots = getattr(common, "req_idx", None)
    rows = lives
    if slots is not None:
        here = slots[: common.num_reqs].tolist()
        rows = {row: lives[slot] for row, slot in enumerate(here) if slot in lives}
    if not (rows or TWINS):
        return None
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    lengths = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
    asked = rows, served().stack, starts, lengths
    groups: list[Any] = [*readings(*asked)]  # whose memories the others share
    groups += plan(*asked, table, size)
    groups += speaking(*asked)
    if not groups:
        return None
    expect(groups)
    return groups


@functools.cache
def number_of(layer_name: str) -> int:
    """A layer's number."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


def edit_layer(
    impl: Any, number: int, groups: list[Any], query: Tensor, cache: Cache, output: Tensor
) -> None:
    """Put a layer's edited rows into what its kernel gave.

    Args:
        impl: vLLM's attention of the layer. groups: those that it edits. query, output: of all
            rows, (tokens, H * D) or (tokens, H, D); output is changed in place.
    """
    shape = -1, impl.num_heads, impl.head_size
    turn = functools.partial(_rotary, number)
    for group in groups:
        given = query.view(shape), cache, output.view(shape), impl.scale, turn, ranks()
        arithmetic.edit(group, number, *given)


def _rotary(number: int, like: Tensor) -> Any:
    """Rotary embeddings of a layer."""
    decoder = served().shape.decoder
    return rotary(decoder, decoder.layers[number].self_attn, like)
