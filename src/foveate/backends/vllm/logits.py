"""The stage `logits`: the last row of a request, where its next token is chosen.

A method that changes logits reads what enters layers on the way (`before`), for that row alone.
Its logits are edited where the model makes them, before vLLM sees them: so grammars, biases,
penalties and log-probabilities of every mode are those of the edited logits, as in transformers.

A second stream is another request of the same step, the twin. Its logits are shown to the method,
and it gets the token that was chosen.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.rows import Phase
from ...core.sequence import Stack, State
from .plan import Live


class Twin(NamedTuple):
    """A request in the worker's batch that is the second stream of another.

    Attributes:
        pair: the name that both share. prompt: length of its prompt.
        ahead: whether it is read before the other's answer begins, and no more.
    """

    pair: str
    prompt: int
    ahead: bool


TWINS: dict[int, Twin] = {}  # row of the batch -> twin, in this process
MAIN: WeakValueDictionary[str, Live] = WeakValueDictionary()  # of every pair
_same: list[tuple[int, int]] = []  # rows of a step that get one token: of the twin, of its request


Memories = tuple[dict[str, Any], ...]
"""Of every method of a stack."""


class Told(NamedTuple):
    """What methods remember of a request's logits: before and after its token number `step`.

    A token may be chosen anew after a preemption.
    """

    step: int
    before: Memories
    after: Memories


@dataclass(eq=False)
class Speaking:
    """Requests whose next logits are edited together.

    Attributes:
        stack: the methods, resolved. acting: those of them that change logits.
        rows: (B,) int64, the requests' last rows among the step's query rows.
        places: each request's number in the step, which is its row of the logits, and position.
        others: the number of each one's twin; None without a second stream.
        state: what the methods see.
        live, before: the request, which is the only one, and what they remember of the tokens
            before, where they remember; else None.
        acted, spoke: see `plan.Group`.
    """

    stack: Stack
    acting: tuple[int, ...]
    rows: Tensor
    places: list[tuple[int, int]]
    others: list[int] | None
    state: State
    live: Live | None
    before: Memories = ()
    acted: set[int] = field(default_factory=set)
    spoke: bool = False
    piece, speaks = False, True
    layers: frozenset[int] = frozenset()  # no attention is edited
    done: frozenset[int] = frozenset()

    def edit(self, logits: Tensor, plain: Tensor, groups: list[Any]) -> None:
        """Change the rows of logits (requests, V) float32 in place.

        Args:
            plain: the same, of the model, for the second streams. groups: of the step.
        """
        number = torch.tensor([row for row, _ in self.places], device=logits.device)
        rows = logits[number]
        other = None if self.others is None else plain[self.others]
        for i in self.acting:
            if self.state.acts(i):
                self.acted.add(i)
                if self.stack.methods[i].edits_attention:
                    self.state.memories[i].update(_noted(self, i, groups))
                mine = other if i == self.stack.owner else None
                rows = self.stack.methods[i].logits(rows, mine, self.state.seen_by(i))
        logits[number] = rows.to(logits.dtype)
        self.spoke = True
        if self.live is not None:
            after = tuple(map(dict, self.state.memories))
            self.live.told = Told(_step(self.live, self.places[0][1]), self.before, after)


def _noted(speaking: Speaking, i: int, groups: list[Any]) -> dict[str, Any]:
    """What method i noted of the attention of these rows in this step, batch first."""
    found = {
        place: {key: x[row] for key, x in group.state.memories[i].items()}
        for group in groups
        if group.stack is speaking.stack and i in group.acting and not group.speaks
        for row, place in enumerate(group.places)
    }
    rows = [found[place] for place in speaking.places]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _step(live: Live, position: int) -> int:
    return position - live.prompt + 1


@dataclass(eq=False)
class Ahead(Speaking):
    """A twin that is read before the answer begins: its logits are kept for its request."""

    def edit(self, logits: Tensor, plain: Tensor, groups: list[Any]) -> None:
        assert self.live is not None
        self.live.ahead = plain[self.places[0][0]].float().clone()
        self.spoke = True


def speaking(
    rows: dict[int, Live], stacks: Any, starts: list[int], lengths: list[int]
) -> list[Speaking]:
    """The requests of a step whose logits methods change; for arguments see `plan.plan`.

    A piece of a prompt, or of an answer that is computed again, has no next token but at its end.
    """
    twins = {twin.pair: row for row, twin in TWINS.items() if row < len(lengths)}
    _same.clear()
    wanted: dict[tuple[Any, ...], list[tuple[int, Live]]] = defaultdict(list)
    for number, length in enumerate(lengths):
        live = rows.get(number)
        if live is None or length < live.prompt + len(live.said):
            continue
        stack: Stack = stacks(live.text)
        acting = stack.at("logits")
        if acting:
            phase = "prompt" if length == live.prompt else "decode"
            alone = number if any(stack.methods[i].remembers for i in acting) else None
            wanted[live.text, phase, alone].append((number, live))
        if stack.owner in acting:
            _same.append((_twin_of(live, length, twins, lengths), number))
    beside = {number: twin for twin, number in _same}
    groups = []
    for (text, phase, alone), asked in wanted.items():
        stack = stacks(text)
        width = max(len(live.visual) for _, live in asked)
        visual = torch.stack([pad(x.visual, (0, width - len(x.visual))) for _, x in asked])
        group = Speaking(
            stack=stack,
            acting=stack.at("logits"),
            rows=torch.tensor([starts[number + 1] - 1 for number, _ in asked]),
            places=[(number, lengths[number] - 1) for number, _ in asked],
            others=[beside[number] for number, _ in asked] if asked[0][0] in beside else None,
            state=State(stack, visual, cast(Phase, phase)),
            live=None if alone is None else asked[0][1],
        )
        if group.live is not None:
            group.before = _remembered(stack, group.live, group.places[0][1])
            if group.before:
                group.state.memories = tuple(map(dict, group.before))
        groups.append(group)
    return groups + _ahead(stacks, starts, lengths)


def _ahead(stacks: Any, starts: list[int], lengths: list[int]) -> list[Speaking]:
    """The twins of a step that are read ahead, where they are at their end."""
    groups: list[Speaking] = []
    for number, twin in TWINS.items():
        if not twin.ahead or number >= len(lengths) or lengths[number] < twin.prompt:
            continue
        live = MAIN.get(twin.pair)
        if live is None:
            raise RuntimeError(
                "foveate: vLLM computed a pass ahead for a request that the worker does not know. "
                "The engine stops: use a version of vLLM that foveate's documentation names."
            )
        stack, visual = stacks(live.text), live.visual[None]
        rows, places = torch.tensor([starts[number + 1] - 1]), [(number, lengths[number] - 1)]
        groups.append(Ahead(stack, (), rows, places, None, State(stack, visual, "prompt"), live))
    return groups


def _remembered(stack: Stack, live: Live, position: int) -> Memories:
    """What methods remember of the tokens before the one that a position chooses."""
    step, told = _step(live, position), live.told
    if not step:
        return ()
    if told is None or step - told.step not in (0, 1):
        raise RuntimeError(
            f"foveate: what {stack} remembers of this answer is lost, so the rest of it would be "
            "wrong. The engine stops: use methods that remember nothing."
        )
    found: Memories = told.after if step > told.step else told.before
    methods = zip(stack.methods, found, strict=True)
    return tuple(memory if method.remembers else {} for method, memory in methods)


def _twin_of(live: Live, length: int, twins: dict[str, int], lengths: list[int]) -> int:
    """The number in the step of a request's twin, which is at the same place of the answer."""
    twin = twins.get(live.pair)
    if twin is None or lengths[twin] - TWINS[twin].prompt != length - live.prompt:
        raise RuntimeError(
            f"foveate: vLLM computed one of the two streams of {live.text} without the other, so "
            "its next token would be wrong. The engine stops: use a version of vLLM that "
            "foveate's documentation names."
        )
    return twin


def say_the_same(tokens: Tensor) -> None:
    """Give twins the tokens (requests, 1) that their requests got, in place."""
    for twin, number in _same:
        tokens[twin] = tokens[number]
    _same.clear()
