"""ONLY: one layer's attention gives the contrast (arXiv 2507.00898).

Heads that spread their attention over the text, compared with how they spread it over the image,
show what the language alone would write. One row of one layer is enough to ask them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import Anatomy, Block, Method, Rows, Sequences, Stream, plausible, weighted


class Parts(NamedTuple):
    """What ONLY needs of a model: its depth, the layer that is read, the last one, and the end."""

    depth: int
    read: Block
    last: Block
    norm: Callable[[Tensor], Tensor]
    readout: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ONLY(Method):
    """One-layer intervention: the text-heavy heads of one layer against the whole model.

    In the layer read, the last row's weights A (H, K) are thinned: among the text columns, and
    among the image's, weights above mean + standard deviation become 0. What is left has an
    entropy on the text and one on the image; heads whose ratio r = H_text / H_image is below the
    heads' mean are silenced. The heads' output y = o_proj(A' V) skips to the last layer, which is
    entered with norm(y) + 0.2 h and adds its feed-forward part; h enters that layer in the model's
    own pass. Its prediction is l~ = head(norm(y) + 0.5 norm(h_L)), with h_L entering the final
    norm. With d = sum |softmax(l) - softmax(l~)|, between 0 and 2, the logits become
    l + alpha_pos l~ where d < gamma, else (1 + alpha_neg) l - alpha_neg l~, on tokens with at
    least `beta` times the probability of the likeliest; the rest get -inf. This happens in the
    prompt and at every decode step, before processors and warpers. The model's own pass is only
    read.

    Every sample decides for itself. Its first real token is in neither entropy and is never
    thinned (inferred for padded batches); text between images counts as text (inferred).

    Attributes:
        gamma: below this distance the two predictions are taken as one, 0 to 100; the largest
            distance is 2. Published: 0.2 on POPE, 0.25 on CHAIR and MME.
        alpha_pos: weight of what is added, 0 to 100. Published: 3.
        alpha_neg: weight of what is subtracted, 0 to 100. Published: 1.
        beta: plausibility cut, 0 to 1; 0 cuts nothing. Published: 0.1, on MME 0.4.
        layers: the one layer that is read. Published: 0.
    """

    gamma: float = 0.2
    alpha_pos: float = 3.0
    alpha_neg: float = 1.0
    beta: float = 0.1

    name: ClassVar[str] = "only"
    paper: ClassVar[str] = "2507.00898"
    paper_layers = (0,)
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"alpha_pos": 0.0, "alpha_neg": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {
        "gamma": 1.0,
        "alpha_pos": 1.0,
        "beta": 0.0,
        "layers": (2,),
    }

    def check(self) -> None:
        self.require(0 <= self.gamma <= 100, "gamma must lie between 0 and 100")
        self.require(0 <= self.alpha_pos <= 100, "alpha_pos must lie between 0 and 100")
        self.require(0 <= self.alpha_neg <= 100, "alpha_neg must lie between 0 and 100")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")
        one = self.layers is None or len(self.layers) == 1
        self.require(one, "layers names the one layer that is read, as in layers=(0,)")

    def wants(self, stage: str) -> bool:
        idle = self.alpha_pos == 0 and self.alpha_neg == 0
        return super().wants(stage) and (stage == "logits" or not idle)

    def setup(self, anatomy: Anatomy) -> Parts | None:
        if not self.layers:
            return None
        read, last = anatomy.block(self.layers[0]), anatomy.block(anatomy.depth - 1)
        return Parts(anatomy.depth, read, last, anatomy.norm, anatomy.readout())

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        depth = seq.plan.depth
        if stream.layer >= depth - 1 and seq.phase != "prefix":
            name = "last state" if stream.layer == depth else "before the last layer"
            seq.memory[name] = stream.last[:, None]
        return stream.x

    # -- the layer that is read --------------------------------------------------------------------

    def weights(self, rows: Rows) -> Tensor:
        first = rows.valid.cumsum(1) == 1  # and padding behind it, which has no weight
        image = rows.visual & rows.valid
        text = rows.valid & ~rows.visual & ~first
        a = rows.x
        for columns in (text, image):
            a = _thinned(a, columns[:, None, None])
        on_text = _entropy(a, text[:, None, None]).nan_to_num(nan=0.0)
        on_image = _entropy(a, image[:, None, None]).nan_to_num(nan=torch.inf)
        r = on_text / on_image
        a = torch.where(r < rows.over_heads(r, "mean"), 0, a)
        heads = weighted(a, rows.value).transpose(1, 2)  # (B, 1, H, D_v)
        rows.memory["y"] = rows.plan.read.output(heads.to(rows.value.dtype))
        return rows.x

    # -- the contrast ------------------------------------------------------------------------------

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        logits = logits.float()
        contrasted = logits
        if self.wants("before"):
            asked = self.skipped(seq).to(logits.device)
            distance = (logits.softmax(-1) - asked.softmax(-1)).abs().sum(-1, keepdim=True)
            plus = logits + self.alpha_pos * asked
            minus = (1 + self.alpha_neg) * logits - self.alpha_neg * asked
            contrasted = torch.where(distance < self.gamma, plus, minus)
        return plausible(contrasted, logits, self.beta)

    def skipped(self, seq: Sequences) -> Tensor:
        """l~ (B, V) float32: what the heads' output says by way of the last layer alone."""
        last, norm = seq.plan.last, seq.plan.norm
        h, h_L = seq.memory["before the last layer"], seq.memory["last state"]
        y = last.norm(seq.memory["y"]) + 0.2 * h
        y = y + last.feed_forward(y)
        return seq.plan.readout(norm(y) + 0.5 * norm(h_L))[:, 0]


def _thinned(a: Tensor, columns: Tensor) -> Tensor:
    """Weights (B, H, 1, K), 0 where they stand out among `columns` (B, 1, 1, K) bool."""
    count = columns.sum(-1, keepdim=True)
    mean = (a * columns).sum(-1, keepdim=True) / count
    variance = ((a - mean).square() * columns).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return a.masked_fill(columns & (a > mean + variance.sqrt()), 0)


def _entropy(a: Tensor, columns: Tensor) -> Tensor:
    """Of every head's weights (B, H, 1, K) among `columns`, (B, H, 1, 1); nan without any."""
    a = a * columns
    p = a / a.sum(-1, keepdim=True)
    return -(p * (p + 1e-6).log()).sum(-1, keepdim=True)
