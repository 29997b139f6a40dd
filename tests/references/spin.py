"""SPIN (arXiv 2505.16411) on full maps: the last row, heads ranked one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.references.full import FullMap


class SPIN(FullMap):
    def __init__(self, model: Any, layers: Any, keep: float, scale: float, rank_by: str) -> None:
        super().__init__(model, layers)
        self.keep, self.scale, self.rank_by = keep, scale, rank_by
        self.suppressed: list[tuple[int, ...]] = []  # per sample, layer and step

    def begin(self) -> None:
        self.given: dict[tuple[int, int], list[float]] = {}

    def scores(self, layer: int, sample: int, z: Tensor) -> Tensor:
        self.given[layer, sample] = self.looks(sample, z)
        return z

    def weights(self, layer: int, sample: int, a: Tensor) -> Tensor:
        looks = self.looks(sample, a) if self.rank_by == "weights" else self.given[layer, sample]
        ranked = sorted(range(len(a)), key=lambda head: -looks[head])
        others = ranked[int(self.keep * len(a)) :]
        for head in others:
            a[head, 0] = a[head, 0] * self.scale
        self.suppressed.append(tuple(sorted(others)))
        return a

    def looks(self, sample: int, x: Tensor) -> list[float]:
        """What every head (H, 1, K) gives the image."""
        return [sum(float(head[0, column]) for column in self.image[sample]) for head in x]
