"""Means, shares and correlations with their 95 % intervals, by scipy and statsmodels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

Numbers = dict[str, Any]


def mean(values: Any, pictures: Sequence[Hashable]) -> Numbers:
    """Means over pictures of each picture's own mean, with 95 % t-intervals (scipy).

    What is read of one picture hangs together, so the pictures are what is independent.

    Args:
        values: (N, ...) numbers; NaN = not defined, left out.
        pictures: which picture each of the N is of.

    Returns:
        {"mean", "low", "high"}: lists of shape (...); the ends NaN for fewer than two pictures.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    places: dict[Hashable, list[int]] = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture, []).append(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN
        own = np.stack([np.nanmean(values[rows], 0) for rows in places.values()])
        middle = np.nanmean(own, 0)
        ends = stats.ttest_1samp(own, 0, nan_policy="omit").confidence_interval(0.95)
    return {
        "mean": middle.tolist(),
        "low": np.ma.filled(ends.low, math.nan).tolist(),
        "high": np.ma.filled(ends.high, math.nan).tolist(),
    }


def proportion(hits: np.ndarray) -> Numbers:
    """Share of ones among (N,) zeros and ones, with Wilson's 95 % interval (statsmodels).

    Returns:
        {"n", "mean", "low", "high"}; NaN for none.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not len(hits):
        return {"n": 0, "mean": math.nan, "low": math.nan, "high": math.nan}
    low, high = proportion_confint(int(hits.sum()), len(hits), 0.05, "wilson")
    return {"n": len(hits), "mean": float(hits.mean()), "low": float(low), "high": float(high)}


def correlation(x: np.ndarray, y: np.ndarray) -> Numbers:
    """Point-biserial correlation of numbers x and zeros and ones y, (N,) each (scipy).

    Returns:
        {"r", "low", "high", "p"}, of N taken as independent; NaN where one of the two does not
        vary or N is below 4.
    """
    from scipy import stats

    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(("r", "low", "high", "p"), math.nan)
    found = stats.pointbiserialr(y, x)
    ends = stats.pearsonr(y, x).confidence_interval(0.95)  # the same r
    values = (found.statistic, ends.low, ends.high, found.pvalue)
    return dict(zip(("r", "low", "high", "p"), map(float, values), strict=True))


def ratio(part: np.ndarray, of: np.ndarray) -> np.ndarray:
    """`part` / `of`, NaN where that is 0."""
    return np.divide(part, of, out=np.full(np.shape(part), math.nan), where=of > 0)
