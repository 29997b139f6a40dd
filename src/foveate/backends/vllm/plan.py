"""Once per step: which rows are edited, by what, and where their key columns lie in the cache."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.method import Method
from ...core.rows import Phase
from ...core.sequence import Stack, State


@dataclass(eq=False)
class Live:
    """A request in the worker's batch that asks for a method.

    Attributes:
        text: its methods. prompt: length of its prompt.
        visual: (P,) bool, its visual tokens. first, last: the first and last of them.
        positions: (3, P) int64 under M-RoPE, else None.
        state: what its methods remember from token to token.
        output: vLLM's list of its tokens, the same as long as the request lives.
        read: what methods found that read its whole prompt; a `State`.
    """

    text: str
    prompt: int
    visual: Tensor
    positions: Tensor | None
    state: Any = field(default=None, repr=False)
    output: Any = field(default=None, repr=False)
    read: Any = field(default=None, repr=False)
    first: int = field(init=False)
    last: int = field(init=False)

    def __post_init__(self) -> None:
        where = self.visual.nonzero()[:, 0].tolist() or [self.prompt, -1]
        self.first, self.last = where[0], where[-1]


@dataclass(eq=False)
class Group:
    """Rows of one step that are edited together.

    The columns that methods see one by one are those of whole cache blocks, P of them per row.

    Attributes:
        stack: the methods, resolved. acting: those of them that edit these rows.
        rows: (B,) int64, among the step's query rows.
        blocks: (B, N) int64, the cache blocks that hold the columns.
        mask: (B, 1, 1, P) bool, the columns that are shown one by one.
        all_blocks, all_mask: (B, M) and (B, 1, 1, M * block size): every column of the row.
        whole: whether every column is shown one by one.
        state: what the methods see and remember.
        layers: which are edited. done: those that were, so far in this step.
        places: the request's number in the step, and the position, of every row.
        acted: those of `acting` that did not rest in all layers.
        speaks, spoke: whether logits are edited, and were.
    """

    stack: Stack
    acting: tuple[int, ...]
    rows: Tensor
    blocks: Tensor
    mask: Tensor
    all_blocks: Tensor
    all_mask: Tensor
    state: State
    layers: frozenset[int]
    whole: bool
    places: list[tuple[int, int]]
    done: set[int] = field(default_factory=set)
    acted: set[int] = field(default_factory=set)
    piece = speaks = spoke = False


@dataclass(frozen=True)
class _Row:
    """One row to edit: its request, the request's number in the step, query row and position."""

    live: Live
    request: int
    query: int
    position: int


def plan(
    rows: dict[int, Live],
    stacks: Any,
    starts: list[int],
    lengths: list[int],
    table: Tensor,
    size: int,
) -> list[Group]:
    """The groups of a step.

    Args:
        rows: row of the batch -> its request. stacks: text -> `Stack`.
        starts: where each request's query rows begin, and the end of the last.
        lengths: tokens of each request after this step.
        table: (requests, blocks) the cache blocks of each request. size: of a block.
    """
    wanted: dict[tuple[Any, ...], list[_Row]] = defaultdict(list)
    for number, length in enumerate(lengths):
        live = rows.get(number)
        if live is None:
            continue
        stack: Stack = stacks(live.text)
        new = starts[number + 1] - starts[number]
        first = live.last + 1 if stack.text_rows else live.prompt - 1
        for position in range(max(first, length - new), length):
            phase = "prompt" if position < live.prompt else "decode"
            acting = tuple(
                i
                for i, method in enumerate(stack.methods)
                if method.edits_attention and _edits(method, live, position)
            )
            if acting:
                query = starts[number] + position - (length - new)
                alone = query if any(m.remembers for m in stack.methods) else None
                key = (live.text, acting, phase, alone)
                wanted[key].append(_Row(live, number, query, position))
    return [
        _group(stacks(text), acting, cast(Phase, phase), asked, table, size)
        for (text, acting, phase, _), asked in wanted.items()
    ]


def _edits(method: Method, live: Live, position: int) -> bool:
    """Whether a method edits the row at a position of its request."""
    if live.last < 0 and method.needs_image:
        return False
    if method.rows == "prompt":
        return position == live.prompt - 1
    return position > live.last if method.rows == "text" else position >= live.prompt - 1


def _group(
    stack: Stack, acting: tuple[int, ...], phase: Phase, asked: list[_Row], table: Tensor, size: int
) -> Group:
    request = torch.tensor([row.request for row in asked])
    position = torch.tensor([row.position for row in asked])
    first = torch.tensor([row.live.first for row in asked])
    last = torch.tensor([row.live.last for row in asked])
    kinds = {stack.methods[i].columns for i in acting}
    through, whole = "through" in kinds, "all" in kinds
    start = torch.zeros_like(first) if through or whole else first // size
    end = position if whole else last
    count = int((end // size - start).max()) + 1
    within = torch.arange(size)
    columns = ((start[:, None] + torch.arange(count))[..., None] * size + within).flatten(1)
    number = (start[:, None] + torch.arange(count)).clamp(max=table.shape[1] - 1)
    # padded to the longest: what lies beyond a request's prompt is no image
    width = int(columns.max()) + 1
    flags = torch.stack([pad(row.live.visual, (0, width))[:width] for row in asked])
    visual = flags.gather(1, columns)
    shown = columns <= end[:, None] if through or whole else visual
    length = int(position.max()) // size + 1
    alone = asked[0].live if any(m.remembers for m in stack.methods) else None
    state = alone.state if alone is not None and phase == "decode" else None
    if state is None:
        state = State(stack, visual, phase)
        state.positions = _positions(columns, asked)
    else:
        state.phase = phase
        state.renew()
    if alone is not None:
        alone.state = state
        if alone.read is not None:
            state.memories = tuple(
                read if method.reads_prompt else memory
                for method, memory, read in zip(
                    stack.methods, state.memories, alone.read.memories, strict=True
                )
            )
    return Group(
        stack=stack,
        acting=acting,
        rows=torch.tensor([row.query for row in asked]),
        blocks=table[request[:, None], number].long(),
        mask=shown[:, None, None],
        all_blocks=table[request, :length].long(),
        all_mask=(torch.arange(length * size) <= position[:, None])[:, None, None],
        state=state,
        layers=frozenset(
            layer for layer, methods in stack.edits.items() if set(methods) & set(acting)
        ),
        whole=whole,
        places=[(row.request, row.position) for row in asked],
    )


def _positions(columns: Tensor, asked: list[_Row]) -> Tensor:
    """(1, B, P), or (3, B, P) under M-RoPE: the positions of prompt columns."""
    places = []
    for row, column in zip(asked, columns, strict=True):
        given = row.live.positions
        if given is None:
            return columns[None]
        places.append(given[:, column.clamp(max=given.shape[1] - 1)])
    return torch.stack(places, 1)
