"""AvisC: don't miss the forest for the trees (arXiv 2405.17820).

A few image tokens draw most of the attention whatever is asked. A second stream sees only them,
and what it writes is subtracted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import FoveateError, Method, Prompt, Rows, Sequences, away_from


@dataclass(frozen=True)
class AvisC(Method):
    """Attentional vision calibration: logits against those of the image's "blind" tokens alone.

    The prompt is read once, and m_l (N) is the mean over heads of layer l's weights, of the last
    row on the image's columns. Of the layers, ordered by how much they give the image, the fewest
    are chosen that together give `layer_mass` of all that it gets; a is the mean of their m_l.
    Image tokens with a >= mean(a) + deviation std(a) are the blind ones and stay. All other image
    tokens are filled with zeros, ones or noise before the first layer of a second stream, which
    reads the prompt after that and then the same answer. Its logits l' are subtracted from the
    model's own l, (1 + alpha) l - alpha l', on tokens with at least `beta` times the probability
    of the likeliest; the rest get -inf. This happens before processors and warpers.

    Statistics are a sample's own, over the tokens of all its images (inferred). Layers that do not
    see the whole image are not asked (inferred). A later turn with an image chooses anew and fills
    among its own tokens (inferred). Qwen3-VL adds features to image tokens in its first layers;
    filled tokens get none (inferred).

    Attributes:
        layer_mass: share of the image's attention that the chosen layers reach, 0 to 1; one layer
            is chosen at least. Published: 0.5.
        deviation: how many standard deviations above the mean a blind token lies, -1000 to 1000.
            Published: 1.
        alpha: strength of the contrast, 0 to 100; 0 leaves only the plausibility cut. Published:
            1 on POPE and MME, 2.5 on AMBER.
        beta: plausibility cut, 0 to 1; 0 cuts nothing. Published: 0.1.
        fill: what other image tokens become: "zeros" as published, "ones", or "noise" from a
            normal distribution, drawn for every sample by a generator that starts at 0 (inferred).
        layers: those that are asked. None: all that see the whole image, as published.
    """

    layer_mass: float = 0.5
    deviation: float = 1.0
    alpha: float = 1.0
    beta: float = 0.1
    fill: Literal["zeros", "ones", "noise"] = "zeros"

    name: ClassVar[str] = "avisc"
    paper: ClassVar[str] = "2405.17820"
    rows: ClassVar = "prompt"
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"beta": 0.0}
    shares_prefix: ClassVar[bool] = False

    def check(self) -> None:
        self.require(0 <= self.layer_mass <= 1, "layer_mass must lie between 0 and 1")
        self.require(-1000 <= self.deviation <= 1000, "deviation must lie between -1000 and 1000")
        self.require(0 <= self.alpha <= 100, "alpha must lie between 0 and 100")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage == "logits" or self.alpha != 0)

    # -- the second stream -------------------------------------------------------------------------

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        if not bool(prompt.visual.any()):
            return None
        if seq.phase == "prefix":
            raise FoveateError(
                "avisc fills image tokens by what the whole prompt ends with, so no prefix can be "
                "filled before its question: give whole prompts."
            )
        return dataclasses.replace(prompt, after=True)

    def weights(self, rows: Rows) -> Tensor:
        m = rows.over_heads(rows.x, "mean")[:, 0, -1]  # (B, K)
        seq = rows.seq
        seq.scratch.setdefault("m", []).append(m.masked_fill(~rows.visual, 0))
        return rows.x

    def other_embeds(self, embeds: Tensor, seq: Sequences) -> Tensor:
        visual = seq.visual.to(embeds.device)
        m = torch.stack([layer.to(embeds.device) for layer in seq.scratch["m"]])  # (L, B, K)
        blind = self.blind(m[..., : visual.shape[1]], visual)
        new = embeds.shape[1]
        filled = (visual & ~blind)[:, -new:, None]
        return torch.where(filled, self.filling(embeds, visual[:, -new:]), embeds)

    def blind(self, m: Tensor, visual: Tensor) -> Tensor:
        """(B, K) bool of every layer's weights (L, B, K), 0 beside the image."""
        share, order = (m.sum(-1) / m.sum((0, -1))).sort(0, descending=True)  # (L, B)
        before = pad(share.cumsum(0)[:-1], (0, 0, 1, 0), value=-1.0)  # without the layer itself
        chosen = torch.zeros_like(visual[:, 0].expand_as(order)).scatter(
            0, order, before < self.layer_mass
        )
        a = (m * chosen[..., None]).sum(0) / chosen.sum(0)[:, None]
        count = visual.sum(-1, keepdim=True)
        mean = a.sum(-1, keepdim=True) / count
        square = ((a - mean).square() * visual).sum(-1, keepdim=True)
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        return visual & (a >= mean + self.deviation * deviation)

    def filling(self, embeds: Tensor, visual: Tensor) -> Tensor:
        """What takes the place of embeddings (B, N, D) where `visual` (B, N) bool."""
        if self.fill != "noise":
            return torch.full_like(embeds, float(self.fill == "ones"))
        noise = torch.zeros_like(embeds)
        for row, tokens in zip(noise, visual, strict=True):
            generator = torch.Generator().manual_seed(0)
            size = (int(tokens.sum()), embeds.shape[-1])
            row[tokens] = torch.randn(size, generator=generator).to(row)
        return noise

    # -- the contrast ------------------------------------------------------------------------------

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        return away_from(other, logits, self.alpha, self.beta)
