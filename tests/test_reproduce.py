"""Recipes: every one can be asked, and a paper's numbers stand beside ours with intervals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate import FoveateError
from foveate.evaluation.benchmark import parse
from foveate.evaluation.points import intervals
from foveate.evaluation.published import MODELS, PROTOCOLS, ROWS
from foveate.evaluation.reproduce import get, recipes
from tests import drawn
from tests.goldens import data_root

LLAVA = "llava-hf/llava-1.5-7b-hf"
FIRST = "coco/val2014/COCO_val2014_000000310196.jpg"


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_asks_what_its_paper_has_numbers_of(name: str) -> None:
    recipe = get(name)
    assert recipe.source in PROTOCOLS
    used = set()
    for model in recipe.asks:
        assert recipe.model(f"hub/{MODELS[model][0]}") == model
        rows = recipe.rows(model)
        assert {row.method for _, row in rows} > {"vanilla"}
        assert recipe.benchmark(model).max_new_tokens == (1 if "CLVS" in recipe.source else 32)
        assert next(iter(recipe.plan(model, Path("x")).stacks)) == "vanilla"
        used |= {f"{row.method} {row.variant}".strip() for _, row in rows}
    assert used == recipe.methods.keys()


def test_every_number_of_both_papers_is_in_a_recipe() -> None:
    asked = {
        (row.source, row.benchmark, row.model, row.method, row.variant)
        for recipe in recipes().values()
        for model in recipe.asks
        for _, row in recipe.rows(model)
    }
    left = {
        (row.method, row.variant)
        for row in ROWS
        if (row.source, row.benchmark, row.model, row.method, row.variant) not in asked
        and "third party" not in row.source
    }
    assert left == {("vicrop", "attention gradient"), ("vicrop", "pure gradient")}


def test_an_interval_of_a_mean_holds_it_and_shrinks_with_the_questions() -> None:
    b = parse("pope")[0]

    def records(count: int) -> list[dict]:
        return [
            {
                "benchmark": "pope", "split": "random", "line": i, "id": str(i), "image": str(i),
                "question": "?", "label": "yes" if i % 2 else "no", "meta": {}, "method": "vanilla",
                "answer": "yes" if i % 2 or not i % 8 else "no",
            }
            for i in range(count)
        ]  # fmt: skip

    widths = []
    for count in (40, 640):
        low, high = intervals(b, records(count))["random/accuracy"]
        assert low < 87.5 < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)
    assert intervals(b, records(1)) == {}


def test_bad_input_is_one_sentence(run) -> None:
    for given, told in {
        ("reproduce", "clvs-pop"): "There is no recipe 'clvs-pop' (did you mean 'clvs-pope'?)",
        ("reproduce", "clvs-pope"): "Say with --model which model to ask: one of llava-1.5-7b-hf",
        ("reproduce", "clvs-pope", "-m", "pocket"): "clvs-pope has no numbers of pocket: give one",
        ("reproduce", "clvs-pope", "-m", LLAVA): "Say with --out",
        ("reproduce", "clvs-pope", "-m", LLAVA, "--as", "llava"): "clvs-pope has no model 'llava'",
    }.items():
        code, out, err = run(*given)
        assert (code, out) == (2, "")
        assert told in err
        assert err.endswith(".\n")
        assert err.count("\n") == 1
    with pytest.raises(FoveateError, match="no numbers of llava-13b"):
        get("clvs-pope").model("llava-13b")


def test_the_list_and_a_dry_run_need_neither_model_nor_data(run, tmp_path) -> None:
    code, out, _ = run("reproduce", "--json")
    assert code == 0
    assert [entry["name"] for entry in json.loads(out)] == list(recipes())
    code, out, _ = run("reproduce", "clvs-amber", "-m", LLAVA, "--data-root", tmp_path, "--dry-run")
    assert code == 0
    assert "questions: 14216 per method, the paper's number" in out
    assert "annotations.json is missing" in out
    assert "every token once more" in out
    assert "No estimate of hours: there is no data here" in out


def test_a_dry_run_counts_the_question_files(run, tmp_path) -> None:
    root = data_root(tmp_path, FIRST)
    code, out, _ = run("reproduce", "clvs-pope", "-m", LLAVA, "--data", root, "--dry-run")
    assert code == 0
    assert "questions: 9000 per method, on 500 images" in out
    assert f"No estimate of hours: {LLAVA} is not on this machine" in out


@pytest.mark.slow
def test_a_recipe_runs_on_the_pocket_model_and_goes_on(run, tmp_path) -> None:
    root, out = drawn.pope(tmp_path / "data", 4), tmp_path / "run"
    given = ("reproduce", "clvs-pope", "-m", "pocket", "--as", "llava-1.5-7b", "--data", root)
    code, told, _ = run(*given, "--dry-run", "--json")
    measured = json.loads(told)["methods"]
    assert code == 0
    assert all(cost["questions"] == 12 and cost["hours"] > 0 for cost in measured)
    code, told, err = run(*given, "--out", out)
    assert code == 0, err
    assert "We asked pocket, which is another model." in told
    found = json.loads((out / "reproduced.json").read_text())
    papers = [
        (row.method, score, value)
        for row in ROWS
        if (row.model, row.benchmark) == ("LLaVA-1.5-7B", "pope") and "CLVS" in row.source
        for score, value in row.values.items()
    ]
    assert [(n["method"], n["score"], n["paper"]) for n in found["numbers"]] == papers
    for n in found["numbers"]:
        assert 0 <= n["ours"] <= 100
        if n["low"] is not None:
            assert n["inside"] == (n["low"] <= n["paper"] <= n["high"])
    records = (out / "records.jsonl").read_text()
    assert run(*given, "--out", out)[0] == 0
    assert (out / "records.jsonl").read_text() == records
