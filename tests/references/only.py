"""ONLY (arXiv 2507.00898) on full maps: one row of one layer, head by head in plain numbers."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from tests.references.full import FullMap, full_attention_layers


class ONLY(FullMap):
    def __init__(
        self,
        model: Any,
        layers: Any,
        gamma: float,
        alpha_pos: float,
        alpha_neg: float,
        beta: float,
        keep_first: bool = True,
    ) -> None:
        """Without `keep_first` it is the wrong variant in which the first column is text, too."""
        super().__init__(model, layers or full_attention_layers(model)[:1])
        self.gamma, self.alpha_pos, self.alpha_neg, self.beta = gamma, alpha_pos, alpha_neg, beta
        self.keep_first = keep_first
        self.silenced: list[tuple[int, ...]] = []
        self.signs: list[bool] = []

    def begin(self) -> None:
        self.rows: dict[int, Tensor] = {}  # sample -> y
        self.states: dict[int, Tensor] = {}

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        self.value = value
        return super().attention(module, query, key, value, *rest, **named)

    def entering(self, layer: int, hidden: Tensor) -> None:
        self.states[layer] = hidden[:, -1]

    def weights(self, layer: int, sample: int, a: Tensor) -> Tensor:
        image = self.image[sample].tolist()
        rest = self.valid[sample].tolist()
        text = [column for column in rest[int(self.keep_first) :] if column not in image]
        row = a[:, 0].clone()  # (H, K)
        ratios = []
        for head in row:
            spread = []
            for columns in (text, image):
                seen = [float(head[column]) for column in columns]
                bar = statistics.fmean(seen)
                bar += statistics.stdev(seen) if len(seen) > 1 else math.inf
                for column in columns:
                    if float(head[column]) > bar:
                        head[column] = 0.0
                left = [float(head[column]) for column in columns]
                total = sum(left)
                spread.append(-sum(w / total * math.log(w / total + 1e-6) for w in left))
            ratios.append(spread[0] / spread[1])
        out = [h for h, r in enumerate(ratios) if r < statistics.fmean(ratios)]
        for head in out:
            row[head] = 0.0
        self.silenced.append(tuple(out))
        groups = len(row) // self.value.shape[1]
        heads = [row[h] @ self.value[sample, h // groups].float() for h in range(len(row))]
        module = self.decoder.layers[layer].self_attn
        self.rows[sample] = module.o_proj(torch.cat(heads))
        return a

    def logits(self, logits: Tensor) -> Tensor:
        for sample, y in self.rows.items():
            logits[sample] = self.contrasted(logits[sample], self.skipped(sample, y))
        return logits

    def skipped(self, sample: int, y: Tensor) -> Tensor:
        last, norm = self.decoder.layers[-1], self.decoder.norm
        y = last.input_layernorm(y) + 0.2 * self.states[self.depth - 1][sample]
        gemma = hasattr(last, "pre_feedforward_layernorm")
        before = last.pre_feedforward_layernorm if gemma else last.post_attention_layernorm
        y = y + last.mlp(before(y))
        state = norm(y) + 0.5 * norm(self.states[self.depth][sample])
        return self.model.get_output_embeddings()(state).float()

    def contrasted(self, own: Tensor, asked: Tensor) -> Tensor:
        """(V,)"""
        p, q = own.double().softmax(0), asked.double().softmax(0)
        plus = sum(abs(float(a - b)) for a, b in zip(p, q, strict=True)) < self.gamma
        self.signs.append(plus)
        out = torch.full_like(own, -math.inf)
        for v in range(len(own)):
            if p[v] >= self.beta * p.max():
                if plus:
                    out[v] = own[v] + self.alpha_pos * asked[v]
                else:
                    out[v] = own[v] + self.alpha_neg * (own[v] - asked[v])
        return out
