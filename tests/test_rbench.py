"""R-Bench against the official script, and its repeated ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate.benchmarks.rbench import RBench
from foveate.evaluation.benchmark import EvalRecord, Problems
from tests import goldens
from tests.goldens import records

NAMES = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")
KEYS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    source = goldens.GOLDEN / "rbench" / "synthetic"
    if not source.is_dir():
        pytest.skip(goldens.REASON)
    (root / "rbench" / "images").mkdir(parents=True)
    (root / "rbench" / "data_filterd").symlink_to(source)
    (root / "rbench" / "images" / "9e2248aa2491b81b.jpg").touch()
    return root


@pytest.mark.parametrize("case", goldens.cases("rbench", ("synthetic", "third_party_logs")))
def test_scores_equal_the_official_script(root: Path, case: str) -> None:
    expected = goldens.read("rbench", case, "expected.json")
    answers = {
        str(line["question_id"]): line["text"]
        for line in goldens.read("rbench", case, "answers.jsonl.gz")
    }
    samples = RBench().samples(root)
    given = records(samples, [answers.get(s.id) for s in samples])
    scores = RBench().score(reversed(given))
    for subset in expected["subsets"]:
        for name, key in zip(NAMES, KEYS, strict=True):
            ours = scores[f"subset{subset['subset']}/{key}"]
            assert ours == pytest.approx(100 * subset[name], rel=1e-12)
    average = [scores[f"average/{key}"] for key in KEYS]
    assert average == expected["average_acc_prec_rec_f1_yesratio_x100"]


@pytest.mark.parametrize("log", ["llava15_7b", "qwen25vl_3b"])
@goldens.needed
def test_counts_on_the_real_data_give_the_logged_numbers(log: str) -> None:
    expected = goldens.read("rbench", "third_party_logs", f"{log}.json")
    kinds = {"TP": ("Yes", "yes"), "FP": ("Yes", "no"), "TN": ("No", "no"), "FN": ("No", "yes")}
    given: list[EvalRecord] = []
    for subset in expected["subsets"]:
        meta = {"subsets": {str(subset["subset"]): 1}}
        for kind, (answer, label) in kinds.items():
            for _ in range(subset[kind]):
                line = len(given)
                record = {"split": "image", "line": line, "id": str(line), "answer": answer}
                given.append({**record, "label": label, "meta": {**meta, "last_label": label}})
    scores = RBench().score(given)
    for subset in expected["subsets"]:
        for name, key in zip(NAMES, KEYS, strict=True):
            ours = scores[f"subset{subset['subset']}/{key}"]
            assert ours == pytest.approx(100 * subset[name], rel=1e-12)
    assert [scores[f"average/{key}"] for key in KEYS] == expected["average_x100"]


@goldens.needed
def test_the_synthetic_set_has_608_lines_of_600_ids_and_an_odd_label(root: Path) -> None:
    problems = Problems()
    samples = RBench().samples(root, problems)
    assert len(samples) == 608
    assert len({s.id for s in samples}) == 600
    assert problems.counts["repeated ids"] == 8
    assert problems.counts["labels that are not yes or no"] == 1


def made_up(root: Path) -> Path:
    """Six lines: id 1 comes twice with flipped labels; the first subset names it twice."""
    home = root / "rbench" / "data_filterd"
    home.mkdir(parents=True)
    (root / "rbench" / "images").mkdir()
    rows = []
    for line, (name, label) in enumerate(
        [(1, "Yes"), (2, "No"), (1, "No"), (3, "Yes"), (4, "No"), (5, "Yes")]
    ):
        image = f"{line:016x}.jpg"
        (root / "rbench" / "images" / image).touch()
        rows.append({"question_id": name, "image": image, "text": f"q{line}", "label": label})
    (home / "image-level_filterd.json").write_text(json.dumps(rows))
    (home / "nocaps_image-level_rel_ids_1.json").write_text(json.dumps([1, 2, 1, 9]))
    return root


def test_in_a_subset_the_last_line_wins_and_repeats_count(tmp_path: Path) -> None:
    problems = Problems()
    samples = RBench().samples(made_up(tmp_path), problems)
    assert problems.counts == {"missing subset lists": 4, "repeated ids": 1}
    given = records(samples, ["No", "No", "Yes", "Yes", "No", "No"])
    scores = RBench().score(reversed(given))
    assert scores["all/accuracy"] == 50
    assert scores["subset1/accuracy"] == pytest.approx(100 / 3)  # id 1 twice wrong, id 2 right
    assert [RBench().correct(r) for r in given] == [0, 1, 0, 1, 1, 0]
    given[2]["answer"] = None  # the earlier answer then meets the later label, as officially
    assert RBench().score(given)["subset1/accuracy"] == 100
    assert RBench().notes(given) == ["1 of 6 questions have no answer and are left out."]
    _, rows = RBench().table(scores)
    assert [row[0] for row in rows] == ["All", "Subset1", "Average"]
