"""Connected regions of a mask: pixels that touch by a side, as `scipy.ndimage.label` counts them.

A region is kept as its horizontal runs of pixels, so that no image of labels is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Regions:
    """The 4-connected regions of a mask, numbered by their first pixel in reading order.

    Attributes:
        shape: (rows, columns) of the mask.
        starts, stops: (n,) int64, the runs in reading order, half-open, as indices of the
            flattened mask.
        labels: (n,) int64, the region of each run, from 0.
        count: how many regions there are.
    """

    shape: tuple[int, int]
    starts: np.ndarray
    stops: np.ndarray
    labels: np.ndarray
    count: int

    def areas(self) -> np.ndarray:
        """Pixels of each region, (count,) int64."""
        areas = np.zeros(self.count, np.int64)
        np.add.at(areas, self.labels, self.stops - self.starts)
        return areas

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of `values`, shaped like the mask, in each region, (count,) float64."""
        if not self.count:
            return np.zeros(0)
        edges = np.stack([self.starts, self.stops], 1).ravel()
        edges = edges[edges < values.size]  # the last run may end with the mask
        runs = np.add.reduceat(values.ravel(), edges, dtype=np.float64)[::2]
        return np.bincount(self.labels, runs, self.count)

    def mask(self, chosen: np.ndarray) -> np.ndarray:
        """The union of the regions whose numbers are `chosen`, bool in the mask's shape."""
        wanted = np.isin(self.labels, chosen)
        inner = np.stack([self.starts[wanted], self.stops[wanted]], 1).ravel()
        lengths = np.diff(inner, prepend=0, append=self.shape[0] * self.shape[1])
        inside = np.arange(len(lengths)) % 2 == 1
        return np.repeat(inside, lengths).reshape(self.shape)


def regions(mask: np.ndarray) -> Regions:
    """The regions of a bool (rows, columns) mask."""
    rows, columns = mask.shape
    wide = columns + 1  # an empty column keeps the rows apart
    flat = np.zeros(rows * wide + 1, bool)
    flat[1:].reshape(rows, wide)[:, :columns] = mask
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    starts, stops = edges[::2], edges[1::2]
    # runs of the next row that touch a run from below: those that its shadow overlaps
    first = np.searchsorted(stops, starts + wide, side="right")
    after = np.searchsorted(starts, stops + wide, side="left")
    touching = np.maximum(after - first, 0)
    upper = np.repeat(np.arange(len(starts)), touching)
    nth = np.arange(len(upper)) - np.repeat(np.cumsum(touching) - touching, touching)
    labels = _joined(len(starts), upper, np.repeat(first, touching) + nth)
    roots, labels = np.unique(labels, return_inverse=True)
    line = starts // wide
    return Regions((rows, columns), starts - line, stops - line, labels.reshape(-1), len(roots))


def _joined(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each of `count` nodes the least node that it is joined to by the edges a[i] - b[i]."""
    root = np.arange(count)
    while len(a):
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        apart = low < high
        a, b, low, high = a[apart], b[apart], low[apart], high[apart]
        np.minimum.at(root, high, low)  # a root that a smaller one touches hangs below it
        while not np.array_equal(up := root[root], root):
            root = up
    return root
