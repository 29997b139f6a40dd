"""Traces: what is read against slow full maps, the object's curves against loops, the pictures."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import FoveateError, Method, trace
from foveate.backends.transformers.anatomy import anatomy
from foveate.families.layout import Grid
from foveate.insight.pages.trace import page
from foveate.insight.target import Target, known, read
from foveate.insight.trace import END, Trace
from foveate.methods.clvs import CLVS
from foveate.scenes import questions, world
from foveate.scenes.export import export
from foveate.vlm.chat import Chat
from foveate.vlm.vlm import VLM
from tests import tiny
from tests.references import clvs as reference

STEPS = 4
QUESTION = "Is there a cat?"


def photo(width: int = 90, height: int = 60) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def llava() -> VLM:
    return tiny.vlm()


@pytest.fixture(scope="module")
def pocket() -> VLM:
    return VLM.load("pocket", device="cpu")


@pytest.fixture(scope="module")
def traced(pocket: VLM) -> Trace:
    """The demo's scene, asked about its first thing, with both methods."""
    scene = world.sample(questions.FIRST_HELD_OUT)
    kind = scene.things[0].kind
    picture = world.draw(scene)
    target = read(kind, picture.size, known("demo"))
    return trace(pocket, picture, f"Is there {questions.a(kind)} in the image?", object=target)


@pytest.fixture(scope="module")
def saved(traced: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    traced.save(folder)
    return folder


# ------------------------------------------------------------------------ what is read


def slow(vlm: VLM, chat: Chat, steps: int) -> tuple[Tensor, Tensor]:
    """Plain answer by full maps: (steps, layers, H, N_v) weights and (steps, L, D) streams."""
    model, inputs = vlm.model, vlm.inputs([chat]).data
    options = {"do_sample": False, "max_new_tokens": steps}
    with torch.no_grad():
        sequence = model.generate(**inputs, **options)
        start = inputs["input_ids"].shape[1]
        longer = dict(inputs)
        for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                new = sequence.shape[1] - 1 - start
                longer[name] = torch.nn.functional.pad(
                    inputs[name], (0, new), value=int(name == "attention_mask")
                )
        longer["input_ids"] = sequence[:, :-1]
        streams: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda m, i, o: streams.append(o[0] if isinstance(o, tuple) else o)
            )
            for layer in model.get_decoder().layers
        ]
        model.set_attn_implementation("eager")
        try:
            out = model(**longer, output_attentions=True)
        finally:
            model.set_attn_implementation("sdpa")
            for hook in hooks:
                hook.remove()
    kinds = getattr(model.get_decoder().config, "layer_types", None)
    kinds = kinds or ["full_attention"] * len(streams)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    columns = visual.nonzero()[:, 0]
    maps = [a[0] for a, kind in zip(out.attentions, kinds, strict=True) if kind == kinds[-1]]
    rows = range(start - 1, longer["input_ids"].shape[1])
    weights = torch.stack([torch.stack([a[:, row, columns] for a in maps]) for row in rows])
    return weights, torch.stack([torch.stack([s[0, row] for s in streams]) for row in rows])


def doubt(vlm: VLM, stream: Tensor, top_k: int) -> float:
    """Equation (8) of CLVS in plain Python."""
    logits = (vlm.model.get_output_embeddings().weight.double() @ stream.double()).tolist()
    best = sorted(logits)[-top_k:]
    total = sum(math.exp(x - best[-1]) for x in best)
    chances = [math.exp(x - best[-1]) / total for x in best]
    return -sum(p * math.log(p) for p in chances if p > 0) / math.log(top_k)


@pytest.mark.parametrize("family", ["llava", "gemma3", "idefics3", "pocket"])
def test_attention_and_uncertainty_equal_slow_full_maps(family: str, pocket: VLM) -> None:
    vlm = pocket if family == "pocket" else tiny.vlm(family)
    image, question = photo(), "What is in the image?" if family == "pocket" else QUESTION
    found = trace(vlm, image, question, ["vanilla"], max_new_tokens=STEPS)
    (run,) = found.runs
    assert len(run.tokens) == STEPS
    weights, streams = slow(vlm, vlm.chat([image], question, None), STEPS)
    assert run.attention.dtype == np.float16
    assert run.attention.shape == (STEPS, *weights.mean(2).shape[1:])
    np.testing.assert_allclose(run.attention, weights.mean(2), atol=5e-4)
    expected = [[doubt(vlm, stream, CLVS.top_k) for stream in step] for step in streams]
    np.testing.assert_allclose(run.uncertainty, expected, atol=1e-4)
    np.testing.assert_allclose(run.on_image, weights.mean(2).sum(-1), atol=2e-3)


def test_heads_are_reduced_as_asked(llava: VLM) -> None:
    chat = llava.chat([photo()], QUESTION, None)
    weights, _ = slow(llava, chat, STEPS)
    for heads, expected in (("max", weights.amax(2)), ((3, 1), weights[:, :, [1, 3]].mean(2))):
        found = trace(llava, photo(), QUESTION, ["vanilla"], heads=heads, max_new_tokens=STEPS)
        np.testing.assert_allclose(found.runs[0].attention, expected, atol=5e-4)


def test_largest_weights_are_drawn_as_shares(llava: VLM) -> None:
    found = trace(llava, photo(), QUESTION, heads="max", max_new_tokens=1, object=(0, 0, 45, 60))
    drawn = [getattr(run, found.measure) for run in found.runs]
    assert found.measure == "object_share"
    assert all(run.on_image.max() > 1 for run in found.runs)
    assert all(values.max() <= 1 for values in drawn)
    assert "<fieldset hidden>" in page(found)


def test_reading_changes_no_answer(traced: Trace, pocket: VLM) -> None:
    assert len(traced.runs) > 1
    for run in traced.runs:
        plain = pocket.ask(traced.image, traced.question, run.method)
        assert run.answer.text == plain.text
        assert run.answer.probabilities == pytest.approx(plain.probabilities, abs=1e-5)
        assert run.tokens == (*plain.tokens, END)
        assert run.said == len(plain.tokens)


@pytest.mark.parametrize(
    "parameters",
    [
        {"smoothing": 0.4, "stop_threshold": 0.8, "stop_from": 0.25, "top_k": 5},
        {"stop_threshold": 0.92, "stop_from": 0.0, "stop_every": 2, "final_norm": True},
        {"stop_threshold": 0.0},
        {"stop_threshold": 1.1},
    ],
    ids=str,
)
def test_the_stopping_layer_is_the_references(llava: VLM, parameters: dict[str, Any]) -> None:
    method = CLVS(**parameters)
    (run,) = trace(llava, photo(), QUESTION, [method], max_new_tokens=STEPS).runs
    inputs = llava.inputs([llava.chat([photo()], QUESTION, None)]).data
    values = method.resolve(anatomy(llava.model)).parameters()
    fields = reference.Parameters.__dataclass_fields__
    values = {k: v for k, v in values.items() if k in fields}
    ids = llava.tokenizer.convert_tokens_to_ids(list(run.answer.tokens))
    tokens = torch.tensor([ids[: STEPS - 1]])
    steps = reference.run(llava.model, inputs, steps=STEPS, tokens=tokens, **values)
    last = len(run.layers) - 1  # the reference tests it, too, though nothing is left to stop
    expected = (step.stopped[0] for step in steps)
    assert run.stopped == tuple(None if layer == last else layer for layer in expected)
    assert run.threshold == method.stop_threshold
    assert (set(run.stopped) == {None}) == (method.stop_threshold == 0)
    for token, layer in enumerate(run.stopped):  # the first tested one below the threshold
        below = [at for at in run.tested if run.uncertainty[token, at] < method.stop_threshold]
        assert layer == (below[0] if below else None)


def test_what_is_read_with_clvs_is_after_its_edits(traced: Trace) -> None:
    plain, smoothed = traced.runs
    assert plain.layers == smoothed.layers
    stop = smoothed.stopped[0]
    assert stop is not None
    assert plain.threshold is None
    assert set(plain.stopped) == {None}
    # smoothing raises the share of the image, in the first smoothed layer for sure
    assert smoothed.on_image[0, 1] > plain.on_image[0, 1]


# ------------------------------------------------------------------------------ objects


def by_loop(mask: np.ndarray, box: Any, rows: int, cols: int) -> np.ndarray:
    """Area share of every cell, counted on a fine raster of points."""
    fine, found = 24, np.zeros((rows, cols))
    left, top, right, bottom = box
    for row in range(rows):
        for col in range(cols):
            for i in range(fine):
                for j in range(fine):
                    y = top + (bottom - top) * (row + (i + 0.5) / fine) / rows
                    x = left + (right - left) * (col + (j + 0.5) / fine) / cols
                    if 0 <= x < 1 and 0 <= y < 1:
                        found[row, col] += mask[int(y * mask.shape[0]), int(x * mask.shape[1])]
    return found / fine**2


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 1.0, 1.0), (0.13, 0.0, 0.87, 1.0), (0.0, -0.25, 1.0, 1.25)], ids=str
)
def test_partly_covered_cells_count_by_area(box: Any) -> None:
    mask = np.random.default_rng(1).random((11, 7)) < 0.4
    target = Target("spots", mask.astype(np.float32))
    found = target.cells(Grid(3, 4, box=box)).numpy()
    np.testing.assert_allclose(found, by_loop(mask, box, 3, 4), atol=0.05)


def test_a_box_between_pixels_has_its_own_area() -> None:
    target = read("0.1,0.2,0.65,0.75", (7, 5))
    assert target.area == pytest.approx(0.55 * 0.55, abs=1e-6)
    whole = target.cells(Grid(2, 2)).numpy()
    assert whole.mean() == pytest.approx(0.55 * 0.55, abs=1e-6)
    assert whole[0, 0] == pytest.approx(0.4 * 0.3 / 0.25, abs=1e-6)
    pixels = read((1, 1, 3, 4), (7, 5))
    assert (pixels.box, pixels.mask.sum()) == ((1, 1, 3, 4), 6)


def test_what_a_crop_shows_of_it() -> None:
    target = read((10, 10, 30, 20), (40, 40))
    part = (0.5, 0.25, 1.0, 0.75)  # pixels 20 to 40 across, 10 to 30 down
    crop = read((0, 0, 10, 10), (20, 20))
    assert torch.allclose(target.cells(Grid(3, 5), part), crop.cells(Grid(3, 5)))
    beyond = Grid(4, 4, box=(-0.5, 0.0, 1.5, 1.0))  # padding beside the crop is no image
    assert torch.allclose(target.cells(beyond, part), crop.cells(beyond))
    assert np.array_equal(target.seen(part, (20, 20)), crop.mask > 0)


def test_curves_are_sums_over_the_objects_tokens(traced: Trace) -> None:
    assert traced.target is not None
    grid = Grid(12, 12)
    cells = traced.target.cells(grid).flatten().tolist()
    for run in traced.runs:
        for step in range(len(run.tokens)):
            for layer in range(len(run.layers)):
                row = run.attention[step, layer].astype(float).tolist()
                mass = sum(weight * share for weight, share in zip(row, cells, strict=True))
                assert run.on_object is not None
                assert run.object_share is not None
                assert run.on_object[step, layer] == pytest.approx(mass, abs=1e-5)
                share = run.object_share[step, layer]
                assert share == pytest.approx(mass / sum(row), abs=1e-5)


@pytest.mark.parametrize("family", ["llava_next", "idefics3"])
def test_tokens_of_tiles_count_by_their_own_cells(family: str) -> None:
    vlm, image = tiny.vlm(family), photo()
    (run,) = trace(vlm, image, QUESTION, ["vanilla"], object=(0, 0, 30, 60), max_new_tokens=1).runs
    grids = vlm.grids(vlm.chat([image], QUESTION, None))
    assert len(grids) > 1
    assert run.share is not None
    for token, share in enumerate(run.share.tolist()):
        boxes = [box for grid in grids if (box := grid.cell(token))]
        expected = 0.0  # a newline's
        for left, top, right, bottom in boxes:
            wide = max(0, min(right, 1 / 3) - max(left, 0))
            high = max(0, min(bottom, 1) - max(top, 0))
            expected = wide * high / ((right - left) * (bottom - top))
        assert share == pytest.approx(expected, abs=1e-6)


def test_an_object_that_the_processor_cuts_away_is_told(llava: VLM) -> None:
    cutting = tiny.llava()
    clip = tiny.image_processor("CLIP")
    cutting.image_processor = clip(size={"shortest_edge": 16}, crop_size=tiny.SIDE)
    vlm = VLM(llava.model, cutting)
    with pytest.warns(UserWarning, match="does not look with vanilla: it was cut away"):
        found = trace(vlm, photo(), QUESTION, ["vanilla"], object=(0, 0, 9, 60), max_new_tokens=1)
    assert found.runs[0].on_object is not None
    assert found.runs[0].on_object.max() == 0


class Halves(Method, register=False):
    """Asks about the right half; says so, or not."""

    name = "halves"
    says = True

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        image = chats[0].images[0]
        box = (image.width // 2, 0, image.width, image.height)
        notes = {"crop": list(box)} if self.says else {}
        return [replace(c, images=[image, image.crop(box)], notes=notes) for c in chats]


class Silent(Halves, register=False):
    name = "silent"
    says = False


def test_a_method_that_crops_is_traced_on_its_pictures(llava: VLM) -> None:
    image = photo(80, 40)
    (run,) = trace(
        llava, image, QUESTION, [Halves()], object=(40, 0, 60, 40), max_new_tokens=1
    ).runs
    whole, crop = run.pictures
    assert (whole.part, crop.part) == ((0.0, 0.0, 1.0, 1.0), (0.5, 0.0, 1.0, 1.0))
    assert crop.image.size == (40, 40)
    assert run.share is not None
    first = read((40, 0, 60, 40), (80, 40)).cells(Grid(4, 4, box=whole.box)).flatten()
    second = read((0, 0, 20, 40), (40, 40)).cells(Grid(4, 4, box=crop.box)).flatten()
    np.testing.assert_allclose(run.share, torch.cat([first, second]), atol=1e-6)
    heats = [picture.heat.sum((-2, -1), dtype=np.float32) for picture in run.pictures]
    np.testing.assert_allclose(sum(heats), run.on_image, atol=1e-3)


def test_without_a_known_place_the_object_is_left_out_with_a_note(
    llava: VLM, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="not known what part of the image silent asked about"):
        found = trace(
            llava, photo(), QUESTION, ["vanilla", Silent()], object=(1, 1, 9, 9), max_new_tokens=1
        )
    plain, silent = found.runs
    assert plain.on_object is not None
    assert silent.on_object is silent.object_share is None
    assert len(found.save(tmp_path)) == 5
    assert json.loads((tmp_path / "trace.json").read_text())["runs"][1]["on_object"] is None


# -------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1,2,3", "The box 1,2,3 has 3 numbers"),
        ("5,5,2,9", "The box 5,5,2,9 is empty"),
        ("5,5,200,9", "reaches outside the image, which has 90 x 60 pixels"),
        ("-3,5,20,9", "reaches outside the image"),
        ("1,2,--3,4", "Cannot read the box"),
        ("dog", "neither a box (left,top,right,bottom) nor a mask file"),
        (np.zeros((60, 90)), "In the mask nothing is marked"),
        (np.ones((90, 60)), "The mask has 60 x 90 pixels and the image 90 x 60"),
    ],
)
def test_objects_that_cannot_be_are_refused(given: Any, expected: str) -> None:
    with pytest.raises(FoveateError, match=re.escape(expected)):
        read(given, (90, 60))


def test_mask_files(tmp_path: Path) -> None:
    values = np.zeros((60, 90), np.uint8)
    values[10:20, 30:50] = 3
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert read(str(tmp_path / "mask.png"), (90, 60)).box == (30, 10, 50, 20)
    with pytest.raises(FoveateError, match=r"mask\.png has 90 x 60 pixels and the image 60 x 90"):
        read(tmp_path / "mask.png", (60, 90))


def test_names_are_known_on_drawn_scenes(tmp_path: Path) -> None:
    folder = export(2, tmp_path, size=64)
    for number in range(2):
        image = folder / "images" / f"00000{number}.png"
        row = json.loads((folder / "scenes.jsonl").read_text().splitlines()[number])
        index = np.asarray(Image.open(folder / row["mask"]))
        names = known(image)
        assert set(names) == set(row["counts"])
        for kind in names:
            things = [i for i, t in enumerate(row["scene"]["things"]) if t["kind"] == kind]
            mask = read(kind, (64, 64), names).mask
            assert np.array_equal(mask > 0, np.isin(index, [i + 1 for i in things]))
    with pytest.raises(FoveateError, match=r"no 'unicorn' in this scene: it has .*, "):
        read("unicorn", (64, 64), known(image))
    assert known(tmp_path / "elsewhere.png") == {}


def test_bad_requests_are_refused(llava: VLM) -> None:
    for options, expected in (
        ({"methods": []}, "There is no method to trace"),
        ({"methods": ["clvs", CLVS()]}, "clvs is named twice"),
        ({"heads": "median"}, "Cannot read the heads 'median'"),
        ({"heads": (0, 4)}, "numbers from 0 to 3"),
        ({"heads": ()}, "Cannot read the heads"),
        ({"object": "cup"}, "The object 'cup' is neither"),
    ):
        with pytest.raises(FoveateError, match=re.escape(expected)):
            trace(llava, photo(), QUESTION, **options)
    with pytest.raises(FoveateError, match="The question is empty"):
        trace(llava, photo(), "  ")


# ------------------------------------------------------------------------- what is written


def test_numbers_in_the_files_are_those_of_the_trace(traced: Trace, saved: Path) -> None:
    written = {path.name for path in saved.iterdir()}
    assert written == {"trace.json", "trace.npz", "strip.png", "curves.png", "index.html"}
    data = json.loads((saved / "trace.json").read_text())
    arrays = np.load(saved / "trace.npz", allow_pickle=False)
    assert data["question"] == traced.question
    assert data["object"]["box"] == list(traced.target.box if traced.target else ())
    assert [row["method"] for row in data["runs"]] == ["vanilla", "clvs"]
    for row, run in zip(data["runs"], traced.runs, strict=True):
        assert row["tokens"] == list(run.tokens)
        assert row["stopped"] == list(run.stopped)
        for name in ("on_image", "on_object", "object_share", "uncertainty"):
            np.testing.assert_allclose(row[name], getattr(run, name), rtol=1e-5, atol=1e-12)
            assert np.array_equal(arrays[f"{run.method}/{name}"], getattr(run, name))
        assert np.array_equal(arrays[f"{run.method}/attention"], run.attention)
        assert np.array_equal(arrays[f"{run.method}/heat-0"], run.pictures[0].heat)
    for name in ("strip.png", "curves.png"):
        with Image.open(saved / name) as drawn:
            assert min(drawn.size) > 700


def inside(text: str) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(data)


def test_the_page_holds_everything_and_fetches_nothing(traced: Trace, saved: Path) -> None:
    text = (saved / "index.html").read_text()
    assert not re.search(r"https?:|//\w+\.|@import|url\(", text)
    assert "default-src 'none'" in text
    assert all(
        value.startswith("data:") for value in re.findall(r'(?:src|href)="(?!#)(.*?)"', text)
    )
    data = inside(text)
    assert data["images"][0].startswith("data:image/jpeg;base64,")
    for row, run in zip(data["runs"], traced.runs, strict=True):
        assert (row["method"], row["tokens"]) == (run.method, list(run.tokens))
        assert row["said"] == run.said
        np.testing.assert_allclose(row["on_object"], run.on_object, rtol=1e-3)
        (picture,) = row["pictures"]
        heat = run.pictures[0].heat.astype(np.float32)
        raw = np.frombuffer(base64.b64decode(picture["heat"]), np.uint8).reshape(heat.shape)
        peaks = np.array(picture["peaks"])[..., None, None]
        np.testing.assert_allclose(peaks * (raw / 255) ** 2, heat, atol=0.005 * heat.max())
        assert picture["outline"].startswith("data:image/png;base64,")


def test_text_on_the_page_is_not_markup(llava: VLM) -> None:
    question = "is </script><b>red</b> & there?"
    text = page(trace(llava, photo(), question, ["vanilla"], max_new_tokens=1))
    assert "<b>" not in text
    assert text.count("</script>") == 2
    assert "is &lt;/script&gt;&lt;b&gt;red" in text
    assert inside(text)["object"] is None


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_the_page_draws_itself_in_a_browser(traced: Trace, saved: Path) -> None:
    address = f"{(saved / 'index.html').as_uri()}#layer=4&token=0"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000"]
    dom = subprocess.run(
        ["chromium", *options, "--dump-dom", address], capture_output=True, text=True, timeout=400
    ).stdout
    assert 'data-ready="yes"' in dom
    assert "4 (0 to 11)" in re.sub(r"<.*?>", "", dom)
    assert dom.count('aria-pressed="true"') == 2
    assert dom.count('class="curve line') == 4
    for run in traced.runs:
        assert f"Attention of {run.method} in layer 4" in dom


# ------------------------------------------------------------------------------- command


def test_the_command_writes_and_tells(run: Any, tmp_path: Path) -> None:
    thing = next(iter(known("demo")))
    asked = ("trace", "demo", f"Is there a {thing}?", "--object", thing, "-o", tmp_path / "out")
    code, out, err = run(*asked, "--method", "clvs(stop_threshold=0.3)", "--max-new-tokens", 1)
    assert code == 0
    assert err == "foveate: tracing clvs(stop_threshold=0.3), 1 of 1\n"
    assert f"most attention to {thing}" in out
    assert "cut off after 1 tokens" in out
    for name in ("trace.json", "trace.npz", "strip.png", "curves.png", "index.html"):
        assert (tmp_path / "out" / name).is_file()
        assert name in out


def test_layers_are_printed_with_the_chosen_one(run: Any, tmp_path: Path, pocket: VLM) -> None:
    from foveate.methods.laser import LASER

    code, out, err = run("trace", "demo", "Is there a cloud?", "--layers")
    assert (code, err) == (0, "")
    picture = world.draw(world.sample(questions.FIRST_HELD_OUT))
    chats = [pocket.chat([picture], "Is there a cloud?", None)]
    notes = pocket.rewrite(chats, (LASER(vat="never"),))[0].notes
    rows = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    assert [int(row[0]) for row in rows] == notes["layers"]
    assert [float(row[1]) for row in rows] == pytest.approx(notes["vaq"], abs=6e-5)
    assert [int(row[0]) for row in rows if "chosen" in row[3]] == [notes["layer"]]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("demo", " "), "The question is empty"),
        (("demo", "red?", "--object", "unicorn"), "There is no 'unicorn' in this scene: it has"),
        (("demo", "red?", "--object", "0,0,800,80"), "reaches outside the image"),
        (("demo", "red?", "--heads", "some"), "Cannot read the heads 'some'"),
        (("demo", "red?", "--method", "all"), "name those to compare"),
        (("demo", "red?", "--method", "cvls"), "There is no method 'cvls'"),
        (("nowhere.png", "red?"), "There is no image nowhere.png"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Any, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    code, out, err = run("trace", *arguments, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith("foveate: ")
    assert expected in err
    assert err.count("\n") == 1
    assert err.endswith(".\n")
