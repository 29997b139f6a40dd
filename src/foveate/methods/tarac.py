"""TARAC: temporal attention real-time accumulative connection (arXiv 2504.04099).

Attention to the image fades as an answer grows. TARAC keeps a fading sum of the attention that
earlier tokens gave the image and adds it to the row of the token being predicted.

No code of the TARAC authors is known. The update at the first token is that of the CLVS authors'
comparison; how the sum runs over tokens is inferred, and its alternatives are parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.method import Method

if TYPE_CHECKING:
    from ..backends.transformers.attention import Rows


@dataclass(frozen=True)
class TARAC(Method):
    """Accumulated attention: add what earlier tokens gave the image to the row of this one.

    Per layer, with S the last row's weights on visual tokens, pooled over heads: A <- alpha * A +
    S; every head's row gets ``beta * A`` on visual tokens and is divided by its sum. The prompt's
    last row is the first step, then every decode step; a new cache starts from nothing, more turns
    on the same cache go on. S is always taken before the injection.

    The memory is one float32 value per layer and visual column, (B, 1, 1, columns of the prompt).

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
    neutral: ClassVar[dict[str, Any]] = {"beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"beta": 1.5, "alpha": 0.8}

    def check(self) -> None:
        self.require(self.beta >= 0, "beta must be 0 or more")
        self.require(0 <= self.alpha <= 1, "alpha must lie between 0 and 1")

    def weights(self, rows: Rows) -> Tensor:
        x, sums = rows.x, rows.memory.setdefault("sums", {})  # layer -> (B, 1 or H, 1, width)
        width = rows.ctx.visual.shape[1]
        visual = rows.visual[:, None, None, :width].float()
        seen = x[..., :width]
        if self.pool != "head":
            seen = seen.amax(1, keepdim=True) if self.pool == "max" else seen.mean(1, keepdim=True)
        seen = seen * visual
        if self.normalise:  # one more "head", that counts
            seen = torch.cat([seen, visual], 1)
        before = sums.get(rows.layer)
        before = torch.zeros_like(seen) if before is None else before.to(x.device)
        before = pad(before, (0, width - before.shape[3]))  # columns of a further turn
        sums[rows.layer] = torch.add(seen, before, alpha=self.alpha)
        used = sums[rows.layer] if self.inject == "updated" else before
        if self.normalise:
            used = used[:, :-1] / used[:, -1:].clamp(min=1)  # below 1 only where never seen
        x = torch.add(x, pad(used, (0, x.shape[3] - width)), alpha=self.beta)
        return x / x.sum(-1, keepdim=True)
