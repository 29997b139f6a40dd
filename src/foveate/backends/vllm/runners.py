"""Which request is in which row of a step, for both of vLLM's model runners.

V1 tells a logits processor what changes in the rows of its batch. V2 gives a request a slot for as
long as it runs, and each step says which slot is in which row; `step` looks there. For V2 this is
written from its source and tested against stand-ins of its classes; not run on a GPU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from . import requests
from .asked import POSITIONS, asked, visual
from .hidden import first_rank
from .plan import Live
from .reading import Sink, asked_to_read, joined
from .requests import ROWS
from .watch import verify


class Requests(requests.Requests, LogitsProcessor):
    """A logits processor of both runners that changes no logits."""

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool = False) -> None:
        """With the arguments of either runner: V1's `state` is a device."""
        super().__init__(vllm_config, state, is_pin_memory)
        self.state = state

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request gets a slot. One that was preempted begins anew, as all of it does."""
        ROWS.pop(req_idx, None)
        text = joined(asked(sampling_params), asked_to_read(sampling_params))
        if not text:
            return False
        prompt = int(self.state.prompt_len.np[req_idx])
        places = sampling_params.extra_args.get(POSITIONS)
        live = Live(text, prompt, visual(sampling_params, prompt), places)
        if asked_to_read(sampling_params):
            live.sink = Sink(sampling_params, writes=first_rank())
        ROWS[req_idx] = live
        return True

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """After the forward of a step: every row that was to be edited was."""
        if ctx is None:
            return super().apply(logits)
        lives = [ROWS[slot] for slot in ctx.idx_mapping_np.tolist() if slot in ROWS]
        verify(bool(lives))
        for live in lives:
            if live.sink:
                live.sink.write()
        return logits


def leave(slot: int | None) -> None:
    """V2: a slot is free again."""
    if slot is not None:
        ROWS.pop(slot, None)
