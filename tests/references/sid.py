"""SID (arXiv 2408.02032) on full maps: a second stream whose maps lose the image's columns."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tests.references.full import FullMap, Step, full_attention_layers
from tests.references.vcd import contrasted

Wrong = Literal["", "once", "last row", "largest"]


class Hiding(FullMap):
    """The second stream."""

    needs_image = False

    def __init__(self, model: Any, layers: Any, keep: float, wrong: Wrong) -> None:
        super().__init__(model, layers)
        self.keep, self.wrong = keep, wrong
        full = full_attention_layers(model)
        self.read = [layer for layer in full if layer < self.layers[0]][-1]
        self.hidden: dict[int, list[int]] = {}

    def edit(self, stage: Any, layer: int, maps: Tensor) -> None:
        for sample, image in enumerate(self.image):
            if not len(image):
                continue
            if stage == self.weights and layer == self.read:
                self.choose(sample, maps[sample][:, -1])
            if stage == self.scores and layer in self.layers:
                rows = slice(-1, None) if self.wrong == "last row" else slice(None)
                for column in self.hidden[sample]:
                    maps[sample][:, rows, column] = float("-inf")

    def choose(self, sample: int, row: Tensor) -> None:
        """What is hidden from now on, by a last row (H, K)."""
        if self.wrong == "once" and sample in self.hidden:
            return
        looks = row.mean(0)
        image = self.image[sample].tolist()
        count = int(self.keep) if self.keep >= 1 else max(1, int(self.keep * len(image)))
        sign = -1 if self.wrong == "largest" else 1
        ranked = sorted(image, key=lambda column: sign * float(looks[column]))
        self.hidden[sample] = ranked[count:]


class SID(FullMap):
    def __init__(
        self, model: Any, layers: Any, alpha: float, beta: float, keep: float, wrong: Wrong = ""
    ) -> None:
        super().__init__(model)
        self.second = Hiding(model, layers, keep, wrong)
        self.alpha, self.beta = alpha, beta
        self.choices: list[dict[int, list[int]]] = []

    def forward(self, turn: dict[str, Tensor], prefix: bool = False) -> Step:
        step = super().forward(dict(turn), prefix)
        other = self.second.forward(dict(turn), prefix)
        self.choices.append({k: sorted(v) for k, v in self.second.hidden.items()})
        logits = torch.clone(step.logits)
        for sample, image in enumerate(self.image):
            if len(image):
                pair = logits[sample], other.logits[sample]
                logits[sample] = contrasted(*pair, self.alpha, self.beta)
        step.logits = logits
        return step
