"""Edits of rows that are a few numbers: a kernel may make them in place of a method's own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kinds = tuple[float, float, float]
"""One number for the key columns before the image, of the image, and after it."""

_NONE: Kinds = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Mixing:
    """Weights a of the image's columns that are mixed with a memory m of earlier rows.

    a becomes ``a + pull (m - a) + push m``, and every row is then divided by its sum. The memory
    becomes ``keep m + take p``, with p the weights of all heads, pooled. Only the image's columns
    of a memory are used.

    Attributes:
        memory: its name in `Rows.memory`, (B, 1, 1, K) float32. A missing one is zeros, and one
            with fewer columns ends in zeros.
        updated: whether a is mixed with the memory as it is after this row, or before.
        gate: name in `Rows.memory` of (B,) bool, rows that are mixed at all; "" for every row.
    """

    memory: str
    keep: float
    take: float
    pool: Literal["max", "mean"]
    pull: float = 0.0
    push: float = 0.0
    updated: bool = False
    gate: str = ""


@dataclass(frozen=True)
class Simple:
    """What `Method.scores` and `Method.weights` do to rows, as numbers.

    Scores z become ``z + times z + lift |z|``, on the image also ``+ agreed mean |z|``, with the
    mean over all heads of the layer. Then, after the softmax, `mixing` acts on the weights.
    """

    times: Kinds = _NONE
    lift: Kinds = _NONE
    agreed: float = 0.0
    mixing: Mixing | None = None

    @property
    def pools(self) -> bool:
        """Whether it needs all heads of the layer."""
        return bool(self.agreed) or self.mixing is not None

    def then(self, other: Simple) -> Simple | None:
        """This edit and another after it; None where the two are not simple together."""
        both = self.on_scores and other.on_scores
        if both or (self.mixing and other.mixing):
            return None
        scores = self if self.on_scores else other
        mixing = self.mixing or other.mixing
        return Simple(scores.times, scores.lift, scores.agreed, mixing)

    @property
    def on_scores(self) -> bool:
        return any((*self.times, *self.lift, self.agreed))
