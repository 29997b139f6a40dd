"""MemVR (arXiv 2410.03577), slowly: sample by sample, with the weights scaled as the authors do.

The authors' factors mean|W_up| and mean|W_down| stand here in full; the fast path leaves them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.references.full import FullMap


class MemVR(FullMap):
    def __init__(self, model: Any, layers: Any, ratio: float, threshold: float) -> None:
        super().__init__(model, layers=())
        self.tested, self.ratio, self.threshold = list(layers), ratio, threshold
        self.features: list[Tensor] = []  # V of each sample, (N, D)
        self.firing: list[list[int | None]] = []  # of each forward: the layer that fired

    def begin(self) -> None:
        self.fired: list[int | None] = [None] * len(self.image)
        self.firing.append(self.fired)

    @contextmanager
    def installed(self) -> Iterator[None]:
        def hook(layer: int) -> Any:
            return lambda module, args, out: self.edited(layer, module, args[0], out)

        with super().installed():
            hooks = [
                layer.mlp.register_forward_hook(hook(number))
                for number, layer in enumerate(self.decoder.layers)
            ]
            try:
                yield
            finally:
                for handle in hooks:
                    handle.remove()

    def entering(self, layer: int, hidden: Tensor) -> None:
        if layer == 0:
            self.features = self.features or [hidden[0, :0]] * len(hidden)
            for sample, image in enumerate(self.image):
                new = [column - self.past for column in image.tolist() if column >= self.past]
                self.features[sample] = torch.cat([self.features[sample], hidden[sample, new]])
        for sample, state in enumerate(hidden[:, -1]):
            asked = layer - 1 in self.tested and self.fired[sample] is None
            if asked and self.uncertainty(state) > self.threshold:
                self.fired[sample] = layer - 1

    def uncertainty(self, state: Tensor) -> float:
        logits = self.model.get_output_embeddings()(self.decoder.norm(state)).double()
        likeliest = sorted(logits.tolist())[-10:]
        total = sum(math.exp(x) for x in likeliest)
        shares = [math.exp(x) / total for x in likeliest]
        return -sum(p * math.log(p) for p in shares) / math.log(10)

    def edited(self, layer: int, module: Any, x: Tensor, out: Tensor) -> Tensor:
        new = out.clone()
        for sample, fired in enumerate(self.fired):
            if fired is not None and fired == layer - 1 and len(self.image[sample]):
                real = self.seen["attention_mask"][sample, self.past :].bool()
                V = self.features[sample]
                new[sample, real] = self.mixed(module, V, x[sample, real], out[sample, real])
        return new

    def mixed(self, module: Any, V: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """FFN' of one sample's rows (n, D)."""
        into = V * (module.up_proj.weight.abs().mean() / V.abs().mean())
        back = V.T * (module.down_proj.weight.abs().mean() / V.abs().mean())
        z = (x @ into.T) @ back.T
        z = z * (out.abs().mean() / z.abs().mean())
        return (1 - self.ratio) * out + self.ratio * z
