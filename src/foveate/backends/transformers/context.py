"""The state of a batch on its way through transformers: on the cache, and in forwards' keywords."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ...core.rows import Phase
from ...core.sequence import Stack, State, map_tensors
from .compat import decoder_of
from .heartbeat import Heartbeat


@dataclass(frozen=True)
class Aside:
    """What a forward of the second stream alone carries, where its owner acts in it.

    Attributes:
        main: the context of the first stream's forward.
    """

    main: Context


class Context(State):
    """A `State` that travels with the KV cache.

    The cache carries one, and so does every forward, as a keyword argument. A prompt's
    context keeps its phase when the forward is over: the cache then carries a copy (`follow`). So a
    backward pass that runs layers again finds what the forward found.

    Attributes:
        other: the second stream, where it has a cache of its own; see `streams.Other`.
        paired: whether the cache has 2B rows, the second half of them the second stream's.
        abreast: whether this forward runs 2B rows, the second half of them on `other`'s cache.
        contrast: what `Chat.contrast` gives this batch for a second stream, else None: pixels, or
            token ids, mask and what else is said per token.
        heartbeat: what the present forward has passed before any graph.
        compiled: whether a part of the present forward is a compiled graph.
        replays: whether a backward pass may run this forward's layers again; see `visit`.
        padded: whether this forward's prompt has padding, as far as its mask says.
        begun: where the feed-forward of a layer looks for its context; see `feeding`.
        real: (B, Q) bool, which rows of this forward are tokens, where a method wants to know and
            some may be padding; else None.
    """

    def __init__(
        self,
        model: Any,
        stack: Stack,
        visual: Tensor,
        phase: Phase,
        notes: list[dict[str, Any]] | None = None,
        contrast: dict[str, Tensor] | None = None,
    ) -> None:
        self.model, self.decoder, self.contrast = model, decoder_of(model), contrast
        self.other: Any = None
        self.real: Tensor | None = None
        self.begun: dict[int, Any] = {}
        self.paired = self.abreast = self.padded = self.replays = False
        super().__init__(stack, visual, phase, notes)

    def renew(self) -> None:
        super().renew()
        self.visits: dict[Any, Any] = {}
        self.abreast = False
        self.compiled = torch.compiler.is_compiling()
        self.heartbeat = None if self.compiled else Heartbeat(self.model, self.stack)

    @property
    def doubled(self) -> bool:
        """Whether this forward runs 2B rows, the second half of them the second stream."""
        return self.paired or self.abreast

    @property
    def watched(self) -> Heartbeat | None:
        """The heartbeat, as long as no part of the forward is a graph; then None."""
        return None if torch.compiler.is_compiling() or self.compiled else self.heartbeat

    def follow(self) -> Self:
        """The context for what comes after this forward, on the same cache."""
        new = copy.copy(self)
        new.phase = "prefix" if self.phase == "prefix" else "decode"
        new.padded = new.replays = False
        new.real = None
        new.renew()
        return new

    @contextmanager
    def visit(self, *place: Any) -> Iterator[None]:
        """A stage at one place of this forward.

        Gradient checkpointing runs layers again in the backward pass. The second visit finds the
        memory that the first one found, and leaves no trace.
        """
        if place not in self.visits:
            self.visits[place] = map_tensors(self.memories, lambda t: t), self.resting
            yield
            return
        now = self.memories, self.resting
        memories, self.resting = self.visits[place]
        self.memories = map_tensors(memories, lambda t: t)
        try:
            yield
        finally:
            self.memories, self.resting = now

    def copied(self, take: Callable[[Tensor], Tensor], index: Tensor | None) -> Self:
        new = super().copied(take, index)
        new.other = None if self.other is None else self.other.copy(index)
        return new
