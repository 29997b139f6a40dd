"""What belongs to a batch of sequences: phase, visual tokens, positions, memory.

An engine keeps one `State` per batch, beside its KV cache. A method sees it as `Sequences`,
which know whose plan and memory they mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .anatomy import Anatomy
from .method import STAGES, Method, identity, text
from .rows import Phase, Sequences


class Stack:
    """Methods resolved for one model, and which of them acts in which layer.

    Args:
        plans: method name -> what its `setup` would return, such as a module in training.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        methods: tuple[Method, ...],
        plans: dict[str, Any] | None = None,
    ) -> None:
        plans = plans or {}
        self.depth = anatomy.depth
        self.methods = tuple(m.resolve(anatomy) for m in methods)
        self._at = {
            stage: tuple(i for i, m in enumerate(self.methods) if m.wants(stage))
            for stage in STAGES
        }
        self.plans = tuple(
            plans[m.name] if m.name in plans else m.setup(anatomy) for m in self.methods
        )
        self.vision = tuple(sorted({k for m in self.methods for k in m.vision_layers or ()}))
        attention = [i for i in range(len(methods)) if i in self.at("scores") + self.at("weights")]
        self.edits = {
            layer: tuple(i for i in attention if layer in (self.methods[i].layers or ()))
            for layer in range(self.depth)
        }
        self.owner = next(iter(self.at("contrast")), None)  # who has a second stream
        owner = None if self.owner is None else self.methods[self.owner]
        read, hidden = owner.other_layers(anatomy) if owner else ((), ())
        self.other_read, self.other_hidden = frozenset(read), frozenset(hidden)
        self.others = self.other_read | self.other_hidden
        self.edited = tuple(x for x, acting in self.edits.items() if acting or x in self.others)
        # whether its owner acts in the second stream's own forwards
        self.aside = bool(self.others) or (owner is not None and owner.wants("other_embeds"))
        self.feeds = {
            layer: tuple(i for i in self.at("mlp") if layer in self.methods[i].mlp_layers)
            for layer in range(self.depth)
        }
        self.fed = tuple(layer for layer, methods in self.feeds.items() if methods)
        self.text_rows = any(self.methods[i].rows == "text" for i in attention)
        self.last_rows = bool(attention) or bool(self.at("logits")) or bool(self.fed)
        self.needs_image = [m.name for m in self.methods if m.needs_image]

    def at(self, stage: str) -> tuple[int, ...]:
        """Indices of the methods that want `stage`, in order."""
        return self._at[stage]

    def __str__(self) -> str:
        return text(self.methods)

    @property
    def identity(self) -> str:
        """What tells this stack from every other in this process."""
        return identity(self.methods)


class State:
    """A batch of sequences; everything is batch-first.

    Attributes:
        visual: (B, P) bool, visual tokens among the prompt's columns so far. Later columns are
            generated text.
        positions: (1, B, P) int64, or (3, B, P) under M-RoPE: the positions the decoder used.
        phase: "prefix", "prompt" or "decode".
        first, last: (B,) int64, the first and last visual column; P and -1 without an image.
        has_image: (B,) bool.
        ahead: what passes that went ahead gave, where a method asks; see `Sequences`.
        notes: each row's notes of the chat it came from; empty without a front door.
        memories: per method its memory: tensors (batch-first), or lists and dictionaries of them.
    """

    def __init__(
        self,
        stack: Stack,
        visual: Tensor,
        phase: Phase,
        notes: list[dict[str, Any]] | None = None,
    ) -> None:
        self.stack, self.phase, self.notes = stack, phase, notes or []
        self.positions = visual.new_zeros((1, len(visual), 0), dtype=torch.long)
        self.memories: tuple[dict[str, Any], ...] = tuple({} for _ in stack.methods)
        self.ahead: Any = None
        self.take_in(visual, visual.shape[1])
        for i in stack.at("begin"):
            stack.methods[i].begin(self.seen_by(i))

    def take_in(self, visual: Tensor, new: int) -> None:
        """A prompt whose last `new` columns are the query rows of this forward."""
        self.visual = visual
        columns = torch.arange(1, visual.shape[1] + 1, device=visual.device) * visual
        self.last = columns.amax(1) - 1
        self.has_image = self.last >= 0
        self.first = torch.where(self.has_image, visual.int().argmax(1), visual.shape[1])
        self.empty = not bool(self.has_image.any())
        self.mixed = not self.empty and not bool(self.has_image.all())
        self.suffix, self.suffix_rows = new, None
        self.renew()
        if self.stack.text_rows:
            counts = (visual.shape[1] - 1 - self.last).clamp(max=new)
            counts = torch.where(self.has_image, counts, 0)
            self.suffix = int(counts.max())
            if bool((counts < self.suffix).any()):
                row = torch.arange(self.suffix, device=visual.device)
                self.suffix_rows = row >= self.suffix - counts[:, None]

    def renew(self) -> None:
        """A forward begins."""
        self.masks: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self.scratch: dict[int, dict[str, Any]] = {}
        self.resting: frozenset[int] = frozenset()

    def seen_by(self, i: int) -> Sequences:
        """What method i sees."""
        return Sequences(self, i)

    def acts(self, i: int) -> bool:
        """Whether method i is active in this forward, on any sample of this batch."""
        return i not in self.resting and not (self.empty and self.stack.methods[i].needs_image)

    def keep(self, i: int, new: Tensor, old: Tensor) -> Tensor:
        """`new`, but `old` for the samples without an image where the method needs one."""
        if new is old or not (self.mixed and self.stack.methods[i].needs_image):
            return new
        has_image = self.has_image.to(new.device)
        return torch.where(has_image.view(-1, *[1] * (new.dim() - 1)), new, old)

    def rows(self, i: int, new: int) -> int:
        """How many of the last query rows method i receives, of `new` in this forward."""
        kind = self.stack.methods[i].rows
        if kind == "prompt":
            return int(self.phase == "prompt")
        if self.phase == "decode":  # one token, or several that a search tries
            return new
        if kind == "last":
            return int(self.phase != "prefix")
        return new if kind == "all" else self.suffix

    def touched(self, i: int, rows: int) -> Tensor | None:
        """(B, rows) bool: the rows that method i edits, of those it receives; None for all."""
        method, mask = self.stack.methods[i], None
        if method.rows == "text" and self.phase != "decode":
            mask = self.suffix_rows
        if self.mixed and method.needs_image:
            image = self.has_image[:, None].expand(-1, rows)
            mask = image if mask is None else mask & image
        return mask

    def columns(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(visual, system, after), each (B, length) bool on `device`; made once per forward."""
        if device not in self.masks:
            visual = pad(self.visual, (0, length - self.visual.shape[1])).to(device)
            column = torch.arange(length, device=device)
            system = column < self.first.to(device)[:, None]
            after = column > self.last.to(device)[:, None]
            self.masks[device] = (visual, system & ~after, after)
        return self.masks[device]

    def select(self, index: Tensor) -> Self:
        """The same state for the batch rows `index` (N,) int64: fork, beams, row selection."""
        return self.copied(lambda t: t.index_select(0, index.to(t.device)), index)

    def crop(self, length: int) -> None:
        """Forget the prompt columns from `length` on."""
        self.positions = self.positions[:, :, :length]
        self.take_in(self.visual[:, :length], 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copied(lambda t: t, None)

    def copied(self, take: Callable[[Tensor], Tensor], index: Tensor | None) -> Self:
        """A copy with `take` of every tensor; an engine's state adds what it has of its own."""
        new = copy.copy(self)
        for name in ("visual", "last", "first", "has_image", "suffix_rows"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else take(value))
        new.positions = take(self.positions.transpose(0, 1)).transpose(0, 1)
        new.ahead = map_tensors(self.ahead, take)
        new.memories = tuple(map_tensors(m, take) for m in self.memories)
        new.renew()
        return new


def remembered(out: Any, kind: type[Method]) -> tuple[Any, dict[str, Any]] | None:
    """The method of class `kind` that acted, and its memory; None where none did.

    Args:
        out: what a forward or `generate` returned inside `enhance`, or its KV cache.
    """
    for carrier in (out, *getattr(out, "__dict__", {}).values()):
        state = getattr(carrier, "foveate", None)
        if isinstance(state, State):
            for method, memory in zip(state.stack.methods, state.memories, strict=True):
                if isinstance(method, kind):
                    return method, memory
    return None


def map_tensors(value: Any, take: Callable[[Tensor], Tensor]) -> Any:
    """`take` on every tensor; containers are new, anything else is shared."""
    if isinstance(value, Tensor):
        return take(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, take) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(v, take) for v in value)
    return value
