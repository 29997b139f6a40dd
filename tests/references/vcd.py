"""Visual contrastive decoding (arXiv 2311.16922), slowly: every token from two whole plain runs.

No cache, no batch, no padding, no attention edits: one prompt at a time is read from its start for
every token, once with the picture and once with the noised picture, and the two are combined
number by number. Noise is put on a single picture before it meets any other, so nothing here knows
how pictures are laid out in a batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def levels(step: int) -> tuple[float, float]:
    """What remains of the picture, and how much noise it has, after `step` of the schedule."""
    kept = 1.0
    for t in range(step + 1):
        u = -6 + 12 * t / 999
        kept *= 1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(-u)))
    return kept**0.5, (1 - kept) ** 0.5


def noised(picture: dict[str, Tensor], step: int, seed: int, restart: bool) -> dict[str, Tensor]:
    """One picture's tensors with noise on its pixels.

    `restart`: every tile starts the generator anew, as where the model cannot tell whose it is.
    """
    signal, strength = levels(step)
    pixels, generator = picture["pixel_values"], torch.Generator().manual_seed(seed)
    if pixels.dim() == 2:  # (patches, 3 * 2 * 4 * 4): both frames see the same noise
        noise = torch.randn(len(pixels), 3, 16, generator=generator)
        rows = [torch.cat([torch.cat([c, c]) for c in row]) for row in noise]
        return picture | {"pixel_values": signal * pixels + strength * torch.stack(rows)}
    if "image_position_ids" in picture:  # Gemma 4 makes -1..1 of 0..1 in its tower
        shown = (picture["image_position_ids"][0] >= 0).all(-1)
        wide = 2 * pixels[0, shown] - 1
        wide = signal * wide + strength * torch.randn(wide.shape, generator=generator)
        painted = torch.zeros_like(pixels)
        painted[0, shown] = (wide + 1) / 2
        return picture | {"pixel_values": painted}
    if "spatial_shapes" in picture:  # padded to a fixed number of patches
        count = int(picture["spatial_shapes"].prod())
        noise = torch.randn(count, pixels.shape[-1], generator=generator)
        painted = pixels.clone()
        painted[0, :count] = signal * pixels[0, :count] + strength * noise
        return picture | {"pixel_values": painted}
    out = []
    for tile in pixels.flatten(0, -4) if pixels.dim() > 3 else pixels:
        if restart:
            generator = torch.Generator().manual_seed(seed)
        out.append(signal * tile + strength * torch.randn(tile.shape, generator=generator))
    return picture | {"pixel_values": torch.stack(out).view_as(pixels)}


def extended(model: Any, prompt: dict[str, Tensor], tokens: Tensor) -> dict[str, Any]:
    """One unpadded prompt (1, n) followed by `tokens` (k,).

    PaliGemma's token types tell a prompt from what is written, those of others images from text.
    """
    suffix = model.config.model_type == "paligemma"
    inputs: dict[str, Any] = dict(prompt)
    inputs["input_ids"] = torch.cat([prompt["input_ids"], tokens[None]], 1)
    for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in prompt:
            one = key == "attention_mask" or (suffix and key == "token_type_ids")
            new = torch.full((1, len(tokens)), int(one))
            inputs[key] = torch.cat([prompt[key], new], 1)
    return inputs


def plain(model: PreTrainedModel, prompt: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Next-token logits (V,) of one unpadded prompt (1, n) followed by `tokens` (k,)."""
    inputs = extended(model, prompt, tokens)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0, -1].float()


def contrasted(true: Tensor, other: Tensor, alpha: float, beta: float) -> Tensor:
    """The contrast of two rows of logits (V,), where the true image finds a token plausible."""
    chances, out = true.softmax(0), torch.full_like(true, -math.inf)
    for v, chance in enumerate(chances):
        if chance >= beta * chances.max():
            out[v] = true[v] + alpha * (true[v] - other[v])
    return out


def run(
    model: PreTrainedModel,
    prompt: dict[str, Tensor],
    noisy: dict[str, Tensor],
    tokens: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Tensor:
    """Logits (k + 1, V) of one prompt: after it, and after each of `tokens` (k,)."""
    steps = []
    for n in range(len(tokens) + 1):
        true = plain(model, prompt, tokens[:n])
        if "pixel_values" not in prompt:  # nothing to contrast with
            steps.append(true)
            continue
        steps.append(contrasted(true, plain(model, noisy, tokens[:n]), alpha, beta))
    return torch.stack(steps)
