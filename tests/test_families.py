"""Where visual tokens lie: the model itself is asked, with a mark painted into a blank picture."""

from __future__ import annotations

import functools
import inspect
import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from foveate.base.errors import FoveateError
from foveate.families.layout import Grid, grids, together
from tests import models as families
from tests import tiny

SIDE = {"height": 16, "width": 16}
EDGE = {"shortest_edge": 16}
SHAPES = [(96, 96), (160, 120), (90, 200), (400, 50), (50, 400)]  # width and height in pixels
ANYRES = {"size": SIDE, "image_grid_pinpoints": families.PINPOINTS}


@dataclass
class Case:
    """A family's tiny model with the image processor that belongs to it."""

    family: str
    processor: str
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    images: int = 1
    tile: int | None = None  # tokens of a run, where an image has several


QWEN = {
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
}
CUT = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
CASES = {
    "squeezed": Case("llava", "CLIP", {"size": SIDE, "do_center_crop": False}),
    "cropped": Case("llava", "CLIP", {"size": EDGE, "crop_size": SIDE}),
    "cropped closer": Case("llava", "CLIP", {"size": {"shortest_edge": 23}, "crop_size": SIDE}),
    "letterboxed": Case("llava", "Llava", {"size": EDGE, "crop_size": SIDE, "do_pad": True}),
    "llava_next": Case("llava_next", "LlavaNext", {**ANYRES, "crop_size": SIDE}),
    "llava_onevision": Case("llava_onevision", "LlavaOnevision", ANYRES),
    "pooled": Case(
        "llava_onevision", "LlavaOnevision", ANYRES, {"vision_aspect_ratio": "anyres_max_1"}
    ),
    "several": Case("llava_onevision", "LlavaOnevision", ANYRES, images=2),
    "qwen2_vl": Case("qwen2_vl", "Qwen2VL", QWEN),
    "qwen2_5_vl": Case("qwen2_5_vl", "Qwen2VL", QWEN),
    "qwen3_vl": Case("qwen3_vl", "Qwen2VL", QWEN),
    "internvl": Case(
        "internvl", "GotOcr2", {"size": SIDE, "crop_to_patches": True, "max_patches": 6}
    ),
    "two internvl": Case(
        "internvl", "GotOcr2", {"size": SIDE, "crop_to_patches": True, "max_patches": 6}, images=2
    ),
    "idefics3": Case("idefics3", "Idefics3", CUT, tile=4),
    "odd idefics3": Case("idefics3", "Idefics3", {**CUT, "size": {"longest_edge": 55}}, tile=4),
    "two smolvlm": Case("smolvlm", "SmolVLM", CUT, images=2, tile=4),
    "unsplit": Case("smolvlm", "SmolVLM", {**CUT, "do_image_splitting": False}, tile=4),
    "mistral3": Case("mistral3", "Pixtral", {"patch_size": 8, "size": {"longest_edge": 64}}),
    "gemma3": Case("gemma3", "Gemma3", {"size": {"height": 24, "width": 24}}),
    "gemma4": Case(
        "gemma4", "Gemma4", {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    ),
}
SLOW = ("gemma4",)
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, case in CASES.items()
    if case.family in families.FAMILIES
]


class Eye:
    """One case's model whose vision tower lets no token look at another."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model: Any = families.build(case.family, fresh=True)
        self.model.config.update(case.config)
        for name, parameter in self.model.named_parameters():
            if ("attn" in name or "attention" in name) and not (
                "language" in name or "text" in name
            ):
                parameter.data.zero_()
        made = tiny.image_processor(case.processor)(**case.options)
        self.processor = SimpleNamespace(image_processor=made)

    def __call__(self, pictures: list[Image.Image]) -> tuple[dict[str, Tensor], Tensor]:
        """A prompt's inputs, and its visual tokens' features (N_v, D)."""
        nested = self.case.tile is not None or self.case.family == "llava_onevision"
        images = [pictures] if nested else pictures
        inputs = self.processor.image_processor(images, return_tensors="pt")
        see = self.model.model.get_image_features
        wanted = inspect.signature(see).parameters
        with torch.no_grad():
            found = see(**{k: v for k, v in inputs.items() if k in wanted}, return_dict=True)
        parts = list(found.pooler_output)
        if self.case.family == "internvl":  # one run per image, not per tile
            parts = [torch.cat(p) for p in _split(parts, inputs["num_patches"].tolist())]
        features = torch.cat(parts)
        sizes = [self.case.tile] * (len(features) // self.case.tile) if self.case.tile else None
        ids = [families.BOS]
        for count in sizes or map(len, parts):
            ids += families.wrapped(count, "")
        return {**inputs, "input_ids": torch.tensor([ids])}, features

    def grids(self, inputs: dict[str, Tensor], pictures: list[Image.Image]) -> list[Grid]:
        sizes = [[picture.size for picture in pictures]]
        return grids(self.model, inputs, sizes, self.processor)[0]


def _split(parts: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    rest = iter(parts)
    return [[next(rest) for _ in range(count)] for count in counts]


@functools.cache
def look(name: str) -> Eye:
    return Eye(CASES[name])


@pytest.fixture(params=NAMES)
def eye(request: pytest.FixtureRequest) -> Eye:
    return look(request.param)


def blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (70, 80, 60))


def pictures(case: Case, size: tuple[int, int]) -> list[Image.Image]:
    """One blank picture, and a lying and a standing one behind it where the case has several."""
    return [blank(s) for s in [size, size[::-1]][: case.images]]


@pytest.mark.parametrize("size", SHAPES)
def test_a_mark_changes_the_token_of_its_place(eye, size):
    clean = pictures(eye.case, size)
    inputs, before = eye(clean)
    laid = eye.grids(inputs, clean)
    dice, seen = random.Random(0), set()
    for grid in laid:
        tokens = [t for t in range(grid.start, grid.stop) if grid.cell(t)]
        some = 3 if len(laid) < 4 else 1
        for token in {tokens[0], tokens[-1], *dice.sample(tokens, min(some, len(tokens)))}:
            box = mark(grid.cell(token), clean[grid.image].size)
            if box is None:
                continue  # on padding
            marked = [picture.copy() for picture in clean]
            marked[grid.image].paste((255, 250, 240), box)
            change = (eye(marked)[1] - before).norm(dim=-1)
            width, height = clean[grid.image].size
            x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
            for other in laid:
                part = change[other.start : other.stop]
                if other.image != grid.image:
                    assert part.max() == 0
                    continue
                under = other.token(x, y)
                cell = None if under is None else other.cell(under)
                if cell and holds(cell, box, (width, height)):
                    assert other.start + int(part.argmax()) == under
                    assert part.max() > 0
                    seen.add(other)
            for place in range(len(change)):
                if not any(other.cell(place) for other in laid):
                    assert change[place] == 0  # a newline
    assert seen == set(laid)


def mark(cell: Any, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The inner part, in pixels, of what of a cell lies on an image; None where nothing does."""
    box = []
    for low, high, length in ((cell[0], cell[2], size[0]), (cell[1], cell[3], size[1])):
        low, high = max(low, 0.0) * length, min(high, 1.0) * length
        if high - low < 2:
            return None
        margin = (high - low) / 5
        box.append((math.ceil(low + margin), math.floor(high - margin)))
    (left, right), (top, bottom) = box
    return (left, top, right, bottom) if right > left and bottom > top else None


def holds(cell: Any, box: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
    width, height = size
    return (
        cell[0] * width <= box[0]
        and cell[1] * height <= box[1]
        and cell[2] * width >= box[2]
        and cell[3] * height >= box[3]
    )


def random_sizes(dice: random.Random, count: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels; a third of them panoramas and towers of up to 1 to 30."""
    plain = [(dice.randint(20, 300), dice.randint(20, 300)) for _ in range(count)]
    long = [(dice.randint(150, 600), dice.randint(20, 40)) for _ in range(count // 2)]
    return plain + [s[:: dice.choice((1, -1))] for s in long]


def test_pixel_to_token_to_pixel_stays_in_the_cell(eye):
    dice = random.Random(1)
    for size in random_sizes(dice, 10):
        given = pictures(eye.case, size)
        inputs, features = eye(given)  # the model says how many tokens there are
        laid = eye.grids(inputs, given)
        owners = [[g for g in laid if g.cell(t)] for t in range(len(features))]
        assert max(map(len, owners)) == 1
        assert {g.image for g in laid} == set(range(eye.case.images))
        for grid in laid:
            for _ in range(20):
                x, y = dice.random(), dice.random()
                token = grid.token(x, y)
                left, top, right, bottom = grid.box
                assert (token is None) == (not (left <= x <= right and top <= y <= bottom))
                if token is not None:
                    cell = grid.cell(token)
                    assert cell[0] - 1e-9 <= x <= cell[2] + 1e-9
                    assert cell[1] - 1e-9 <= y <= cell[3] + 1e-9
                    assert owners[token] == [grid]
            for token in range(grid.start, grid.stop):
                if cell := grid.cell(token):
                    assert grid.token((cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2) == token
            assert grid.heat(torch.arange(len(features))).flatten().tolist() == [
                t for t in range(grid.start, grid.stop) if grid.cell(t)
            ]


def test_one_map_keeps_the_mass_and_the_peak(eye):
    dice = random.Random(2)
    for size in random_sizes(dice, 6):
        given = pictures(eye.case, size)
        inputs, features = eye(given)
        laid = eye.grids(inputs, given)
        for image in range(eye.case.images):
            mine = [grid for grid in laid if grid.image == image]
            values = torch.rand(2, 3, len(features))
            heat, box = together(laid, values, image)
            mass = sum(grid.heat(values).sum((-2, -1)) for grid in mine)
            torch.testing.assert_close(heat.sum((-2, -1)), mass)
            map_ = Grid(*heat.shape[-2:], box=box)
            for grid in mine:
                token = dice.choice([t for t in range(grid.start, grid.stop) if grid.cell(t)])
                left, top, right, bottom = grid.cell(token)
                x, y = (left + right) / 2, (top + bottom) / 2
                if map_.token(x, y) is None or not (0 < x < 1 and 0 < y < 1):
                    continue
                peak = torch.full((len(features),), 0.01)
                peak[token] = 5.0
                heat, _ = together(laid, peak, image)
                found = map_.cell(int(heat.flatten().argmax()))
                assert found[0] <= right + 1e-9
                assert found[2] >= left - 1e-9
                assert found[1] <= bottom + 1e-9
                assert found[3] >= top - 1e-9


def test_a_tile_token_is_its_own_place_in_the_one_map():
    eye = look("internvl")
    given = [blank((150, 100))]
    inputs, features = eye(given)
    laid = eye.grids(inputs, given)
    assert [g.box for g in laid[:2]] == [(0, 0, 1 / 3, 0.5), (1 / 3, 0, 2 / 3, 0.5)]
    peak = torch.zeros(len(features))
    peak[laid[3].token(0.05, 0.95)] = 1  # lower left tile
    heat, box = together(laid, peak)
    assert (heat.shape, box) == ((4, 6), (0, 0, 1, 1))
    assert heat[3, 0] == heat.sum() == 1


# -- at full size, by the models' own packing ------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["LlavaNext", "LlavaOnevision"])
def test_full_size_mosaics_are_where_the_model_packs_them(name):
    """Every patch carries its place on the padded canvas through `pack_image_features`."""
    config = getattr(tf, f"{name}Config")()
    model = getattr(tf, f"{name}Model")
    if name == "LlavaNext":
        config.image_grid_pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        options: dict[str, Any] = {"vision_feature_select_strategy": "default"}
    else:
        options = {"vision_aspect_ratio": config.vision_aspect_ratio}
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    assert side in (24, 27)
    dice = random.Random(3)
    sizes = [(dice.randint(30, 3000), dice.randint(30, 3000)) for _ in range(6)]
    sizes += [
        (2400, 300),
        (300, 2400),
        (1000, 1000),
        (2000, 40),
        (40, 2000),
        (5000, 24),
        (24, 5000),
    ]
    for width, height in sizes:
        canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
        rows, cols = (edge // tile for edge in canvas)
        places = torch.stack(  # (x, y) of every patch, in pixels of the canvas
            torch.meshgrid(
                (torch.arange(cols * side) + 0.5) * (tile / side),
                (torch.arange(rows * side) + 0.5) * (tile / side),
                indexing="xy",
            ),
            -1,
        ).double()
        tiled = places.view(rows, side, cols, side, 2).transpose(1, 2).reshape(-1, side**2, 2)
        base = torch.full((1, side**2, 2), -1.0, dtype=torch.float64)
        packed, _ = model.pack_image_features(
            SimpleNamespace(config=config),
            [torch.cat([base, tiled])],
            torch.tensor([[height, width]]),
            image_newline=torch.tensor([-2.0, -2.0], dtype=torch.float64),
            **options,
        )
        ids = torch.tensor([[9] + [config.image_token_id] * len(packed[0])])
        inputs = {"input_ids": ids, "image_sizes": torch.tensor([[height, width]])}
        whole, *rest = grids(SimpleNamespace(config=config), inputs)[0]
        assert (whole.rows, whole.cols, whole.start) == (side, side, 0)
        assert bool((packed[0][: whole.stop] == -1).all())
        fitted = get_patch_output_size(np.empty((3, height, width)), canvas, ChannelDimension.FIRST)
        shift = [(a - b) // 2 for a, b in zip(canvas, fitted, strict=True)]
        for token in range(whole.stop, len(packed[0])):
            x, y = packed[0][token].tolist()
            cell = rest[0].cell(token) if rest else None
            if x == -2:
                assert cell is None
                continue
            middle = (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2
            assert middle[0] == pytest.approx((x - shift[1]) / fitted[1], abs=1e-6)
            assert middle[1] == pytest.approx((y - shift[0]) / fitted[0], abs=1e-6)


# -- whole prompts, and what is refused ------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", *tiny.PROCESSORS])
def test_real_processors_are_accounted_for(family):
    vlm = tiny.vlm(family)
    dice = random.Random(4)
    for _ in range(4):
        given = [blank(s) for s in dice.sample(random_sizes(dice, 2), 2)]
        laid = vlm.grids(vlm.chat(given, "red", None))
        assert {grid.image for grid in laid} == {0, 1}


def test_images_of_a_batch_go_to_their_samples():
    eye = look("squeezed")
    ids = families.wrapped(16, "")
    text = [families.FIRST_TEXT] * len(ids)
    inputs = {"input_ids": torch.tensor([ids + ids, text + text, text + ids])}
    laid = grids(eye.model, inputs)
    assert laid == [[Grid(4, 4), Grid(4, 4, 16, image=1)], [], [Grid(4, 4)]]


def test_tiles_of_odd_pixels_are_arranged_as_the_processor_arranges_them():
    """Where transformers' rounding of the shorter edge to even pixels matters."""
    config = tf.Idefics3Config(vision_config={"image_size": 15, "patch_size": 5}, scale_factor=1)
    cut = {"size": {"longest_edge": 60}, "max_image_size": {"longest_edge": 15}}
    processor = tiny.image_processor("Idefics3")(**cut)
    for size in [(60, 45), (45, 60), (60, 44), (60, 60), (300, 20), (20, 300), (400, 7)]:
        out = processor([[blank(size)]], return_row_col_info=True)
        (rows,), (cols,) = out["rows"][0], out["cols"][0]
        ids = [families.START] + [config.image_token_id] * 9
        inputs = {"input_ids": torch.tensor([ids * (rows * cols + 1)])}
        model, door = SimpleNamespace(config=config), SimpleNamespace(image_processor=processor)
        *tiles, whole = grids(model, inputs, [[size]], door)[0]
        assert tiles[-1].box == ((cols - 1) / cols, (rows - 1) / rows, 1, 1)
        assert whole.box == (0, 0, 1, 1)


def test_the_tower_decides_before_the_model():
    tower = families.tower("pixtral", side=32, head_dim=16)
    pixtral = tf.LlavaConfig(vision_config=tower, image_token_index=families.IMAGE)
    ids, size = families.wrapped(2 * 7, ""), (2 * 4, 7 * 4)
    inputs = {"input_ids": torch.tensor([ids]), "image_sizes": torch.tensor([size])}
    assert grids(SimpleNamespace(config=pixtral), inputs) == [[Grid(2, 7)]]


def test_what_cannot_be_known_is_refused():
    eye = look("internvl")
    given = [blank((150, 100))]
    inputs, _ = eye(given)
    sizes = [[(150, 100)]]

    def refused(model: Any, inputs: Any, *rest: Any) -> None:
        kind = model.config.model_type
        with pytest.raises(FoveateError, match=f"layout of {kind}'s image tokens is not known"):
            grids(model, inputs, *rest)

    refused(eye.model, inputs)
    refused(eye.model, inputs, sizes)
    refused(eye.model, inputs, [[(100, 150)]], SimpleNamespace(image_processor=None))
    refused(eye.model, inputs, [[(300, 300)]], eye.processor)  # another number of tiles
    refused(eye.model, inputs, [sizes[0] * 2], eye.processor)  # more images than tokens
    refused(eye.model, inputs, [[]], eye.processor)
    other = look("squeezed")
    refused(other.model, {"input_ids": inputs["input_ids"][:, :-5]})  # not a whole grid
    refused(SimpleNamespace(config=tf.AyaVisionConfig(image_token_id=families.IMAGE)), inputs)
    for name in ("llava_next", "qwen3_vl", "mistral3", "idefics3"):
        refused(families.build(name), inputs)  # no image_sizes, no image_grid_thw, no size
    scan = SimpleNamespace(image_processor=SimpleNamespace(do_pan_and_scan=True))
    gemma = {"input_ids": torch.tensor([[families.IMAGE] * 18])}
    assert len(grids(families.build("gemma3"), gemma)[0]) == 2
    refused(families.build("gemma3"), gemma, None, scan)
    refused(families.build("gemma3"), gemma, [[(10, 40)]], scan)


def test_one_map_of_nothing_is_refused():
    with pytest.raises(FoveateError, match="no image 1"):
        together([Grid(2, 2)], torch.zeros(4), image=1)
    boxes = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1)]
    tiles = [Grid(2, 2, 4 * i, box) for i, box in enumerate(boxes)]
    with pytest.raises(FoveateError, match="do not form a mosaic"):
        together(tiles, torch.zeros(12))
