"""ICD (arXiv 2403.18715), slowly: every token from two whole plain runs, number by number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.references import vcd


def disturbed(prompt: dict[str, Tensor], image: int, prefix: tuple[int, ...]) -> dict[str, Tensor]:
    """One unpadded prompt (1, n) with tokens behind its last `image` token; the rest as it is."""
    ids = prompt["input_ids"][0].tolist()
    if image not in ids:
        return prompt
    end = len(ids) - ids[::-1].index(image)
    out: dict[str, Any] = dict(prompt)
    out["input_ids"] = torch.tensor([[*ids[:end], *prefix, *ids[end:]]])
    for key, value in prompt.items():
        if key != "input_ids" and value.shape == (1, len(ids)):
            new = [int(key == "attention_mask")] * len(prefix)
            row = value[0].tolist()
            out[key] = torch.tensor([[*row[:end], *new, *row[end:]]])
    return out


def run(
    model: Any,
    prompt: dict[str, Tensor],
    other: dict[str, Tensor],
    tokens: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Tensor:
    """Logits (k + 1, V) of one prompt against those of `other`: after it and each of `tokens`."""
    return vcd.run(model, prompt, other, tokens, alpha, beta)
