"""POPE against the official script, lmms-eval and VLMEvalKit, and its files in every shape."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.benchmarks.pope import POPE
from foveate.evaluation.benchmark import EvalRecord, Problems, parse
from tests import goldens
from tests.goldens import records

IMAGES = (
    "coco/val2014/COCO_val2014_000000310196.jpg",
    "coco/val2014/COCO_val2014_000000461751.jpg",
    "gqa/images/2405722.jpg",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return goldens.data_root(tmp_path_factory.mktemp("data"), *IMAGES)


def golden(root: Path, case: str) -> tuple[POPE, str, list[EvalRecord], dict[str, Any]]:
    """The benchmark, its split, the answered records and the expected numbers of a case."""
    expected = goldens.read("pope", case, "expected.json")
    home, name = Path(expected["label_file"]).parent.name, Path(expected["label_file"]).stem
    split: Any = name.rpartition("_")[2]
    benchmark = {
        "coco": POPE(),
        "coco_e3e3926": POPE(version="e3e3926"),
        "aokvqa": POPE(source="aokvqa"),
        "gqa": POPE(source="gqa"),
    }[home]
    benchmark = replace(benchmark, splits=(split,))
    samples = benchmark.samples(root)
    lines = goldens.read("pope", case, "answers.jsonl.gz")
    assert [line["question"] for line in lines] == [s.question for s in samples]
    assert len(lines) == expected["n"]
    return benchmark, split, records(samples, [line["answer"] for line in lines]), expected


@pytest.mark.parametrize("case", goldens.cases("pope"))
def test_scores_equal_the_official_script_and_the_harnesses(root: Path, case: str) -> None:
    benchmark, split, given, expected = golden(root, case)
    scores = benchmark.score(reversed(given))
    metrics = expected["metrics"]
    counts = benchmark.counts(given)
    for key, ours in zip(
        ("TP", "FP", "TN", "FN"),
        (counts.hits, counts.false, counts.rejected, counts.missed),
        strict=True,
    ):
        assert ours == metrics[key]
    if "error" in metrics:  # the script divides by zero: we report what is defined
        assert metrics["error"].startswith("ZeroDivisionError")
        assert isnan(scores[f"{split}/precision"])
        assert isnan(scores[f"{split}/f1"])
        assert scores[f"{split}/accuracy"] == 50
        assert "official script stops" in " ".join(benchmark.notes(given))
    else:
        names = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")
        keys = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        for name, key in zip(names, keys, strict=True):
            assert scores[f"{split}/{key}"] == pytest.approx(100 * metrics[name], rel=1e-12)
        assert benchmark.notes(given) == []

    lmms = replace(benchmark, parser="lmms").score(given)
    for key in ("accuracy", "precision", "recall", "f1"):
        value = 100 * expected["lmms_eval"][key]
        assert lmms[f"pooled/{key}"] == pytest.approx(value, rel=1e-12)
    printed = 100 * expected["lmms_eval"]["yes_ratio_as_implemented(gt!)"]
    assert lmms["pooled/label_yes_ratio"] == pytest.approx(printed)

    kit = replace(benchmark, parser="vlmevalkit").score(given)
    for key, name in (("accuracy", "acc"), ("precision",) * 2, ("recall",) * 2, ("f1", "Overall")):
        value = expected["vlmevalkit_exact_matching"][name]
        assert kit[f"pooled/{key}"] == pytest.approx(value, rel=1e-12)


@goldens.needed
def test_both_versions_of_random(root: Path) -> None:
    problems = Problems()
    head, old = POPE(), POPE(version="e3e3926")
    assert len(head.samples(root, problems)) == 9000
    samples = old.samples(root, problems)
    assert [sum(s.split == split for s in samples) for split in old.splits] == [2910, 3000, 3000]
    assert sum(s.label == "yes" and s.split == "random" for s in samples) == 1500
    assert any("imange" in s.question for s in samples)
    assert set(problems.counts) == {"missing images"}


@goldens.needed
def test_an_old_random_file_in_place_of_the_new_one_is_noticed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "pope").mkdir()
    name = "coco_pope_random.json.gz"
    (tmp_path / "pope" / name).symlink_to(root / "pope" / "coco_e3e3926" / name)
    (tmp_path / "coco").symlink_to(root / "coco")
    problems = Problems()
    POPE(splits=("random",)).samples(tmp_path, problems)
    assert f"1 question files of another version: {name} has 2910" in problems.lines()


def made_up(tmp_path: Path, rows: list[dict[str, Any]], array: bool) -> Path:
    path = tmp_path / "pope" / "output" / "coco" / "coco_pope_popular.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rows) if array else "\n".join(map(json.dumps, rows)))
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    for row in rows:
        (tmp_path / "coco" / "val2014" / row["image"]).touch()
    return tmp_path


@pytest.mark.parametrize("array", [False, True])
def test_six_rows_become_samples(tmp_path: Path, array: bool) -> None:
    rows = [
        {"question_id": i + 1, "image": f"{i // 2}.jpg", "text": f"A {i}?", "label": label}
        for i, label in enumerate(["yes", "no", "yes", "no", "YES", "maybe"])
    ]
    problems = Problems()
    benchmark = parse('pope(splits=("popular",), suffix=" One word.")')[0]
    samples = benchmark.samples(made_up(tmp_path, rows, array), problems)
    assert [s.line for s in samples] == [0, 1, 2, 3, 4]
    assert [s.label for s in samples] == ["yes", "no", "yes", "no", "yes"]
    assert samples[2].question == "A 2?"
    assert samples[2].prompt == "A 2? One word."
    assert samples[2].image_name == samples[3].image_name == "1.jpg"
    assert samples[2].image == tmp_path / "coco" / "val2014" / "1.jpg"
    assert problems.counts["labels that are not yes or no"] == 1


def test_the_table_and_the_average_of_the_splits() -> None:
    answers = [("random", "yes", "yes"), ("random", "no", "yes"), ("popular", "no", "no")]
    given = [
        {"split": s, "line": i, "id": "1", "label": label, "answer": answer, "meta": {}}
        for i, (s, label, answer) in enumerate([*answers, ("popular", "yes", "Yes.")])
    ]
    scores = POPE().score(given)
    assert scores["random/precision"] == 50
    assert scores["average/accuracy"] == 75
    columns, rows = POPE().table(scores)
    assert [row[0] for row in rows] == ["Random", "Popular", "Average"]
    assert all(len(row) == len(columns) for row in rows)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(FoveateError, match="COCO questions only"):
        POPE(source="gqa", version="e3e3926")
    with pytest.raises(FoveateError, match="at least one split"):
        POPE(splits=())
