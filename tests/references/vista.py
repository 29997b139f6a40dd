"""VISTA (arXiv 2502.03628), slowly: directions from hidden states of single unpadded prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.references.full import FullMap, Step


def norm(x: Tensor) -> float:
    return float(x.double().square().sum().sqrt())


def leaving(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What leaves each layer at the last row of one prompt, (D,) each."""
    states: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        states.append((out[0] if isinstance(out, tuple) else out)[0, -1])

    hooks = [layer.register_forward_hook(keep) for layer in model.get_decoder().layers]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


class VISTA(FullMap):
    """Args: alone: the prompts one by one, as model inputs, from which directions are made."""

    needs_image = False

    def __init__(
        self,
        model: Any,
        layers: Any,
        steering: float,
        logit_mix: float,
        logit_layers: Any,
        pca_offset: float,
        alone: list[dict[str, Tensor]],
    ) -> None:
        super().__init__(model, layers=())
        self.steered, self.steering, self.offset = list(layers), steering, pca_offset
        self.mix, self.late, self.alone = logit_mix, list(logit_layers), alone
        self.directions: list[list[Tensor] | None] = []

    def direction(self, prompt: dict[str, Tensor]) -> list[Tensor] | None:
        """v_l of every layer, (D,) each; None for a prompt without an image."""
        ids = prompt["input_ids"]
        shown = ids == self.model.config.image_token_id
        if not bool(shown.any()):
            return None
        text = ids[~shown][None]
        whole = leaving(self.model, prompt)
        unseen = leaving(self.model, {"input_ids": text})
        v = [a - b for a, b in zip(whole, unseen, strict=True)]
        v[0] = v[0].clone()
        v[0][0] += self.offset
        return v

    def forward(self, turn: dict[str, Tensor], prefix: bool = False) -> Step:
        if not self.directions:
            self.directions = [self.direction(prompt) for prompt in self.alone]
        return super().forward(turn, prefix)

    @contextmanager
    def installed(self) -> Iterator[None]:
        def hook(layer: int) -> Any:
            return lambda module, args, out: self.steer(layer, out)

        with super().installed():
            hooks = [
                self.decoder.layers[layer].mlp.register_forward_hook(hook(layer))
                for layer in self.steered
            ]
            try:
                yield
            finally:
                for handle in hooks:
                    handle.remove()

    def steer(self, layer: int, out: Tensor) -> Tensor:
        new = out.clone()
        for sample, v in enumerate(self.directions):
            if v is None or not self.steering:
                continue
            for row in range(out.shape[1]):
                new[sample, row] = self.turn_row(out[sample, row], v[layer])
        return new

    def factor(self, x: Tensor, v: Tensor) -> float:
        cosine = -float(x.double() @ v.double()) / max(norm(x) * norm(v), 1e-8)
        return 1 + max(0.0, cosine)

    def turn_row(self, x: Tensor, v: Tensor) -> Tensor:
        y = x / norm(x) + self.steering * self.factor(x, v) * v / norm(v)
        return y * (norm(x) / norm(y))

    def entering(self, layer: int, hidden: Tensor) -> None:
        if layer == 0:
            self.left: dict[int, Tensor] = {}
        self.left[layer - 1] = hidden[:, -1]

    def logits(self, logits: Tensor) -> Tensor:
        if not self.mix:
            return logits
        total = torch.zeros_like(logits)
        for layer in self.late:
            state = self.left[layer]
            if layer == self.depth - 1:
                state = self.decoder.norm(state)
            total += self.model.get_output_embeddings()(state).float()
        return (1 - self.mix) * logits + self.mix * total / len(self.late)
