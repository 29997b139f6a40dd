"""LASER (arXiv 2602.04304), slowly: full eager maps, every pixel painted, two streams by hand.

One prompt at a time, no cache, no batch, no shared prefix. A crop is found by painting the map on
the image's pixels and trying every window of whole pixels, so it is meant for small images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.vlm.chat import Chat
from foveate.vlm.vlm import VLM


def attention(vlm: VLM, images: list[Image.Image], text: str, system: str | None) -> list[Tensor]:
    """Per layer (H, N_v): the prompt's last row of the whole map, on the image tokens."""
    inputs = vlm.inputs([Chat(images, text, system)])
    before = vlm.model.get_decoder().config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = vlm.model(**inputs, output_attentions=True, use_cache=False)
    finally:
        vlm.model.set_attn_implementation(before)
    columns = (inputs["input_ids"][0] == vlm.model.config.image_token_id).nonzero()[:, 0]
    return [layer[0, :, -1, columns].float() for layer in out.attentions]


@dataclass
class Found:
    """Per layer VAQ, the chosen layer, and its maps with, without and by the question, (N_v,)."""

    vaq: list[float]
    layer: int
    asked: Tensor
    unasked: Tensor
    added: Tensor


def evidence(
    asked: list[Tensor],
    unasked: list[Tensor],
    heads: int,
    first_layer: int = 0,
) -> Found:
    """Equations (3) to (6), head by head; `asked` and `unasked` hold (H, N_v) per layer."""
    vaq, chosen = [], []
    for with_query, without in zip(asked, unasked, strict=True):
        activations = []
        for a, b in zip(with_query, without, strict=True):
            added = torch.tensor(
                [max(x - y, 0.0) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
            )
            activations.append((math.sqrt(sum(x * x for x in added.tolist())), added, a, b))
        top = sorted(activations, key=lambda entry: -entry[0])[:heads]
        vaq.append(sum(entry[0] for entry in top) / len(top))
        chosen.append(top)
    layer = max(range(first_layer, len(vaq)), key=lambda i: vaq[i])
    added, a, b = (sum(entry[i] for entry in chosen[layer]) / len(chosen[layer]) for i in (1, 2, 3))
    return Found(vaq, layer, a, b, added)


def painted(
    heat: np.ndarray, box: tuple[float, ...], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The map on every pixel of the image, (height, width), and which cell each pixel is of.

    A cell's value is spread over its pixels. Cells must have whole pixels; outside `box`, -1.
    """
    (width, height), (rows, cols) = size, heat.shape
    density, cell = np.zeros((height, width)), np.full((height, width), -1)
    cell_width = (box[2] - box[0]) * width / cols
    cell_height = (box[3] - box[1]) * height / rows
    for y in range(height):
        row = math.floor((y + 0.5 - box[1] * height) / cell_height)
        for x in range(width):
            col = math.floor((x + 0.5 - box[0] * width) / cell_width)
            if 0 <= row < rows and 0 <= col < cols:
                density[y, x] = heat[row, col] / (cell_width * cell_height)
                cell[y, x] = row * cols + col
    return density, cell


def hottest(density: np.ndarray, cell: np.ndarray, count: int) -> np.ndarray:
    """Pixels (height, width) bool of the `count` cells with most on the image, none with 0."""
    held = {c: density[cell == c].sum() for c in set(cell[cell >= 0].tolist())}
    cells = sorted((c for c in held if held[c] > 0), key=lambda c: (-round(held[c], 12), c))
    return np.isin(cell, cells[:count])


def crop(
    heat: np.ndarray,
    box: tuple[float, ...],
    size: tuple[int, int],
    placement: str,
    share: float,
    floor: int,
    patches: float,
) -> tuple[int, int, int, int]:
    """Con-ViCrop: (left, top, right, bottom) in pixels, by trying and counting pixels."""
    density, cell = painted(heat, box, size)
    width, height = (min(side, max(floor, round(share * side))) for side in size)
    if placement == "topk_bbox":
        ys, xs = hottest(density, cell, max(1, round(patches * heat.size))).nonzero()
        width = min(width, max(floor, int(xs.max() + 1 - xs.min())))
        height = min(height, max(floor, int(ys.max() + 1 - ys.min())))
        x, y = (xs.max() + 1 + xs.min()) / 2, (ys.max() + 1 + ys.min()) / 2
    else:
        x = (density.sum(0) * (np.arange(size[0]) + 0.5)).sum() / density.sum()
        y = (density.sum(1) * (np.arange(size[1]) + 0.5)).sum() / density.sum()
    if placement == "slide_max_sum":
        held = {}
        for top in range(size[1] - height + 1):
            column_sums = density[top : top + height].sum(0)
            for left in range(size[0] - width + 1):
                held[left, top] = column_sums[left : left + width].sum()
        most = max(held.values())
        best = [place for place in held if held[place] >= most * (1 - 1e-9)]
        centre = (x - width / 2, y - height / 2)
        left, top = min(best, key=lambda place: math.dist(place, centre))
        return left, top, left + width, top + height
    left = round(min(max(x - width / 2, 0), size[0] - width))
    top = round(min(max(y - height / 2, 0), size[1] - height))
    return left, top, left + width, top + height


def masked(
    image: Image.Image, heat: np.ndarray, box: tuple[float, ...], patches: float, fill: str
) -> Image.Image:
    """The image with the pixels of its hottest cells in one colour, equation (7)."""
    pixels = np.asarray(image).copy()
    colour = {"grey": 127, "black": 0, "mean": np.round(pixels.mean((0, 1)))}[fill]
    count = max(1, round(patches * heat.size))
    pixels[hottest(*painted(heat, box, image.size), count)] = colour
    return Image.fromarray(pixels)


def stream(vlm: VLM, images: list[Image.Image], chat: Chat, tokens: list[int]) -> Tensor:
    """Logits (len(tokens) + 1, V) of a prompt with these pictures, and after each of `tokens`.

    Every token is a whole run from the start.
    """
    prompt = dict(vlm.inputs([Chat(images, chat.text, chat.system)]))
    shape, steps = prompt["input_ids"].shape, []
    for count in range(len(tokens) + 1):
        new = torch.tensor([tokens[:count]], dtype=torch.long)
        extra = {"input_ids": new, "attention_mask": torch.ones_like(new)}
        inputs = {
            key: torch.cat([value, extra.get(key, torch.zeros_like(new))], 1)
            if isinstance(value, Tensor) and value.shape == shape
            else value
            for key, value in prompt.items()
        }
        with torch.no_grad():
            steps.append(vlm.model(**inputs, use_cache=False).logits[0, -1].float())
    return torch.stack(steps)


def contrasted(own: Tensor, other: Tensor, alpha: float = 1.0, plausibility: float = 0.0) -> Tensor:
    """Equations (8) and (9) on the logits (steps, V) of both streams."""
    steps = []
    for plain, hidden in zip(own, other, strict=True):
        vat = plain - hidden
        step = plain + alpha * vat
        chances = plain.softmax(0)
        step[chances < plausibility * chances.max()] = -math.inf
        steps.append(step)
    return torch.stack(steps)
