"""Is a difference between two methods real? Paired tests on the questions that both answered."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 5_000_000  # numbers drawn at a time


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p: are as many answers gained as lost?

    Only questions count on which the two methods differ. If neither is better, each of them is as
    likely a gain as a loss, so the smaller count is binomial with one half (McNemar 1947; with
    graded scores this is the sign test). Twice that tail, at most 1. Questions are taken as
    independent; `interval` does without that.
    """
    fewer, both = min(gained, lost), gained + lost
    ways = total = 1
    for k in range(fewer):
        ways = ways * (both - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**both)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for being several (Holm 1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, is never below a smaller one's, and is at
    most 1. Comparing the results with 0.05 keeps the chance of any false finding below 5 %.
    """
    corrected = [0.0] * len(values)
    floor = 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        floor = max(floor, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = floor
    return corrected


def interval(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean difference, resampling whole clusters.

    Questions about one image stand or fall together, so images are drawn, with all of their
    questions; drawing single questions would give intervals that are too narrow. Clusters that
    have the same sum and the same size are interchangeable, so it is drawn how often each kind of
    cluster occurs: the same distribution with far fewer numbers.

    Args:
        differences: per question, score of the method minus score of the other, (N,).
        clusters: per question, what it shares with others, such as the image's name, (N,).

    Returns:
        The two ends, or None for fewer than two clusters, of which nothing can be said.
    """
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    count = len(numbers)
    if count < 2:
        return None
    sums = np.bincount(index, weights=np.asarray(differences, np.float64)).round(9)
    sizes = np.bincount(index).astype(np.float64)
    kinds, often = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, step := max(1, _CELLS // len(kinds))):
        drawn = random.multinomial(count, often / count, min(step, resamples - start))
        totals = drawn @ kinds
        means.append(totals[:, 0] / totals[:, 1])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def significant(corrected: float, ends: tuple[float, float] | None, level: float = LEVEL) -> bool:
    """Both tests agree: the corrected p is below 1 - `level`, and the interval leaves out 0."""
    apart = ends is not None and (ends[0] > 0 or ends[1] < 0)
    return apart and not math.isnan(corrected) and corrected < 1 - level
