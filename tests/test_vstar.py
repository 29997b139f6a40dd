"""V*Bench against lmms-eval's prompt and letters and ViCrop's choice, and its two layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.benchmarks.vstar import ASK, VStar, prompt
from foveate.evaluation.benchmark import Problems, parse
from foveate.evaluation.data import Data
from foveate.evaluation.vqa import LETTERS, letter, nearest
from tests import goldens

TEXT = "What color is the dog?\n(A) black\n(B) white\n(C) red\n(D) brown" + ASK


@goldens.needed
def test_letters_equal_lmms_eval_and_vicrop() -> None:
    table = goldens.read("vstar", "parse_table.json")
    options = table["options"]
    assert len(table["rows"]) == 19
    for row in table["rows"]:
        assert letter(row["answer"]) == row["lmms_eval_extract"]
        assert VStar().parse(row["answer"]) == row["lmms_eval_extract"]
        assert LETTERS[nearest(row["answer"], options)] == row["vicrop_similarity_letter"]
        given = record(row["answer"], row["vicrop_similarity_letter"], options=options)
        assert VStar(parser="vicrop").correct(given) == 1


@goldens.needed
def test_the_prompt_is_lmms_evals() -> None:
    example = goldens.read("vstar", "prompt_example.json")
    assert prompt(example["text_field"]) + VStar().suffix == example["lmms_eval_prompt"]
    assert prompt("How many?") == "How many?"


def record(answer: str | None, label: str, **meta: Any) -> dict[str, Any]:
    row = {"split": "direct_attributes", "line": 0, "id": "0", "label": label, "meta": meta}
    return {**row, "answer": answer}


def listed(root: Path) -> Path:
    home = root / "vstar_bench"
    rows = []
    for i in range(6):
        split = "direct_attributes" if i < 4 else "relative_position"
        image = f"{split}/sa_{i}.jpg"
        (home / split).mkdir(parents=True, exist_ok=True)
        (home / image).touch()
        row = {"image": image, "text": TEXT, "category": split, "label": "ABCDAB"[i]}
        rows.append({**row, "question_id": i})
    (home / "test_questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"ima')
    return root


def test_six_rows_become_samples(tmp_path: Path) -> None:
    problems = Problems()
    samples = VStar().samples(listed(tmp_path), problems)
    assert problems.counts == {"broken lines": 1}
    assert [(s.split, s.line, s.label) for s in samples[3:5]] == [
        ("direct_attributes", 3, "D"),
        ("relative_position", 4, "A"),
    ]
    assert samples[1].prompt == (
        "What color is the dog?\nA. black\nB. white\nC. red\nD. brown" + ASK + ASK
    )
    assert samples[1].meta["options"] == ["(A) black", "(B) white", "(C) red", "(D) brown"]
    assert samples[1].image == tmp_path / "vstar_bench" / "direct_attributes" / "sa_1.jpg"
    assert parse('vstar(suffix=" Letter?")')[0].samples(tmp_path)[0].prompt.endswith(" Letter?")


def folders(root: Path) -> Path:
    for split, options in (
        ("direct_attributes", ["red", "black", "white", "brown"]),
        ("relative_position", ["It is left of the cat.", "It is right of the cat."]),
    ):
        home = root / "vstar_bench" / split
        home.mkdir(parents=True)
        for i in range(12):
            entry = {"target_object": ["dog"], "bbox": [[1, 2, 3, 4]], "options": options}
            (home / f"sa_{i}.json").write_text(json.dumps({**entry, "question": "Where?"}))
            (home / f"sa_{i}.{'png' if i == 1 else 'jpg'}").touch()
    (home / "sa_0.jpg").unlink()
    return root


def test_folders_put_the_right_option_first_and_we_do_not(tmp_path: Path) -> None:
    problems = Problems()
    samples = VStar().samples(folders(tmp_path), problems)
    assert problems.counts == {"missing images": 1}
    assert {s.label for s in samples if s.split == "relative_position"} == {"A", "B"}
    assert {s.label for s in samples if s.split == "direct_attributes"} == set("ABCD")
    for sample in samples:
        right = "red" if sample.split == "direct_attributes" else "It is left of the cat."
        assert f"\n{sample.label}. {right}\n" in sample.prompt
        assert f"({sample.label}) {right}" in sample.meta["options"]
    assert [s.label for s in VStar().samples(tmp_path)] == [s.label for s in samples]
    by_id = {(s.split, s.id): s for s in samples}
    image = by_id["direct_attributes", "sa_1"].image
    assert isinstance(image, Path)
    assert image.suffix == ".png"


def test_scores_per_kind_and_overall() -> None:
    given = [record("A", "A"), {**record("(B) white", "A"), "line": 1}]
    given += [{**record("hm", "B"), "line": 2}, {**record(None, "A"), "line": 3}]
    given.append({**record("The answer is B", "B"), "split": "relative_position"})
    scores = VStar().score(given)
    assert scores == {
        "direct_attributes/accuracy": pytest.approx(100 / 3),
        "relative_position/accuracy": 100,
        "overall/accuracy": 50,
    }
    lost, unread = VStar().notes(given)
    assert "1 of 5 questions" in lost
    assert "1 of 4 answers name no option and count as wrong, such as 'hm'" in unread
    assert VStar().correct(given[3]) is None
    columns, rows = VStar().table(scores)
    assert [row[0] for row in rows] == ["Direct attributes", "Relative position", "Overall"]
    assert all(len(row) == len(columns) for row in rows)


def test_a_missing_folder_is_one_sentence_with_path_and_hub_id(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"direct_attributes is missing.*craigwu/vstar_bench"):
        VStar().samples(tmp_path)


def test_the_hubs_table_gives_the_same_questions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = (listed(tmp_path) / "vstar_bench" / "test_questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:6]]
    monkeypatch.setattr(Data, "table", lambda *_: ((row, bytes, "") for row in rows))
    local, hub = VStar().samples(tmp_path), VStar().samples()
    for ours, theirs in zip(local, hub, strict=True):
        assert theirs.image is bytes
        for key in ("split", "line", "id", "prompt", "label", "meta"):
            assert getattr(ours, key) == getattr(theirs, key)
    assert len({s.image_name for s in hub}) == 6
