"""What a method sees while a model runs.

Its sequence, rows of attention, the residual stream, and what a feed-forward adds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..base.errors import FoveateError
from .edit import products

Phase = Literal["prefix", "prompt", "decode"]


class Sequences:
    """A batch of sequences, as one method sees it; everything is batch-first.

    Attributes:
        phase: "prefix" (tokens that several prompts share), "prompt" or "decode".
        visual: (B, P) bool, visual tokens among the prompt's columns so far.
        positions: (C, B, P) int64, as the decoder uses them; C is 3 under M-RoPE, else 1.
        first, last: (B,) int64, the first and last visual column; P and -1 without an image.
        has_image: (B,) bool.
        ahead: what the pass that went ahead gave, where `contrast` asked for it: next-token logits
            (B, V), or (B, L, D) where it wanted `states`; a tuple where it asked for several.
        notes: each row's notes of the chat it came from; empty without a front door.
        memory: the method's own: tensors, batch-first, or lists and dictionaries of them. Replace
            tensors, never change them in place: the batch may be forked.
        plan: what the method's `setup` returned.
        scratch: the method's own, for this forward only.
    """

    __slots__ = ("_i", "_state")

    def __init__(self, state: Any, i: int) -> None:
        self._state, self._i = state, i

    @property
    def phase(self) -> Phase:
        return self._state.phase

    @property
    def visual(self) -> Tensor:
        return self._state.visual

    @property
    def positions(self) -> Tensor:
        return self._state.positions

    @property
    def first(self) -> Tensor:
        return self._state.first

    @property
    def last(self) -> Tensor:
        return self._state.last

    @property
    def has_image(self) -> Tensor:
        return self._state.has_image

    @property
    def ahead(self) -> Any:
        return self._state.ahead

    @property
    def notes(self) -> list[dict[str, Any]]:
        return self._state.notes

    @property
    def memory(self) -> dict[str, Any]:
        return self._state.memories[self._i]

    @property
    def plan(self) -> Any:
        return self._state.stack.plans[self._i]

    @property
    def scratch(self) -> dict[str, Any]:
        return self._state.scratch.setdefault(self._i, {})

    def rest(self) -> None:
        """Do nothing more in this forward: the layers above run plain."""
        self._state.resting |= {self._i}

    def rests(self, kind: type) -> bool:
        """Whether a method of class `kind` rests."""
        return any(isinstance(self._state.stack.methods[i], kind) for i in self._state.resting)

    def columns(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(visual, system, after) among `length` key columns, each (B, length) bool."""
        return self._state.columns(length, device)


class Rotary(Protocol):
    """Rotary position embeddings of one attention layer."""

    def rotation(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) float32 that move states by position differences (C, B, N) int64."""

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """(B, *, N, D) states, moved; computed in float32, dtype kept."""


class Rows:
    """Query rows of one attention layer.

    Attributes:
        x: (B, H, R, K) float32: scores in the stage `scores`, softmax weights in `weights`.
        layer: 0-based.
        query: (B, H, R, D); key, value: (B, Hkv, K, D), as cached, after RoPE.
        scale: what products of query and key are multiplied with.
        seq: what the acting method sees of its sequences; also as plan, memory and phase.
    """

    __slots__ = ("_rotary", "key", "layer", "mask", "query", "scale", "seq", "value", "x")

    def __init__(
        self,
        x: Tensor,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        seq: Sequences,
        rotary: Callable[[], Rotary | None] = lambda: None,
    ) -> None:
        self.x, self.layer, self.query, self.key, self.value = x, layer, query, key, value
        self.mask, self.scale, self.seq, self._rotary = mask, scale, seq, rotary

    def seen_by(self, seq: Sequences, x: Tensor, count: int) -> Rows:
        """The last `count` rows, for another method, with `x` of all rows as it is now."""
        query = self.query
        if count < x.shape[2]:
            x, query = x[:, :, -count:], query[:, :, -count:]
        given = self.layer, query, self.key, self.value, self.mask, self.scale, seq
        return type(self)(x, *given, self._rotary)

    @property
    def plan(self) -> Any:
        return self.seq.plan

    @property
    def memory(self) -> dict[str, Any]:
        return self.seq.memory

    @property
    def phase(self) -> Phase:
        return self.seq.phase

    @property
    def visual(self) -> Tensor:
        """Visual key columns, (B, K) bool."""
        return self.seq.columns(self.x.shape[3], self.x.device)[0]

    @property
    def system(self) -> Tensor:
        """Key columns before the first visual token, (B, K) bool."""
        return self.seq.columns(self.x.shape[3], self.x.device)[1]

    @property
    def after(self) -> Tensor:
        """Key columns after the last visual token, (B, K) bool; generated tokens included."""
        return self.seq.columns(self.x.shape[3], self.x.device)[2]

    @property
    def valid(self) -> Tensor:
        """Key columns that the last query row may attend to, (B, K) bool."""
        size = (self.x.shape[0], self.x.shape[3])
        if self.mask is None:
            return torch.ones(size, dtype=torch.bool, device=self.x.device)
        allowed = self.mask if self.mask.dtype == torch.bool else self.mask >= 0
        return allowed[:, 0, -1].expand(size)

    def over_heads(self, x: Tensor, pool: Literal["max", "mean"]) -> Tensor:
        """(B, H, R, K) pooled over all query heads of the layer, (B, 1, R, K)."""
        return x.amax(1, keepdim=True) if pool == "max" else x.mean(1, keepdim=True)

    def all_heads(self, x: Tensor) -> Tensor:
        """(B, H, ...) of the rows' heads as (B, all query heads of the layer, ...)."""
        return x

    def these_heads(self, x: Tensor) -> Tensor:
        """Of (B, all query heads of the layer, ...) those that `x` of the rows has, H of them.

        An engine may have split the heads over several ranks.
        """
        return x

    def products(self, query: Tensor) -> Tensor:
        """Scores (B, H, R, K) float32 of other queries (B, H, R, D) with the keys."""
        return products(query, self.key, self.scale)

    def move(self, columns: Tensor, by: Tensor, later: Tensor | None = None) -> None:
        """From here on `moved` scores some tokens as if they stood at other positions.

        Rotations compose: a key rotated to position p and turned by q - p is the key at q. The
        moved keys are kept in the memory, so that decode steps find those of the prompt.

        Args:
            columns: (B, N) int64, the key columns that move.
            by: (C, B, N) int64, by how many positions each.
            later: (C, B, 1) int64, by how many every query moves, and with it every key after the
                last image; None where they stay.

        Raises:
            FoveateError: for a decoder without one rotary embedding for all layers.
        """
        rotary, columns = self._rotary(), columns.to(self.key.device)
        if rotary is None:
            raise FoveateError(
                "This decoder has no rotary position embedding to re-rotate cached keys with: "
                "switch unified positions off."
            )
        index = columns[:, None, :, None].expand(-1, self.key.shape[1], -1, self.key.shape[3])
        self.memory["moved columns"] = columns
        self.memory["moved keys"] = rotary.rotate(self.key.gather(2, index), rotary.rotation(by))
        self.memory["query turn"] = None if later is None else rotary.rotation(later)

    @property
    def has_moved(self) -> bool:
        """Whether the memory holds moved keys; an engine may forget those of the prompt."""
        return "moved keys" in self.memory

    def moved(self) -> Tensor:
        """Scores (B, H, R, K) float32 with tokens where `move` put them."""
        x, query, memory = self.x, self.query, self.memory
        if memory["query turn"] is not None:
            rotary = self._rotary()
            assert rotary is not None
            query = rotary.rotate(query, memory["query turn"])
            x = torch.where(self.after[:, None, None], x, self.products(query))
        index = memory["moved columns"][:, None, None].expand(-1, x.shape[1], x.shape[2], -1)
        return x.scatter(3, index, products(query, memory["moved keys"], self.scale))


class Stream:
    """The residual stream that enters a decoder layer; layer L is the final norm's input.

    Attributes:
        x: (B, Q, D). layer: 0-based.
    """

    __slots__ = ("layer", "x")

    def __init__(self, x: Tensor, layer: int) -> None:
        self.x, self.layer = x, layer

    @property
    def last(self) -> Tensor:
        """The last position, (B, D)."""
        return self.x[:, -1]


class FeedForward:
    """The feed-forward of a decoder layer, all experts of a mixture together.

    Attributes:
        x: (B, Q, D), what it was given: the normed residual stream.
        out: (B, Q, D), what it returned, before a norm that may follow and the residual sum.
        layer: 0-based. valid: (B, Q) bool, the rows that are tokens and not padding.
    """

    __slots__ = ("layer", "out", "valid", "x")

    def __init__(self, x: Tensor, out: Tensor, layer: int, valid: Tensor) -> None:
        self.x, self.out, self.layer, self.valid = x, out, layer, valid
