"""The driver of the evidence on injection: what is run, what is counted, what is published."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import injection
from benchmarks.injection import Settings
from foveate import VLM, FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.benchmarks.pocket import CATEGORIES
from foveate.core.method import parse
from foveate.evaluation.benchmark import EvalRecord
from foveate.methods.cli.method import CLI

PAGE = Path(__file__).parent.parent / "docs" / "cli"
SMALL = Settings(steps=10, batch=1, scenes=4, windows=2, each=5, questions=2, captions=2)


# -- what is run -----------------------------------------------------------------------------------


def test_every_configuration_has_every_seed_and_a_folder_of_its_own() -> None:
    runs = injection.trainings()
    assert len({run.name for run in runs}) == len(runs) == 19
    for name in injection.CONFIGURATIONS:
        seeds = [run.seed for run in runs if run.configuration == name]
        assert seeds == list(injection.SEEDS)
    assert {run.configuration for run in runs} == {
        *injection.CONFIGURATIONS,
        *injection.DENSITY,
    }


def test_runs_can_be_chosen() -> None:
    runs = injection.trainings(["AMP+AGF", "base"], 2)
    assert [run.name for run in runs] == ["base-0", "amp-agf-0", "base-1", "amp-agf-1"]


def test_methods_are_what_their_names_say() -> None:
    model, _ = injection.open_model()
    found: dict[str, Any] = {}
    for run in injection.trainings():
        if not run.options:
            assert (run.configuration, run.method) == ("base", "vanilla")
            continue
        [method] = parse(run.method)
        assert isinstance(method, CLI)
        start = 0.0 if run.configuration == "half open" else -4.0
        assert (method.seed, method.summary, method.start) == (run.seed, "image", start)
        found[run.configuration] = method.resolve(anatomy(model))
    layers = [len(found[name].layers) for name in ("density 1", "density 2", "AMP+AGF")]
    assert [*layers, len(found["density 8"].layers)] == [1, 2, 4, 8]
    assert {m.vision_layers for name, m in found.items() if name != "one-to-many"} == {(2, 3, 5, 6)}
    assert found["one-to-many"].vision_layers == (6,)
    gates = {name: method.gate for name, method in found.items()}
    assert {name for name, gate in gates.items() if gate == "static"} == {
        "AMP only",
        "one-to-one",
        "one-to-many",
    }


def test_runs_differ_in_nothing_but_method_and_seed() -> None:
    """Everything else, steps, data and rates, is the same in each command."""
    rest = set()
    for run in injection.trainings():
        line = injection.train(Path("runs"), run, Settings())
        for option in ("--method", "--seed", "--out"):
            at = line.index(option)
            del line[at : at + 2]
        rest.add(tuple(line))
    assert len(rest) == 1


def test_data_are_training_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    injection.make_data(tmp_path, SMALL)
    rows = [json.loads(line) for line in (tmp_path / "conversations.jsonl").open()]
    images = {row["image"] for row in rows}
    assert 4 <= len(images) <= 6
    assert all(Image.open(tmp_path / image).size == (96, 96) for image in images)
    assert len(rows) <= 5 * len(images)
    assert len({row["id"] for row in rows}) == len(rows)

    def never(*_: Any) -> Any:
        raise AssertionError("drawn again")

    monkeypatch.setattr(injection.lessons, "Pool", never)
    injection.make_data(tmp_path, SMALL)  # what is there is kept


def test_commands_follow_each_other_and_a_failed_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    line = ["foveate", "train", "cli"]

    def train(line: list[str], stdout: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        started.append(line)
        stdout.write("looking\nThe disk is full.\n")
        return subprocess.CompletedProcess(line, int(len(started) == 1))

    monkeypatch.setattr(subprocess, "run", train)
    with pytest.raises(FoveateError, match=r"base-0 ended with 1: The disk is full\."):
        injection.work(tmp_path / "base-0", [line, ["foveate", "eval"]])
    assert len(started) == 1
    injection.work(tmp_path / "base-0", [line, ["foveate", "eval"]])
    assert [command[1:] for command in started[1:]] == [
        ["-m", "foveate.commands", "train", "cli"],
        ["-m", "foveate.commands", "eval"],
    ]


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(dataclasses.asdict(SMALL)))
    with pytest.raises(FoveateError, match=r"other settings \(steps: 10, now 11\)"):
        injection.complete(tmp_path, [], dataclasses.replace(SMALL, steps=11), 1, 1)


# -- what is counted -------------------------------------------------------------------------------


def answered(rights: dict[str, list[float]]) -> list[EvalRecord]:
    """Answers by category; the first half of each with the habit, two about each picture."""
    return [
        {
            "right": right,
            "image": f"picture {number // 2}",
            "meta": {"category": name, "habit": ("with", "against")[2 * number >= len(found)]},
        }
        for name, found in rights.items()
        for number, right in enumerate(found)
    ]


def everything(attribute: list[float]) -> list[EvalRecord]:
    """A right and a wrong answer, twice, in every category but one."""
    same = {name: [1.0, 0.0, 1.0, 0.0] for name in CATEGORIES}
    return answered({**same, "attribute": attribute})


def test_accuracy_and_differences_by_hand() -> None:
    base = {0: everything([1, 0, 0, 0]), 1: everything([0, 0, 0, 0]), 2: everything([0, 1, 0, 0])}
    runs = {0: everything([1, 1, 0, 1]), 1: everything([0, 0, 1, 1]), 2: everything([1, 1, 1, 0])}
    found = injection.compared(runs, base)
    own = found["attribute"]
    assert (own["n"], own["pictures"]) == (4, 2)
    assert own["seeds"] == [75, 50, 75]
    assert own["differences"] == [50, 50, 50]
    assert own["difference"] == pytest.approx(50)
    # of the pictures, one gains 1/3 on each question and the other 2/3
    assert own["over_pictures"] == pytest.approx([100 / 3, 200 / 3])
    assert found["relation"]["difference"] == 0
    assert not found["relation"]["beyond"]
    # eight categories of four questions, captions left out
    assert found["all"]["n"] == 32
    assert found["all"]["difference"] == pytest.approx(50 / 8)
    assert found["with"]["difference"] + found["against"]["difference"] == pytest.approx(100 / 8)
    assert found["captions"]["n"] == 4
    plain = injection.compared(base, base)["attribute"]
    assert plain["accuracy"] == pytest.approx(100 / 6)
    assert "difference" not in plain


@pytest.mark.parametrize(
    ("attribute", "beyond"),
    [
        (([1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]), True),  # every seed, every picture
        (([1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]), False),  # one seed does not
        (([1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]), False),  # one picture does not
    ],
)
def test_beyond_noise_takes_both_intervals(attribute: Any, beyond: bool) -> None:
    base = dict.fromkeys(range(3), everything([0, 0, 0, 0]))
    own = injection.compared(dict(enumerate(map(everything, attribute))), base)["attribute"]
    assert own["beyond"] == beyond


def test_seeds_give_students_interval() -> None:
    """By hand: three differences, t with 2 degrees of freedom is 4.3027."""
    base = dict.fromkeys(range(3), everything([0, 0, 0, 0]))
    rows = ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])
    own = injection.compared(dict(enumerate(map(everything, rows))), base)["attribute"]
    error = np.std([25, 50, 75], ddof=1) / 3**0.5
    assert own["over_seeds"] == pytest.approx([50 - 4.302653 * error, 50 + 4.302653 * error])
    single = injection.compared({0: everything([1, 0, 0, 0])}, base)["attribute"]
    assert single["over_seeds"] is None
    assert not single["beyond"]


# -- what is published -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.name[:-13] for p in PAGE.glob("*accuracy.json")))
def test_the_pages_tables_are_those_of_its_numbers(name: str) -> None:
    page = (PAGE / "README.md").read_text("utf-8")
    report: dict[str, Any] = {}
    for part in ("accuracy", "seeds", "density"):
        if (path := PAGE / f"{name}{part}.json").exists():
            report |= json.loads(path.read_text("utf-8"))
    for table in (injection.accuracy_table, injection.seeds_table):
        assert table(report) in page
    assert "density" not in report or injection.density_table(report) in page
    assert report["command"] in page


@pytest.mark.slow
def test_from_nothing_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two configurations, one variant and one seed, each really trained and asked."""
    kept = {name: injection.CONFIGURATIONS[name] for name in ("base", "AMP+AGF")}
    monkeypatch.setattr(injection, "CONFIGURATIONS", kept)
    monkeypatch.setattr(injection, "SEEDS", (0,))
    monkeypatch.setattr(injection, "ONCE", {"density 1": "layers=(0,)"})
    small = [
        f"--{field.name.replace('_', '-')}={getattr(SMALL, field.name)}"
        for field in dataclasses.fields(SMALL)
    ]
    given = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--pictures=2", *small]
    assert injection.main(given) == 0
    for name in ("accuracy.png", "loss.png", "gates.png", "gates.json"):
        assert (tmp_path / "out" / name).stat().st_size
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| no training | base | AMP+AGF |" in page
    for folder in ("base-0", "amp-agf-0"):
        VLM.load(str(tmp_path / "run" / folder / "model"), device="cpu")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("model.safetensors")}
    assert injection.main(given) == 0  # nothing is trained again
    assert {p: p.stat().st_mtime_ns for p in before} == before
