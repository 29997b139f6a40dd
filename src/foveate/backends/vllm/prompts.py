"""Methods that read every row of a prompt, piece by piece, before they edit any.

What they find belongs to the request. The rows that are edited later share its memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.sequence import Stack, State
from .plan import Live


@dataclass(eq=False)
class Reading:
    """A piece of one prompt.

    Attributes:
        stack: the methods, resolved. acting: those of them that read.
        rows: (Q,) int64, the piece among the step's query rows.
        state: what the methods see and remember of the request.
    """

    stack: Stack
    acting: tuple[int, ...]
    rows: Tensor
    state: State
    places: list[tuple[int, int]] = field(default_factory=list)  # nothing is edited here
    acted: frozenset[int] = frozenset()
    layers: frozenset[int] = frozenset()
    done: frozenset[int] = frozenset()
    piece = True
    speaks = spoke = False


def readings(
    rows: dict[int, Live], stacks: Any, starts: list[int], lengths: list[int]
) -> list[Reading]:
    """The pieces of prompts in a step that methods read; for arguments see `plan.plan`.

    Generated tokens are no part of a prompt, also where they are computed again.

    Raises:
        RuntimeError: a piece before this one was not read.
    """
    found = []
    for number, length in enumerate(lengths):
        live = rows.get(number)
        if live is None:
            continue
        stack: Stack = stacks(live.text)
        acting = tuple(i for i in stack.at("before") if stack.methods[i].reads_prompt)
        start = length - (starts[number + 1] - starts[number])
        if not acting or start >= live.prompt:
            continue
        end = min(length, live.prompt)
        visual = live.visual[None, :end]
        if start == 0:
            live.read = State(stack, visual, "prompt")
        elif live.read is None or live.read.visual.shape[1] != start:
            raise RuntimeError(
                f"foveate: {stack} did not read the prompt before position {start}, so it would "
                "act on half of what it needs: use a vLLM that foveate's documentation names."
            )
        else:
            live.read.take_in(visual, end - start)
        place = torch.arange(starts[number], starts[number] + end - start)
        found.append(Reading(stack, acting, place, live.read))
    return found
