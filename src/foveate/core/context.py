"""What a sequence carries: the resolved methods, their context, and the cache it hangs on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends.transformers.compat import layer_kinds
from ..backends.transformers.heartbeat import Heartbeat
from .method import Method, identity, text

if TYPE_CHECKING:
    from ..backends.transformers.cache import Stream


def attention_layers(model: Any) -> tuple[int, ...]:
    """Decoder layers (0-based) with full attention; no others see the whole image."""
    kinds = layer_kinds(model.get_decoder().config)
    return tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")


class Stack:
    """Resolved methods on one model, and which of them acts where. Shared by all contexts."""

    def __init__(
        self,
        model: Any,
        methods: tuple[Method, ...],
        plans: dict[str, Any] | None = None,
    ) -> None:
        plans = plans or {}
        self.model = model
        self.decoder = model.get_decoder()
        self.methods = tuple(m.resolve(model) for m in methods)
        self.plans = tuple(
            plans[m.name] if m.name in plans else m.setup(model) for m in self.methods
        )
        self.vision = tuple(sorted({k for m in self.methods for k in m.vision_layers or ()}))
        self.depth: int = self.decoder.config.num_hidden_layers
        attention = [i for i, m in enumerate(self.methods) if m.edits_attention]
        self.edits = {
            layer: tuple(i for i in attention if layer in (self.methods[i].layers or ()))
            for layer in range(self.depth)
        }
        self.edited = tuple(layer for layer, methods in self.edits.items() if methods)
        self.text_rows = any(self.methods[i].rows == "text" for i in attention)
        self.last_rows = bool(attention) or bool(self.at("logits"))
        self.owner = next(iter(self.at("contrast")), None)  # who has a second stream
        self.needs_image = [m.name for m in self.methods if m.needs_image]

    def at(self, stage: str) -> tuple[int, ...]:
        """Indices of the methods that want `stage`, in order."""
        return tuple(i for i, m in enumerate(self.methods) if m.wants(stage))

    def __str__(self) -> str:
        return text(self.methods)

    @property
    def identity(self) -> str:
        """What tells this stack from every other in this process."""
        return identity(self.methods)


class Context:
    """What the methods know about one sequence batch; everything is batch-first.

    The KV cache carries one, and so does every forward, as a keyword argument. A prompt's own one
    keeps its phase when the forward is over: the cache then carries a copy (`follow`). So a
    backward pass that runs layers again finds what the forward found.

    Attributes:
        visual: (B, P) bool, visual tokens among the prompt's columns so far. Later columns are
            generated text.
        positions: (1, B, P) int64, or (3, B, P) under M-RoPE: the positions the decoder used.
        phase: "prefix", "prompt" or "decode".
        has_image: (B,) bool.
        ahead: next-token logits (B, V) of the plain pass that went ahead, where a method asks.
        paired: whether the model runs 2B rows, the second half of them the second stream.
        notes: each row's notes of the chat it came from; empty without a front door.
        contrast: pixels that `Chat.contrast` gives this batch for a second stream, else None.
        vision: during the stage `see`, what vision blocks gave for the images of this piece of
            prompt: k -> (images or tiles, patches, D_v), k = 1 being the first block's output.
        inputs: during the stage `see`, what the model was given, without caches and positions;
            ``attention_mask`` (B, new) int64 is always there, ``labels`` where they were given.
        heartbeat: what the present forward has passed before any graph; see `Heartbeat`.
        compiled: whether a part of the present forward is a compiled graph.
        replays: whether a backward pass may run this forward's layers again; see `visit`.
        padded: whether this forward's prompt has padding, as far as its mask says.
        plan: what the acting method's `setup` returned.
        memory: the acting method's own dictionary. Values are tensors (batch-first), or lists and
            dictionaries of them; replace tensors, never change them in place.
    """

    plan: Any
    memory: dict[str, Any]

    def __init__(
        self,
        stack: Stack,
        visual: Tensor,
        phase: str,
        notes: list[dict[str, Any]] | None = None,
        contrast: dict[str, Tensor] | None = None,
    ) -> None:
        self.stack = stack
        self.phase = phase
        self.notes, self.contrast = notes or [], contrast
        self.positions = visual.new_zeros((1, len(visual), 0), dtype=torch.long)
        self.memories: tuple[dict[str, Any], ...] = tuple({} for _ in stack.methods)
        self.other: Stream | None = None
        self.ahead: Tensor | None = None
        self.paired = False
        self.vision: dict[int, Tensor] = {}
        self.inputs: dict[str, Any] = {}
        self.padded = False
        self.replays = False
        self.see(visual, visual.shape[1])
        for i in stack.at("begin"):
            self.use(i).begin(self)

    def see(self, visual: Tensor, new: int) -> None:
        """Take in a prompt whose last `new` columns are the query rows of this forward."""
        self.visual = visual
        columns = torch.arange(1, visual.shape[1] + 1, device=visual.device) * visual
        self.last = columns.amax(1) - 1  # (B,), -1 without an image
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

    def use(self, i: int) -> Method:
        """Method i of the stack, with its own `plan` and `memory` in place."""
        self.acting, self.plan, self.memory = i, self.stack.plans[i], self.memories[i]
        return self.stack.methods[i]

    def acts(self, i: int) -> bool:
        """Whether method i does anything, on this batch and still in this forward."""
        return i not in self.resting and not (self.empty and self.stack.methods[i].needs_image)

    def rest(self) -> None:
        """The acting method does nothing more in this forward: the layers above run plain."""
        self.resting |= {self.acting}

    def renew(self) -> None:
        """A forward begins."""
        self.step: dict[Any, Any] = {}
        self.resting: frozenset[int] = frozenset()
        self.visits: dict[Any, Any] = {}
        self.compiled = torch.compiler.is_compiling()
        self.heartbeat = None if self.compiled else Heartbeat(self.stack)

    @property
    def watched(self) -> Heartbeat | None:
        """The heartbeat, as long as no part of the forward is a graph; then None."""
        return None if torch.compiler.is_compiling() or self.compiled else self.heartbeat

    def follow(self) -> Context:
        """The context for what comes after this forward, on the same cache."""
        new = copy.copy(self)
        new.phase = "prefix" if self.phase == "prefix" else "decode"
        new.padded = new.replays = False
        new.renew()
        return new

    @contextmanager
    def visit(self, place: Any) -> Iterator[None]:
        """A stage at one place of this forward.

        Gradient checkpointing runs layers again in the backward pass. The second visit finds the
        memory that the first one found, and leaves no trace.
        """
        if place not in self.visits:
            self.visits[place] = _containers(self.memories), self.resting
            yield
            return
        now = self.memories, self.resting
        memories, self.resting = self.visits[place]
        self.memories = _containers(memories)
        try:
            yield
        finally:
            self.memories, self.resting = now

    def keep(self, i: int, new: Tensor, old: Tensor) -> Tensor:
        """`new`, but `old` for the samples without an image where the method needs one."""
        if new is old or not (self.mixed and self.stack.methods[i].needs_image):
            return new
        has_image = self.has_image.to(new.device)
        return torch.where(has_image.view(-1, *[1] * (new.dim() - 1)), new, old)

    def rows(self, i: int, new: int) -> int:
        """How many of the last query rows method i receives, of `new` in this forward."""
        kind = self.stack.methods[i].rows
        if self.phase == "decode" and not self.stack.methods[i].decodes:
            return 0
        if kind == "last":
            return 0 if self.phase == "prefix" else 1
        return new if kind == "all" or self.phase == "decode" else self.suffix

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
        if device not in self.step:
            visual = pad(self.visual, (0, length - self.visual.shape[1])).to(device)
            column = torch.arange(length, device=device)
            system = column < self.first.to(device)[:, None]
            after = column > self.last.to(device)[:, None]
            self.step[device] = (visual, system & ~after, after)
        return cast(tuple[Tensor, Tensor, Tensor], self.step[device])

    def select(self, index: Tensor) -> Context:
        """The same context for the batch rows `index` (N,) int64: fork, beams, row selection."""
        return self._copy(lambda t: t.index_select(0, index.to(t.device)), index)

    def crop(self, length: int) -> None:
        """Forget the prompt columns from `length` on."""
        self.visual = self.visual[:, :length]
        self.positions = self.positions[:, :, :length]
        self.see(self.visual, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        return self._copy(lambda t: t, None)

    def _copy(self, take: Callable[[Tensor], Tensor], index: Tensor | None) -> Context:
        new = copy.copy(self)
        for name in ("visual", "last", "first", "has_image", "suffix_rows", "ahead"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else take(value))
        new.positions = take(self.positions.transpose(0, 1)).transpose(0, 1)
        new.memories = tuple(_map(m, take) for m in self.memories)
        new.renew()
        new.other = None if self.other is None else self.other.copy(index)
        return new


def _containers(value: Any) -> Any:
    """The same tensors in containers of their own."""
    return _map(value, lambda t: t)


def _map(value: Any, take: Callable[[Tensor], Tensor]) -> Any:
    """`take` on every tensor; containers are new, anything else is shared."""
    if isinstance(value, Tensor):
        return take(value)
    if isinstance(value, dict):
        return {k: _map(v, take) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(v, take) for v in value)
    return value
