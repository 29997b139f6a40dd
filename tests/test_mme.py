"""MME against the official script, lmms-eval and VLMEvalKit, and its folders in every shape."""

from __future__ import annotations

from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.benchmarks.mme import COGNITION, MME, PERCEPTION
from foveate.evaluation.benchmark import EvalRecord, Problems
from tests import goldens
from tests.goldens import records


def given(answers: dict[str, list[str]], labels: dict[str, list[str]]) -> list[EvalRecord]:
    """Records of every task; labels alternate yes and no unless `labels` says otherwise."""
    return [
        {
            "split": task,
            "line": line,
            "id": f"{line // 2}/{line % 2}",
            "label": labels[task][line].lower() if task in labels else ("yes", "no")[line % 2],
            "answer": answer,
            "meta": {},
        }
        for task, lines in answers.items()
        for line, answer in enumerate(lines)
    ]


@pytest.mark.parametrize("case", goldens.cases("mme"))
def test_scores_equal_the_official_script_and_the_harnesses(case: str) -> None:
    expected = goldens.read("mme", case, "expected.json")
    labels: dict[str, list[str]] = {}
    if case == "lavin_official_sample":
        lines = goldens.read("mme", case, "result_lines_by_task.json.gz")
        answers = {task: [row[3] for row in rows] for task, rows in lines.items()}
        labels = {task: [row[2] for row in rows] for task, rows in lines.items()}
    else:
        answers = goldens.read("mme", case, "answers_by_task.json.gz")
    assert sum(map(len, answers.values())) == 2374
    asked = given(answers, labels)

    scores = MME().score(reversed(asked))
    for part, total in (("Perception", "perception"), ("Cognition", "cognition")):
        for task, value in expected["scores"][part]["tasks"].items():
            assert scores[f"{task}/score"] == pytest.approx(value, rel=1e-12)
        assert scores[total] == pytest.approx(expected["scores"][part]["total"], rel=1e-12)

    lmms = replace(MME(), parser="lmms").score(asked)
    for total in ("perception", "cognition"):
        value = expected["lmms_eval"][f"mme_{total}_score"]
        assert lmms[total] == pytest.approx(value, rel=1e-12)

    kit = replace(MME(), parser="vlmevalkit").score(asked)
    names = expected["vlmevalkit_exact_matching"]
    assert kit["perception"] == pytest.approx(names["perception"], rel=1e-12)
    assert kit["cognition"] == pytest.approx(names["reasoning"], rel=1e-12)
    for task in (*PERCEPTION, *COGNITION):
        assert kit[f"{task}/score"] == pytest.approx(names[task], rel=1e-12)


def made_up(root: Path) -> Path:
    """Three tasks of one or two images in the three shapes of the released folder."""
    home = root / "mme" / "MME_Benchmark_release_version"
    shapes = {
        "existence": ("existence", "existence"),
        "posters": ("posters/questions_answers_YN", "posters/images"),
        "artwork": ("artwork/questions_answers_YN", "artwork/images/toy_dataset"),
    }
    for task, (questions, images) in shapes.items():
        for i in range(2 if task == "existence" else 1):
            (home / questions).mkdir(parents=True, exist_ok=True)
            (home / images).mkdir(parents=True, exist_ok=True)
            (home / images / f"{i}.{'png' if task == 'posters' else 'jpg'}").touch()
            (home / questions / f"{i}.txt").write_text(
                f"Is {task} {i}? Please answer yes or no.\tYes\n"
                f"Not {task} {i}? Please answer yes or no.\tNo\n"
            )
    return root


def test_folders_of_every_shape_become_pairs(tmp_path: Path) -> None:
    problems = Problems()
    benchmark = MME(tasks=("existence", "posters", "artwork"))
    samples = benchmark.samples(made_up(tmp_path), problems)
    assert not problems
    assert [s.label for s in samples] == ["yes", "no"] * 4
    assert [(s.split, s.line) for s in samples][:5] == [
        *(("existence", line) for line in range(4)),
        ("posters", 0),
    ]
    assert all(isinstance(s.image, Path) and s.image.is_file() for s in samples)
    assert len({s.image_name for s in samples}) == 4
    assert samples[0].prompt == samples[0].question == "Is existence 0? Please answer yes or no."
    short = replace(benchmark, suffix="\nOne word.").samples(tmp_path)
    assert short[0].prompt == "Is existence 0?\nOne word."


def test_a_cut_question_file_is_counted_and_keeps_the_other_lines_in_place(tmp_path: Path) -> None:
    root, problems = made_up(tmp_path), Problems()
    cut = root / "mme/MME_Benchmark_release_version/existence/0.txt"
    cut.write_text(cut.read_text()[:60])
    samples = MME().samples(root, problems)
    assert [s.line for s in samples if s.split == "existence"] == [0, 2, 3]
    assert problems.counts["broken lines"] == 1
    assert problems.counts["images without two questions"] == 1
    assert problems.counts["missing tasks"] == 11


def test_acc_plus_needs_both_answers_of_an_image() -> None:
    asked = given({"color": ["Yes", "No", "Yes", "Yes", "Not sure", "no\nno"]}, {})
    scores = MME().score(asked)
    assert scores["color/acc"] == pytest.approx(100 * 4 / 6)
    assert scores["color/acc+"] == pytest.approx(100 / 3)
    assert "perception" not in scores  # nine of its tasks were not asked
    asked[1]["answer"] = None
    assert MME().score(asked)["color/acc+"] == 0
    columns, rows = MME().table(scores)
    assert rows == [["color", *(scores[f"color/{key}"] for key in ("acc", "acc+", "score"))]]
    assert len(columns) == 4
    assert not any(isnan(value) for value in scores.values())


def test_options_and_folders_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="there is no task 'colour'"):
        MME(tasks=("colour",))
    with pytest.raises(FoveateError, match=r"MME_Benchmark_release_version/existence is missing"):
        MME().samples(tmp_path)


def test_line_breaks_and_tabs_in_answers_do_not_break_the_four_characters() -> None:
    asked: dict[str, Any] = {"No\tway": "no", "\n\n\n\nYes": None, "A\nno": "no"}
    assert {answer: MME().parse(answer) for answer in asked} == asked


def test_records_of_samples_have_what_scoring_needs(tmp_path: Path) -> None:
    samples = MME(tasks=("existence",)).samples(made_up(tmp_path))
    scores = MME().score(records(samples, ["Yes", "No", "Yes", "No"]))
    assert scores["existence/score"] == 200
