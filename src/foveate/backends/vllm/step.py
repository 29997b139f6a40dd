"""What is edited in a step, from what vLLM says of its batch before the forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .hidden import served
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
