"""AvisC (arXiv 2405.17820) on full maps: a plain pass is read, then a second one is filled."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from tests.references.full import FullMap, Step
from tests.references.vcd import contrasted

Wrong = Literal["", "blind"]


class Filled(FullMap):
    """The second stream: some image tokens are something else before layer 0."""

    def __init__(self, model: Any, fill: str) -> None:
        super().__init__(model)
        self.fill = fill
        self.filled: dict[int, list[int]] = {}  # sample -> columns

    @contextmanager
    def installed(self) -> Iterator[None]:
        hook = self.decoder.register_forward_pre_hook(self.blank, with_kwargs=True)
        try:
            with super().installed():
                yield
        finally:
            hook.remove()

    def blank(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.phase == "decode":
            return None
        embeds = kwargs["inputs_embeds"].clone()
        extra = kwargs.get("deepstack_visual_embeds")
        extra = None if extra is None else [layer.clone() for layer in extra]
        position = 0  # among all image tokens of the batch
        for sample, image in enumerate(self.image):
            mine = [int(column) for column in image if column >= self.past]
            values = torch.full((len(mine), embeds.shape[2]), float(self.fill == "ones"))
            if self.fill == "noise":
                generator = torch.Generator().manual_seed(0)
                values = torch.randn(values.shape, generator=generator)
            for value, column in zip(values, mine, strict=True):
                if column in self.filled[sample]:
                    embeds[sample, column - self.past] = value
                    for layer in extra or ():
                        layer[position] = 0
                position += 1
        kwargs = kwargs | {"inputs_embeds": embeds}
        return args, kwargs if extra is None else kwargs | {"deepstack_visual_embeds": extra}


class AvisC(FullMap):
    def __init__(
        self,
        model: Any,
        layers: Any,
        layer_mass: float,
        deviation: float,
        alpha: float,
        beta: float,
        fill: str,
        wrong: Wrong = "",
    ) -> None:
        super().__init__(model, layers)
        self.second = Filled(model, fill)
        self.mass, self.deviation, self.alpha, self.beta = layer_mass, deviation, alpha, beta
        self.wrong = wrong
        self.counts: list[tuple[int, int]] = []  # chosen layers and filled tokens

    def begin(self) -> None:
        self.m: dict[int, dict[int, list[float]]] = {}  # sample -> layer -> of every image token

    def weights(self, layer: int, sample: int, a: Tensor) -> Tensor:
        looks = a[:, -1].mean(0)
        found = self.m.setdefault(sample, {})
        found[layer] = [float(looks[column]) for column in self.image[sample]]
        return a

    def forward(self, turn: dict[str, Tensor], prefix: bool = False) -> Step:
        step = super().forward(dict(turn), prefix)
        if self.phase == "prompt":
            self.second.filled = {sample: self.choose(sample) for sample in self.m}
        other = self.second.forward(dict(turn), prefix)
        logits = torch.clone(step.logits)
        for sample, image in enumerate(self.image):
            if len(image):
                pair = logits[sample], other.logits[sample]
                logits[sample] = contrasted(*pair, self.alpha, self.beta)
        step.logits = logits
        return step

    def choose(self, sample: int) -> list[int]:
        """Columns of the sample that are filled."""
        m = self.m[sample]
        total = sum(sum(row) for row in m.values())
        best, taken = [], 0.0
        for layer in sorted(m, key=lambda layer: -sum(m[layer])):
            best.append(layer)
            taken += sum(m[layer]) / total
            if taken >= self.mass:
                break
        a = [statistics.fmean(row) for row in zip(*(m[layer] for layer in best), strict=True)]
        bar = statistics.fmean(a) + self.deviation * statistics.stdev(a)
        columns = self.image[sample].tolist()
        filled = [c for c, look in zip(columns, a, strict=True) if look < bar]
        if self.wrong == "blind":
            filled = [column for column in columns if column not in filled]
        self.counts.append((len(best), len(filled)))
        return filled
