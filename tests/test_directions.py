"""`foveate directions`: differences of states, their principal components, and runs that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate import VLM, FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.base.artifact import DIRECTIONS, Artifact
from foveate.insight import directions
from foveate.insight.directions import Demonstration, find_directions
from foveate.methods import vti
from foveate.methods.vti import VTI
from foveate.vlm.chat import Chat
from tests import tiny
from tests.references.full import difference

Run = Callable[..., tuple[int, str, str]]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8))


def demonstrations(count: int) -> list[Demonstration]:
    return [
        Demonstration(
            str(i), f"is there w{30 + i}", f"w{50 + i} a cat", f"w{70 + i}", lambda i=i: picture(i)
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny.vlm()


# -- by the definition -----------------------------------------------------------------------------


def component(rows: Tensor) -> Tensor:
    """Mean of the rows (n, F) plus the first right singular vector of the centred rows."""
    mean = rows.double().mean(0)
    left, _, right = torch.linalg.svd(rows.double() - mean, full_matrices=False)
    sign = 1 if left[:, 0].max() > -left[:, 0].min() else -1
    return mean + sign * right[0]


@torch.no_grad()
def states_after(vlm: VLM, one: Demonstration, caption: str) -> Tensor:
    """HF hidden states (L + 1, D) of the last row, with the caption's words as ids."""
    inputs = dict(vlm.inputs([Chat([one.load()], one.question)]))
    words = vlm.tokenizer(caption, add_special_tokens=False)["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([words])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    out = vlm.model(**inputs, output_hidden_states=True)
    return torch.stack([h[0, -1] for h in out.hidden_states])


def test_text_directions_are_the_mean_and_one_component_over_all_layers(
    vlm: VLM, tmp_path: Path
) -> None:
    found = find_directions(vlm, demonstrations(4), tmp_path / "out", image=False)
    deltas = [
        states_after(vlm, one, one.true) - states_after(vlm, one, one.hallucinated)
        for one in demonstrations(4)
    ]
    want = component(torch.stack(deltas).flatten(1)).view(7, 64)
    assert found.tensors.keys() == {"text"}
    assert difference(found.tensors["text"].double(), want[1:]) < 1e-4
    per_layer = torch.stack([component(torch.stack(deltas)[:, i]) for i in range(7)])
    assert difference(per_layer[1:], want[1:]) > 1e-2, "not one component per layer"
    mean = torch.stack(deltas).double().mean(0)
    assert difference(mean[1:], want[1:]) > 1e-3, "not the mean alone"


@torch.no_grad()
def seen(vlm: VLM, pixels: Tensor) -> Tensor:
    """(L_v + 1, T_v, D_v) of one picture, as transformers hands them out."""
    out = vlm.model.model.vision_tower(pixels, output_hidden_states=True)
    return torch.stack(out.hidden_states)[:, 0]


@pytest.mark.parametrize("grouping", ["released", "token"])
def test_image_directions_are_masked_views_less_the_image_by_groups(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouping: Any
) -> None:
    views: list[Tensor] = []

    def masked(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
        views.append(original(pixels, side, generator))
        return views[-1]

    original = directions.masked
    monkeypatch.setattr(directions, "masked", masked)
    options = {"grouping": grouping, "trials": 3}
    found = find_directions(vlm, demonstrations(4), tmp_path / "out", **options)
    assert len(views) == 12
    deltas = []
    for i, one in enumerate(demonstrations(4)):
        pixels = vlm.inputs([Chat([one.load()], one.question)])["pixel_values"]
        mean = sum(seen(vlm, view) for view in views[3 * i : 3 * i + 3]) / 3
        deltas.append(mean - seen(vlm, pixels))
    blocks, tokens, width = deltas[0].shape
    flat = torch.stack(deltas).view(4, blocks * tokens, width)
    want = torch.zeros(blocks * tokens, width, dtype=torch.double)
    for group in range(tokens):
        if grouping == "released":  # consecutive rows, mostly tokens of one block
            rows = [group * blocks + i for i in range(blocks)]
        else:
            rows = [block * tokens + group for block in range(blocks)]
        want[rows] = component(flat[:, rows].flatten(1)).view(blocks, width)
    assert found.tensors["image"].shape == (2, 17, 32)
    assert difference(found.tensors["image"].double(), want.view(blocks, tokens, width)[1:]) < 1e-4


def test_nearly_all_patches_are_masked_with_the_channels_means() -> None:
    pixels = torch.randn(1, 3, 42, 45, generator=torch.Generator().manual_seed(0))
    view = directions.masked(pixels, 4, torch.Generator().manual_seed(1))
    changed = (view != pixels).any(1)[0]
    patches = changed[:40, :44].unfold(0, 4, 4).unfold(1, 4, 4).flatten(2)
    assert not changed[40:].any()
    assert not changed[:, 44:].any(), "what is left of a patch stays"
    assert (patches.all(2) | ~patches.any(2)).all()
    assert int(patches.all(2).sum()) == int(0.99 * 110)
    means = pixels.mean((2, 3))[0]
    assert torch.equal(view[0, :, changed], means[:, None].expand(-1, int(changed.sum())))


def test_a_caption_stands_right_behind_the_prompt(vlm: VLM) -> None:
    """Also where its first letters change how the prompt's last ones are cut into tokens."""
    chat = Chat([picture(0)], "is there a cat")
    prompt = vlm.inputs([chat])["input_ids"][0].tolist()
    got = directions.captioned(vlm, chat, "w50 w51")
    assert got["input_ids"][0].tolist() == [*prompt, 50, 51]
    assert got["attention_mask"].shape == got["input_ids"].shape
    joined = directions.captioned(vlm, chat, ":")  # the template ends in one: "::" is one word
    unknown = vlm.tokenizer.unk_token_id
    assert joined["input_ids"][0].tolist() == [*prompt[:-1], unknown]


# -- runs ------------------------------------------------------------------------------------------


def test_the_folder_is_an_artifact_that_vti_takes(vlm: VLM, tmp_path: Path) -> None:
    out = tmp_path / "out"
    find_directions(vlm, demonstrations(3), out, trials=2, command="again")
    found = Artifact.from_pretrained(out, DIRECTIONS)
    assert found.model == anatomy(vlm.model).shape
    assert (found.made["demonstrations"], found.made["command"]) == (3, "again")
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "states and records are gone"
    answers = [
        vlm.ask(picture(9), "is there a cat", method, max_new_tokens=2).probabilities
        for method in (None, VTI(alpha_text=3.0, alpha_image=3.0, path=str(out)))
    ]
    assert answers[0] != answers[1]


def test_a_run_that_stopped_goes_on_and_ends_as_an_undisturbed_one(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_directions(vlm, demonstrations(4), tmp_path / "whole", trials=2)
    measured: list[str] = []
    original = directions.text_difference

    def stopping(vlm: VLM, one: Demonstration) -> Tensor:
        measured.append(one.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return original(vlm, one)

    monkeypatch.setattr(directions, "text_difference", stopping)
    with pytest.raises(KeyboardInterrupt):
        find_directions(vlm, demonstrations(4), tmp_path / "out", trials=2)
    with pytest.raises(FoveateError, match=r"other settings \(trials: 2, now 3\)"):
        find_directions(vlm, demonstrations(4), tmp_path / "out", trials=3)
    next(iter((tmp_path / "out.states").glob("*.safetensors"))).unlink()  # measured again
    find_directions(vlm, demonstrations(4), tmp_path / "out", trials=2)
    assert len(measured) == 3 + 3
    whole, out = (
        Artifact.from_pretrained(tmp_path / name, DIRECTIONS).tensors for name in ("whole", "out")
    )
    assert all(torch.equal(whole[name], out[name]) for name in ("text", "image"))


def test_what_cannot_be_used_is_refused_in_one_sentence(vlm: VLM, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="give at least two"):
        find_directions(vlm, demonstrations(1), tmp_path / "one", image=False)
    with pytest.raises(FoveateError, match="cannot be used, a folder is written"):
        find_directions(vlm, demonstrations(2), tmp_path / "out.safetensors")
    with pytest.raises(FoveateError, match="trials must be at least 1"):
        find_directions(vlm, demonstrations(2), tmp_path / "out", trials=0)
    other = tiny.vlm("gemma3")
    found = find_directions(other, demonstrations(2), tmp_path / "text")
    assert found.tensors.keys() == {"text"}, "its tower cannot be read"


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


def written(folder: Path, count: int) -> Path:
    rows = []
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "is there a cat", "value": f"w{50 + i}"})
        rows[-1]["h_value"] = f"w{80 + i}"
    file = folder / "demonstrations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_demonstrations_are_read_and_broken_lines_counted(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    data = written(tmp_path, 3)
    data.write_text(data.read_text() + '{"image": "0.png"}\nnonsense\n')
    options = ("directions", folder, "--data", data, "--trials", 2, "--out", tmp_path / "out")
    code, out, err = run(*options)
    assert code == 0, err
    assert "2 of 5 lines" in err
    assert "text: 6 x 64\nimage: 2 x 17 x 32\n" in out
    made = Artifact.from_pretrained(tmp_path / "out", DIRECTIONS).made
    assert made["demonstrations"] == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("MODEL",), "--data FILE.jsonl"),
        (("--images", "here"), "--data FILE.jsonl"),
        (("MODEL", "--data", "missing.jsonl"), "cannot be read"),
        (("MODEL", "--data", "empty.jsonl"), "has no usable line"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Run, folder: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    given = [
        str(tmp_path / a) if a.endswith("jsonl") else str(folder) if a == "MODEL" else a
        for a in arguments
    ]
    code, out, err = run("directions", *given)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.long
def test_a_killed_run_goes_on(run: Run, folder: Path, tmp_path: Path) -> None:
    data = written(tmp_path, 30)
    command = ["directions", str(folder), "--data", str(data), "--trials", "20", "--out"]
    code, out, _ = run(*command, tmp_path / "whole")
    assert code == 0
    assert "next: foveate eval" in out
    records = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "foveate.commands", *command, str(tmp_path / "out")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    patience = time.monotonic() + 120
    while not records.exists() or records.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < patience
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert run(*command, tmp_path / "out")[0] == 0
    for file in ("config.json", "model.safetensors"):
        whole, out = ((tmp_path / name / file).read_bytes() for name in ("whole", "out"))
        assert whole == out


def test_the_pocket_model_draws_its_own_and_has_its_own() -> None:
    drawn = directions.pocket_demonstrations(20)
    assert len({one.name for one in drawn}) == 20
    assert all(one.true != one.hallucinated for one in drawn)
    vlm = VLM.load("pocket", device="cpu")
    for one in drawn[:3]:
        ids = vlm.tokenizer(one.true + " " + one.hallucinated)["input_ids"]
        assert vlm.tokenizer.unk_token_id not in ids
    kept = Artifact.from_pretrained(vti.POCKET, DIRECTIONS)
    assert kept.model == anatomy(vlm.model).shape
    assert kept.tensors["text"].isfinite().all()
    image, question = drawn[0].load(), drawn[0].question
    answers = [vlm.ask(image, question, method, max_new_tokens=3) for method in (None, "vti")]
    assert answers[0].probabilities != answers[1].probabilities
