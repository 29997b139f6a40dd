"""A-OKVQA against the official script, and its files in every shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.benchmarks.aokvqa import AOKVQA
from foveate.evaluation.benchmark import EvalRecord, Problems
from foveate.evaluation.data import Data
from tests import goldens


def made_up(root: Path, rows: list[dict[str, Any]]) -> Path:
    (root / "aokvqa").mkdir()
    (root / "aokvqa" / "aokvqa_v1p0_val.json").write_text(json.dumps(rows))
    (root / "coco" / "val2017").mkdir(parents=True)
    for row in rows[:5]:
        (root / "coco" / "val2017" / f"{row['image_id']:012}.jpg").touch()
    return root


def answered(benchmark: AOKVQA, root: Path, **answers: dict[str, str]) -> list[EvalRecord]:
    """Records of `benchmark` on the questions under `root`; `answers`: split -> id -> answer."""
    samples = benchmark.samples(root)
    return goldens.records(samples, [answers[s.split].get(s.id) for s in samples])


def test_scores_equal_the_official_script(tmp_path: Path) -> None:
    golden = goldens.read("aokvqa", "synthetic.json")
    questions = [{**row, "question": "What?", "image_id": 9} for row in golden["dataset"]]
    root, benchmark = made_up(tmp_path, questions), AOKVQA(parser="official")
    given = answered(benchmark, root, direct=golden["da_preds"], choice=golden["mc_preds"])
    scores = benchmark.score(given)
    assert scores["choice/accuracy"] == pytest.approx(golden["expected"]["MC"], rel=1e-12)
    assert scores["direct/accuracy"] == pytest.approx(golden["expected"]["DA"], rel=1e-12)
    easy = sum(not row["difficult_direct_answer"] for row in questions)
    assert sum(r["split"] == "direct" for r in given) == easy < len(questions)

    given = answered(benchmark, root, direct={}, choice=golden["mc_preds_missing5"])
    scores = benchmark.score(given)
    assert scores["choice/accuracy"] == pytest.approx(golden["expected"]["MC_missing5"])
    assert scores["direct/accuracy"] == 0
    lost = 5 + easy
    assert f"{lost} of {len(given)} questions have no answer and count as wrong." in (
        benchmark.notes(given)
    )


def rows() -> list[dict[str, Any]]:
    return [
        {
            "split": "val",
            "image_id": 461751 + i,
            "question_id": f"q{i}",
            "question": f"What is {i}?",
            "choices": ["ice cream", "bus", "cab", "apple"],
            "correct_choice_idx": i % 4,
            "direct_answers": ["Bus", "bus", "bus", "the bus"] + ["cab"] * 6,
            "difficult_direct_answer": i == 2,
        }
        for i in range(6)
    ]


def test_six_rows_become_samples(tmp_path: Path) -> None:
    problems = Problems()
    root = made_up(tmp_path, rows())
    samples = AOKVQA().samples(root, problems)
    assert [s.line for s in samples] == [0, 1, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert problems.counts == {"missing images": 1}
    direct, choice = samples[1], samples[6]
    assert direct.prompt == "What is 1?\nAnswer the question using a single word or phrase."
    assert len(direct.label) == 10
    assert choice.prompt == (
        "What is 1?\nA. ice cream\nB. bus\nC. cab\nD. apple\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert choice.label == "bus"
    assert choice.image == tmp_path / "coco" / "val2017" / "000000461752.jpg"
    both = AOKVQA(tasks=("direct",), difficult=True, suffix=" Short.").samples(root)
    assert [s.line for s in both] == [0, 1, 2, 3, 4, 5]
    assert both[2].prompt == "What is 2? Short."


def test_lists_written_as_text_are_read(tmp_path: Path) -> None:
    row = rows()[0]
    text = {key: repr(row[key]) for key in ("choices", "direct_answers")}
    samples = AOKVQA().samples(made_up(tmp_path, [{**row, **text}]))
    assert samples[0].label == row["direct_answers"]
    assert samples[1].meta == {"choices": row["choices"]}


@pytest.mark.parametrize(
    ("answer", "official", "by_letter"),
    [
        ("bus", "bus", "bus"),
        ("Bus.", None, "bus"),
        ("B", None, "bus"),
        ("(C) cab", None, "cab"),
        ("apple", "apple", "apple"),  # not A, though it starts so
        ("zoo", None, None),
        ("", None, None),
    ],
)
def test_choices(answer: str, official: str | None, by_letter: str | None) -> None:
    choices = ["ice cream", "bus", "cab", "apple"]
    assert AOKVQA(parser="official").choose(answer, choices) == official
    assert AOKVQA().choose(answer, choices) == by_letter
    assert AOKVQA().choose("D", choices[:2]) is None


def test_direct_answers_by_three_rules() -> None:
    people = ["Bus", "bus", "bus", "the bus"] + ["cab"] * 6
    given = {"split": "direct", "line": 0, "id": "1", "label": people, "meta": {}}
    assert AOKVQA().correct({**given, "answer": "bus"}) == pytest.approx(2 / 3)
    assert AOKVQA().correct({**given, "answer": "BUS"}) == 0
    assert AOKVQA(accuracy="vqa").correct({**given, "answer": "BUS"}) == pytest.approx(1)
    assert AOKVQA(accuracy="vicrop").correct({**given, "answer": "a bus"}) == 1
    assert AOKVQA().correct({**given, "answer": None}) is None


def test_the_table_and_the_notes() -> None:
    meta = {"choices": ["red", "blue"]}
    given = {"split": "choice", "line": 0, "id": "1", "label": "red", "meta": meta}
    records = [{**given, "answer": "A"}, {**given, "line": 1, "answer": "hm"}]
    scores = AOKVQA().score(records)
    assert AOKVQA().table(scores) == (["A-OKVQA", "Accuracy"], [["Multiple choice", 50.0]])
    assert AOKVQA().notes(records) == [
        "1 of 2 answers name none of the choices and count as wrong, such as 'hm'."
    ]
    assert AOKVQA().notes(records[:1]) == []


def test_bad_options_and_a_missing_file_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="direct, choice or both"):
        AOKVQA(tasks=())
    with pytest.raises(FoveateError, match=r"aokvqa_v1p0_val\.json is missing.*HuggingFaceM4"):
        AOKVQA().samples(tmp_path)


def test_the_hubs_table_gives_the_same_questions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def table(self: Data, *required: str, split: str) -> Any:
        assert split == "validation"
        kept = [{k: v for k, v in row.items() if k != "image_id"} for row in rows()]
        assert all(key in row for key in required for row in kept)
        return ((row, bytes, "") for row in kept)

    monkeypatch.setattr(Data, "table", table)
    local, hub = AOKVQA().samples(made_up(tmp_path, rows())), AOKVQA().samples()
    for ours, theirs in zip(local, hub, strict=True):
        assert theirs.image is bytes
        for key in ("split", "line", "id", "prompt", "label", "meta"):
            assert getattr(ours, key) == getattr(theirs, key)
