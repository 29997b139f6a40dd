"""DeCo (arXiv 2410.11779), slowly: one prompt at a time, read from its start for every token.

States come from hooks on the plain model's layers and on its final norm, candidates and the surest
layer from plain lists of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.backends.transformers.compat import decoder_of, final_norm
from tests.references.vcd import extended


def entering(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """h_0 ... h_L of the last position, the last one without the norm, and its logits (V,)."""
    states: list[Tensor] = []
    decoder = decoder_of(model)

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    parts = [*decoder.layers, final_norm(decoder)]
    hooks = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    with torch.no_grad():
        out = model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [state[0, -1] for state in states], out.logits[0, -1]


def run(
    model: PreTrainedModel,
    prompt: dict[str, Tensor],
    tokens: Tensor,
    layers: Sequence[int],
    alpha: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 20,
    norm: bool = True,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Logits (k + 1, V) of one prompt; which layer was surest each time, among how many tokens.

    After the prompt, and after each of `tokens` (k,). Without `norm` it is the wrong variant that
    unembeds states as they are.
    """
    steps, chosen = [], []
    for n in range(len(tokens) + 1):
        states, own = entering(model, extended(model, prompt, tokens[:n]))
        chances = own.double().softmax(0).tolist()
        ranked = sorted(range(len(chances)), key=lambda v: -chances[v])
        likely, mass = [], 0.0
        for v in ranked[: top_k or None]:
            likely.append(v)
            mass += chances[v]
            if mass >= top_p:
                break
        surest, best, correction = -1.0, -1, own
        for j in layers:
            with torch.no_grad():
                state = final_norm(decoder_of(model))(states[j]) if norm else states[j]
                e = model.get_output_embeddings()(state)
            p = e.double().softmax(0)
            for v in likely:
                if p[v] > surest:
                    surest, best, correction = float(p[v]), j, e
        logits = torch.full_like(own, -math.inf)
        for v in likely:
            logits[v] = own[v] + alpha * surest * correction[v]
        steps.append(logits)
        chosen.append((best, len(likely)))
    return torch.stack(steps), chosen
