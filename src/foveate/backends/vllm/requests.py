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
from .asked import AHEAD, LIVES, PAIR, POSITIONS, TWIN, asked, visual
from .hidden import first_rank
from .logits import MAIN, TWINS, Twin
from .plan import Live
from .reading import Sink, asked_to_read, joined
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
        TWINS.clear()

    def is_argmax_invariant(self) -> bool:
        return False  # otherwise `apply` is left out of greedy steps

    def apply(self, logits: Tensor) -> Tensor:
        """After the forward of a step: every row that was to be edited was."""
        verify(bool(ROWS))
        for live in ROWS.values():
            if live.sink:
                live.sink.write()
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Before the forward of a step."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            _leave(row)
        for row, params, prompt, said in batch_update.added:
            _leave(row)
            text = joined(asked(params), asked_to_read(params))
            if text and prompt is not None:
                ROWS[row] = _live(params, text, len(prompt), said)
            elif params.extra_args and TWIN in params.extra_args:
                given = params.extra_args
                TWINS[row] = Twin(given[PAIR], len(prompt), given[TWIN] == AHEAD)
        for one, two, kind in batch_update.moved:
            for table in (ROWS, TWINS):
                _move(table, one, two, kind)


def _leave(row: int) -> None:
    ROWS.pop(row, None)
    TWINS.pop(row, None)


def _move(table: dict[int, Any], one: int, two: int, kind: Any) -> None:
    first, second = table.pop(one, None), table.pop(two, None)
    if first is not None:
        table[two] = first
    if kind == MoveDirectionality.SWAP and second is not None:
        table[one] = second


def _live(params: Any, text: str, prompt: int, said: list[int]) -> Live:
    """A request that enters the batch, or comes back with what it remembers.

    A running request leaves the batch for every step that has no room for it. Its `Live` stays with
    its parameters, so both end together. One engine process shares the parameters of all answers
    of one request (n > 1): there the list of its tokens tells an answer, or how long it is.
    """
    lives: list[list[Any]] = params.extra_args.setdefault(LIVES, [])
    mine = [entry for entry in lives if entry[1] is said]
    if said and not mine:  # the scheduler made a new list
        mine = [one for one in lives if len(lives) == 1 or len(one[1]) == len(said)]
    if len(mine) != 1:
        places = params.extra_args.get(POSITIONS)
        live = Live(text, prompt, visual(params, prompt), places)
        live.pair = params.extra_args.get(PAIR, "")
        if live.pair:
            MAIN[live.pair] = live
        mine = [[live, said]]
        if asked_to_read(params):
            mine[0][0].sink = Sink(params, writes=first_rank())
        lives += mine
    mine[0][1] = said
    found: Live = mine[0][0]
    found.said = said
    return found
