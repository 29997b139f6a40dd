"""The analysis of gates: what is read, what is counted, what is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate import VLM, FoveateError, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.core.method import parse as parse_methods
from foveate.insight.analyses.gates import Gates, short
from foveate.insight.analysis import parse, run
from foveate.insight.plots.gates import pairs, told
from foveate.insight.truth import AnnotatedImage, pocket_pictures
from foveate.methods.cli.method import CLI


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[AnnotatedImage]:
    return pocket_pictures(3)


def trained(vlm: VLM, folder: Path, **options: Any) -> str:
    """An injection whose gates look at what they see."""
    injection = CLI(seed=0, **options).resolve(anatomy(vlm.model)).build(anatomy(vlm.model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in injection.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    injection.save_pretrained(folder)
    return f"cli(path={str(folder)!r})"


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("summary", ["prompt", "image"])
def test_gates_are_those_of_each_question_alone(
    vlm: VLM, pictures: list[AnnotatedImage], tmp_path: Path, summary: Any
) -> None:
    method = trained(vlm, tmp_path, summary=summary, start=0.0, layers=(0, 5), rank=4)
    [found] = Gates().measure(vlm, pictures[0], {method: parse_methods(method)})["methods"].values()
    assert found["layers"] == [0, 5]
    assert found["vision_layers"] == [2, 3, 5, 6]
    asked, image = pictures[0].asked(), pictures[0].load()
    assert np.shape(found["gates"]) == (len(asked), 2, 4)
    for number in (0, len(asked) - 1):
        inputs = vlm.inputs([vlm.chat([image], asked[number].text, None)])
        with enhance(vlm.model, method), torch.no_grad():
            alone = CLI.gates(vlm.model(**inputs))[0]
        np.testing.assert_allclose(found["gates"][number], alone, atol=1e-5)
    spread = np.std(found["gates"], 0).max()
    assert (spread > 1e-3) == (summary == "prompt")  # only then a question reaches the gate


@pytest.mark.parametrize("methods", [[], ["cli"], ["clvs"]])
def test_without_an_injection_there_are_no_gates(
    vlm: VLM, pictures: list[AnnotatedImage], tmp_path: Path, methods: list[str]
) -> None:
    with pytest.raises(FoveateError, match=r'--method "cli\(path=FOLDER\)"'):
        run(Gates(), vlm, pictures[:1], tmp_path, methods=methods)
    assert not list(tmp_path.iterdir())  # nothing is begun


@pytest.mark.long
def test_two_injections_beside_each_other(
    vlm: VLM, pictures: list[AnnotatedImage], tmp_path: Path
) -> None:
    methods = [
        trained(vlm, tmp_path / "one", rank=4, start=0.0),
        trained(vlm, tmp_path / "two", rank=4, gate="static", routes="one-to-one"),
    ]
    (tmp_path / "out").mkdir()
    found = run(parse("gates"), vlm, pictures[:2], tmp_path / "out", methods=methods)
    first, second = (found["numbers"]["methods"][method] for method in methods)
    assert first["questions"] == second["questions"] == sum(len(p.asked()) for p in pictures[:2])
    gates = np.array(second["gate"]["mean"], float)
    assert (np.isnan(gates) == ~np.eye(4, dtype=bool)).all()
    assert np.nanmax(np.array(second["deviation"], float)) < 1e-6
    assert (tmp_path / "out" / "gates.png").stat().st_size > 10_000
    assert "gates.png" in (tmp_path / "out" / "gates.md").read_text()


# -- what is counted -------------------------------------------------------------------------------


def test_gates_are_counted() -> None:
    """By hand: a picture's questions count as one; t with 1 degree of freedom is 12.7062."""
    nan = math.nan
    values = {"a": [[[0.1, nan]], [[0.3, nan]]], "b": [[[0.6, nan]]]}
    about = {"layers": [4], "vision_layers": [2, 6]}
    rows = [
        {"picture": name, "methods": {"cli": {**about, "gates": gates}}}
        for name, gates in values.items()
    ]
    found = Gates().count(rows)["methods"]["cli"]
    assert found["questions"] == 3
    assert found["gate"]["mean"][0][0] == pytest.approx(0.4)
    half = 12.7062 * np.std([0.2, 0.6], ddof=1) / math.sqrt(2)
    assert found["gate"]["high"][0][0] == pytest.approx(0.4 + half, abs=1e-4)
    assert found["deviation"][0][0] == pytest.approx(np.std([0.1, 0.3, 0.6]))
    assert math.isnan(found["gate"]["mean"][0][1])
    caption = Gates().caption({"methods": {"cli": found}})
    assert "most 0.4 (" in caption
    assert "from vision layer 2 into decoder layer 4" in caption


# -- what is drawn ---------------------------------------------------------------------------------


def panel(mean: Any, spread: Any) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    layers, vision = np.shape(mean)
    pairs(axes, np.array(mean, float), np.array(spread, float), range(1, vision + 1), range(layers))
    return axes


def written(axes: Any) -> dict[tuple[float, int], list[str]]:
    found: dict[tuple[float, int], list[str]] = {}
    for text in axes.texts:
        x, y = text.get_position()
        found.setdefault((x, round(y)), []).append(text.get_text())
    return found


def test_cells_hold_their_numbers() -> None:
    axes = panel([[0.1, 0.25], [math.nan, 0.5]], [[0.01, 0.0004], [math.nan, 0.2]])
    assert written(axes) == {
        (0, 0): ["0.100", "± 0.010"],
        (0, 1): ["0.250", "± 4e-4"],
        (1, 1): ["0.500", "± 0.200"],  # the pair that is not connected is left empty
    }
    assert axes.images[0].origin == "lower"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["1", "2"]


def test_numbers_that_never_vary_stand_alone_and_signs_have_two_colours() -> None:
    axes = panel([[-0.1], [0.2]], [[0.0], [1e-17]])
    assert written(axes) == {(0, 0): ["-0.100"], (1, 0): ["0.200"]}
    assert axes.images[0].norm.vmin == -axes.images[0].norm.vmax


def test_closed_gates_look_closed() -> None:
    axes = panel([[1e-11], [0.0]], [[0.0], [0.0]])
    assert axes.images[0].norm(1e-11) < 1e-6


def test_many_layers_leave_room_for_one_number() -> None:
    axes = panel(np.full((12, 2), 0.123), np.full((12, 2), 0.05))
    assert set(map(tuple, written(axes).values())) == {("0.12",)}


def test_few_letters() -> None:
    values = (0.0179, 0.0, 2e-11, -0.3, 0.00012)
    assert [told(v) for v in values] == ["0.018", "0.000", "0.000", "-0.300", "1e-4"]
    assert short("cli(path='a')") == "cli(path='a')"
    assert short("x" * 40 + "y" * 40) == "x" * 22 + " ... " + "y" * 22
