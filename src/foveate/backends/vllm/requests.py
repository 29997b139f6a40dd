"""Which request is in which row of a step: a logits processor of vLLM that changes no logits.

Logits are edited before, in `hidden`, where log-probabilities are not yet made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

from ...base.errors import FoveateError
from . import switched_off
from .admission import check_text
from .asked import POSITIONS, asked, visual
from .plan import Live
from .watch import verify

ROWS: dict[int, Live] = {}  # row of the batch -> request, in this process
_aside: dict[int, Live] = {}  # requests that left the batch, by their list of tokens


def _put_aside(row: int) -> None:
    """A request leaves the batch: it is over, or waits for a step that has room for it."""
    live = ROWS.pop(row, None)
    if live is not None and live.output is not None:
        _aside[id(live.output)] = live  # which holds the list, so no other gets its id
        if len(_aside) > 256:
            del _aside[next(iter(_aside))]


class Requests(LogitsProcessor):
    """See the module."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """In the front end: a text that cannot be read or run is refused.

        Raises:
            ValueError: with the sentence to tell.
        """
        try:
            if switched_off() and asked(sampling_params):
                raise FoveateError("foveate is switched off here (FOVEATE_VLLM=off).")
            check_text(sampling_params)
        except FoveateError as error:
            raise ValueError(str(error)) from error

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        ROWS.clear()
        _aside.clear()

    def is_argmax_invariant(self) -> bool:
        return False  # otherwise `apply` is left out of greedy steps

    def apply(self, logits: Tensor) -> Tensor:
        """After the forward of a step: every row that was to be edited was."""
        verify(bool(ROWS))
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Before the forward of a step."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            _put_aside(row)
        for row, params, prompt, output in batch_update.added:
            _put_aside(row)
            text = asked(params)
            if text and prompt is not None:
                places = params.extra_args.get(POSITIONS)
                live = _aside.pop(id(output), None)
                if live is None or (live.text, live.prompt) != (text, len(prompt)):
                    live = Live(text, len(prompt), visual(params, len(prompt)), places)
                    live.output = output
                ROWS[row] = live
        for one, two, kind in batch_update.moved:
            first, second = ROWS.pop(one, None), ROWS.pop(two, None)
            if first is not None:
                ROWS[two] = first
            if kind == MoveDirectionality.SWAP and second is not None:
                ROWS[one] = second
