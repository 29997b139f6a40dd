"""VTI (arXiv 2410.15778), slowly: row by row, decoder and vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tests.references.full import FullMap


def norm(x: Tensor) -> float:
    return float(x.double().square().sum().sqrt())


def turn(x: Tensor, direction: Tensor, strength: float) -> Tensor:
    """One state (D,)."""
    y = x / norm(x) + 0.1 * strength * direction / norm(direction)
    return y * (norm(x) / norm(y))


def blocks_of(model: Any) -> Any:
    """The blocks of a LLaVA's tower, which transformers before 5.6 keeps one level lower."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


class VTI(FullMap):
    needs_image = False

    def __init__(
        self,
        model: Any,
        layers: Any,
        alpha_text: float,
        alpha_image: float,
        directions: dict[str, Tensor],
    ) -> None:
        super().__init__(model, layers=())
        self.in_decoder, self.in_tower = alpha_text, alpha_image
        self.steered = range(self.depth) if layers is None else layers
        self.directions = directions

    def rows(self, out: Tensor, direction: Tensor, strength: float) -> Tensor:
        """(n, T, D) with one direction (D,), or one per token (T, D)."""
        new = out.clone()
        for i in range(out.shape[0]):
            for t in range(out.shape[1]):
                mine = direction if direction.dim() == 1 else direction[t]
                new[i, t] = turn(out[i, t], mine, strength)
        return new

    @contextmanager
    def installed(self) -> Iterator[None]:
        def hook(direction: Tensor, strength: float) -> Any:
            return lambda module, args, out: self.rows(out, direction, strength)

        text = self.directions["text"]
        places = [(self.decoder.layers[i], text[i], self.in_decoder) for i in self.steered]
        if self.in_tower:
            blocks = blocks_of(self.model)
            places += [
                (block, self.directions["image"][i], self.in_tower)
                for i, block in enumerate(blocks)
            ]
        with super().installed():
            hooks = [
                block.mlp.register_forward_hook(hook(direction, strength))
                for block, direction, strength in places
                if strength
            ]
            try:
                yield
            finally:
                for handle in hooks:
                    handle.remove()
