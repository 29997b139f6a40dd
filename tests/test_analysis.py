"""Analyses: every measure against an obvious slow one; stopped and torn runs; mistakes; masks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import VLM, FoveateError, commands
from foveate.analyses import decay as decay_file
from foveate.analyses.decay import Decay
from foveate.analysis import analyses, parse, run
from foveate.intervals import mean
from foveate.masks import Asked, Picture, coco_pictures, pocket_pictures, union
from foveate.method import parse as parse_methods
from tests import tiny
from tests.references import clvs as slow_clvs


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny.vlm()


@pytest.fixture(scope="module")
def pocket() -> VLM:
    return VLM.load("pocket")


def noise(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    return Image.fromarray(values)


def mask_of(kind: str) -> np.ndarray:
    """Tokens are 8 x 8 pixels: a cat covers four, a red thing one and a bit, w20 none."""
    mask = np.zeros((32, 32), bool)
    box = {"cat": (0, 0, 16, 16), "red": (16, 8, 26, 16), "w20": (0, 0, 3, 3)}[kind]
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


TOKENS = {"cat": [0, 1, 4, 5], "red": [6]}


def pictures(count: int) -> list[Picture]:
    def asked(number: int) -> list[Asked]:
        return [Asked("is there a cat ?", "yes", "one"), Asked("red ?", "w21", "two")][: 2 - number]

    return [
        Picture(
            f"picture {n}",
            ("cat", "red", "w20"),
            lambda n=n: noise(n),
            mask_of,
            lambda n=n: asked(n % 2),
        )
        for n in range(count)
    ]


def full_maps(vlm: VLM, text: str, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Eager attention of every layer (L, H, Q, K), and which columns are visual (K,)."""
    inputs = vlm.inputs([vlm.chat([image], text, None)])
    model = vlm.model
    before = model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(**inputs, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    return torch.stack(out.attentions)[:, 0], visual


# -- where things are ------------------------------------------------------------------------------


def test_drawn_scenes() -> None:
    [first, second] = pocket_pictures(2)
    assert first.name.startswith("with-")
    assert second.name.startswith("against-")
    for kind in first.objects:
        assert first.mask(kind).any()
    labels = [asked.answer for asked in first.asked() if asked.group == "existence"]
    assert labels.count("yes") == labels.count("no") > 0
    assert pocket_pictures(1)[0].asked() == first.asked()


def coco(folder: Path, segmentation: Any = None) -> Path:
    """Two pictures of 12 x 10 pixels: one with three categories, one with a single."""
    (folder / "annotations").mkdir()
    (folder / "val2014").mkdir()
    names = {1: "cat", 2: "dog", 3: "orange", 4: "cup"}
    square, counts = [[0, 0, 2, 0, 2, 2, 0, 2]], {"size": [10, 12], "counts": [10, 10, 100]}
    rows = [(7, 1, square), (7, 2, counts), (7, 3, segmentation or counts), (8, 4, square)]
    data = {
        "categories": [{"id": i, "name": name} for i, name in names.items()],
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (7, 8, 9)],
        "annotations": [
            {"image_id": image, "category_id": kind, "segmentation": form}
            for image, kind, form in rows
        ],
    }
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(data))
    for name in (7, 8):
        Image.new("RGB", (12, 10)).save(folder / "val2014" / f"{name}.png")
    return folder


def test_coco(tmp_path: Path) -> None:
    [picture] = coco_pictures(coco(tmp_path), 5)
    assert (picture.name, sorted(picture.objects)) == ("7.png", ["cat", "dog", "orange"])
    assert picture.load().size == (12, 10)
    assert picture.mask("cat").tolist() == [
        [x <= 2 and y <= 2 for x in range(12)] for y in range(10)
    ]
    assert picture.mask("dog").tolist() == [[x == 1 for x in range(12)] for _ in range(10)]
    asked = {a.text: a.answer for a in picture.asked()}
    assert asked.pop("Is there a cup in the image?") == "no"
    assert asked.pop("Is there an orange in the image?") == "yes"
    assert set(asked.values()) == {"yes"}


def test_cocos_text_form_of_run_lengths() -> None:
    """The text form that pycocotools 2.0 made of these run lengths of a picture of 40 x 90."""
    lengths = [39, 2, 38, 4, 997, 1, 2519]
    wanted = np.repeat(np.arange(7) % 2 == 1, lengths).reshape(90, 40).T
    text = "W12V12om0Mb_1"
    assert (union([{"size": [40, 90], "counts": text}], 90, 40) == wanted).all()
    assert (union([{"size": [40, 90], "counts": lengths}], 90, 40) == wanted).all()


@pytest.mark.parametrize(
    "bad", [{"size": [4, 6], "counts": [4]}, {"size": [4, 6]}, [["a", 1, 2, 3]], [[1, 2, 3]], 5]
)
def test_bad_segmentations_are_one_sentence(bad: Any) -> None:
    with pytest.raises(FoveateError, match="A segmentation cannot be read"):
        union([bad], 6, 4)


def test_bad_folders_of_coco_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="give the folder of COCO"):
        coco_pictures(tmp_path, 5)
    folder = coco(tmp_path)
    (folder / "val2014" / "7.png").unlink()
    with pytest.raises(FoveateError, match="No picture with 3 or more categories"):
        coco_pictures(folder, 5)
    (folder / "annotations" / "instances_val2014.json").write_text("[]")
    with pytest.raises(FoveateError, match="is not a file of COCO's instances"):
        coco_pictures(folder, 5)


# -- means -----------------------------------------------------------------------------------------


def test_means_are_of_pictures() -> None:
    """By hand: two questions of one picture count as one; t with 2 degrees of freedom is 4.3027."""
    found = mean([[1.0], [3.0], [5.0], [8.0]], ["a", "a", "b", "c"])
    error = np.std([2, 5, 8], ddof=1) / np.sqrt(3)
    assert found["mean"] == [5.0]
    assert found["high"] == pytest.approx([5 + 4.302653 * error])
    assert found["low"] == pytest.approx([5 - 4.302653 * error])


def test_means_leave_out_what_is_not_defined() -> None:
    found = mean([[1.0, np.nan], [3.0, np.nan], [np.nan, 7.0]], ["a", "b", "c"])
    assert found["mean"] == [2.0, 7.0]
    assert found["high"][0] == pytest.approx(2 + 12.7062, abs=1e-3)
    assert np.isnan(found["high"][1])


# -- decay -----------------------------------------------------------------------------------------


def test_attention_to_the_object_is_that_of_full_maps(vlm: VLM) -> None:
    [picture] = pictures(1)
    stacks = {"vanilla": (), "clvs": parse_methods("clvs")}
    row = Decay().measure(vlm, picture, stacks)
    assert row["layers"] == list(range(vlm.model.get_decoder().config.num_hidden_layers))
    for found in row["objects"][:2]:
        kind, text = found["object"], f"Is there a {found['object']} in the image?"
        maps, visual = full_maps(vlm, text, picture.load())
        inputs = vlm.inputs([vlm.chat([picture.load()], text, None)])
        [step] = slow_clvs.run(vlm.model, dict(inputs), steps=1)
        smoothed = torch.stack([step.rows[layer][0] for layer in row["layers"]])
        assert found["area"] == len(TOKENS[kind]) / 16
        for name, rows in (("vanilla", maps[:, :, -1]), ("clvs", smoothed)):
            image = rows.mean(1)[:, visual]
            np.testing.assert_allclose(found[name]["image"], image.sum(-1), rtol=1e-4)
            np.testing.assert_allclose(
                found[name]["object"], image[:, TOKENS[kind]].sum(-1), rtol=1e-4
            )
    assert row["objects"][2]["area"] == 0


def made_up(values: list[list[float]], more: float = 1.0) -> list[dict[str, Any]]:
    """Rows of one object each, with `more` times the attention by clvs."""
    return [
        {
            "picture": str(number),
            "layers": list(range(len(own))),
            "objects": [
                {
                    "object": "cat",
                    "area": 0.25,
                    "vanilla": {"object": own, "image": [0.5] * len(own)},
                    "clvs": {"object": [more * v for v in own], "image": [0.5] * len(own)},
                }
            ],
        }
        for number, own in enumerate(values)
    ]


def test_decay_is_counted() -> None:
    rows = made_up([[0.1, 0.4, 0.2, 0.1, 0.1, 0.1], [0.1, 0.2, 0.1, 0.3, 0.1, 0.1]] * 4, 1.2)
    found = Decay().count(rows)
    vanilla, clvs = found["methods"]["vanilla"], found["methods"]["clvs"]
    assert found["objects"] == 8
    np.testing.assert_allclose(vanilla["object"]["mean"], [0.1, 0.3, 0.15, 0.2, 0.1, 0.1])
    np.testing.assert_allclose(vanilla["share"]["mean"][1], 0.6)
    assert vanilla["peaks"] == clvs["peaks"] == [0, 4, 0, 4, 0, 0]
    # the peak of pictures 0, 2, ... is layer 1; pictures 1, 3, ... have 0.2 there
    assert vanilla["decay"]["peak"] == 1
    assert vanilla["decay"]["next"]["mean"] == pytest.approx((0.5 / 3 - 0.2) / 0.2)
    assert vanilla["decay"]["later"]["mean"] == pytest.approx((0.6 / 4 - 0.2) / 0.2)
    assert clvs["increase_next"]["mean"] == pytest.approx(0.2)


def test_increases_are_clipped_at_once_more() -> None:
    found = Decay().count(made_up([[0.1, 0.2]] * 3, 5.0))["methods"]["clvs"]
    assert found["increase"]["mean"] == [1.0, 1.0]
    found = Decay().count(made_up([[0.1, 0.2]] * 3, 0.5))["methods"]["clvs"]
    assert found["increase"]["mean"] == [-0.5, -0.5]


def test_no_object_that_covers_a_token_is_one_sentence() -> None:
    rows = made_up([[0.1, 0.2]])
    rows[0]["objects"][0]["area"] = 0.0
    with pytest.raises(FoveateError, match="give a smaller covered"):
        Decay().count(rows)


# -- runs ------------------------------------------------------------------------------------------


def test_every_analysis_is_registered() -> None:
    assert set(analyses()) == {"decay", "convergence", "complexity", "layers", "heads"}
    for cls in analyses().values():
        assert cls.title


def test_a_torn_run_gives_the_same_numbers(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, few = parse("decay"), pictures(4)
    whole = run(analysis, vlm, few, tmp_path)["numbers"]
    for ending in (".png", ".json", ".md"):
        assert (tmp_path / f"decay{ending}").stat().st_size
    assert json.loads((tmp_path / "decay.json").read_text())["numbers"] == whole
    journal = tmp_path / "decay.jsonl"
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) - 100])
    read, measure = [], Decay.measure

    def counted(self: Decay, vlm: VLM, picture: Picture, stacks: Any) -> Any:
        read.append(picture.name)
        return measure(self, vlm, picture, stacks)

    monkeypatch.setattr(Decay, "measure", counted)
    assert run(analysis, vlm, few, tmp_path)["numbers"] == whole
    assert read == ["picture 3"]
    assert journal.read_bytes() == data
    assert run(analysis, vlm, few[:2], tmp_path)["pictures"] == 2  # and nothing is read
    assert read == ["picture 3"]


def test_pictures_that_cannot_be_read_are_left_out(vlm: VLM, tmp_path: Path) -> None:
    def broken() -> Image.Image:
        raise FoveateError("It is torn.")

    good = pictures(2)
    bad = Picture("bad", ("cat",), broken, mask_of, list)
    with pytest.warns(UserWarning, match=r"1 of 3 pictures were left out; the first: It is torn"):
        assert run(Decay(), vlm, [bad, *good], tmp_path)["pictures"] == 2
    with pytest.raises(FoveateError, match=r"No picture could be used.*It is torn"):
        run(Decay(covered=0.6), vlm, [bad], tmp_path / "..")


def test_other_settings_are_refused(vlm: VLM, tmp_path: Path) -> None:
    run(Decay(), vlm, pictures(1), tmp_path)
    with pytest.raises(FoveateError, match=r"other settings \(methods:"):
        run(Decay(), vlm, pictures(1), tmp_path, methods=["vaf"])


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command line says to a mistake: one sentence, exit code 2."""

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            commands.main(["analyze", *map(str, arguments)])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.err.startswith("foveate: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return call


def test_mistakes_are_one_sentence(said: Callable[..., str], tmp_path: Path) -> None:
    assert "There is no analysis 'decy' (did you mean 'decay'?)" in said("decy")
    assert "decay has no parameter 'cover'" in said("decay(cover=1)")
    assert "covered must lie above 0" in said("decay(covered=0)")
    assert "One analysis at a time" in said("decay+decay")
    assert "are drawn by `foveate sweep`" in said("sweep")
    assert "instances_val2014.json cannot be read" in said("decay", "--data", tmp_path)
    assert "There is no method 'clsv'" in said("decay", "--method", "clsv", "--out", tmp_path)


def test_a_missing_package_is_one_sentence(
    said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "scipy" else there(name, *a)
    )
    told = said("decay", "--out", tmp_path)
    assert "decay needs scipy: install it with `pip install 'foveate[plot]'`." in told


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        commands.main(["analyze", "decay", "--limit", "4", "--out", str(tmp_path)])
    assert not stop.value.code
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "decay.json").read_text())
    assert found["caption"] in out
    assert found["command"] == (
        f"foveate analyze decay --model pocket --data none --limit 4 --out {tmp_path}"
    )
    assert found["pictures"] == 4
    assert found["caption"] in (tmp_path / "decay.md").read_text()
    assert decay_file.AHEAD == 3
