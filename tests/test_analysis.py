"""Analyses: every measure against an obvious slow one; stopped and torn runs; mistakes; masks."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import VLM, FoveateError, commands
from foveate.base.stats import mean, proportion
from foveate.core.method import parse as parse_methods
from foveate.insight.analyses.complexity import Complexity, binned, color, entropy, texture
from foveate.insight.analyses.convergence import Convergence, Lens, logistic
from foveate.insight.analyses.decay import Decay
from foveate.insight.analyses.heads import Heads
from foveate.insight.analyses.layers import Layers, association
from foveate.insight.analysis import analyses, chance, parse, run
from foveate.insight.plots.analysis import Sheet
from foveate.insight.truth import AnnotatedImage, Asked, coco_pictures, pocket_pictures, union
from foveate.vlm.chat import Chat
from foveate.vlm.look import GENERAL, SHORT
from tests import tiny
from tests.references import clvs as slow_clvs


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny.vlm()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest of a tiny run."""
    monkeypatch.setattr(Sheet, "save", lambda self, path: None)


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


def pictures(count: int) -> list[AnnotatedImage]:
    def asked(number: int) -> list[Asked]:
        return [Asked("is there a cat ?", "yes", "one"), Asked("red ?", "w21", "two")][: 2 - number]

    return [
        AnnotatedImage(
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
    return eager(vlm, dict(vlm.inputs([Chat([image], text)])))


def eager(vlm: VLM, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
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


# -- heads -----------------------------------------------------------------------------------------


def test_attention_of_heads_is_that_of_full_maps(vlm: VLM) -> None:
    [picture] = pictures(1)
    row = Heads().measure(vlm, picture, {"vanilla": ()})
    for found in row["objects"][:2]:
        text = f"Is there a {found['object']} in the image?"
        maps, visual = full_maps(vlm, text, picture.load())
        image = maps[:, :, -1, visual]
        np.testing.assert_allclose(found["on_image"], image.sum(-1), rtol=1e-4)
        inside = image[..., TOKENS[found["object"]]].sum(-1)
        np.testing.assert_allclose(found["on_object"], inside, rtol=1e-4)


def test_heads_are_ranked() -> None:
    image = [[[0.1, 0.9], [0.5, 0.2]], [[0.3, 0.7], [0.5, 0.2]]]
    on_object = [[0.05, 0.09], [0.05, 0.02]]
    rows = [
        {
            "picture": str(number),
            "layers": [3, 7],
            "objects": [
                {"object": "cat", "area": 0.25, "on_image": own, "on_object": on_object},
                {"object": "mouse", "area": 0.0, "on_image": own, "on_object": [[0.0] * 2] * 2},
            ],
        }
        for number, own in enumerate(image)
    ]
    found = Heads().count(rows)
    np.testing.assert_allclose(found["image"]["mean"], [[0.2, 0.8], [0.5, 0.2]])
    assert found["most"][:2] == [[0, 1], [1, 0]]
    assert (found["questions"], found["objects"]) == (4, 2)
    assert found["share"]["mean"][0][0] == pytest.approx((0.5 + 0.05 / 0.3) / 2)
    assert found["times"]["mean"][1][1] == pytest.approx(0.1 / 0.25)


# -- convergence -----------------------------------------------------------------------------------


def slow_uncertainty(logits: Tensor, top: int) -> float:
    largest = sorted(logits.tolist(), reverse=True)[:top]
    weights = [math.exp(value - largest[0]) for value in largest]
    shares = [weight / sum(weights) for weight in weights]
    return -sum(p * math.log(p) for p in shares) / math.log(top)


@pytest.mark.parametrize("normed", [False, True])
def test_lens_is_every_layers_output_unembedded(vlm: VLM, normed: bool) -> None:
    [picture] = pictures(1)
    row = Convergence(top_k=5, final_norm=normed).measure(vlm, picture, {"vanilla": ()})
    decoder, unembed = vlm.model.get_decoder(), vlm.model.get_output_embeddings()
    for asked, found in zip(picture.asked(), row["questions"], strict=True):
        streams: list[Tensor] = []

        def keep(module: Any, args: Any, out: Tensor, to: list[Tensor] = streams) -> None:
            to.append(out[0, -1])

        hooks = [layer.register_forward_hook(keep) for layer in decoder.layers]
        with torch.no_grad():
            inputs = vlm.inputs([Chat([picture.load()], asked.text)])
            written = vlm.model(**inputs).logits[0, -1].argmax()
            for hook in hooks:
                hook.remove()
            logits = [unembed(decoder.norm(s) if normed else s) for s in streams]
        assert found["group"] == asked.group
        wanted = [slow_uncertainty(z, 5) for z in logits]
        np.testing.assert_allclose(found["u"], wanted, rtol=1e-3)
        assert found["converged"] == [int(z.argmax() == written) for z in logits]
    if normed:
        assert [q["converged"][-1] for q in row["questions"]] == [1, 1]


def test_lens_reads_every_step(vlm: VLM) -> None:
    [picture] = pictures(1)
    answer = vlm.ask(picture.load(), "is there a cat ?", record=Lens(), max_new_tokens=3)
    assert answer.record is not None
    depth, width = len(vlm.model.get_decoder().layers), vlm.model.get_decoder().config.hidden_size
    assert {step: v.shape for step, v in answer.record.values.items()} == dict.fromkeys(
        range(min(3, len(answer.tokens) + 1)), (1, depth, width)
    )


def test_convergence_is_counted() -> None:
    rows = [
        {
            "picture": str(n),
            "questions": [{"group": "one", "u": [0.9, 0.35, 0.0], "converged": [0, n % 2, 1]}] * 2,
        }
        for n in range(4)
    ]
    found = Convergence().count(rows)
    assert (found["questions"], found["pairs"]) == (8, 16)  # the last layer is no pair
    assert found["converged"]["mean"] == [0.0, 0.5, 1.0]
    assert [b["n"] for b in found["bins"]] == [0, 0, 0, 8, 0, 0, 0, 0, 0, 8]
    assert found["bins"][3]["mean"] == 0.5
    assert math.isnan(found["by_layer"][2]["r"])
    assert found["stop"]["layer"] == 2
    assert (found["stop"]["share"], found["stop"]["converged"]) == (1, 1)
    x, y = [0.9] * 8 + [0.35] * 8, [0] * 12 + [1] * 4
    assert found["correlation"]["r"] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_chances_too_small_to_tell_are_bounds() -> None:
    assert [chance(p) for p in (0.0, 1e-20, 0.0123, 1.0)] == [
        "p < 1e-16", "p < 1e-16", "p = 0.012", "p = 1"
    ]  # fmt: skip


def slow_logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Newton's method."""
    design, fit = np.stack([np.ones_like(x), x], 1), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ fit))
        fit += np.linalg.solve(design.T * (p * (1 - p)) @ design, design.T @ (y - p))
    return fit


def test_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    x = rng.random(400)
    y = (rng.random(400) < 1 / (1 + np.exp(4 * x - 2))).astype(int)
    found = logistic(x, y, np.arange(400) // 4)
    assert found is not None
    np.testing.assert_allclose(found["coefficients"], slow_logistic(x, y), rtol=1e-4)
    assert found["odds"]["mean"] == pytest.approx(math.exp(found["coefficients"][1] / 10))
    assert found["odds"]["low"] < found["odds"]["mean"] < found["odds"]["high"] < 1
    assert found["p"] < 0.001
    assert logistic(x, np.ones(400, int), np.arange(400)) is None
    assert logistic(x, (x > 0.5).astype(int), np.arange(400)) is None  # separated: no fit


def test_proportions() -> None:
    """Wilson's interval of 8 of 10 is 0.490 to 0.943 (Newcombe 1998's formula)."""
    found = proportion(np.array([1] * 8 + [0] * 2))
    assert found["mean"] == 0.8
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert math.isnan(proportion(np.array([]))["mean"])


# -- complexity ------------------------------------------------------------------------------------


def test_entropy() -> None:
    assert entropy(torch.full((16,), 0.03)).item() == pytest.approx(1)
    one = torch.zeros(2, 16)
    one[:, 3] = one[1, 5] = 0.2
    assert entropy(one).tolist() == pytest.approx([0, math.log(2) / math.log(16)])


def test_texture_of_known_pictures() -> None:
    assert texture(Image.new("RGB", (64, 64), "red"), 100, 200) == 0
    square = Image.new("RGB", (64, 64), "white")
    square.paste("black", (16, 16, 48, 48))
    assert texture(square, 100, 200) * 64 * 64 == pytest.approx(4 * 32, rel=0.1)
    faint = Image.new("L", (64, 64), 100)
    faint.paste(120, (16, 16, 48, 48))
    assert texture(faint, 100, 200) == 0
    assert texture(faint, 10, 20) > 0


def test_color_of_known_pictures() -> None:
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    assert color(picture) == 0
    for corner, own in (((4, 0), (0, 255, 0)), ((0, 4), (0, 0, 255)), ((4, 4), (255, 255, 0))):
        picture.paste(own, (*corner, corner[0] + 4, corner[1] + 4))
    assert color(picture) == pytest.approx(math.log(4) / math.log(180))


def slow_last_step(vlm: VLM, text: str, image: Image.Image, steps: int) -> tuple[Tensor, str]:
    """Mean over heads of the last row on the image where the answer ends (L, N_v); the answer.

    The whole text goes through the model again for every token.
    """
    inputs = dict(vlm.inputs([Chat([image], text)]))
    start, ends = inputs["input_ids"].shape[1], vlm.model.generation_config.eos_token_id
    for step in range(steps):
        maps, visual = eager(vlm, inputs)
        with torch.no_grad():
            token = vlm.model(**inputs).logits[:, -1:].argmax(-1)
        if token.item() == ends or step == steps - 1:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    written = torch.cat([inputs["input_ids"][0, start:], token[0]])
    said = vlm.tokenizer.decode(written, skip_special_tokens=True)
    return maps.mean(1)[:, -1, visual], said


def test_entropies_are_those_of_full_maps(vlm: VLM) -> None:
    [picture] = pictures(1)
    row = Complexity(steps=3).measure(vlm, picture, {"vanilla": ()})
    image = picture.load()
    clutter, _ = slow_last_step(vlm, GENERAL + SHORT, image, 3)
    for asked, found in zip(picture.asked(), row["questions"], strict=True):
        own, said = slow_last_step(vlm, asked.text + SHORT, image, 3)
        assert found["right"] == asked.right(said)
        np.testing.assert_allclose(found["attention"], entropy(own), rtol=1e-4)
        np.testing.assert_allclose(found["contrast"], entropy(own / (clutter + 1e-8)), rtol=1e-4)
    assert row["texture"] == texture(image, 100, 200)
    assert row["color"] == color(image)


def test_complexity_is_counted() -> None:
    rows = [
        {
            "picture": str(n),
            "texture": 0.1 + 0.01 * n,
            "color": 0.5,
            "layers": [0, 1, 2],
            "deep": [1, 2],
            "questions": [
                {
                    "group": "one",
                    "right": n < 10,
                    "attention": [0.0, 0.2 + 0.02 * n, 0.4 + 0.02 * n],
                    "contrast": [0.9, 0.5, 0.5],
                }
            ],
        }
        for n in range(20)
    ]
    found = Complexity().count(rows)
    own = found["complexity"]["texture"]
    assert own["attention"]["rho"] == pytest.approx(1)
    assert math.isnan(own["contrast"]["rho"])
    assert math.isnan(found["complexity"]["color"]["attention"]["rho"])
    bins = own["attention"]["bins"]
    assert [b["n"] for b in bins] == [2] * 10
    assert bins[0]["mean"] == pytest.approx(0.3 + 0.02 * 0.5)
    assert math.isnan(bins[0]["low"])
    tenth = found["accuracy"]["attention"]["bins"]
    assert [t["mean"] for t in (tenth[0], tenth[-1])] == [1, 0]
    assert sum(t["n"] for t in tenth) == 20
    assert [t["n"] for t in found["accuracy"]["contrast"]["bins"]] == [20]
    assert found["accuracy"]["attention"]["r"] < -0.8
    assert found["by_layer"]["contrast"]["mean"] == pytest.approx([0.9, 0.5, 0.5])


def test_bins_have_intervals_of_three_pictures_or_more() -> None:
    found = binned(np.array([0, 1, 1, 1.0]), np.array([5, 1, 2, 3.0]))
    assert (found[0]["mean"], found[9]["mean"]) == (5, 2)
    assert math.isnan(found[0]["low"])
    assert math.isnan(found[4]["mean"])
    assert found[9]["high"] == pytest.approx(2 + 4.302653 / math.sqrt(3))


# -- chosen layers ---------------------------------------------------------------------------------


def test_vaq_is_that_of_full_maps(vlm: VLM) -> None:
    [picture] = pictures(1)
    row = Layers(heads=2).measure(vlm, picture, {"vanilla": ()})
    without, visual = full_maps(vlm, "", picture.load())
    for asked, found in zip(picture.asked(), row["questions"], strict=True):
        maps, own = full_maps(vlm, asked.text + SHORT, picture.load())
        added = (maps[:, :, -1, own] - without[:, :, -1, visual]).clamp(min=0)
        vaq = [sum(sorted(layer.norm(dim=-1).tolist())[-2:]) / 2 for layer in added]
        np.testing.assert_allclose(found["vaq"], vaq, rtol=1e-3)
        assert found["layer"] == row["layers"][int(np.argmax(vaq))]


def test_chosen_layers_are_counted() -> None:
    def question(group: str, layer: int | None) -> dict[str, Any]:
        return {"group": group, "vaq": [0.1, 0.3], "layer": layer}

    asked = [question("one", 4), question("two", 6), question("two", None)]
    rows = [{"picture": str(n), "layers": [4, 6], "questions": asked} for n in range(3)]
    found = Layers().count(rows)
    assert found["chosen"] == [3, 3]
    assert found["groups"]["two"]["chosen"] == [0, 3]
    assert found["groups"]["two"]["unchanged"] == 3
    assert found["vaq"]["mean"] == pytest.approx([0.1, 0.3])
    caption = Layers().caption(found)
    assert "layer 4 is chosen most, for 50.0 %" in caption
    nothing = [{**rows[0], "questions": [question("one", None)]}]
    with pytest.raises(FoveateError, match="no question changes the attention"):
        Layers().count(nothing)


def test_association() -> None:
    told = association([[10, 0, 0], [0, 10, 0]])
    assert told is not None
    assert told["v"] == pytest.approx(1)
    even = association([[10, 20], [20, 40]])
    assert even is not None
    assert (even["v"], even["p"]) == pytest.approx((0, 1))
    assert association([[10, 0], [20, 0]]) is None


# -- runs ------------------------------------------------------------------------------------------


def test_every_analysis_is_registered() -> None:
    assert set(analyses()) == {"decay", "convergence", "complexity", "layers", "heads", "gates"}
    for cls in analyses().values():
        assert cls.title


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(analyses()) - {"gates"}))  # it needs an injection
def test_a_torn_run_gives_the_same_numbers(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    analysis, few = parse(name), pictures(4)
    whole = run(analysis, vlm, few, tmp_path)
    for ending in (".png", ".json", ".md"):
        assert (tmp_path / f"{name}{ending}").stat().st_size
    assert json.loads((tmp_path / f"{name}.json").read_text()) == whole
    assert whole["caption"] in (tmp_path / f"{name}.md").read_text()
    journal = tmp_path / f"{name}.jsonl"
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) - 100])
    read, measure = [], type(analysis).measure

    def counted(self: Any, vlm: VLM, picture: AnnotatedImage, stacks: Any) -> Any:
        read.append(picture.name)
        return measure(self, vlm, picture, stacks)

    monkeypatch.setattr(type(analysis), "measure", counted)
    monkeypatch.setattr(Sheet, "save", lambda self, path: None)
    assert run(analysis, vlm, few, tmp_path) == whole
    assert read == ["picture 3"]
    assert journal.read_bytes() == data
    assert run(analysis, vlm, few[:2], tmp_path)["pictures"] == 2  # and nothing is read
    assert read == ["picture 3"]


@pytest.mark.usefixtures("undrawn")
def test_coco_from_file_to_numbers(vlm: VLM, tmp_path: Path) -> None:
    """The cat covers a token; a dog of one column of pixels covers none."""
    found = run(Decay(), vlm, coco_pictures(coco(tmp_path), 5), tmp_path, data="COCO val2014")
    assert (found["numbers"]["objects"], found["numbers"]["too_small"]) == (1, 2)
    assert "1 pictures (COCO val2014)" in found["caption"]


@pytest.mark.usefixtures("undrawn")
def test_pictures_that_cannot_be_read_are_left_out(vlm: VLM, tmp_path: Path) -> None:
    def broken() -> Image.Image:
        raise FoveateError("It is torn.")

    good = pictures(2)
    bad = AnnotatedImage("bad", ("cat",), broken, mask_of, list)
    with pytest.warns(UserWarning, match=r"1 of 3 images were left out; the first: It is torn"):
        assert run(Decay(), vlm, [bad, *good], tmp_path)["pictures"] == 2
    with pytest.raises(FoveateError, match=r"No image could be used \(It is torn"):
        run(Decay(covered=0.6), vlm, [bad], tmp_path / "..")


@pytest.mark.usefixtures("undrawn")
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
    assert "heads is about the plain model" in said("heads", "--method", "pai", "--out", tmp_path)
    told = said("decay", "--method", "vicrop", "--out", tmp_path)
    assert "vicrop shows the model another picture" in told
    assert "the thresholds must be 0 < low <= high" in said("complexity(low=300)")
    assert "top_k must be 2 or more" in said("convergence(top_k=1)")


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
        commands.main(["analyze", "decay", "--limit", "2", "--out", str(tmp_path)])
    assert not stop.value.code
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "decay.json").read_text())
    assert "vanilla object" in " ".join(out.split())
    assert f"what it shows: {tmp_path / 'decay.md'}" in out
    assert found["command"] == (
        f"foveate analyze decay --model pocket --data none --limit 2 --out {tmp_path}"
    )
    assert found["pictures"] == 2
    assert found["caption"] in (tmp_path / "decay.md").read_text()


def test_a_stopped_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {
        p.name: row for p, row in zip(pocket_pictures(4), made_up([[0.1, 0.3]] * 4), strict=True)
    }
    read: list[str] = []

    def measure(self: Decay, vlm: VLM, picture: AnnotatedImage, stacks: Any) -> Any:
        read.append(picture.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return {k: v for k, v in rows[picture.name].items() if k != "picture"}

    monkeypatch.setattr(Decay, "measure", measure)
    monkeypatch.setattr(Sheet, "save", lambda self, path: None)
    for code, told in ((130, "stopped; the same command goes on"), (0, "")):
        with pytest.raises(SystemExit) as stop:
            commands.main(["analyze", "decay", "--limit", "4", "--out", str(tmp_path)])
        assert (stop.value.code or 0) == code
        assert told in capsys.readouterr().err
    names = list(rows)
    assert read == [*names[:3], *names[2:]]
    found = json.loads((tmp_path / "decay.json").read_text())["numbers"]
    assert found["methods"]["vanilla"]["object"]["mean"] == [0.1, 0.3]
