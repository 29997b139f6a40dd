"""What a method may know of a model: sizes, kinds of layers, and the way from a state to logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tower:
    """A vision tower whose blocks can be read.

    Attributes:
        kind: its type, such as "clip_vision_model". width: of its states. depth: its blocks.
        used: the block outputs that the model itself uses, 1 being the first block's.
        device: where the projector to the language model computes.
        merged: width of what stands for one token at the projector's entry, where patches are
            merged before it or in it; None where every patch is a token.
    """

    kind: str
    width: int
    depth: int
    used: tuple[int, ...]
    device: torch.device
    merged: int | None = None


@dataclass(frozen=True)
class Block:
    """The parts of one decoder layer, each to be called alone on any rows.

    Attributes:
        norm: the norm before the attention, (..., D) to (..., D).
        output: what the heads (B, R, H, D_v) put out, through the output projection, (B, R, D).
        feed_forward: what the feed-forward part, with the norm before it, makes of states
            (B, R, D); neither a norm behind it nor the residual is added.
    """

    norm: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Anatomy(ABC):
    """A model as methods see it; an engine makes one, from a model or its configuration alone.

    Attributes:
        kind: the model's type, such as "llava_next".
        text_kind: its language model's type.
        width: size of the residual stream.
        depth: decoder layers.
        heads, key_value_heads: of an attention layer.
        vocabulary: rows of the unembedding.
        layer_kinds: what each layer attends to, such as "full_attention".
        tied: whether the unembedding is the embedding.
        placed: whether it is known, or can be looked for, where the image's tokens lie on it.
        tower: the vision tower, or None where it cannot be read.
        dtype, device: of the weights.
        kept: what `setup` made and wants to find again; lives as long as the model.
    """

    kind: str
    text_kind: str
    width: int
    depth: int
    heads: int
    key_value_heads: int
    vocabulary: int
    layer_kinds: tuple[str, ...]
    tied: bool
    placed: bool
    tower: Tower | None
    dtype: torch.dtype
    device: torch.device
    kept: dict[Any, Any] = field(repr=False)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Decoder layers (0-based) with full attention; no others see the whole image."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "full_attention")

    @property
    def plain_tower(self) -> Tower | None:
        """The vision tower, where each of its patches becomes a token; else None."""
        return self.tower if self.tower and self.tower.merged is None else None

    @property
    def shape(self) -> dict[str, Any]:
        """What tells one architecture from another without a name, ready for JSON."""
        return {
            "model_type": self.kind,
            "text_model_type": self.text_kind,
            "hidden_size": self.width,
            "layers": self.depth,
            "attention_heads": self.heads,
            "key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
        }

    @abstractmethod
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) float32 of residual states (..., D), without the final norm."""

    @abstractmethod
    def readout(self) -> Callable[[Tensor], Tensor]:
        """What makes the model's own logits (..., V) float32 of states behind the final norm.

        That is `unembed`, and behind it the scaling or soft-cap that some models have. The first
        call runs the model on one token to see which.

        Raises:
            FoveateError: where the model does something else behind its unembedding.
        """

    @abstractmethod
    def norm(self, hidden: Tensor) -> Tensor:
        """Residual states (..., D) after the final norm."""

    @abstractmethod
    def block(self, layer: int) -> Block:
        """The parts of a decoder layer.

        Raises:
            FoveateError: for a layer that is not attention and then a feed-forward part, each
                behind a norm of its own.
        """

    @abstractmethod
    def layer_device(self, layer: int) -> torch.device:
        """Where a decoder layer computes; the CPU where its weights are offloaded."""

    def turns(self, layer: int) -> bool:
        """Whether a layer's keys are turned by their positions; False where it has no positions.

        Raises:
            FoveateError: for a layer that places its keys in a way that nobody here knows.
        """
        return True

    @abstractmethod
    def first_token(self) -> Tensor | None:
        """What enters each decoder layer for the first token of a text, (layers, D) float32.

        One pass over the BOS token alone (token 0 where the model names none), without any image.
        None for a model without weights.
        """
