"""Perturbations of pictures against pixel loops, and what their randomness depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from foveate import FoveateError
from foveate.base import perturb
from foveate.base.perturb import Blur, Crop, Jitter, Mask, Noise, Rotate, own_generator, perturbed
from tests.references import ritual as reference
from tests.references import vcd

NAMES = "blur crop flip grey identity jitter mask noise rotate"


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def test_the_registry_has_these() -> None:
    assert list(perturb.registry.all()) == NAMES.split()


@pytest.mark.parametrize("name", NAMES.split())
def test_every_perturbation_keeps_size_mode_and_the_original(name: str) -> None:
    image = picture()
    before = image.tobytes()
    changed = perturbed(image, name, seed=3)
    assert (changed.size, changed.mode) == (image.size, "RGB")
    assert image.tobytes() == before
    assert (changed.tobytes() != before) == (name != "identity")
    assert perturbed(picture(), name, seed=3).tobytes() == changed.tobytes()


def test_the_generator_depends_on_seed_and_picture_alone() -> None:
    def first(image: Image.Image, seed: int) -> int:
        return int(torch.randint(2**40, (1,), generator=own_generator(image, seed)))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    draws = {first(picture(s), seed) for s in range(4) for seed in range(4)}
    assert len(draws) == 16
    assert first(picture(), 0) == first(picture().copy(), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_several_act_in_their_order() -> None:
    image = picture()
    both = perturbed(image, "grey+flip(axis='vertical')")
    assert np.array_equal(pixels(both), pixels(image.convert("L").convert("RGB"))[::-1])
    assert np.array_equal(pixels(perturbed(image, "flip")), pixels(image)[:, ::-1])


def test_rotation_looks_every_pixel_up_where_it_came_from() -> None:
    for seed in range(4):
        angle = float(torch.empty(1).uniform_(-180, 180, generator=generator(seed)))
        got = Rotate()(picture(), generator(seed))
        slow = reference.rotated(np.asarray(picture()), angle)
        assert (pixels(got) != slow).any(2).mean() < 0.01, "but for ties of rounding"
    assert Rotate(degrees=0)(picture(), generator()).tobytes() == picture().tobytes()


@pytest.mark.parametrize("kernel", [13, 3])
def test_blur_is_the_weighted_mean_of_a_square(kernel: int) -> None:
    image = picture(1, 20, 16)
    sigma = float(torch.empty(1).uniform_(1.5, 2, generator=generator(5)))
    got = Blur(kernel=kernel)(image, generator(5))
    assert abs(pixels(got) - reference.blurred(np.asarray(image), kernel, sigma)).max() <= 1
    assert abs(pixels(got) - reference.blurred(np.asarray(image), kernel, sigma)).mean() < 1e-3


def test_jitter_follows_its_definition_in_the_drawn_order() -> None:
    orders = set()
    for seed in range(8):
        draws = generator(seed)
        order = torch.randperm(4, generator=draws).tolist()
        factors = [float(torch.empty(1).uniform_(0, 2, generator=draws)) for _ in range(3)]
        turn = float(torch.empty(1).uniform_(-0.5, 0.5, generator=draws))
        got = pixels(Jitter()(picture(), generator(seed)))
        slow = reference.jittered(np.asarray(picture()), order, factors, turn)
        # Pillow rounds after every step, and hue and saturation to 256 steps
        assert abs(got - slow).mean() < 4, (order, factors, turn)
        orders.add(tuple(order))
    assert len(orders) > 1
    still = Jitter(brightness=0, contrast=0, saturation=0, hue=0)(picture(), generator())
    assert abs(pixels(still) - pixels(picture())).mean() < 2


def test_a_crop_has_an_allowed_area_and_ratio_and_lies_anywhere() -> None:
    draws, size = generator(), (400, 300)
    found = np.array([Crop().rectangle(size, draws) for _ in range(500)])
    left, top, width, height = found.T
    assert (left >= 0).all()
    assert (left + width <= 400).all()
    assert (top >= 0).all()
    assert (top + height <= 300).all()
    area, ratio = width * height / 120_000, width / height
    assert 0.079 < area.min() < 0.1
    assert area.max() > 0.8
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.35
    assert abs(np.log(ratio)).mean() == pytest.approx(np.log(4 / 3) / 2, rel=0.15)
    long = Crop(low=1.0).rectangle((400, 100), generator())
    assert long == (133, 0, 133, 100), "nothing fits: the middle, with the widest ratio"
    assert Crop(side=8)(picture(), generator()).size == (8, 8)
    left, top, width, height = Crop().rectangle((40, 30), generator(2))
    part = picture().crop((left, top, left + width, top + height))
    assert Crop()(picture(), generator(2)).tobytes() == part.resize((40, 30), 2).tobytes()


def test_noise_has_the_levels_of_the_schedule() -> None:
    flat = Image.new("RGB", (64, 64), (160, 160, 160))
    for step in (100, 300):
        kept, strength = vcd.levels(step)
        values = pixels(Noise(step=step)(flat, generator())) / 127.5 - 1
        assert values.mean() == pytest.approx(kept * (160 / 127.5 - 1), abs=0.01)
        assert values.std() == pytest.approx(strength, rel=0.05)


def test_a_mask_hides_its_share_of_the_cells() -> None:
    white = Image.new("RGB", (64, 32), "white")
    shown = pixels(Mask(share=0.25)(white, generator()))
    assert (shown == 0).mean() == 0.25
    cells = shown.reshape(8, 4, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(64, -1)
    assert (np.ptp(cells, axis=1) == 0).all()
    assert (pixels(Mask(share=1.0)(white, generator())) == 0).all()
    assert Mask(share=0.0)(white, generator()).tobytes() == white.tobytes()


def test_ones_own_perturbation_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturb.registry, "classes", dict(perturb.registry.all()))

    @dataclass(frozen=True)
    class Negative(perturb.Perturbation):
        name: ClassVar[str] = "negative"

        def __call__(self, image: Image.Image, generator: Generator) -> Image.Image:
            return Image.fromarray(255 - np.asarray(image))

    assert np.array_equal(pixels(perturbed(picture(), "negative")), 255 - pixels(picture()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blurr", "no perturbation 'blurr' .did you mean 'blur'"),
        ("blur(kernel=4)", "kernel must be odd"),
        ("blur(low=3.0)", "low must be above 0"),
        ("noise(step=1000)", "step must lie between 0 and 999"),
        ("mask(share=2)", "share must lie between 0 and 1"),
        ("mask(cells=0)", "cells must lie between 1 and 64"),
        ("rotate(degrees=181)", "degrees must lie between 0 and 180"),
        ("jitter(hue=0.6)", "hue must lie between 0 and 0.5"),
        ("jitter(contrast=-1)", "contrast must lie between 0 and 10"),
        ("crop(low=0)", "low and high must rise"),
        ("crop(ratio=0.5)", "ratio must lie between 1 and 10"),
        ("crop(side=0)", "side must lie in 1 to 4096"),
        ("flip(axis=up)", "axis must be 'horizontal' or 'vertical'"),
        ("/tmp/blur", "Cannot read the perturbation"),
    ],
)
def test_senseless_text_is_refused(text: str, message: str) -> None:
    image: Any = picture()
    with pytest.raises(FoveateError, match=message):
        perturbed(image, text)
