"""Ways to change a picture: what a second stream sees, or what a test of robustness asks about.

    perturbed(image, "rotate(degrees=90)+blur", seed=0)

Every perturbation is a frozen dataclass with a text form. It takes an RGB picture and a generator
and returns a new RGB picture of the same size, unless it says otherwise. A plug-in adds its own
with the entry-point group ``foveate.perturbations``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Generator

from .form import Form, Registry

STEPS = 1000  # of the noise schedule

registry = Registry(
    "perturbation", "foveate.perturbations", "rotate(degrees=90)+blur", (), __name__
)


@dataclass(frozen=True)
class Perturbation(Form):
    """A change of a picture. A subclass with a `name` registers itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registry.add(cls)

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        """The changed picture; `image` stays as it is.

        Args:
            image: RGB. generator: on the CPU; every random number comes from it.
        """
        raise NotImplementedError


def perturbed(image: Image.Image, what: str, seed: int = 0) -> Image.Image:
    """`image`, RGB, after the perturbations of a text form, in their order.

    Raises:
        FoveateError: a text that cannot be read, an unknown perturbation or parameter.
    """
    generator = own_generator(image, seed)
    for one in registry.parse(what):
        image = one(image, generator)
    return image


def own_generator(image: Image.Image, seed: int) -> Generator:
    """A generator that depends on the seed and the picture's pixels, and on nothing else."""
    content = hashlib.sha256(repr((seed, image.size)).encode())
    content.update(image.tobytes())
    return Generator().manual_seed(int.from_bytes(content.digest()[:8]) >> 1)


def noise_levels(step: int) -> tuple[float, float]:
    """What `step` + 1 steps of VCD's schedule leave of the pixels, and how much noise they add.

    The schedule is that of VCD's authors (arXiv 2311.16922): 1000 steps on a sigmoid from 1e-5 to
    5e-3.
    """
    betas = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = math.prod((1 - betas[: step + 1]).tolist())
    return math.sqrt(kept), math.sqrt(1 - kept)


@dataclass(frozen=True)
class Identity(Perturbation):
    """The picture as it is."""

    name: ClassVar[str] = "identity"

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        return image.copy()


@dataclass(frozen=True)
class Noise(Perturbation):
    """Forward diffusion, as VCD does it, on pixel values scaled to -1..1.

    Attributes:
        step: of the 1000-step schedule, 0 to 999.
    """

    step: int = 500

    name: ClassVar[str] = "noise"

    def check(self) -> None:
        self.require(0 <= self.step < STEPS, f"step must lie between 0 and {STEPS - 1}")

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        kept, strength = noise_levels(self.step)
        values = np.asarray(image, np.float32) / 127.5 - 1
        noise = torch.randn(values.shape, generator=generator).numpy()
        return _picture((kept * values + strength * noise + 1) * 127.5)


@dataclass(frozen=True)
class Blur(Perturbation):
    """Gaussian blur with a square kernel; the picture is mirrored at its borders.

    Attributes:
        kernel: side in pixels, odd, 1 to 101.
        low, high: the standard deviation in pixels is uniform between them.
    """

    kernel: int = 13
    low: float = 1.5
    high: float = 2.0

    name: ClassVar[str] = "blur"

    def check(self) -> None:
        self.require(
            1 <= self.kernel <= 101 and self.kernel % 2 == 1, "kernel must be odd, 1 to 101"
        )
        self.require(0 < self.low <= self.high < math.inf, "low must be above 0, high not below it")

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        sigma, reach = _uniform(generator, self.low, self.high), self.kernel // 2
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        taps /= taps.sum()
        values = np.asarray(image, np.float64)
        for axis in (0, 1):
            edges = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
            padded, length = np.pad(values, edges, mode="reflect"), values.shape[axis]
            values = sum(  # type: ignore[assignment]
                tap * padded.take(range(i, i + length), axis) for i, tap in enumerate(taps)
            )
        return _picture(values)


@dataclass(frozen=True)
class Grey(Perturbation):
    """The picture without its colours."""

    name: ClassVar[str] = "grey"

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        return image.convert("L").convert("RGB")


@dataclass(frozen=True)
class Mask(Perturbation):
    """Cells of a square grid over the picture, drawn at random, turn black.

    Attributes:
        share: of the cells, 0 to 1.
        cells: along each side, 1 to 64.
    """

    share: float = 0.5
    cells: int = 8

    name: ClassVar[str] = "mask"

    def check(self) -> None:
        self.require(0 <= self.share <= 1, "share must lie between 0 and 1")
        self.require(1 <= self.cells <= 64, "cells must lie between 1 and 64")

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        n = self.cells
        hidden = torch.randperm(n * n, generator=generator)[: round(self.share * n * n)]
        cell = np.zeros(n * n, bool)
        cell[hidden.numpy()] = True
        rows, columns = (np.arange(side) * n // side for side in (image.height, image.width))
        black = cell.reshape(n, n)[rows][:, columns]
        return Image.fromarray(np.where(black[..., None], 0, np.asarray(image)).astype(np.uint8))


@dataclass(frozen=True)
class Flip(Perturbation):
    """The mirrored picture: left and right change sides, or top and bottom."""

    axis: Literal["horizontal", "vertical"] = "horizontal"

    name: ClassVar[str] = "flip"

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        return ImageOps.mirror(image) if self.axis == "horizontal" else ImageOps.flip(image)


@dataclass(frozen=True)
class Rotate(Perturbation):
    """Rotation about the centre by a random angle; what comes in at the corners is black.

    Attributes:
        degrees: the angle is uniform between -degrees and degrees; 0 to 180.
    """

    degrees: float = 180.0

    name: ClassVar[str] = "rotate"

    def check(self) -> None:
        self.require(0 <= self.degrees <= 180, "degrees must lie between 0 and 180")

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        return image.rotate(_uniform(generator, -self.degrees, self.degrees))


@dataclass(frozen=True)
class Jitter(Perturbation):
    """Random brightness, contrast, saturation and hue, in random order.

    The factors of the first three are uniform between 1 - x, at least 0, and 1 + x. The hue is
    shifted by a share of the colour circle that is uniform between -hue and hue.

    Attributes:
        brightness, contrast, saturation: 0 to 10. hue: 0 to 0.5.
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.5

    name: ClassVar[str] = "jitter"

    def check(self) -> None:
        for field in ("brightness", "contrast", "saturation"):
            self.require(0 <= getattr(self, field) <= 10, f"{field} must lie between 0 and 10")
        self.require(0 <= self.hue <= 0.5, "hue must lie between 0 and 0.5")

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        order = torch.randperm(4, generator=generator).tolist()
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [_uniform(generator, max(0.0, 1 - x), 1 + x) for x in strengths]
        turn = _uniform(generator, -self.hue, self.hue)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for i in order:
            image = enhancers[i](image).enhance(factors[i]) if i < 3 else _turned(image, turn)
        return image


@dataclass(frozen=True)
class Crop(Perturbation):
    """A random rectangle of the picture, resized bilinearly.

    After ten draws that do not fit, it is the largest one in the middle with an allowed ratio.

    Attributes:
        low, high: the rectangle's share of the area is uniform between them, 0 to 1.
        ratio: its width over its height lies between 1 / ratio and ratio, uniform in the
            logarithm; 1 to 10.
        side: of the square that it is resized to, 1 to 4096; None: the picture's own size.
    """

    low: float = 0.08
    high: float = 1.0
    ratio: float = 4 / 3
    side: int | None = None

    name: ClassVar[str] = "crop"

    def check(self) -> None:
        self.require(0 < self.low <= self.high <= 1, "low and high must rise between 0 and 1")
        self.require(1 <= self.ratio <= 10, "ratio must lie between 1 and 10")
        self.require(self.side is None or 1 <= self.side <= 4096, "side must lie in 1 to 4096")

    def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
        left, top, width, height = self.rectangle(image.size, generator)
        size = image.size if self.side is None else (self.side, self.side)
        part = image.crop((left, top, left + width, top + height))
        return part.resize(size, Image.Resampling.BILINEAR)

    def rectangle(self, size: tuple[int, int], generator: Generator) -> tuple[int, int, int, int]:
        """(left, top, width, height) in pixels of a picture of (width, height)."""
        across, down = size
        for _ in range(10):
            area = across * down * _uniform(generator, self.low, self.high)
            ratio = math.exp(_uniform(generator, -math.log(self.ratio), math.log(self.ratio)))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= across and 0 < height <= down:
                top = int(torch.randint(down - height + 1, (1,), generator=generator))
                left = int(torch.randint(across - width + 1, (1,), generator=generator))
                return left, top, width, height
        width = min(across, round(down * self.ratio))
        height = min(down, round(across * self.ratio))
        return (across - width) // 2, (down - height) // 2, width, height


def _uniform(generator: Generator, low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high, generator=generator))


def _picture(values: np.ndarray) -> Image.Image:
    """Values (H, W, 3) in 0..255, rounded and clipped."""
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def _turned(image: Image.Image, turn: float) -> Image.Image:
    """The picture with its hues shifted by a share of the colour circle, of 256 steps."""
    hue, *others = image.convert("HSV").split()
    turned = (np.asarray(hue, int) + int(turn * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), *others)).convert("RGB")
