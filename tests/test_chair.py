"""CHAIR against OPERA's script on its own 500 captions, and the objects of made-up COCO files."""

from __future__ import annotations

import json
import sys
from math import isnan
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from foveate import FoveateError
from foveate.benchmarks.chair import CHAIR, PAIRS, PROMPT, Objects, singular
from foveate.evaluation.benchmark import EvalRecord, Problems
from foveate.evaluation.words import lemmas
from tests import goldens

CASE = "opera_llava15_greedy"


def synonyms() -> list[str]:
    path = goldens.BENCHDATA / "chair" / "synonyms.txt"
    if not path.exists():
        pytest.skip("the synonym table (../shared/benchdata/chair) is not beside this repository")
    return path.read_text().strip().splitlines()


def captions() -> list[dict[str, Any]]:
    return goldens.read("chair", CASE, "per_sentence.json.gz")


def record(line: int, caption: str, there: list[str], **meta: Any) -> EvalRecord:
    row = {"split": "captions", "line": line, "id": str(line), "answer": caption}
    return {**row, "label": there, "meta": meta}


def overall() -> dict[str, float]:
    return goldens.read("chair", CASE, "expected.json")["overall"]


def test_scores_from_stored_objects_equal_operas() -> None:
    rows, expected = captions(), overall()
    given = [record(i, r["caption"], r["gt"], named=r["generated"]) for i, r in enumerate(rows)]
    scores = CHAIR().score(reversed(given))
    assert scores["chair_s"] == pytest.approx(100 * expected["CHAIRs"], rel=1e-12)
    assert scores["chair_i"] == pytest.approx(100 * expected["CHAIRi"], rel=1e-12)
    assert scores["recall"] == pytest.approx(100 * expected["Recall"], rel=1e-12)
    assert isnan(scores["length"])
    for row, one in zip(rows, given, strict=True):
        judged = CHAIR().judge(one)
        assert judged["invented"] == [node for _, node in row["hallucinated"]]
        assert CHAIR().correct(one) == 1 - row["CHAIRs"]
        assert CHAIR().score([one])["recall"] == pytest.approx(100 * row["Recall"])
    head, body = CHAIR().table(scores)
    assert head == ["", "CHAIRs", "CHAIRi", "Recall", "Length"]
    assert [f"{value:.1f}" for value in body[0][1:4]] == ["45.0", "12.7", "80.4"]


def test_captions_name_the_same_objects_as_in_opera() -> None:
    try:
        CHAIR().split_words("a dog", frozenset())
    except FoveateError as error:
        pytest.skip(f"OPERA's words need nltk and its data: {error}")
    rows, table, expected = captions(), synonyms(), overall()
    given = [record(i, r["caption"], r["gt"], synonyms=table) for i, r in enumerate(rows)]
    different = [
        r["id"] for r, row in zip(given, rows, strict=True) if named(r) != row["generated"]
    ]
    assert different == []
    scores = CHAIR().score(given)
    assert scores["chair_i"] == pytest.approx(100 * expected["CHAIRi"], rel=1e-12)
    assert scores["length"] == pytest.approx(100 * expected["Len"], rel=1e-12)


def named(one: EvalRecord) -> list[str]:
    return CHAIR().judge(one)["named"]


def test_singular_forms_come_near_without_nltk() -> None:
    rows, table, expected = captions(), synonyms(), overall()
    given = [record(i, r["caption"], r["gt"], synonyms=table) for i, r in enumerate(rows)]
    benchmark = CHAIR(words="singular")
    scores = benchmark.score(given)
    assert scores["chair_s"] == pytest.approx(100 * expected["CHAIRs"], abs=0.3)
    assert scores["chair_i"] == pytest.approx(100 * expected["CHAIRi"], abs=0.3)
    assert scores["recall"] == pytest.approx(100 * expected["Recall"], abs=0.3)
    assert scores["length"] == pytest.approx(100 * expected["Len"], abs=0.1)
    objects = [benchmark.judge(one)["named"] for one in given]
    same = sum(ours == row["generated"] for ours, row in zip(objects, rows, strict=True))
    assert same >= 460
    assert "singular forms" in benchmark.notes(given)[-1]


def test_the_two_word_table_is_the_original() -> None:
    synonyms()
    path = goldens.BENCHDATA / "chair" / "double_word_dict.json"
    assert json.loads(path.read_text()) == PAIRS


TABLE = [
    "person, man, woman, child, adult, passenger",
    "dog, puppy",
    "train, locomotive",
    "chair, seat",
    "toilet, potty",
    "wine glass",
    "traffic light, stop light",
    "cake,  cheesecake",
]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Two puppies and a woman.", ["dog", "person"]),
        ("A baby dog and an adult dog", ["dog", "dog"]),
        ("the passenger train, a passenger", ["train", "person"]),
        ("three wine glasses under the traffic lights", ["wine glass", "traffic light"]),
        ("the seat of the toilet", ["toilet"]),
        ("a toilet seat", ["toilet"]),
        ("a seat by the window", ["chair"]),
        ("men and seats", ["person", "chair"]),
        ("cheesecake", []),  # the table's second space is part of the word, as in the original
        ("hotdogs; dog-like traffic", []),
        ("", []),
    ],
)
def test_what_a_caption_names(caption: str, expected: list[str]) -> None:
    one = record(0, caption, [], synonyms=TABLE)
    assert CHAIR(words="singular").judge(one)["named"] == expected


def test_pairs_count_as_one_word() -> None:
    table = Objects(TABLE)
    assert table.named(["wine", "glass", "and", "stop", "light", "."]) == (
        ["wine glass", "traffic light"],
        4,
    )


def test_singular_forms_are_known_words() -> None:
    forms = {
        **{"buses": "bus", "knives": "knife", "calves": "calf", "mice": "mouse", "skis": "skis"},
        **{"glasses": "glass", "babies": "baby", "women": "woman", "vases": "vase"},
    }
    known = frozenset(forms.values())
    assert {word: singular(word, known) for word in forms} == forms
    assert singular("trees", known) == "trees"


def test_words_are_lemmatised_as_they_are_tagged(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"skiing": "VBG", "big": "JJ", "men": "NNS", "quickly": "RB", "two": "CD"}
    fake = ModuleType("nltk")
    fake.word_tokenize = str.split  # type: ignore[attr-defined]
    fake.pos_tag = lambda words: [(w, tags[w]) for w in words]  # type: ignore[attr-defined]
    lemmatizer = SimpleNamespace(lemmatize=lambda word, pos: f"{word}/{pos}")
    fake.stem = SimpleNamespace(WordNetLemmatizer=lambda: lemmatizer)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", fake)
    lemmas.cache_clear()
    words = CHAIR().split_words("Two big men skiing quickly", frozenset())
    lemmas.cache_clear()
    assert words == ["two/n", "big/a", "men/n", "skiing/v", "quickly/r"]


def test_without_nltk_or_its_data_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(FoveateError, match=r"foveate\[eval\].*words=singular"):
        CHAIR().samples(tmp_path)
    fake = ModuleType("nltk")

    def absent(text: str) -> Any:
        raise LookupError("a page of text")

    fake.word_tokenize = absent  # type: ignore[attr-defined]
    fake.pos_tag = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", fake)
    with pytest.raises(FoveateError, match=r"nltk\.downloader punkt .*words=singular"):
        CHAIR().samples(tmp_path)


def made_up(root: Path, train: int = 0) -> Path:
    """Six images, ids 1 to 6; the last `train` of them in train2014."""
    (root / "chair").mkdir()
    (root / "chair" / "synonyms.txt").write_text("\n".join(TABLE) + "\n")
    annotations = root / "coco" / "annotations"
    annotations.mkdir(parents=True)
    names = {18: "dog", 1: "person", 62: "chair"}
    parts = {"val": range(1, 7 - train), "train": range(7 - train, 7)}
    for part, ids in parts.items():
        folder = root / "coco" / f"{part}2014"
        folder.mkdir()
        for i in ids:
            (folder / f"COCO_{part}2014_{i:012}.jpg").touch()
        instances = {
            "images": [{"id": i} for i in ids],
            "categories": [{"id": k, "name": name} for k, name in names.items()],
            "annotations": [{"image_id": i, "category_id": 18} for i in ids for _ in range(2)],
        }
        said = {1: "A woman on a seat.", 5: "Wine glasses."}
        captions = {
            "annotations": [{"image_id": i, "caption": said.get(i, "A photo.")} for i in ids]
        }
        (annotations / f"instances_{part}2014.json").write_text(json.dumps(instances))
        (annotations / f"captions_{part}2014.json").write_text(json.dumps(captions))
    return root


def test_listed_images_with_their_objects(tmp_path: Path) -> None:
    root = made_up(tmp_path, train=2)
    (root / "chair" / "image_ids.json").write_text("[5, 1, 99, 2]")
    problems = Problems()
    samples = CHAIR(words="singular").samples(root, problems)
    assert problems.counts == {"images without annotation": 1}
    assert [(s.line, s.id) for s in samples] == [(0, "5"), (1, "1"), (3, "2")]
    assert [s.label for s in samples] == [
        ["dog", "wine glass"],
        ["chair", "dog", "person"],
        ["dog"],
    ]
    assert samples[0].image == root / "coco" / "train2014" / "COCO_train2014_000000000005.jpg"
    assert samples[1].prompt == PROMPT
    answers = ["A wine glass.", "Men on a chair.", "Two dogs and a train, a train."]
    given = goldens.records(samples, answers)
    scores = CHAIR(words="singular").score(given)
    assert scores["chair_s"] == pytest.approx(100 / 3)
    assert scores["chair_i"] == pytest.approx(100 * 2 / 6)
    assert scores["recall"] == pytest.approx(100 * 4 / 6)
    assert scores["length"] == pytest.approx((3 + 5 + 9) / 3)


def test_without_a_list_images_are_drawn_from_val2014(tmp_path: Path) -> None:
    root = made_up(tmp_path)
    drawn = CHAIR(words="singular", images=3).samples(root)
    assert len({s.id for s in drawn}) == 3
    assert [s.id for s in CHAIR(words="singular", images=3).samples(root)] == [s.id for s in drawn]
    other = [CHAIR(words="singular", images=3, seed=n).samples(root) for n in range(1, 4)]
    assert any([s.id for s in samples] != [s.id for s in drawn] for samples in other)
    assert len(CHAIR(words="singular").samples(root)) == 6


def test_what_is_missing_or_wrong_is_one_sentence(tmp_path: Path) -> None:
    benchmark = CHAIR(words="singular")
    with pytest.raises(FoveateError, match=r"synonyms\.txt is missing.*LisaAnne/Hallucination"):
        benchmark.samples(tmp_path)
    root = made_up(tmp_path)
    (root / "chair" / "synonyms.txt").write_text("dog, puppy\nchair\n")
    with pytest.raises(FoveateError, match="the synonyms lack COCO's person"):
        benchmark.samples(root)
    (root / "coco" / "annotations" / "captions_val2014.json").unlink()
    (root / "chair" / "synonyms.txt").write_text("\n".join(TABLE))
    with pytest.raises(FoveateError, match=r"captions_val2014\.json is missing.*cocodataset"):
        benchmark.samples(root)
    with pytest.raises(FoveateError, match="images must be 1 or more"):
        CHAIR(images=0)


def test_captions_that_name_nothing_have_no_chair_i() -> None:
    scores = CHAIR(words="singular").score([record(0, "A photo.", ["dog"], synonyms=TABLE)])
    assert isnan(scores["chair_i"])
    assert scores["chair_s"] == scores["recall"] == 0
    assert CHAIR().score([]) == {}
    assert CHAIR().correct({**record(0, "", []), "answer": None}) is None
