"""Statistics: intervals of means, shares and correlations, and paired tests of two methods.

scipy and statsmodels do the work and are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .errors import FoveateError

Numbers = dict[str, Any]
RESAMPLES = 10_000
_CELLS = 5_000_000  # numbers drawn at a time


def mean(values: Any, pictures: Sequence[Hashable]) -> Numbers:
    """Means over pictures of each picture's own mean, with 95 % t-intervals (scipy).

    Values from one picture depend on each other; only the pictures are independent.

    Args:
        values: (N, ...) numbers; NaN (not defined) is left out.
        pictures: the picture of each of the N.

    Returns:
        {"mean", "low", "high"}: lists of shape (...); the ends are NaN for fewer than two pictures.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    places: dict[Hashable, list[int]] = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture, []).append(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # columns of nothing but NaN
        means = np.stack([np.nanmean(values[rows], 0) for rows in places.values()])
        middle = np.nanmean(means, 0)
        ends = stats.ttest_1samp(means, 0, nan_policy="omit").confidence_interval(0.95)
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
    test = stats.pointbiserialr(y, x)
    ends = stats.pearsonr(y, x).confidence_interval(0.95)  # the same r
    values = (test.statistic, ends.low, ends.high, test.pvalue)
    return dict(zip(("r", "low", "high", "p"), map(float, values), strict=True))


def ratio(part: np.ndarray, of: np.ndarray) -> np.ndarray:
    """`part` / `of`, NaN where that is 0."""
    return np.divide(part, of, out=np.full(np.shape(part), math.nan), where=of > 0)


# -- paired tests: is the difference between two methods real? -------------------------------------


def require_statsmodels() -> None:
    """Raise `FoveateError` where statsmodels, which the paired tests need, is missing."""
    if importlib.util.find_spec("statsmodels") is None:
        raise FoveateError(
            "Tests of significance need statsmodels: install it with `pip install 'foveate[eval]'`."
        )


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p: are as many answers gained as lost? (statsmodels)

    With graded scores this is the sign test. Questions are taken as independent; `interval` does
    without that.
    """
    require_statsmodels()
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test([[0, gained], [lost, 0]], exact=True).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p-values after Holm's correction for several tests, in the order given (statsmodels)."""
    require_statsmodels()
    from statsmodels.stats.multitest import multipletests

    return multipletests(values, method="holm")[1].tolist() if values else []


def interval(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean difference, resampling whole clusters.

    Questions about one image depend on each other, so images are drawn with all of their questions.
    Clusters with the same sum and size are interchangeable: we draw how often each kind of cluster
    occurs, which gives the same distribution with far fewer numbers.

    Args:
        differences: per question, score of the method minus score of the other, (N,).
        clusters: per question, what it shares with others, such as the image's name, (N,).

    Returns:
        The two ends; None for fewer than two clusters.
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
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def significant(corrected: float, ends: tuple[float, float] | None) -> bool:
    """Whether both tests agree: the corrected p is below 0.05, and the interval leaves out 0."""
    apart = ends is not None and (ends[0] > 0 or ends[1] < 0)
    return apart and corrected < 0.05
