"""VCD: visual contrastive decoding (arXiv 2311.16922).

Next-token logits of the true image are contrasted with those of a heavily noised one: what the
model would write without seeing loses, what the picture supports wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.perturb import STEPS, noise_levels
from ..core import FoveateError, Method, Prompt, Sequences, away_from


@dataclass(frozen=True)
class VCD(Method):
    """Visual contrastive decoding: the logits against those of a noised image.

    A second stream reads the same tokens beside an image noised as by ``noise_step`` steps of
    forward diffusion. Its logits l' are subtracted from the true l, (1 + alpha) l - alpha l', on
    tokens with at least `beta` times the probability of the likeliest; the rest get -inf. This
    happens in the prompt and at every decode step, before processors and warpers, so greedy
    decoding and sampling both use it. Attention is untouched.

    The noise of an image comes from a generator of its own, started with `seed`: the same image
    always gets the same noise, whatever else is in the batch or the prompt. The tiles of one
    image are noised independently (inferred) where the model tells which tiles belong together;
    Idefics2 and 3, SmolVLM, Llama 4 and MiniCPM-V do not, so there every tile counts as an image.
    Both frames that Qwen makes of a still image get the same noise (inferred).

    Attributes:
        alpha: strength of the contrast, 0 or more; 0 leaves only the plausibility cut. Default of
            the authors' scripts: 1.
        beta: plausibility cut, 0 to 1; 0 cuts nothing. Default of the authors' scripts: 0.1;
            their shell file passes 0.2.
        noise_step: index into the 1000-step schedule, 0 to 999. Published: 500.
        seed: of every image's generator, 0 or more; inferred, the authors draw from the global
            one.
    """

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "2311.16922"
    needs_pixels: ClassVar[bool] = True
    remembers: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"alpha": 1.0, "beta": 0.0}

    def check(self) -> None:
        self.require(self.alpha >= 0, "alpha must be 0 or more")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")
        self.require(0 <= self.noise_step < STEPS, f"noise_step must lie between 0 and {STEPS - 1}")
        self.require(self.seed >= 0, "seed must be 0 or more")

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage != "contrast" or self.alpha != 0)

    # -- the noised image --------------------------------------------------------------------------

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | None:
        if not bool(prompt.visual.any()):
            return None
        if not prompt.pixels:
            raise FoveateError(
                "vcd adds noise to the image, and this prompt has visual tokens but no "
                "pixel_values: pass the processor's pixels, not encoded features."
            )
        return prompt.repainted(self.add_noise)

    def add_noise(self, tiles: list[Tensor]) -> None:
        """`noise_step` steps of forward diffusion on a picture; all-zero tiles stay."""
        kept, strength = noise_levels(self.noise_step)
        generator = torch.Generator().manual_seed(self.seed)
        for tile in tiles:
            noise = torch.randn(tile.shape[1:], generator=generator).to(tile.device)
            if bool(tile.any()):
                tile.copy_(kept * tile.float() + strength * noise)

    # -- the contrast ------------------------------------------------------------------------------

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        return away_from(other, logits, self.alpha, self.beta)
