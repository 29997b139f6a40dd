"""A layout found by looking is the one that the family's file says; what was found is kept."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.base.errors import FoveateError
from foveate.commands import doctor
from foveate.families import layout, probe
from foveate.families.layout import Grid
from foveate.families.probe import agreement, find
from foveate.insight.trace import trace
from foveate.vlm import probing
from foveate.vlm.chat import Chat
from foveate.vlm.probing import Looked, cache, fingerprint, kept
from foveate.vlm.vlm import VLM
from tests import models as families
from tests import tiny
from tests.test_families import CASES, NAMES, SHAPES, Eye, blank, look, random_sizes

SINGLE = [param for param in NAMES if CASES[str(param.values[0])].images == 1]
QUESTION = "Is there a cup?"


def compared(eye: Eye, size: tuple[int, int], order: Any = slice(None)) -> tuple[float, int, int]:
    """The probe's confidence, how many tokens it places as the file does, and of how many."""
    inputs, _ = eye([blank(size)])
    found = find(lambda picture: eye([picture])[1][order], size)
    return found.confidence, *agreement(found, eye.grids(inputs, [blank(size)]))


def shuffled(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SINGLE)
def test_looking_agrees_with_the_file(name: str) -> None:
    confidence, same, of = compared(look(name), (160, 120))
    assert same == of > 0
    assert confidence > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_looking_agrees_with_the_file_on_pictures_of_all_shapes(name: str) -> None:
    some = [s for s in random_sizes(random.Random(5), 6) if max(s) < 8 * min(s)]
    for size in SHAPES + some:
        confidence, same, of = compared(look(name), size)
        assert same == of, size
        assert confidence > 0.85, size


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_looking_agrees_where_every_token_sees_all_others(name: str) -> None:
    eye = Eye(CASES[name])
    eye.model = families.build(CASES[name].family, fresh=True)
    eye.model.config.update(CASES[name].config)
    for size in [(96, 96), (160, 120)]:
        confidence, same, of = compared(eye, size)
        assert same == of, size
        assert confidence > 0.85, size


@pytest.mark.parametrize("name", ["squeezed", "llava_next", "qwen2_5_vl", "internvl"])
def test_tokens_in_no_order_are_not_found(name: str) -> None:
    eye = look(name)
    order = shuffled(len(eye([blank((160, 120))])[1]))
    assert compared(eye, (160, 120), order)[0] < 0.1


def test_tokens_that_stand_for_no_place_are_not_found() -> None:
    draw = torch.Generator().manual_seed(0)
    mixed, outward = torch.randn(64, 256, generator=draw), torch.randn(64, 8, generator=draw)

    def resampler(picture: Image.Image) -> torch.Tensor:
        grey = np.asarray(picture.convert("L").resize((16, 16)), np.float32)
        return torch.tanh(mixed @ torch.tensor(grey / 255 - 0.5).flatten())[:, None] * outward

    assert find(resampler, (160, 120)).confidence < 0.1
    assert find(lambda picture: torch.ones(64, 8), (160, 120)).confidence == 0
    assert find(lambda picture: torch.ones(0, 8), (160, 120)).confidence == 0


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (2, 2), (24, 24), (3, 60)])
def test_grids_of_all_shapes_are_found(shape: tuple[int, int]) -> None:
    rows, cols = shape

    def patches(picture: Image.Image) -> torch.Tensor:
        grey = picture.convert("L").resize((cols, rows), Image.Resampling.BOX)
        return torch.tensor(np.asarray(grey, np.float32)).flatten()[:, None]

    found = find(patches, (640, 480))
    (grid,) = found.grids
    assert (grid.rows, grid.cols, grid.start, grid.gap) == (rows, cols, 0, 0)
    if rows > 1 and cols > 1:
        assert grid.box == (0, 0, 1, 1)
        assert agreement(found, [Grid(rows, cols)]) == (rows * cols, rows * cols)
    assert found.confidence > 0.9


# -- in a model ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has written a file for LLaVA."""
    known = {name: grid for name, grid in layout._layouts().items() if name != "llava"}
    monkeypatch.setattr(layout, "_layouts", lambda: known)


@pytest.fixture(scope="module")
def pocket() -> VLM:
    return VLM.load("pocket", device="cpu")


def picture(width: int = 160, height: int = 120) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


@pytest.mark.long
def test_a_trained_tower_says_where_its_tokens_lie(pocket: VLM, folder: Path) -> None:
    for size in [(96, 96), (160, 120), (90, 200)]:
        found = Looked(pocket).found(size)
        assert agreement(found, pocket.grids(Chat([blank(size)], QUESTION))) == (144, 144)
        assert found.confidence > 0.95
        assert found.pictures <= 26


@pytest.mark.long
def test_a_family_without_a_file_has_heat_maps_and_crops(
    pocket: VLM, folder: Path, request: pytest.FixtureRequest
) -> None:
    image = picture()
    crop = pocket.ask(image, QUESTION, "vicrop").chat.notes["crop"]
    heat = trace(pocket, image, QUESTION, ["vanilla"]).runs[0].pictures[0]
    request.getfixturevalue("hidden")
    unwritten = VLM(pocket.model, pocket.processor, "pocket")
    assert isinstance(unwritten.layout, Looked)
    assert unwritten.ask(image, QUESTION, "vicrop").chat.notes["crop"] == crop
    seen = trace(unwritten, image, QUESTION, ["vanilla"]).runs[0].pictures[0]
    assert seen.box == heat.box
    assert np.array_equal(seen.heat, heat.heat)


def test_several_pictures_are_placed_one_by_one(hidden: None) -> None:
    vlm = tiny.vlm()
    images = [picture(), picture(90, 200), picture()]
    laid = vlm.grids(vlm.chat(images, "red", None))
    assert laid == [Grid(4, 4, 16 * i, image=i) for i in range(3)]


def test_what_was_found_is_kept(
    hidden: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat([picture()], "red")
    first = tiny.vlm().grids(chat)
    (path,) = (folder / "layouts" / "llava").iterdir()
    assert path.name.startswith("160x120-")
    assert kept("llava", None)[160, 120].grids == tuple(first)
    asked: list[tuple[int, int]] = []

    def looks(look: Any, size: tuple[int, int]) -> probe.Found:
        asked.append(size)
        return find(look, size)

    monkeypatch.setattr(probing, "find", looks)
    assert tiny.vlm().grids(chat) == first
    assert asked == []
    path.write_text(path.read_text()[:-20])  # no kill leaves this, but a damaged disk may
    assert tiny.vlm().grids(chat) == first
    assert asked == [(160, 120)]
    vlm = tiny.vlm()
    before = fingerprint(vlm.model)
    vlm.model.model.vision_tower.embeddings.patch_embedding.weight.data *= 1.01
    assert fingerprint(vlm.model) != before
    vlm.grids(chat)
    vlm.processor.image_processor.do_center_crop = False
    vlm.__dict__.pop("layout")
    vlm.grids(Chat([picture()], "red"))
    assert asked == [(160, 120)] * 3


def test_a_folder_that_cannot_be_written_is_told(
    hidden: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be"):
        assert tiny.vlm().grids(Chat([picture()], "red")) == [Grid(4, 4)]


def test_where_looking_does_not_help_it_is_said(
    hidden: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, order = Looked._features, shuffled(16)
    monkeypatch.setattr(Looked, "_features", lambda self, image: features(self, image)[order])
    with pytest.raises(FoveateError, match=r"did not tell where they lie \(confidence 0\.\d"):
        tiny.vlm().ask(picture(), "red", "vicrop")


def test_without_weights_nobody_looks(hidden: None) -> None:
    vlm = tiny.vlm()
    vlm.model.to("meta")
    assert vlm.layout is None


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", "/a")
    assert cache() == Path("/a")
    monkeypatch.delenv("FOVEATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache() == Path("/b/foveate")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache() == Path.home() / ".cache" / "foveate"


# -- doctor ----------------------------------------------------------------------------------------


def told(name: str, look_now: bool = False) -> str:
    (line,) = (
        one.finding
        for one in doctor.model_lines(doctor.examine(name, probe=look_now))
        if one.subject == "image layout"
    )
    return line


@pytest.mark.long
def test_doctor_says_whether_a_file_or_looking_tells_the_layout(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert told("pocket") == "known, from foveate.families.square"
    assert "144 of 144 tokens are where the file says" in told("pocket", look_now=True)
    request.getfixturevalue("hidden")
    saved = str(tiny.save(tmp_path / "tiny"))
    assert told(saved).startswith("in no file, so it is looked for once the weights are loaded")
    report = doctor.examine(saved, probe=True)
    (looked,) = report["layout"]["looked"]
    assert looked["size"] == doctor.PROBED
    assert report["layout"]["by"] == "probe"
    assert report["methods"]["vicrop"]["refusal"] is None
    said = f"looking found it with confidence {looked['confidence']:.2f} at 640 x 480 pixels"
    assert told(saved) == f"in no file; {said}", "as it was kept"
    for path in (folder / "layouts").glob("*tiny/*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": [0.1] * 16}))
    assert "no heat maps on the image, no crops" in told(saved)
    assert doctor.examine(saved)["methods"]["vicrop"]["refusal"]
