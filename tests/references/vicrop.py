"""ViCrop (arXiv 2502.17422) slowly: full maps of single prompts, the window search in plain loops.

Every prompt is read alone, uncached; `FullMap` keeps the last row of its eager maps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from foveate.vlm.chat import Chat
from foveate.vlm.vlm import VLM
from tests.references.full import FullMap


def attention(vlm: VLM, image: Any, text: str, layer: int) -> np.ndarray:
    """The last row of one layer on the visual tokens, mean over the heads, (N_v,)."""
    inputs = dict(vlm.inputs([Chat([image], text)]))
    slow = FullMap(vlm.model)
    row = slow.run(inputs)[0].rows[layer][0]
    return row[:, slow.image[0]].double().mean(0).numpy()


def relative(vlm: VLM, image: Any, question: str, layer: int, suffix: str) -> np.ndarray:
    """Attention to the question over attention to the general instruction, (N_v,)."""
    general = attention(vlm, image, "Write a general description of the image." + suffix, layer)
    return attention(vlm, image, question + suffix, layer) / general


def window_search(heat: Any, size: tuple[int, int], window: int, ratios: Any) -> tuple[int, ...]:
    """The crop (left, top, right, bottom) in pixels for a map that covers the whole image."""
    rows, cols = len(heat), len(heat[0])
    cell_x, cell_y = size[0] / cols, size[1] / rows
    candidates = []
    for ratio in ratios:
        across = min(int(window * ratio / cell_x), cols)
        down = min(int(window * ratio / cell_y), rows)
        if across == cols and down == rows:
            if ratio == ratios[0]:
                return (0, 0, *size)
            continue
        sums = {}
        for x in range(cols - across + 1):
            for y in range(rows - down + 1):
                total = 0.0
                for i in range(x, x + across):
                    for j in range(y, y + down):
                        total += float(heat[j][i])
                sums[x, y] = total
        place, most = (0, 0), -1.0
        for x in range(cols - across + 1):
            for y in range(rows - down + 1):
                if sums[x, y] > most:
                    place, most = (x, y), sums[x, y]
        x, y = place
        beside = [(x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)]
        near = [sums[p] for p in beside if p in sums]
        score = (most - sum(near) / len(near)) / (across * down)
        candidates.append((score, ratio, x, y, across, down))
    best = candidates[0]
    for candidate in candidates[1:]:
        if candidate[0] > best[0]:
            best = candidate
    _, ratio, x, y, across, down = best
    half = int(window * ratio / 2)
    ends = []
    for start, cells, cell, limit in ((x, across, cell_x, size[0]), (y, down, cell_y, size[1])):
        middle = int(start * cell + cells * cell / 2)
        if middle < half:
            middle = half
        if middle > limit - half:
            middle = limit - half
        ends.append((max(0, middle - half), min(limit, middle + half)))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]
