"""Rotary position embeddings of a model of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import compat


class ModelRotary:
    """Rotary embeddings of one layer; a `core.rows.Rotary`.

    Args:
        decoder: the language model. module: the layer's attention.
        like: states on the device where the embeddings are used.
    """

    def __init__(self, decoder: Any, module: nn.Module, like: Tensor) -> None:
        self.decoder, self.module, self.like = decoder, module, like

    def rotation(self, by: Tensor) -> tuple[Tensor, Tensor]:
        place = self.like.device
        cos, sin = compat.rotation(self.decoder, self.module, self.like, by.to(place))
        return cos.to(place), sin.to(place)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return compat.rotate(self.module, x, *rotation).to(x.dtype)


def rotary(decoder: Any, module: nn.Module, like: Tensor) -> ModelRotary | None:
    """The rotary embeddings of a layer; None where the decoder has no single module for them."""
    return None if compat.rotary(decoder) is None else ModelRotary(decoder, module, like)
