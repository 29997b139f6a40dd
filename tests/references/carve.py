"""CARVE (arXiv 2509.06461), slowly: whole attention maps, every step from the start, every pixel.

One picture and one question at a time. Each token is written by a run over the whole sequence with
eager attention and without a cache; every layer's ratio at every step is resized to the picture
before it is added; regions are filled pixel by pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

GENERAL = "Write a general description of the image."
SUFFIX = " Answer the question using a single word or phrase."

Pixel = tuple[int, int]


def attention(
    vlm: Any,
    image: Image.Image,
    text: str,
    layers: tuple[int, ...],
    limit: int,
    heads: str = "mean",
) -> list[Tensor]:
    """A of section 4 at each generated token: (layers, N_v), mean over heads, or (layers, H, N_v)
    of "all" heads."""
    prompt = dict(vlm.inputs([vlm.chat([image], text, None)]))
    ends = vlm.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    columns = (prompt["input_ids"][0] == vlm.model.config.image_token_id).nonzero()[:, 0]
    implementation = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    steps: list[Tensor] = []
    try:
        while len(steps) < limit:
            with torch.no_grad():
                out = vlm.model(**prompt, output_attentions=True, use_cache=False)
            rows = torch.stack([out.attentions[layer][0, :, -1, columns] for layer in layers])
            steps.append(rows if heads == "all" else rows.mean(1))
            token = int(out.logits[0, -1].argmax())
            if token in ends:
                break
            for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                if key in prompt:
                    new = {"input_ids": token, "attention_mask": 1}.get(key, 0)
                    prompt[key] = torch.cat([prompt[key], torch.tensor([[new]])], 1)
    finally:
        vlm.model.set_attn_implementation(implementation)
    return steps


def contrast(
    asked: list[Tensor],
    general: list[Tensor],
    grid: tuple[int, int],
    size: tuple[int, int],
    time: str = "full",
    floor: float = 1e-8,
) -> np.ndarray:
    """S of section 4 at every pixel, (height, width), for a grid of (rows, cols)."""
    used = list(range(min(len(asked), len(general))))
    used = {"full": used, "start": used[:1], "end": used[-1:]}[time]
    total = np.zeros((size[1], size[0]), np.float64)
    for t in used:
        weight = t - used[0] + 1
        for a_q, a_g in zip(asked[t], general[t], strict=True):
            ratio = (a_q / (a_g + floor)).double().view(1, 1, *grid)
            fine = interpolate(ratio, (size[1], size[0]), mode="bilinear", align_corners=False)
            total += weight * fine[0, 0].numpy()
    return total


def fill(mask: np.ndarray) -> list[list[Pixel]]:
    """The 4-connected regions of a mask, by their first pixel in reading order."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = []
    for seed in sorted(left):
        if seed not in left:
            continue
        left.remove(seed)
        region, front = [seed], [seed]
        while front:
            y, x = front.pop()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    region.append(near)
                    front.append(near)
        found.append(region)
    return found


def select(
    heat: np.ndarray,
    keep: float,
    number: int | str,
    rank: str = "attention",
    smallest: float = 0.0,
) -> np.ndarray:
    """M*, bool in the shape of `heat`: the best regions of the largest values."""
    mask = heat >= np.percentile(heat, (1 - keep) * 100)
    regions = [r for r in fill(mask) if len(r) >= smallest * mask.sum()]
    if number == "released":
        number = max(3, int(keep * len(regions)))
    if rank == "attention":
        regions.sort(key=lambda region: -sum(heat[pixel] for pixel in region))
    if rank == "area":
        regions.sort(key=lambda region: -len(region))
    best = np.zeros(heat.shape, bool)
    for region in regions if rank == "all" else regions[:number]:
        for pixel in region:
            best[pixel] = True
    return best


def extract(image: Image.Image, mask: np.ndarray) -> tuple[list[int], Image.Image]:
    """Phi: the box of the mask, and what is in it, black outside the mask, magnified."""
    pixels = np.asarray(image).copy()
    pixels[~mask] = 0
    ys, xs = np.nonzero(mask)
    box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
    crop = Image.fromarray(pixels).crop(tuple(box))
    scale = max(image.width / crop.width, image.height / crop.height)
    size = (round(crop.width * scale), round(crop.height * scale))
    return box, crop.resize(size, Image.Resampling.LANCZOS)
