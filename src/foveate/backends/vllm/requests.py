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
            ROWS.pop(row, None)
        for row, params, prompt, _ in batch_update.added:
            ROWS.pop(row, None)
            text = asked(params)
            if text and prompt is not None:
                places = params.extra_args.get(POSITIONS)
                ROWS[row] = Live(text, len(prompt), visual(params, len(prompt)), places)
        for one, two, kind in batch_update.moved:
            first, second = ROWS.pop(one, None), ROWS.pop(two, None)
            if first is not None:
                ROWS[two] = first
            if kind == MoveDirectionality.SWAP and second is not None:
                ROWS[one] = second
