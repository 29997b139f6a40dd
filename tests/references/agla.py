"""AGLA (arXiv 2406.12718), slowly: maps by dense matrices, the mask pixel by pixel.

The cubic spline is found by solving for its coefficients, the blur is a matrix with every weight
written out, the threshold is counted off in a sorted list.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

SIDE = 384


def spline(n: int, size: int) -> np.ndarray:
    """(size, n): n cells to `size` pixels by the interpolating cubic spline of cells and zeros."""
    far = 40  # zeros on both sides; what is beyond them has no influence left
    total = n + 2 * far
    system = np.zeros((total, total))
    for i in range(total):
        for j, weight in ((i - 1, 1 / 6), (i, 4 / 6), (i + 1, 1 / 6)):
            if 0 <= j < total:
                system[i, j] = weight
    coefficients = np.linalg.inv(system)[:, far : far + n]
    basis = np.zeros((size, total))
    for pixel in range(size):
        x = (pixel + 0.5) * n / size - 0.5 + far
        for k in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - k)
            basis[pixel, k] = (
                2 / 3 - d * d + d**3 / 2 if d < 1 else (2 - d) ** 3 / 6 if d < 2 else 0
            )
    return basis @ coefficients


def gauss(size: int, sigma: float) -> np.ndarray:
    """(size, size): Gaussian blur up to four sigma; the border repeats backwards."""
    reach, out = int(4 * sigma + 0.5), np.zeros((size, size))
    weights = [math.exp(-(i * i) / (2 * sigma * sigma)) for i in range(-reach, reach + 1)]
    for pixel in range(size):
        for offset, weight in zip(range(-reach, reach + 1), weights, strict=True):
            at = pixel + offset
            at = -1 - at if at < 0 else 2 * size - 1 - at if at >= size else at
            out[pixel, at] += weight / sum(weights)
    return out


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


def mask(
    relevance: np.ndarray, score: float, box: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)
) -> np.ndarray:
    """(384, 384) bool: the pixels that stay."""
    if relevance.max() == relevance.min():
        return np.ones((SIDE, SIDE), bool)
    left, top, right, bottom = (round(edge * SIDE) for edge in box)
    down, across = spline(len(relevance), bottom - top), spline(relevance.shape[1], right - left)
    fine = np.clip(down @ scaled(relevance) @ across.T, 0, 1)
    whole = np.zeros((SIDE, SIDE))
    for y in range(SIDE):
        for x in range(SIDE):
            if top <= y < bottom and left <= x < right:
                whole[y, x] = fine[y - top, x - left]
    blur = gauss(SIDE, 0.02 * SIDE)
    smooth = scaled(blur @ whole @ blur.T)
    share = min(1 - score / 2, 1 - 1e-5)
    ordered = sorted(smooth.ravel().tolist(), reverse=True)
    return smooth >= ordered[int(SIDE * SIDE * share)]


def masked(image: Image.Image, stays: np.ndarray) -> np.ndarray:
    """The picture as a square of 384 pixels, black where it does not stay, (384, 384, 3)."""
    out = np.array(image.resize((SIDE, SIDE)))
    for y in range(SIDE):
        for x in range(SIDE):
            if not stays[y, x]:
                out[y, x] = 0
    return out


def moved(asked: list[float], described: list[float]) -> float:
    """The share of the attention that the question moves from where the instruction has it."""
    total, other = sum(asked), sum(described)
    shares = zip(asked, described, strict=True)
    return sum(max(0.0, a / total - b / other) for a, b in shares)
