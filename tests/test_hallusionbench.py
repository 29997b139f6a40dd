"""HallusionBench against the official aggregation, and its files."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.benchmarks.hallusionbench import HallusionBench, aggregate, contains
from foveate.evaluation.benchmark import Problems, Sample
from foveate.evaluation.data import Data
from tests import goldens

IMAGE = "hallusion_bench/VD/illusion/0_0.png"
CASES = goldens.cases("hallusionbench")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    root = goldens.data_root(tmp_path_factory.mktemp("data"), IMAGE)
    return HallusionBench().samples(root)


@pytest.mark.parametrize("case", CASES)
def test_the_aggregation_equals_the_official_one(case: str, samples: list[Sample]) -> None:
    judged = goldens.read("hallusionbench", case, "correctness_and_same.json.gz")
    expected = goldens.read("hallusionbench", case, "expected.json")["result"]
    scores = aggregate(
        [
            {**s.meta, "yes": s.label == "yes", "verdict": int(verdict), "same": same == "1"}
            for s, (verdict, same) in zip(samples, judged, strict=True)
        ]
    )
    for key in ("aAcc", "qAcc", "fAcc"):
        assert round(scores[key], 4) == expected[key]
    for key, table in (
        ("aAcc", "all"),
        ("qAcc", "pair_all"),
        ("easy/qAcc", "pair_easy"),
        ("hard/qAcc", "pair_hard"),
        ("fAcc", "fig"),
    ):
        share = expected[table]["correct"] / expected[table]["total"]
        assert scores[key] == pytest.approx(100 * share, rel=1e-12)
    figures = expected["fig"]
    for key in ("wrong", "inconsistent"):
        share = figures[key] / figures["total"]
        assert scores[f"figures/{key}"] == pytest.approx(100 * share, rel=1e-12)
    assert scores["figures/score"] == pytest.approx(100 * figures["score"], rel=1e-12)
    ratio = expected["yes_ratio_stats"]
    assert scores["yes/difference"] == pytest.approx(100 * ratio["diff"], rel=1e-9)
    assert scores["yes/false_positive"] == pytest.approx(100 * ratio["fp"], rel=1e-12)
    for key, column in (("language", "LH_cg"), ("vision", "VI_cg"), ("mixed", "Mix_cg")):
        share = expected["pair_all"][column] / expected["all"]["wrong"]
        assert scores[f"cause/{key}"] == pytest.approx(100 * share, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parser", ["first_word", "vlmevalkit"])
def test_answers_that_earn_these_verdicts_score_the_same(
    case: str, parser: Any, samples: list[Sample]
) -> None:
    judged = goldens.read("hallusionbench", case, "correctness_and_same.json.gz")
    expected = goldens.read("hallusionbench", case, "expected.json")["result"]
    other = {"yes": "no", "no": "yes"}
    answers = []
    for sample, (verdict, _) in zip(samples, judged, strict=True):
        word = {"0": other[sample.label], "1": sample.label, "2": "I cannot tell"}[verdict]
        answers.append(f"{word.capitalize()}, as far as I see.")
    given = goldens.records(samples, answers)
    benchmark = HallusionBench(parser=parser)
    scores = benchmark.score(reversed(given))
    for key in ("aAcc", "qAcc", "fAcc"):
        assert round(scores[key], 4) == expected[key]
    right = sum(benchmark.correct(r) or 0 for r in given)
    assert right == expected["all"]["correct"]
    columns, rows = benchmark.table(scores)
    assert rows[0][1:] == [scores[k] for k in ("qAcc", "fAcc", "easy/qAcc", "hard/qAcc", "aAcc")]
    assert [row[0] for row in rows] == ["All", "VD", "VS"]
    assert all(len(row) == len(columns) for row in rows)
    size = {split: sum(s.split == split for s in samples) for split in ("VD", "VS")}
    parts = sum(scores[f"{split}/aAcc"] * n for split, n in size.items())
    assert parts == pytest.approx(100 * right)


@goldens.needed
def test_the_question_file(samples: list[Sample], tmp_path: Path) -> None:
    assert len(samples) == 1129
    assert sum(s.image is None for s in samples) == 178
    assert sum(s.meta["visual_input"] == "2" for s in samples) == 504
    shown = HallusionBench(figures="only").samples(goldens.data_root(tmp_path, IMAGE))
    assert len(shown) == 951
    assert [s.line for s in shown] == [s.line for s in samples if s.image is not None]


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "category": "VD",
        "subcategory": "illusion",
        "visual_input": "1",
        "set_id": "0",
        "figure_id": "0",
        "question_id": "0",
        "question": "Is it round?",
        "gt_answer": "1",
        "filename": "./VD/illusion/0_0.png",
    }
    return base | changes


def made_up(root: Path, rows: list[dict[str, Any]]) -> Path:
    home = root / "hallusion_bench"
    (home / "VD" / "illusion").mkdir(parents=True)
    for name in ("0_0.png", "0_1.png"):
        (home / "VD" / "illusion" / name).touch()
    (home / "HallusionBench.json").write_text(json.dumps(rows))
    return root


def test_six_rows_become_samples(tmp_path: Path) -> None:
    rows = [
        row(),
        row(question_id="1", gt_answer="0", filename="./hallusion_bench/VD/illusion/0_0.png"),
        row(figure_id="1", filename=None, visual_input="2"),
        row(category="VS", subcategory="chart", visual_input="0", filename=None),
        row(category="VS", subcategory="chart", figure_id="1", filename="./VS/chart/0_1.png"),
        {"question": "broken"},
    ]
    problems = Problems()
    root = made_up(tmp_path, rows)
    samples = HallusionBench(suffix="\nYes or no?").samples(root, problems)
    assert problems.counts == {"broken lines": 1, "missing images": 1}
    assert [s.split for s in samples] == ["VD", "VD", "VD", "VS", "VS"]
    assert [s.label for s in samples] == ["yes", "no", "yes", "yes", "yes"]
    assert samples[0].image == samples[1].image == tmp_path / IMAGE
    assert samples[0].image_name == samples[1].image_name
    assert samples[2].image == tmp_path / "hallusion_bench" / "VD" / "illusion" / "0_1.png"
    assert samples[4].image == tmp_path / "hallusion_bench" / "VS" / "chart" / "0_1.png"
    assert samples[3].image is None
    assert samples[3].load() is None
    assert samples[3].prompt == "Is it round?\nYes or no?"
    assert samples[4].id == "VS_chart_0_1_0"


def test_unclear_is_right_only_where_the_figure_is_not_shown() -> None:
    hidden = {"category": "VS", "figure_id": "0", "visual_input": "0"}
    names = {"subcategory": "chart", "set_id": "0", "question_id": "0"}
    given = {"split": "VS", "line": 0, "id": "1", "label": "yes", "answer": "Who knows?"}
    benchmark = HallusionBench()
    assert benchmark.correct({**given, "meta": {**names, **hidden}}) == 1
    assert benchmark.correct({**given, "meta": {**names, **hidden, "figure_id": "1"}}) == 0
    assert benchmark.correct({**given, "meta": {**names, **hidden, "category": "VD"}}) == 0
    assert benchmark.correct({**given, "meta": {**names, **hidden}, "answer": "No."}) == 0
    assert HallusionBench(parser="contains").correct({**given, "meta": names | hidden}) == 0
    assert contains("Oh YES") == "yes"
    assert contains("eyes") == "yes"


def test_a_part_of_the_questions_scores_what_it_has_and_tells_the_rule() -> None:
    meta = {key: value for key, value in row().items() if key not in ("question", "gt_answer")}
    given = {"split": "VD", "line": 0, "id": "1", "label": "yes", "meta": meta, "answer": "Yes."}
    scores = HallusionBench().score([given])
    assert scores["VD/aAcc"] == scores["aAcc"] == scores["easy/qAcc"] == 100
    assert isnan(scores["hard/qAcc"])
    assert [r[0] for r in HallusionBench().table(scores)[1]] == ["All", "VD"]
    assert "by rule" in HallusionBench().notes([])[-1]


def test_a_missing_file_is_one_sentence_with_path_and_hub_id(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"HallusionBench\.json is missing.*lmms-lab"):
        HallusionBench().samples(tmp_path)


def test_the_hubs_table_has_hidden_figures_in_a_split_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = {
        "image": [row(), row(question_id="1"), row(figure_id="1", visual_input="2")],
        "non_image": [row(category="VS", subcategory="chart", visual_input="0")],
    }

    def table(self: Data, *required: str, split: str) -> Any:
        return ((row, bytes, "") for row in tables[split])

    monkeypatch.setattr(Data, "table", table)
    found = HallusionBench().samples()
    assert [s.image for s in found] == [bytes, bytes, bytes, None]
    assert found[0].image_name == found[1].image_name != found[2].image_name
    assert found[3].image_name is None
    assert [s.line for s in found] == [0, 1, 2, 3]
    assert len(HallusionBench(figures="only").samples()) == 3
