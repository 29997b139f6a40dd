"""RITUAL (arXiv 2405.17821), slowly: transforms pixel by pixel, and two whole plain runs.

No cache, no batch, no padding: one prompt at a time is read once with the picture and once with the
changed one, with the tokens that were written behind it, and the two are added number by number.
"""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


def plain(model: PreTrainedModel, prompt: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits (k + 1, V) of one unpadded prompt (1, n): after it and after each of `tokens` (k,)."""
    inputs: dict[str, Any] = dict(prompt)
    inputs["input_ids"] = torch.cat([prompt["input_ids"], tokens[None]], 1)
    for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in prompt:
            new = torch.full((1, len(tokens)), int(key == "attention_mask"))
            inputs[key] = torch.cat([prompt[key], new], 1)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0, -len(tokens) - 1 :].float()


def complemented(true: Tensor, other: Tensor, alpha: float, beta: float) -> Tensor:
    """l + alpha l' of two rows (V,), where the true picture finds a token plausible."""
    chances, out = true.softmax(0), torch.full_like(true, -math.inf)
    for v, chance in enumerate(chances):
        if chance >= beta * chances.max():
            out[v] = true[v] + alpha * other[v]
    return out


def run(
    model: PreTrainedModel,
    prompt: dict[str, Tensor],
    changed: dict[str, Tensor],
    tokens: Tensor,
    alpha: float,
    beta: float,
    first_token_only: bool = False,
) -> Tensor:
    """Logits (k + 1, V) of one prompt, after it and after each of `tokens` (k,).

    `first_token_only`: later tokens add the first stream to itself.
    """
    true = plain(model, prompt, tokens)
    if "pixel_values" not in prompt:  # nothing to add
        return true
    other = plain(model, changed, tokens)
    if first_token_only:
        other = torch.cat([other[:1], true[1:]])
    return torch.stack([complemented(a, b, alpha, beta) for a, b in zip(true, other, strict=True)])


# -- transforms of a picture (H, W, 3) uint8 -------------------------------------------------------


def rotated(picture: np.ndarray, degrees: float) -> np.ndarray:
    """Counter-clockwise about the centre: each pixel is looked up where it came from."""
    height, width = picture.shape[:2]
    out, angle = np.zeros_like(picture), math.radians(degrees)
    for y in range(height):
        for x in range(width):
            dx, dy = x + 0.5 - width / 2, y + 0.5 - height / 2
            from_x = math.floor(math.cos(angle) * dx - math.sin(angle) * dy + width / 2)
            from_y = math.floor(math.sin(angle) * dx + math.cos(angle) * dy + height / 2)
            if 0 <= from_x < width and 0 <= from_y < height:
                out[y, x] = picture[from_y, from_x]
    return out


def blurred(picture: np.ndarray, kernel: int, sigma: float) -> np.ndarray:
    """Every pixel the weighted mean of a square around it, mirrored at the borders."""
    height, width = picture.shape[:2]
    reach, out = kernel // 2, np.zeros(picture.shape)
    near = range(-reach, reach + 1)
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma * sigma)) for i in near for j in near}
    total = sum(weights.values())

    def mirror(i: int, n: int) -> int:
        i = abs(i)
        return i if i < n else 2 * (n - 1) - i

    for y in range(height):
        for x in range(width):
            for (i, j), weight in weights.items():
                out[y, x] += weight / total * picture[mirror(y + i, height), mirror(x + j, width)]
    return np.rint(out)


def jittered(
    picture: np.ndarray, order: list[int], factors: list[float], turn: float
) -> np.ndarray:
    """Brightness 0, contrast 1, saturation 2 and hue 3 in this order, on values 0..255."""
    values = picture.astype(float)
    for step in order:
        grey = values @ [0.299, 0.587, 0.114]
        if step == 0:
            values = factors[0] * values
        elif step == 1:
            mean = math.floor(grey.mean() + 0.5)
            values = mean + factors[1] * (values - mean)
        elif step == 2:
            values = grey[..., None] + factors[2] * (values - grey[..., None])
        else:
            flat = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in values.reshape(-1, 3)]
            shifted = [colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in flat]
            values = np.array(shifted).reshape(values.shape) * 255
        values = values.clip(0, 255)
    return values
