"""TextVQA against LLaVA's and lmms-eval's scorers and ViCrop's, and the VQA normaliser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.benchmarks.textvqa import TextVQA
from foveate.evaluation.benchmark import Problems
from foveate.evaluation.data import Data
from foveate.evaluation.vqa import CONTRACTIONS, leave_one_out, normalise, three_tenths
from tests import goldens


def record(answer: str | None, people: list[str], line: int = 0) -> dict[str, Any]:
    return {"split": "val", "line": line, "id": "1", "answer": answer, "label": people, "meta": {}}


def test_accuracies_equal_those_of_the_published_scorers() -> None:
    table = goldens.read("textvqa", "vqa_accuracy_table.json")
    assert len(table["rows"]) == 59
    for row in table["rows"]:
        given = record(row["pred"], table["gt_answers"][row["gt"]])
        official = TextVQA().correct(given)
        assert official == row["llava_m4c"] == row["lmms_eval_textvqa"]
        assert TextVQA(accuracy="vicrop").correct(given) == row["vicrop_get_acc_0.3"]


def test_the_two_ways_of_counting_agree_on_ten_people_and_differ_on_fewer() -> None:
    for n in range(11):
        people = ["a"] * n + ["b"] * (10 - n)
        assert leave_one_out("a", people) == pytest.approx(three_tenths("a", people))
    assert leave_one_out("a", ["a", "b"]) == pytest.approx(1 / 6)
    assert three_tenths("a", ["a", "b"]) == 0.3
    assert leave_one_out("a", []) == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  RED one.", "red 1"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("St. Ives Ave.", "st ives ave"),
        ("coca-cola", "coca cola"),
        ("coca - cola", "coca cola"),
        ("a/b", "b"),  # the mark becomes a space, and a lone "a" is an article
        ("dont\tstop\n", "don't stop"),
        ("Joe's", "joe 's"),
        ("somebody'd", "somebodyd"),
        ("couldnt've", "couldn't've"),
        ("." * 40, "." * 8),
        ("", ""),
    ],
)
def test_the_normaliser(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


def test_contractions_are_the_published_list_with_its_gaps() -> None:
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["whove"] == "who've"
    assert CONTRACTIONS["y'alld've"] == "y'all'd've"
    assert not {"hell", "ill", "its", "lets", "shed", "shell", "wed", "well"} & CONTRACTIONS.keys()


def made_up(root: Path, rows: list[dict[str, Any]]) -> Path:
    home = root / "textvqa"
    (home / "train_images").mkdir(parents=True)
    (home / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))
    for row in rows[:4]:
        (home / "train_images" / f"{row['image_id']}.jpg").touch()
    return root


def rows() -> list[dict[str, Any]]:
    return [
        {
            "question_id": 34602 + i,
            "image_id": f"00{i // 2}ff",
            "question": f"what BRAND is {i}?",
            "answers": ["nokia"] * (10 - i) + ["lg"] * i,
        }
        for i in range(6)
    ]


def test_six_rows_become_samples(tmp_path: Path) -> None:
    problems = Problems()
    broken = {"question": "what is this?"}
    samples = TextVQA().samples(made_up(tmp_path, [*rows(), broken]), problems)
    assert [s.line for s in samples] == [0, 1, 2, 3, 4, 5]
    assert samples[3].id == "34605"
    assert samples[3].image == tmp_path / "textvqa" / "train_images" / "001ff.jpg"
    assert samples[2].image_name == samples[3].image_name == "001ff"
    assert samples[3].prompt == (
        "What brand is 3?\nAnswer the question using a single word or phrase."
    )
    assert samples[3].label.count("lg") == 3
    assert problems.counts == {"broken lines": 1, "missing images": 1}
    as_written = TextVQA(capitalize=False, suffix="").samples(tmp_path)
    assert as_written[3].prompt == "what BRAND is 3?"


def test_scores_leave_out_what_has_no_answer() -> None:
    given = [record("Nokia!", rows()[0]["answers"]), record("lg", rows()[2]["answers"], 1)]
    scores = TextVQA().score([*given, record(None, ["x"], 2)])
    assert scores["accuracy"] == pytest.approx(100 * (1 + 0.6) / 2)
    assert "1 of 3 questions" in TextVQA().notes([*given, record(None, ["x"], 2)])[0]
    assert TextVQA().table(scores) == (
        ["TextVQA", "Accuracy"],
        [["Validation", scores["accuracy"]]],
    )


def test_a_missing_file_is_one_sentence_with_path_and_hub_id(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"TextVQA_0\.5\.1_val\.json is missing.*lmms-lab"):
        TextVQA().samples(tmp_path)


def test_the_hubs_table_gives_the_same_questions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def table(self: Data, *required: str, split: str) -> Any:
        assert split == "validation"
        assert all(key in row for key in required for row in rows())
        return ((row, bytes, "") for row in rows())

    monkeypatch.setattr(Data, "table", table)
    local, hub = TextVQA().samples(made_up(tmp_path, rows())), TextVQA().samples()
    assert [(s.id, s.prompt, s.label) for s in hub] == [(s.id, s.prompt, s.label) for s in local]
    assert hub[2].image_name == hub[3].image_name == "001ff"
    assert hub[0].image is bytes
