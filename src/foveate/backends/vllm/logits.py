"""The stage `logits`: the last row of a request, where its next token is chosen.

A method that changes logits reads what enters layers on the way (`before`), for that row alone.
Its logits are edited where the model makes them, before vLLM sees them: so grammars, biases,
penalties and log-probabilities of every mode are those of the edited logits, as in transformers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.rows import Phase
from ...core.sequence import Stack, State
from .plan import Live


@dataclass(eq=False)
class Speaking:
    """Requests whose next logits are edited together.

    Attributes:
        stack: the methods, resolved. acting: those of them that change logits.
        rows: (B,) int64, the requests' last rows among the step's query rows.
        places: each request's number in the step, which is its row of the logits, and position.
        state: what the methods see.
        acted, spoke: see `plan.Group`.
    """

    stack: Stack
    acting: tuple[int, ...]
    rows: Tensor
    places: list[tuple[int, int]]
    state: State
    acted: set[int] = field(default_factory=set)
    spoke: bool = False
    piece, speaks = False, True
    layers: frozenset[int] = frozenset()  # no attention is edited
    done: frozenset[int] = frozenset()

    def edit(self, logits: Tensor) -> None:
        """Change the rows of logits (requests, V) float32 in place."""
        number = torch.tensor([row for row, _ in self.places], device=logits.device)
        rows = logits[number]
        for i in self.acting:
            if self.state.acts(i):
                self.acted.add(i)
                rows = self.stack.methods[i].logits(rows, None, self.state.seen_by(i))
        logits[number] = rows.to(logits.dtype)
        self.spoke = True


def speaking(
    rows: dict[int, Live], stacks: Any, starts: list[int], lengths: list[int]
) -> list[Speaking]:
    """The requests of a step whose logits methods change; for arguments see `plan.plan`.

    A piece of a prompt that is not its end has no next token.
    """
    wanted: dict[tuple[str, str], list[tuple[int, Live]]] = defaultdict(list)
    for number, length in enumerate(lengths):
        live = rows.get(number)
        if live is not None and length >= live.prompt and stacks(live.text).at("logits"):
            phase = "prompt" if length == live.prompt else "decode"
            wanted[live.text, phase].append((number, live))
    groups = []
    for (text, phase), asked in wanted.items():
        stack: Stack = stacks(text)
        width = max(len(live.visual) for _, live in asked)
        visual = torch.stack([pad(x.visual, (0, width - len(x.visual))) for _, x in asked])
        groups.append(
            Speaking(
                stack=stack,
                acting=stack.at("logits"),
                rows=torch.tensor([starts[number + 1] - 1 for number, _ in asked]),
                places=[(number, lengths[number] - 1) for number, _ in asked],
                state=State(stack, visual, cast(Phase, phase)),
            )
        )
    return groups
