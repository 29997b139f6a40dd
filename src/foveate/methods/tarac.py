"""TARAC: temporal attention real-time accumulative connection (arXiv 2504.04099).

Attention to the image fades as an answer grows. TARAC keeps a fading sum of the attention that
earlier tokens gave the image and adds it to the row of the token being predicted.

No code of the TARAC authors is known. The update at the first token is that of the CLVS authors'
comparison; how the sum runs over tokens is inferred, and its alternatives are parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import Method, Mixing, Rows, Simple


@dataclass(frozen=True)
class TARAC(Method):
    """Accumulated attention: add what earlier tokens gave the image to the row of this one.

    Per layer, with S the last row's weights on visual tokens, pooled over heads: A <- alpha * A +
    S; every head's row gets ``beta * A`` on visual tokens and is divided by its sum. The prompt's
    last row is the first step, then every decode step; a new cache starts from nothing, more turns
    on the same cache go on. S is always taken before the injection.

    The memory is one float32 value per layer and key column, (B, 1, 1, K).

    Attributes:
        beta: strength of the injection, 0 or more; 0 leaves the row. The CLVS authors' code: 0.5.
        alpha: what is left of the sum after a token, 0 to 1. Inferred: 0.5 (the code it is
            compared in answers with one token, where it plays no part).
        pool: how heads are pooled into S: "max" as in the CLVS authors' code, "mean", or "head"
            for no pooling, one sum per head (both inferred).
        inject: the "updated" sum, this token's S included, as in the CLVS authors' code; or the
            "previous" one (inferred), under which the first token is plain.
        normalise: divide each token's sum by the sum of the powers of alpha in it, so that it is a
            mean over the steps that could see the token (inferred; off as in the plain sum).
        layers: 9 to 15, as the CLVS paper sets it for 32.
    """

    beta: float = 0.5
    alpha: float = 0.5
    pool: Literal["max", "mean", "head"] = "max"
    inject: Literal["updated", "previous"] = "updated"
    normalise: bool = False

    name: ClassVar[str] = "tarac"
    paper: ClassVar[str] = "2504.04099"
    paper_layers = (9, ..., 15)
    columns: ClassVar = "visual"
    neutral: ClassVar[dict[str, Any]] = {"beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"beta": 1.5, "alpha": 0.8}

    def check(self) -> None:
        self.require(self.beta >= 0, "beta must be 0 or more")
        self.require(0 <= self.alpha <= 1, "alpha must lie between 0 and 1")

    def weights(self, rows: Rows) -> Tensor:
        x, memory, layer = rows.x, rows.memory, f"layer {rows.layer}"
        visual = rows.visual[:, None, None].float()
        seen = (x if self.pool == "head" else rows.over_heads(x, self.pool)) * visual
        accumulated, updated = self.plus(seen, memory.get(layer))
        used = updated if self.inject == "updated" else accumulated
        if self.normalise:
            before, now = self.plus(visual, memory.get(f"{layer}, powers of alpha"))
            memory[f"{layer}, powers of alpha"] = now
            powers = now if self.inject == "updated" else before
            used = used / powers.clamp(min=1)  # below 1 only where never seen
        memory[layer] = updated
        x = torch.add(x, used, alpha=self.beta)  # x + beta A
        return x / x.sum(-1, keepdim=True)

    def simple(self, rows: Rows) -> Simple | None:
        if self.pool == "head" or self.normalise:
            return None
        name, updated = f"layer {rows.layer}", self.inject == "updated"
        mixing = Mixing(name, self.alpha, 1.0, self.pool, push=self.beta, updated=updated)
        return Simple(mixing=mixing)

    def plus(self, new: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
        """A, with the columns that have come since, and alpha A + S."""
        A = torch.zeros_like(new) if old is None else old.to(new.device)
        A = pad(A, (0, new.shape[3] - A.shape[3]))
        return A, torch.add(new, A, alpha=self.alpha)
