"""M3ID (arXiv 2403.14003), slowly: every token from two whole plain runs, number by number.

A prompt is read alone, from its start for every token, once whole and once as a list of its text
tokens. `count` is how many tokens of the answer were written before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.references.vcd import plain


def guided(
    own: Tensor,
    unseen: Tensor,
    count: int,
    forgetting: float = 0.02,
    beta: float = 0.1,
    confidence: float = 1.0,
    first_step: int = 1,
) -> Tensor:
    """(V,) from the logits with and without the picture."""
    p, q = own.double().softmax(0), unseen.double().softmax(0)
    gamma = math.exp(-forgetting * (count + first_step))
    sure = p.max() >= confidence if confidence < 1 else False
    out = torch.full_like(own, -math.inf)
    for v in range(len(out)):
        if p[v] >= beta * p.max():
            out[v] = p[v].log()
            if not sure:
                out[v] += (1 - gamma) / gamma * (p[v].log() - q[v].log())
    return out


def run(
    model: PreTrainedModel, prompt: dict[str, Tensor], tokens: Tensor, **parameters: float
) -> Tensor:
    """Logits (k + 1, V) of one unpadded prompt (1, n): after it, and after each of `tokens`."""
    ids, steps = prompt["input_ids"][0], []
    text = {"input_ids": ids[ids != model.config.image_token_id][None]}
    for count in range(len(tokens) + 1):
        own = plain(model, prompt, tokens[:count])
        if "pixel_values" not in prompt:
            steps.append(own)
            continue
        unseen = plain(model, text, tokens[:count])
        steps.append(guided(own, unseen, count, **parameters))
    return torch.stack(steps)
