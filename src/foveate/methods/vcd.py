"""VCD: visual contrastive decoding (arXiv 2311.16922).

Next-token logits of the true image are contrasted with those of a heavily noised one: what the
model would write without seeing loses, what the picture supports wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..base.errors import FoveateError
from ..core.method import Method
from ..core.visual import runs

if TYPE_CHECKING:
    from ..core.context import Context

_STEPS = 1000  # of the noise schedule


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
    Idefics3 and SmolVLM do not, so there every tile counts as an image. Both frames that Qwen
    makes of a still image get the same noise (inferred).

    Attributes:
        alpha: strength of the contrast, 0 or more; 0 leaves only the plausibility cut. Default of
            the authors' scripts: 1.
        beta: plausibility cut, 0 to 1; 0 cuts nothing. Default of the authors' scripts: 0.1;
            their shell file passes 0.2.
        noise_step: index into the 1000-step schedule, 0 to 999. Published: 500.
        seed: of every image's generator; inferred, the authors draw from the global one.
    """

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "2311.16922"
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}
    example: ClassVar[dict[str, Any]] = {"alpha": 1.0, "beta": 0.0}

    def check(self) -> None:
        self.require(self.alpha >= 0, "alpha must be 0 or more")
        self.require(0 <= self.beta <= 1, "beta must lie between 0 and 1")
        self.require(
            0 <= self.noise_step < _STEPS, f"noise_step must lie between 0 and {_STEPS - 1}"
        )
        self.require(self.seed >= 0, "seed must be 0 or more")

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage != "contrast" or self.alpha != 0)

    # -- the noised image --------------------------------------------------------------------------

    def contrast(self, inputs: dict[str, Any], ctx: Context) -> dict[str, Any]:
        pixels = {
            key: value
            for key, value in inputs.items()
            if key.startswith("pixel_values")
            and isinstance(value, Tensor)
            and value.is_floating_point()
        }
        if not pixels and bool(_visual(inputs, ctx).any()):
            raise FoveateError(
                "vcd adds noise to the image, and this prompt has visual tokens but no "
                "pixel_values: pass the processor's pixels, not encoded features."
            )
        return {**inputs, **{key: self._noised(key, inputs, ctx) for key in pixels}}

    def _noised(self, key: str, inputs: dict[str, Any], ctx: Context) -> Tensor:
        """``inputs[key]`` after `noise_step` steps of forward diffusion; all-zero tiles stay."""
        betas = torch.linspace(-6, 6, _STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
        kept = math.prod((1 - betas[: self.noise_step + 1]).tolist())
        noised = inputs[key].clone()
        for image in _images(noised, key, inputs, ctx):
            generator = torch.Generator().manual_seed(self.seed)
            for tile in image:
                noise = torch.randn(tile.shape[1:], generator=generator).to(tile.device)
                if bool(tile.any()):
                    tile.copy_(math.sqrt(kept) * tile.float() + math.sqrt(1 - kept) * noise)
        return noised

    # -- the contrast ------------------------------------------------------------------------------

    def logits(self, logits: Tensor, other: Tensor | None, ctx: Context) -> Tensor:
        logits = logits.float()
        contrasted = logits
        if other is not None:
            contrasted = (1 + self.alpha) * logits - self.alpha * other.float()
        if self.beta == 0:
            return contrasted
        least = logits.amax(-1, keepdim=True) + math.log(self.beta)
        return contrasted.masked_fill(logits < least, -math.inf)


def _visual(inputs: dict[str, Any], ctx: Context) -> Tensor:
    """Visual tokens of this piece of prompt, (B, new) bool."""
    return ctx.visual[:, -inputs["attention_mask"].shape[1] :]


def _images(
    pixels: Tensor, key: str, inputs: dict[str, Any], ctx: Context
) -> Iterator[list[Tensor]]:
    """The images in a pixel tensor, each a list of its tiles.

    A tile is a view (copies, ...) into `pixels`, whose copies along the first dimension are to
    get the same noise: the frames that Qwen makes of a still image, otherwise one.
    """
    grid = inputs.get("video_grid_thw" if key.endswith("videos") else "image_grid_thw")
    if pixels.dim() == 2 and grid is not None:  # (patches, C * frames * P * P), Qwen
        vision = ctx.stack.model.config.vision_config
        frames, side = vision.temporal_patch_size, vision.patch_size
        patches = pixels.view(len(pixels), -1, frames, side * side)
        for image, length in zip(patches.split(grid.prod(-1).tolist()), grid[:, 0], strict=True):
            yield [image[None] if length > 1 else image.permute(2, 0, 1, 3)]
    elif pixels.dim() == 5 and (key.endswith("videos") or "image_sizes" in inputs):
        for image in pixels:  # (images, tiles, 3, H, W), LLaVA-NeXT and OneVision
            yield [tile[None] for tile in image]
    elif pixels.dim() == 5:  # (prompts, tiles, 3, H, W), Idefics3
        for tile in pixels.flatten(0, 1):
            yield [tile[None]]
    elif "image_sizes" in inputs:  # (images, 3, H, W), padded to the largest: Mistral3
        for image, (height, width) in zip(pixels, inputs["image_sizes"].tolist(), strict=True):
            padded = image[:, height:].any() or image[:, :, width:].any()
            yield [image[None] if padded else image[None, :, :height, :width]]
    else:  # (images, 3, H, W), or flat tiles (tiles, 3, H, W), InternVL
        tiles = iter(pixels)
        for count in _tile_counts(len(pixels), _visual(inputs, ctx)):
            yield [next(tiles)[None] for _ in range(count)]


def _tile_counts(tiles: int, visual: Tensor) -> list[int]:
    """Tiles of every image: its run of visual tokens is cut into tiles of equal length.

    All ones where the runs do not divide so, as with models that mark each row of an image.
    """
    lengths = [n for row in runs(visual) for n in row.bincount()[1:].tolist()]
    each = max(1, sum(lengths) // tiles)
    if sum(lengths) != each * tiles or any(n % each for n in lengths):
        return [1] * tiles
    return [n // each for n in lengths]
