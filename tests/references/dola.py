"""DoLa (arXiv 2309.03883), slowly: one prompt at a time, read from its start for every token.

Everything comes from the hidden states that the plain model hands out; the divergence is summed
token by token from its definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.references.vcd import extended


def buckets(depth: int, tied: bool) -> dict[str, list[int]]:
    """Candidate layers, from a list of all even distances instead of ranges."""
    start = 0 if not tied else {1: 0, 2: 1}.get(depth, 2)
    if depth <= 40:
        low = [j for j in range(depth) if j >= start and j < depth // 2 and (j - start) % 2 == 0]
        high = [j for j in range(depth) if j >= depth // 2 and (j - depth // 2) % 2 == 0]
    else:
        low = [j for j in range(start, 20) if j % 2 == 0]
        high = [j for j in range(depth) if j >= depth - 20 and (depth - j) % 2 == 0]
    return {"low": low or [depth // 2], "high": high}


def divergence(p: Tensor, q: Tensor) -> float:
    """Half the sum of KL(M || p) and KL(M || q), each a mean over the vocabulary (V,)."""
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        m = (a + b) / 2
        total += m * math.log(m / a) + m * math.log(m / b)
    return total / 2 / len(p)


def run(
    model: PreTrainedModel,
    prompt: dict[str, Tensor],
    tokens: Tensor,
    layers: Sequence[int],
    plausibility: float = 0.1,
    strength: float = 1.0,
) -> tuple[Tensor, list[int]]:
    """Logits (k + 1, V) of one prompt, and the layer chosen each time.

    After the prompt, and after each of `tokens` (k,).
    """
    steps, chosen = [], []
    for n in range(len(tokens) + 1):
        inputs = extended(model, prompt, tokens[:n])
        with torch.no_grad():
            out = model(**inputs, use_cache=False, output_hidden_states=True)
            own = out.logits[0, -1].double().log_softmax(0)
            early = {
                j: model.get_output_embeddings()(out.hidden_states[j][0, -1])
                .double()
                .log_softmax(0)
                for j in layers
            }
        apart = {j: divergence(own.exp(), q.exp()) for j, q in early.items()}
        best = max(apart, key=lambda j: apart[j])
        logits = torch.full_like(own, -math.inf)
        for v in range(len(own)):
            if own[v] >= own.max() + math.log(plausibility or 1e-300):
                logits[v] = own[v] - strength * early[best][v]
        steps.append(logits.float())
        chosen.append(best)
    return torch.stack(steps), chosen
