"""The command line: tables, JSON, pictures; and for every mistake one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import demo
from foveate import VLM, commands
from foveate.backends.transformers import compat
from foveate.base import __version__
from foveate.commands import common, doctor
from foveate.core.method import methods
from foveate.families.layout import Grid
from foveate.insight.plots.attention import AttentionRow, show_attention
from foveate.insight.plots.style import evenly, greys, lit
from foveate.pocket import build
from foveate.scenes import questions
from foveate.vlm import loading
from tests import models, tiny
from tests.test_images import png_header


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


def one_sentence(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("foveate: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


# ------------------------------------------------------------------------------------- ask


def test_ask_compares_vanilla_and_clvs(run, folder, photo):
    code, out, err = run("ask", photo, "Is there a cat?", "--model", folder, "--max-new-tokens", 3)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["vanilla", "clvs"]


def test_ask_with_methods_of_ones_choice_in_json(run, folder, photo):
    wanted = ["clvs(smoothing=0.6, stop_threshold=0.0)", "vanilla"]
    options = [x for method in wanted for x in ("--method", method)]
    asked = ("ask", photo, "Is there a cat?", "--model", folder, "--max-new-tokens", 4)
    code, out, err = run(*asked, *options, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["question"] == "Is there a cat?"
    assert [answer["method"] for answer in found["answers"]] == wanted
    for answer in found["answers"]:
        assert len(answer["tokens"]) == len(answer["probabilities"]) == 4
        assert 0 < answer["yes"] < 1
        assert 0 < answer["probability"] < 1
        assert answer["seconds"] > 0


def test_ask_compares_all_methods_and_says_what_it_leaves_out(run, folder, photo):
    asked = ("ask", photo, "red", "--model", folder, "--max-new-tokens", 2, "--json")
    code, out, err = run(*asked, "--method", "clvs(smoothing=0.5)", "--method", "all")
    assert code == 0
    names = [answer["method"] for answer in json.loads(out)["answers"]]
    assert names[:2] == ["clvs(smoothing=0.5)", "vanilla"]
    assert names[2:] == sorted(set(methods()) - {"adhh", "cli", "vti"})
    assert "left out: adhh" in err
    assert "left out: cli" in err
    assert "left out: vti" in err
    assert "foveate heads" in err
    assert "foveate directions" in err


def test_words_that_the_pocket_model_does_not_know_are_named(run):
    asked = ("ask", "demo", "Ist das Auto rot?", "--max-new-tokens", 1, "--method", "vanilla")
    code, _, err = run(*asked, "--json")
    assert code == 0
    assert err.startswith("foveate: note: pocket does not know Ist, das, Auto, rot: ")
    assert run("ask", "demo", "Is there a Car?", *asked[3:], "--json")[2] == ""


@pytest.mark.parametrize(
    ("running", "threads"), [(0, 8), (2, 6), (7, 1), (30, 1)], ids=["idle", "some", "full", "over"]
)
def test_a_busy_machine_gets_fewer_threads(monkeypatch, capsys, running, threads):
    chosen = [8]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common, "running_threads", lambda: running)
    common.share_cores()
    assert chosen[-1] == threads
    assert ("OMP_NUM_THREADS" in capsys.readouterr().err) == (threads < 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    common.share_cores()
    assert len(chosen) <= 2


def test_running_threads_are_counted_or_none():
    assert common.running_threads() >= 0


def test_ask_shows_the_attention(run, folder, photo, tmp_path):
    path = tmp_path / "look.png"
    asked = ("ask", photo, "red", "--model", folder, "--max-new-tokens", 2, "--show", path)
    code, out, _ = run(*asked)
    assert code == 0
    assert f"picture: {path}" in out
    with Image.open(path) as picture:
        assert picture.width > picture.height > 300


def test_ask_about_a_drawn_scene(run, folder):
    asked = ("ask", "demo", "red", "--model", folder, "--max-new-tokens", 1, "--method", "vanilla")
    assert run(*asked)[0] == 0


def test_a_note_is_one_line_on_stderr(run, folder, tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    asked = ("ask", path, "red", "--model", folder, "--max-new-tokens", 1, "--method", "vanilla")
    code, out, err = run(*asked, "--json")
    assert code == 0
    assert json.loads(out)
    assert err == f"foveate: note: {path} has several frames: the first is used.\n"


def bad_image(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    whole = folder / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(whole)
    if kind == "truncated":
        path.write_bytes(whole.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "empty":
        path.touch()
    elif kind == "enormous":
        path.write_bytes(png_header(20_000, 20_000))
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "empty", "enormous"])
def test_bad_images(run, tmp_path, kind):
    path = bad_image(kind, tmp_path)
    assert str(path) in one_sentence(run("ask", path, "Is there a cat?"))


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "1"])
@pytest.mark.parametrize("size", [(1, 1), (50, 30)])
def test_unusual_images_are_answered(run, folder, tmp_path, mode, size):
    path = tmp_path / ("odd.tif" if mode == "CMYK" else "odd.png")
    Image.new(mode, size).save(path)
    asked = ("ask", path, "red", "--model", folder, "--max-new-tokens", 1, "--method", "vanilla")
    code, _, err = run(*asked)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("demo", " "), "question is empty"),
        (("demo", "red", "--method", "clvz"), "did you mean 'clvs'"),
        (("demo", "red", "--method", "clvs(smothing=0.5)"), "did you mean 'smoothing'"),
        (("demo", "red", "--method", "clvs(smoothing=high)"), "smoothing must be a number"),
        (("demo", "red", "--method", "clvs(("), "Cannot read"),
        (("demo", "red", "--model", "poket"), "did you mean 'pocket'"),
        (("demo", "red", "--model", "/nowhere/at/all"), "no model or folder"),
        (("demo", "red", "--model", str(Path(__file__).parent)), "no config.json"),
        (("demo", "red", "--show", "look.xyz"), "cannot be drawn"),
        (("demo", "red", "--show", "/nowhere/look.png"), "no folder /nowhere"),
        (("demo", "red", "--show", str(Path(__file__).parent)), "cannot be drawn"),
    ],
)
def test_mistakes_of_ask(run, arguments, expected):
    assert expected in one_sentence(run("ask", *arguments))


def test_mistakes_that_need_the_model(run, folder, photo):
    asked = ("ask", photo, "red", "--model", folder)
    assert "at least 1" in one_sentence(run(*asked, "--max-new-tokens", 0))
    assert "no device" in one_sentence(run(*asked, "--device", "cuda:99"))
    assert "no dtype" in one_sentence(run(*asked, "--dtype", "float99"))
    assert "layer 9 does not exist" in one_sentence(run(*asked, "--method", "clvs(layers=(9,))"))


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(commands.ask, "read_picture", broken)
    with pytest.raises(ZeroDivisionError):
        commands.main(["ask", "demo", "red"])


# --------------------------------------------------------------------------- other commands


def test_methods(run, folder):
    code, out, _ = run("methods")
    assert code == 0
    assert "clvs" in out
    assert "layers=None" in out
    assert out.endswith("next: foveate methods NAME tells all about one of them\n")
    code, out, err = run("methods", "--model", folder)
    assert code == 0
    assert "layers=0..5" in out
    assert "foveate heads" in out, "what cannot be had says why"
    assert "loading the weights" in err
    code, out, _ = run("methods", "--model", "pocket")
    assert code == 0
    assert "heads=((" in out, "the pocket model has a list of its own"
    assert "no config.json" in one_sentence(run("methods", "--model", Path(__file__).parent))


def test_doctor_names_the_families_of_the_tests():
    assert set(doctor.FAMILIES) == {build().config.model_type for build in models.FAMILIES.values()}


def test_doctor_says_what_is_wrong_by_its_exit_code(run, monkeypatch):
    good = doctor.Line("pocket model", "answers", True)
    monkeypatch.setattr(doctor, "_pocket", lambda: good)
    code, out, _ = run("doctor")
    assert code == 0
    assert f"foveate: {__version__}" in out
    assert "family llava: usable" in out
    assert "family qwen2_5_vl" in out
    bad = doctor.Line("pocket model", "is missing", False)
    monkeypatch.setattr(doctor, "_pocket", lambda: bad)
    code, out, _ = run("doctor")
    assert code == 1
    assert "BAD pocket model: is missing" in out


def test_doctor_asks_the_pocket_model(monkeypatch, folder, tmp_path):
    monkeypatch.setattr("foveate.vlm.loading.WEIGHTS", Path(folder))
    assert doctor._pocket().good
    monkeypatch.setattr("foveate.vlm.loading.WEIGHTS", tmp_path)
    assert doctor._pocket().good is False


def test_draw(run, tmp_path):
    code, out, _ = run("draw", 2, "--out", tmp_path / "scenes", "--seed", 5, "--habit", "against")
    assert code == 0
    assert str(tmp_path / "scenes") in out
    rows = (tmp_path / "scenes" / "scenes.jsonl").read_text().splitlines()
    assert [json.loads(row)["scene"]["seed"] - questions.FIRST_HELD_OUT for row in rows] == [5, 6]
    (tmp_path / "file").touch()
    assert "cannot be made" in one_sentence(run("draw", 1, "--out", tmp_path / "file"))
    again = ("draw", 1, "--out", tmp_path / "scenes", "--seed", 7)
    assert "already holds scenes: give another --out, or --force" in one_sentence(run(*again))
    assert run(*again, "--force")[0] == 0
    assert len((tmp_path / "scenes" / "scenes.jsonl").read_text().splitlines()) == 1
    assert run("draw", 0, "--out", tmp_path)[0] == 2
    assert run("draw", 1, "--out", tmp_path, "--habit", "sometimes")[0] == 2


@pytest.mark.slow
def test_demo_shows_a_gain_a_habit_and_a_harm(run, tmp_path):
    code, out, err = run("demo", "--out", tmp_path)
    assert (code, err) == (0, "")
    verdicts = [line.split("│")[-2].strip() for line in out.splitlines() if line.startswith("│")]
    assert verdicts == [
        *("wrong", "right", "right"),  # print: vanilla, vicrop, laser
        *("wrong", "right", "wrong", "wrong"),  # habit: vanilla, clvs, pai, vcd
        *("right", "wrong"),  # spoiled: vanilla, laser
    ]
    page = (tmp_path / "index.html").read_text("utf-8")
    assert page.count("<figure>") == 3 + 1 + 4 + 5 + 5  # scenes, what is seen, chains
    assert not re.search(r"(?:src|href)=.?(?:https?:|/)", page)  # one file
    for name in ("scene.png", "fine-print.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 700


@pytest.mark.slow
def test_the_demos_questions_are_the_first_that_fit():
    asked = demo.found(VLM.load("pocket"))
    texts = commands.demo.PRINT, commands.demo.HABIT, commands.demo.SPOILED
    assert [part[1] for part in asked.values()] == list(texts)
    assert {part[0] for part in asked.values()} == {0}


def test_the_drawn_scene_is_asked_also_beside_the_demos_folder(run, folder, tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("ask", "demo", "red", "--model", folder, "--max-new-tokens", 1)
    assert code == 0
    assert "clvs" in out


def test_train_wants_a_folder(run):
    assert "--out" in one_sentence(run("train", "pocket"))
    assert run("train", "pocket", "--out", "x", "--until", "dinner")[0] == 2


def test_version_and_usage(run):
    assert run("--version") == (0, f"foveate {__version__}\n", "")
    code, _, err = run("frobnicate")
    assert code == 2
    assert "No such command" in err


def test_help_shows_whole_summaries_and_completion(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "..." not in out.replace("[ARGS]...", "")
    assert "--install-completion" in out
    words = " ".join(out.split())
    assert "Ask one question about an image, with every method given, and compare the" in words


def test_help_is_quick_because_nothing_heavy_is_imported():
    heavy = "import sys, foveate.commands; print({'torch', 'transformers', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_installed_command_fails_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "foveate.commands", "ask", "nowhere.png", "Is there a cat?"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert one_sentence((done.returncode, done.stdout, done.stderr)) == (
        "foveate: There is no image nowhere.png: check the path.\n"
    )


@pytest.mark.skipif(
    not any(build.WEIGHTS.glob("*.safetensors")), reason="the pocket model is not trained"
)
def test_the_shipped_model_is_what_runs_by_default(run, tmp_path):
    code, out, err = run("ask", "demo", "Is there a car in the image?", "--json")
    assert (code, err) == (0, "")
    assert {answer["answer"] for answer in json.loads(out)["answers"]} <= {"yes", "no"}
    assert run("doctor")[0] == 0


# ------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize(
    ("size", "rows"), [((96, 96), 1), ((1200, 90), 2), ((60, 900), 1), ((8, 8), 3)]
)
def test_pictures_of_any_shape_and_any_number_of_rows(tmp_path, size, rows):
    attention = torch.rand(32, 12)
    looks = [AttentionRow(f"method {i}", "yes $5$ _no_ " * 30, attention) for i in range(rows)]
    question = "Is there a $cup$ in the picture? " * 20
    grid = Grid(3, 4, box=(0.2, 0.0, 0.8, 1.0))
    path = tmp_path / "look.png"
    show_attention(Image.new("RGB", size, "red"), question, looks, range(32), grid, path)
    with Image.open(path) as picture:
        assert 400 < picture.width < 4000
        assert 300 < picture.height < 4000


def test_a_brighter_square_is_where_more_attention_goes(tmp_path):
    """One token of four draws everything: its quarter of the panel is the bright one."""
    back = greys(Image.new("RGB", (40, 40), "gray"))
    whole = lit(back, np.array([[0.0, 1.0], [0.1, 0.0]]), (0.0, 0.0, 1.0, 1.0)).mean(-1)
    quarters = whole.reshape(2, 20, 2, 20).mean((1, 3))
    assert quarters[0, 1] > 1.5 * quarters[1, 0] > 1.5 * quarters[0, 0]
    cut = lit(back, np.zeros((2, 2)), (0.25, 0.0, 0.75, 1.0)).mean(-1)
    assert cut[:, :10].min() > 0.6 > cut[:, 10:30].max()
    beyond = lit(back, np.array([[0.0], [1.0]]), (0.0, -1.0, 1.0, 1.0)).mean(-1)
    assert beyond.min() > 1.5 * quarters[0, 0]  # the dark half lies on the padding above


def test_layers_are_spread_evenly():
    assert evenly(32, 7) == [0, 5, 10, 16, 21, 26, 31]
    assert evenly(3, 7) == [0, 1, 2]
    assert evenly(1, 7) == [0]


def test_doctor_prints_the_handshake_with_a_model(run):
    code, out, _ = run("doctor", "--model", "pocket")
    assert code == 0
    for line in (
        "handshake: the model can be enhanced",
        "layers of full_attention: 12 (0 to 11)",
        "image layout: known",
        "static cache: yes",
        "clvs: layers 0 to 11",
        "vaf: layers 3 to 5",
        "vcd: outside the layers",
    ):
        assert line in out
    assert "cli is trained" in out
    stop = re.search(
        r"stop test: up to (\d+) tests per token, each (\d+)% .* up to (\S+) times", out
    )
    assert stop
    assert int(stop[1]) == 4  # after layers 7 to 10 of 12
    assert float(stop[3]) == pytest.approx(1 + 4 * int(stop[2]) / 100, abs=0.03)


def test_doctor_prints_json(run):
    code, out, _ = run("doctor", "--model", "pocket", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["refusal"] is None
    assert found["cache_argument"] in compat.CACHE_NAMES
    assert found["layers"] == {"full_attention": list(range(12))}
    assert found["methods"]["clvs"] == {"layers": list(range(12)), "note": None, "refusal": None}
    assert "is trained" in found["methods"]["cli"]["refusal"]
    assert found["layout"]
    assert found["padded_batches"]
    assert found["static_cache"]
    code, _, err = run("doctor", "--json")
    assert code == 2
    assert "name one with --model" in err


def test_doctor_needs_no_weights(run, folder, tmp_path):
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    code, out, _ = run("doctor", "--model", str(tmp_path))
    assert code == 0
    assert "layers of full_attention: 6 (0 to 5)" in out


def test_doctor_says_why_a_model_is_refused(run, monkeypatch):
    monkeypatch.setattr(loading, "outline", lambda *_: models.soft_capped())
    code, out, _ = run("doctor", "--model", "some/model")
    assert code == 1
    assert "BAD handshake: " in out
    assert "soft-caps" in out


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([], ""), ([3], "3"), ([3, 4], "3, 4"), ([0, 1, 2, 5, 7, 8, 9, 10], "0 to 2, 5, 7 to 10")],
)
def test_layers_are_told_as_ranges(numbers, words):
    assert doctor.ranges(numbers) == words
