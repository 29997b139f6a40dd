"""The script that judges crops: its numbers by hand, its oracle, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import crops
from foveate import VLM
from foveate.core.method import as_stack
from foveate.evaluation.benchmark import EvalRecord
from foveate.scenes import world

WHOLE = [0, 0, 768, 768]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


def record(
    line: int, habit: str, answer: str, crop: list[int] | None = None, image: str = ""
) -> EvalRecord:
    return {
        "benchmark": "pocket",
        "method": "m",
        "split": f"print/{habit}",
        "line": line,
        "image": image or f"{habit}-{line}",
        "label": "e",
        "answer": answer,
        "meta": {"category": "print", "habit": habit, "boxes": [[100, 100, 200, 200]]},
        "notes": {} if crop is None else {"crop": crop},
        "ms": 100.0 * (line + 1),
    }


def test_how_much_of_a_thing_a_crop_holds() -> None:
    box = [[100, 100, 200, 200]]
    assert crops.held(box, WHOLE) == 1
    assert crops.held(box, [150, 0, 768, 768]) == 0.5
    assert crops.held(box, [150, 120, 768, 180]) == pytest.approx(0.3)
    assert crops.held(box, [300, 120, 768, 180]) == 0
    assert crops.held(box, [200, 200, 768, 768]) == 0


def test_figures_by_hand() -> None:
    bench = crops.FinePrint()
    plain = [record(i, h, a) for h in crops.HABITS for i, a in enumerate(["e", "k", "k"])]
    rows = [
        record(0, "with", "e", [100, 100, 400, 400]),
        record(1, "with", "E.", [130, 100, 430, 400]),  # 70 % of it
        record(2, "with", "k", [131, 100, 431, 400]),
        record(0, "against", "k", [0, 0, 192, 192]),
        record(1, "against", "e", WHOLE),
        record(2, "against", "e", [300, 300, 684, 684]),
    ]
    found = crops.compared(bench, {"vanilla": plain, "m": rows, "same": plain[::-1]})
    assert "versus" not in found["vanilla"]
    assert "crop" not in found["vanilla"]
    assert found["vanilla"]["all"] == {"n": 6, "right": pytest.approx(100 / 3)}
    mine = found["m"]
    assert mine["with"] == mine["against"] == {"n": 3, "right": pytest.approx(200 / 3)}
    assert mine["seconds"] == pytest.approx(0.2)
    assert mine["crop"]["holds"] == {"n": 3, "right": pytest.approx(200 / 3)}
    assert mine["crop"]["misses"] == {"n": 2, "right": 50}
    assert mine["crop"]["whole"] == {"n": 1, "right": 100}
    areas = [300 * 300] * 3 + [192 * 192, 384 * 384]
    assert mine["crop"]["area"] == pytest.approx(sum(areas) / 5 / 768**2)
    versus = mine["versus"]
    assert (versus["gained"], versus["lost"]) == (3, 1)
    assert versus["difference"] == pytest.approx(100 / 3)
    assert versus["p"] == pytest.approx(2 * (1 + 4) / 2**4)
    assert versus["holm"] == 1.0
    assert found["same"]["versus"]["difference"] == 0
    low, high = versus["interval"]
    assert low < 100 / 3 < high
    row = dict(zip(crops.HEADS, crops.cells("`m`", mine), strict=True))
    assert row["crop holds it"] == "50.0 %"
    assert row["right where not"] == "50.0"
    assert row["whole image"] == "16.7 %"
    assert row["s / question"] == "0.20"


def test_examples_are_the_first_of_both_habits_in_turn() -> None:
    bench = crops.FinePrint()
    plain = [record(i, h, "k" if i else "e") for h in crops.HABITS for i in range(9)]
    rows = [record(i, h, "e" if i % 2 else "k") for h in crops.HABITS for i in range(9)]
    won, lost = crops.examples(bench, rows, plain)
    assert [(r["line"], r["meta"]["habit"]) for r in won] == [
        (1, "against"), (1, "with"), (3, "against"), (3, "with"), (5, "against"),
    ]  # fmt: skip
    assert [r["line"] for r in lost] == [0, 0, 2, 2, 4]


def test_the_oracle_shows_the_asked_thing(vlm: VLM, tmp_path: Path) -> None:
    bench = crops.FinePrint(questions=4, scenes=str(tmp_path))
    for sample in bench.samples():
        image = sample.load()
        assert image is not None
        _, _, seed = str(sample.image_name).rpartition("-")
        drawn = world.draw(world.sample(int(seed), sample.meta["habit"]), 768)
        assert image.tobytes() == drawn.tobytes() == sample.load().tobytes()  # drawn, then a file
        chat = vlm.chat([image], sample.prompt, None)
        for form, shown in (("oracle(window=330)", 2), ("oracle(final_input=crop)", 1)):
            (found,) = vlm.rewrite([chat], crops.stack(form))
            left, top, right, bottom = found.notes["crop"]
            assert crops.held(sample.meta["boxes"], found.notes["crop"]) == 1
            assert right - left == bottom - top == (330 if shown == 2 else 336)
            assert len(found.images) == shown
            assert found.images[-1].tobytes() == image.crop((left, top, right, bottom)).tobytes()
        (found,) = vlm.rewrite([chat], crops.stack("oracle(black=True,window=768)"))
        mask = np.zeros((768, 768, 1), bool)
        ((left, top, right, bottom),) = sample.meta["boxes"]
        mask[top:bottom, left:right] = True
        assert np.array_equal(found.images[-1], np.asarray(image) * mask)


@pytest.mark.slow
def test_the_layers_table_speaks_of_vicrops_own_crops(
    vlm: VLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--layers", "--questions", "2", "--run", str(tmp_path), "--out", str(tmp_path)]
    assert crops.main(given) == 0
    report = json.loads((tmp_path / "layers.json").read_text())
    assert (report["questions"], report["seed"], report["published"]) == (4, 1, [5])
    assert all(len(shares) == 12 for shares in report["held"].values())
    bench = crops.FinePrint(questions=2, seed=1, scenes=str(tmp_path / "scenes"))
    hits = []
    for sample in bench.samples():
        chat = vlm.chat([sample.load()], sample.prompt, None)  # type: ignore[list-item]
        (found,) = vlm.rewrite([chat], as_stack("vicrop"))
        hits.append(crops.held(sample.meta["boxes"], found.notes["crop"]) >= crops.SEEN)
    assert report["held"]["question / general"][5] == 100 * sum(hits) / 4
    assert "n = 4 " in capsys.readouterr().out


@pytest.mark.long
def test_the_script_writes_its_page_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Before\n<!-- crops -->\nold\n<!-- end of crops -->\nafter\n")
    monkeypatch.setattr(crops, "EXAMPLES", 1)
    monkeypatch.setattr(crops, "TENTHS", 2)
    given = ["--questions", "2", "--run", str(tmp_path / "run"), "--out", str(tmp_path)]
    given += ["--method", "vicrop", "--method", "oracle(final_input=crop)"]
    assert crops.main(given) == 0
    told = page.read_text()
    assert told.startswith("# Before\n<!-- crops -->\nn = 4 questions about ")
    assert told.endswith("<!-- end of crops -->\nafter\n")
    for name in ("vanilla", "vicrop", "oracle(final_input='crop')"):
        assert f"| `{name}` |" in told
    report: dict[str, Any] = json.loads((tmp_path / "crops.json").read_text())
    assert report["figures"]["oracle(final_input='crop')"]["crop"]["holds"]["n"] == 4
    assert (tmp_path / "vicrop.png").stat().st_size > 10_000
    files = sorted((tmp_path / "run").rglob("records.jsonl"))
    assert len(files) == 3 * 2
    before = [f.read_bytes() for f in files]
    assert crops.main([*given[:-4], "--method", "vicrop"]) == 0
    assert [f.read_bytes() for f in files] == before
    assert "oracle" not in page.read_text()
    assert crops.main([*given, "--method", "vicropp"]) == 2
    assert "did you mean 'vicrop'" in capsys.readouterr().out
