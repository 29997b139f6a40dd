"""Once per step: which rows are edited, by what, and where their key columns lie in the cache."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

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
        sink: where its readers leave what they find; None without readers.
        kept: what its group of the last step kept for the next one.
        read: what methods found that read its whole prompt; a `State`.
        said: its answer so far, as the worker keeps it.
        pair: the name that it shares with its twin; "" without one.
        ahead: (V,) the logits of the pass ahead, where a method asks for one.
        told: what its methods remember of logits; see `logits.Told`.
    """

    text: str
    prompt: int
    visual: Tensor
    positions: Tensor | None
    sink: Any = field(default=None, repr=False)
    kept: Kept | None = field(default=None, repr=False)
    read: Any = field(default=None, repr=False)
    said: list[int] = field(default_factory=list, repr=False)
    pair: str = ""
    ahead: Tensor | None = field(default=None, repr=False)
    told: Any = field(default=None, repr=False)
    first: int = field(init=False)
    last: int = field(init=False)

    def __post_init__(self) -> None:
        where = self.visual.nonzero()[:, 0].tolist() or [self.prompt, -1]
        self.first, self.last = where[0], where[-1]


@dataclass(eq=False)
class Kept:
    """What stays of a group while the same requests are edited together from token to token.

    Attributes:
        lives: its requests. state: what its methods see and remember.
        few: the columns that are shown one by one; None where all are.
        rooms: for the blocks that are shown, and for all of them, see `Blocks`.
    """

    lives: tuple[Live, ...]
    state: State
    few: Few | None
    rooms: tuple[dict[Any, Any], ...] = field(default_factory=lambda: ({}, {}))


@dataclass(eq=False)
class Few:
    """Some columns of the rows of a group: those of N whole blocks of each, P of them.

    Attributes:
        numbers: (B, N) int64, which blocks of the request. columns: (B, P) int64, of the request.
        mask: (B, P) bool, those that are shown. among: (B, M) bool, the same among all columns.
    """

    numbers: Tensor
    columns: Tensor
    mask: Tensor
    among: Tensor


@dataclass(eq=False)
class Blocks:
    """Cache blocks of the rows of a group, N of each.

    Attributes:
        number: (B, N) int64. places: what a cache made of them, once it was asked.
        room: what copies of them are written into, layer by layer: to get new memory from the
            system each time takes longer than to copy.
    """

    number: Tensor
    room: dict[Any, Any] = field(default_factory=dict)
    places: Any = None


@dataclass(eq=False)
class Rest:
    """The columns that are shown as one.

    Attributes:
        blocks: every block of the rows. columns: (B, 1, 1, P) int64, where the columns lie among
            theirs that are shown one by one.
        bias: (B, 1, 1, M) float32, what is added to the scores of theirs: 0 to all others of the
            row.
    """

    blocks: Blocks
    columns: Tensor
    bias: Tensor


@dataclass(eq=False)
class Group:
    """Rows of one step that are edited together.

    The columns that methods see one by one are those of whole cache blocks, P of them per row.

    Attributes:
        stack: the methods, resolved. acting: those of them that edit these rows.
        rows: (B,) int64, among the step's query rows. at: the same, as an index.
        shown: the cache blocks of columns that are shown one by one.
        bias: (B, 1, 1, P) float32, what is added to their scores: 0, and so little to columns that
            are none of the row that their weight is 0; with a last 0 for the rest.
        rest: the others; None where every column is shown.
        state: what the methods see and remember.
        layers: which are edited. done: those that were, so far in this step.
        places: the request's number in the step, and the position, of every row.
        acted: those of `acting` that did not rest in all layers.
        speaks, spoke: whether logits are edited, and were.
    """

    stack: Stack
    acting: tuple[int, ...]
    rows: Tensor
    at: Tensor | slice
    shown: Blocks
    bias: Tensor
    rest: Rest | None
    state: State
    layers: frozenset[int]
    places: list[tuple[int, int]]
    done: set[int] = field(default_factory=set)
    acted: set[int] = field(default_factory=set)
    piece = speaks = spoke = False

    def at_work(self, layer: int) -> list[int]:
        """The methods that edit a layer in this step; none where they rest."""
        if layer not in self.layers:
            return []
        edits = self.stack.edits[layer]
        return [i for i in edits if i in self.acting and self.state.acts(i)]


class _Row(NamedTuple):
    """One row to edit: its request, the request's number in the step, query row and position."""

    live: Live
    request: int
    query: int
    position: int

    @property
    def step(self) -> int:
        """Which token it writes; 0 is the prompt's last row."""
        return self.position - self.live.prompt + 1


_LOW = -1e30  # as a score


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
        first = max(live.last + 1 if stack.text_rows else live.prompt - 1, length - new)
        extent = _shows_all(stack, live, size), (length // size).bit_length()
        for position in range(first, length):
            phase = "prompt" if position < live.prompt else "decode"
            acting = tuple(i for i, method in _acting(stack) if _edits(method, live, position))
            if acting:
                query = starts[number] + position - (length - new)
                single = first == length - 1
                key = (live.text, acting, phase, single, *extent, *_past(stack, live, single))
                wanted[key].append(_Row(live, number, query, position))
    return [
        _group(stacks(text), acting, cast(Phase, phase), single, asked, table, size)
        for (text, acting, phase, single, *_), asked in wanted.items()
    ]


@functools.lru_cache(256)
def _acting(stack: Stack) -> list[tuple[int, Method]]:
    """The methods that edit rows, and the readers of what enters the layers."""
    return [
        (i, method)
        for i, method in enumerate(stack.methods)
        if method.edits_attention or (method.wants("before") and not method.wants("logits"))
    ]


@functools.lru_cache(256)
def _kinds(stack: Stack) -> frozenset[str]:
    """The columns that methods see one by one; of the whole stack, as memories keep their place."""
    return frozenset(method.columns for method in stack.methods if method.edits_attention)


def _shows_all(stack: Stack, live: Live, size: int) -> bool:
    """Whether a request's rows show every column: where it is half of the prompt's blocks or more.

    To copy a few blocks more costs less than to work out what they add to a row.
    """
    kinds = _kinds(stack)
    start = 0 if "through" in kinds else live.first // size
    few = 2 * (live.last // size - start + 1) < -(-live.prompt // size)
    return "all" in kinds or live.last < 0 or not few


def _edits(method: Method, live: Live, position: int) -> bool:
    """Whether a method edits the row at a position of its request."""
    if live.last < 0 and method.needs_image:
        return False
    if method.rows == "prompt":
        return position == live.prompt - 1
    return position > live.last if method.rows == "text" else position >= live.prompt - 1


def _group(
    stack: Stack,
    acting: tuple[int, ...],
    phase: Phase,
    single: bool,
    asked: list[_Row],
    table: Tensor,
    size: int,
) -> Group:
    device = table.device
    request = torch.tensor([row.request for row in asked], device=device)
    position = torch.tensor([row.position for row in asked], device=device)[:, None]
    length = max(row.position for row in asked) // size + 1
    lives = tuple(row.live for row in asked)
    kept = lives[0].kept
    if single and phase == "decode" and kept is not None and kept.lives == lives:
        kept.state.phase = phase
        kept.state.renew()
    else:
        kept = _begin(stack, phase, lives, length, size, device)
    kept.state.notes = [row.live.sink.notes(row.step) if row.live.sink else {} for row in asked]
    ahead = [row.live.ahead for row in asked if row.live.ahead is not None]
    if phase == "prompt" and len(ahead) == len(asked):
        kept.state.ahead = torch.stack(ahead)
    read = lives[0].read
    if read is not None:
        kept.state.memories = tuple(
            found if method.reads_prompt else memory
            for method, memory, found in zip(
                stack.methods, kept.state.memories, read.memories, strict=True
            )
        )
    for live in lives:
        live.kept = kept
    numbers = table[request, :length].long()
    shown = Blocks(numbers, kept.rooms[0])
    valid = torch.arange(length * size, device=device) <= position
    mask, rest = valid, None
    if kept.few is not None:
        few = kept.few
        others = valid & ~pad(few.among, (0, valid.shape[1] - few.among.shape[1]))
        every = Blocks(numbers, kept.rooms[1])
        rest = Rest(every, few.columns[:, None, None], _bias(others))
        shown = Blocks(numbers.gather(1, few.numbers), kept.rooms[0])
        mask = pad(few.mask, (0, 1), value=True)
    query = [row.query for row in asked]
    rows, end = torch.tensor(query, device=device), query[0] + len(query)
    return Group(
        stack=stack,
        acting=acting,
        rows=rows,
        at=slice(query[0], end) if query == list(range(query[0], end)) else rows,
        shown=shown,
        bias=_bias(mask),
        rest=rest,
        state=kept.state,
        layers=frozenset(
            layer for layer, methods in stack.edits.items() if set(methods) & set(acting)
        ),
        places=[(row.request, row.position) for row in asked],
    )


def _bias(mask: Tensor) -> Tensor:
    """(B, 1, 1, P) float32 to add to scores, of (B, P) bool; adding is faster than filling."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, _LOW)[:, None, None]


def _begin(
    stack: Stack,
    phase: Phase,
    lives: tuple[Live, ...],
    length: int,
    size: int,
    device: torch.device,
) -> Kept:
    """What a group begins with.

    Args:
        length: of the longest row, in blocks.
    """
    every = torch.arange(length * size).expand(len(lives), -1)
    flags = torch.stack([pad(live.visual, (0, length * size))[: length * size] for live in lives])
    few, columns = None, every
    if not _shows_all(stack, lives[0], size):
        first = torch.tensor([live.first for live in lives])[:, None] // size
        last = torch.tensor([live.last for live in lives])[:, None]
        through = "through" in _kinds(stack)
        start = torch.zeros_like(first) if through else first
        numbers = start + torch.arange(int((last // size - start).max()) + 1)
        among = every <= last if through else flags
        # where others show more blocks, a row shows its last ones again, behind the mask
        inside = numbers < length
        numbers = numbers.clamp(max=length - 1)
        columns = (numbers[..., None] * size + torch.arange(size)).flatten(1)
        mask = among.gather(1, columns) & inside.repeat_interleave(size, 1)
        few = Few(*(x.to(device) for x in (numbers, columns, mask, among)))
        flags = flags.gather(1, columns) & mask
    state = State(stack, flags.to(device), phase)
    state.positions = _positions(columns, lives).to(device)
    if phase == "decode":
        if any(m.remembers for m in stack.methods) and any(live.kept is None for live in lives):
            raise RuntimeError(
                f"foveate: what {stack} remembers of this answer is lost, so the rest of it would "
                "be wrong. The engine stops: use methods that remember nothing, such as clvs."
            )
        state.memories = tuple(
            _joined(lives, i) if method.remembers else memory
            for i, (method, memory) in enumerate(zip(stack.methods, state.memories, strict=True))
        )
    return Kept(lives, state, few)


def _positions(columns: Tensor, lives: tuple[Live, ...]) -> Tensor:
    """(1, B, P), or (3, B, P) under M-RoPE: the positions of prompt columns."""
    places = []
    for live, column in zip(lives, columns, strict=True):
        given = live.positions
        if given is None:
            return columns[None]
        places.append(given[:, column.clamp(max=given.shape[1] - 1)])
    return torch.stack(places, 1)


# -- what methods remember from token to token -----------------------------------------------------


def _past(stack: Stack, live: Live, single: bool) -> tuple[Any, ...]:
    """What rows must have in common to be edited together by methods that remember.

    Where a step has several rows of one request, each needs what the one before it left.
    """
    if not any(method.remembers for method in stack.methods):
        return ()
    if not single or any(method.reads_prompt for method in stack.methods):
        return (object(),)
    if live.kept is None:
        return ()
    found: list[Any] = []
    for i, memory in enumerate(live.kept.state.memories):
        for key, x in memory.items() if stack.methods[i].remembers else ():
            if not isinstance(x, Tensor):
                return (object(),)
            found.append((i, key, x.shape[1:], x.dtype))
    return tuple(found)


def _joined(lives: tuple[Live, ...], i: int) -> dict[str, Any]:
    """What method i remembers of several requests, batch first."""
    kept = [live.kept for live in lives]
    if len(lives) == 1 and kept[0] is not None and len(kept[0].lives) == 1:
        return kept[0].state.memories[i]  # itself, as more rows may follow in this step
    parts = [
        {key: x[one.lives.index(live)][None] for key, x in one.state.memories[i].items()}
        for one, live in zip(kept, lives, strict=True)
        if one is not None
    ]
    if not parts:
        return {}
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
