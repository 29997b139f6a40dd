"""AMBER against the official script, discriminative and generative."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.benchmarks import amber
from foveate.benchmarks.amber import AMBER, AMBERCaptions
from foveate.evaluation.benchmark import Problems
from tests import goldens
from tests.goldens import records

NAMES = {  # as the official script spells them
    "Descriminative Task": "all",
    "Exsitence": "existence",
    "Attribute": "attribute",
    "State": "state",
    "Number": "number",
    "Action": "action",
    "Relation": "relation",
}
TYPES: dict[str, Any] = {
    "d": ("existence", "attribute", "relation"),
    "de": ("existence",),
    "da": ("attribute",),
    "dr": ("relation",),
    "a": ("existence", "attribute", "relation"),
}
GENERATIVE = ("g_stub_similarity", "a_stub_similarity")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return goldens.data_root(tmp_path_factory.mktemp("data"), "amber/images/AMBER_1.jpg")


@pytest.fixture(scope="module")
def samples(root: Path) -> list[Any]:
    return AMBER().samples(root)


@pytest.fixture
def without_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are scored from stored nouns, so no tagger is needed."""
    monkeypatch.setattr(amber, "_nouns", lambda text: ())


@pytest.mark.parametrize("case", goldens.cases("amber", without=("g_stub_similarity",)))
def test_discriminative_scores_equal_the_official_script(samples: list[Any], case: str) -> None:
    expected = goldens.read("amber", case, "expected.json")["by_evaluation_type"]
    answers = {
        str(row["id"]): row["response"] for row in goldens.read("amber", case, "input.json.gz")
    }
    for kind, tables in expected.items():
        asked = [s for s in samples if s.split in TYPES[kind] and s.id in answers]
        given = records(asked, [answers[s.id] for s in asked])
        scores = AMBER(parser="exact").score(reversed(given))
        for name, metrics in tables.items():
            if name == "Generative Task":
                continue
            for metric, value in metrics.items():
                assert scores[f"{NAMES[name]}/{metric.lower()}"] == value, (kind, name, metric)


@pytest.mark.parametrize("case", GENERATIVE)
@pytest.mark.usefixtures("without_nltk")
@goldens.needed
def test_caption_scores_equal_the_official_script_from_stored_nouns(root: Path, case: str) -> None:
    kind = case[0]
    expected = goldens.read("amber", case, "expected.json")["by_evaluation_type"][kind]
    answers = {
        str(row["id"]): row["response"] for row in goldens.read("amber", case, "input.json.gz")
    }
    nouns = goldens.read("amber", case, "nouns.json.gz")
    benchmark = AMBERCaptions(similarity="equal")
    asked = [s for s in benchmark.samples(root) if s.id in answers]
    given = records(asked, [answers[s.id] for s in asked])
    assert len(given) == 1004
    for record in given:
        record["meta"]["nouns"] = nouns[record["id"]]
    scores = benchmark.score(reversed(given))
    assert scores == {k.lower(): v for k, v in expected["Generative Task"].items()}
    assert sum(benchmark.correct(r) == 0 for r in given) / 1004 == pytest.approx(
        scores["hal"] / 100, abs=5e-4
    )


@goldens.needed
def test_nouns_of_the_tagger_equal_the_stored_ones() -> None:
    pytest.importorskip("nltk", reason="the extra `eval` is not installed")
    try:
        amber._nouns("A dog.")
    except FoveateError as error:
        pytest.skip(str(error))
    rows = goldens.read("amber", GENERATIVE[0], "input.json.gz")
    nouns = goldens.read("amber", GENERATIVE[0], "nouns.json.gz")
    same = sum(list(amber._nouns(row["response"])) == nouns[str(row["id"])] for row in rows)
    assert same >= 0.99 * len(rows)  # the tagger's data differ a little between versions of nltk


@goldens.needed
def test_counts_of_the_official_files(samples: list[Any], root: Path) -> None:
    kinds = [s.meta["kind"] for s in samples]
    count = {kind: kinds.count(kind) for kind in set(kinds)}
    assert count == {
        "existence": 4924,
        "state": 4764,
        "number": 2072,
        "action": 792,
        "relation": 975 + 689,
    }
    assert sum(s.label == "no" for s in samples) == 9427
    problems = Problems()
    AMBER().samples(root, problems)
    assert problems.counts == {"missing images": 1003}


def test_the_default_reads_answers_that_the_official_script_cannot(tmp_path: Path) -> None:
    asked = [s for s in AMBER().samples(made_up(tmp_path)) if s.split == "relation"]
    polite = [f"{s.label.capitalize()}, I think so." for s in asked]
    given = records(asked, polite)
    assert AMBER().score(given)["relation/accuracy"] == 100
    assert AMBER(parser="exact").score(given)["relation/accuracy"] == 0
    (note,) = AMBER(parser="exact").notes(given)
    assert note.startswith("2 of 2 answers say neither")
    assert AMBER().notes(given) == []


def test_the_mean_of_vlmevalkit_weighs_the_three_dimensions_alike() -> None:
    given = [
        {"split": "existence", "kind": "existence", "label": "no", "answer": "No"},
        {"split": "existence", "kind": "existence", "label": "no", "answer": "Yes"},
        {"split": "attribute", "kind": "state", "label": "yes", "answer": "yes"},
        {"split": "attribute", "kind": "number", "label": "yes", "answer": "yes"},
        {"split": "attribute", "kind": "action", "label": "yes", "answer": "yes"},
        {"split": "relation", "kind": "relation", "label": "no", "answer": "yes"},
    ]
    rows = [
        {**row, "line": i, "id": str(i), "meta": {"kind": row["kind"]}}
        for i, row in enumerate(given)
    ]
    scores = AMBER(parser="vlmevalkit").score(rows)
    assert scores["average/accuracy"] == pytest.approx(50)
    columns, table = AMBER().table(scores)
    assert [row[0] for row in table][-1] == "All"
    assert all(len(row) == len(columns) for row in table)


def test_start_values_and_epsilons_show_on_few_answers() -> None:
    """Worked by hand: 2 of 4 found, nothing wrong among those said; existence has its own eps."""
    given = [
        {"split": split, "line": i, "id": str(i), "label": "no", "meta": {"kind": kind}}
        | {"answer": "Yes" if i % 2 else "No"}
        for split, kind in (("existence", "existence"), ("attribute", "state"))
        for i in range(4)
    ]
    scores = AMBER(parser="exact").score(given)
    assert scores["existence/precision"] == scores["state/precision"] == 100.0
    assert scores["existence/recall"] == scores["state/recall"] == 50.0
    assert scores["existence/f1"] == 66.6  # 2 * 1 * 0.5 / (1.5 + 0.001)
    assert scores["state/f1"] == 66.7  # 2 * 1 * 0.5 / (1.5 + 0.0001)
    assert scores["attribute/precision"] == 99.9  # 2 / 2.003: three kinds start at 0.001 each


# -- captions --------------------------------------------------------------------------------------

META = {
    "truth": [["man", ["person"]], ["boat", ["ship"]], ["boat", ["ship"]]],
    "likely": [["dog", ["puppy"]], ["sun", []]],
    "neutral": ["light"],
    "vocabulary": ["boat", "car", "dog", "light", "man", "person", "puppy", "ship", "sun"],
}


def caption(*nouns: str) -> dict[str, Any]:
    meta = {**META, "nouns": list(nouns)}
    return {"split": "generative", "line": 0, "id": "1", "answer": "...", "label": [], "meta": meta}


def test_a_caption_is_judged_noun_by_noun() -> None:
    benchmark = AMBERCaptions(similarity="equal")
    judged = benchmark.judge(caption("ship", "person", "man", "tree", "light", "puppy", "car"))
    assert judged == {
        "named": 6,  # tree is not in the vocabulary
        "invented": 2,  # puppy and car
        "covered": 2,  # the man, and the first of two boats through "ship"
        "there": 3,
        "fallen": 1,
        "likely": 2,
    }
    assert benchmark.correct(caption("ship")) == 1
    assert benchmark.correct(caption("car")) == 0
    assert benchmark.score([]) == {}
    scores = benchmark.score([caption("ship"), {**caption("car"), "line": 1}])
    assert scores == {"chair": 50.0, "cover": 16.7, "hal": 50.0, "cog": 0.0}
    assert benchmark.table(scores)[1] == [["AMBER, generative", 50.0, 16.7, 50.0, 0.0]]
    assert "not comparable" in benchmark.notes([caption("ship")])[0]


class Alike(AMBERCaptions):
    """Cars are like boats and suns."""

    def similar(self, first: str, second: str) -> float:
        return 0.9 if first == "car" and second in ("ship", "sun") else float(first == second)


def test_a_similarity_can_be_plugged_in() -> None:
    judged = Alike().judge(caption("car", "car"))
    assert (judged["invented"], judged["covered"], judged["fallen"]) == (0, 1, 1)


def test_without_the_official_vectors_one_sentence_says_what_to_do() -> None:
    if importlib.util.find_spec("en_core_web_lg"):
        pytest.skip("the official vectors are installed here")
    with pytest.raises(FoveateError, match="cannot be compared"):
        AMBERCaptions().similar("dog", "cat")


def test_without_nltk_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(FoveateError, match=r"pip install 'foveate\[eval\]'"):
        AMBERCaptions(similarity="equal").judge({**caption(), "meta": META, "answer": "A cat."})


def made_up(root: Path) -> Path:
    """Two questions of each dimension and one caption, official layout."""
    home = root / "amber" / "data"
    (home / "query").mkdir(parents=True)
    (root / "amber" / "image").mkdir()
    (root / "amber" / "image" / "AMBER_1.jpg").touch()
    types = {
        "existence": ["discriminative-hallucination"] * 2,
        "attribute": ["discriminative-attribute-state", "discriminative-attribute-action"],
        "relation": ["discriminative-relation", "relation"],
    }
    annotations: list[dict[str, Any]] = [
        {"id": 1, "type": "generative", "truth": ["sky", "moon"], "hallu": ["sun"]}
    ]
    queries: dict[str, list[dict[str, Any]]] = {"generative": [{"id": 1}]}
    for split, kinds in types.items():
        for kind in kinds:
            number = len(annotations) + 1
            truth = "yes" if kind == "discriminative-relation" else "no"
            annotations.append({"id": number, "type": kind, "truth": truth})
            queries.setdefault(f"discriminative-{split}", []).append({"id": number})
    for name, rows in queries.items():
        rows = [{**row, "image": "AMBER_1.jpg", "query": f"Is {row['id']}?"} for row in rows]
        (home / "query" / f"query_{name}.json").write_text(json.dumps(rows))
    (home / "annotations.json").write_text(json.dumps(annotations))
    (home / "relation.json").write_text(json.dumps({"sky": ["air"], "sun": []}))
    (home / "safe_words.txt").write_text("light\nsign")
    return root


@pytest.mark.usefixtures("without_nltk")
def test_the_official_layout_becomes_samples(tmp_path: Path) -> None:
    problems = Problems()
    root = made_up(tmp_path)
    samples = AMBER(suffix="\nPlease answer yes or no.").samples(root, problems)
    assert [(s.split, s.line, s.meta["kind"]) for s in samples] == [
        ("existence", 0, "existence"),
        ("existence", 1, "existence"),
        ("attribute", 0, "state"),
        ("attribute", 1, "action"),
        ("relation", 0, "relation"),
        ("relation", 1, "relation"),
    ]
    assert [s.label for s in samples] == ["no", "no", "no", "no", "yes", "no"]
    assert samples[0].prompt == "Is 2?\nPlease answer yes or no."
    (one,) = AMBERCaptions(similarity="equal").samples(root, problems)
    assert one.meta == {
        "truth": [["sky", ["air"]], ["moon", []]],
        "likely": [["sun", []]],
        "neutral": ["light", "sign"],
        "vocabulary": ["air", "sky", "sun"],
    }
    assert not problems


def test_a_question_without_annotation_is_counted(tmp_path: Path) -> None:
    root, problems = made_up(tmp_path), Problems()
    path = root / "amber" / "data" / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    assert len(AMBER().samples(root, problems)) == 5
    assert problems.lines() == ["1 questions without annotation: id 7"]


def test_missing_question_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"amber/data/annotations.json is missing.*Drive"):
        AMBER().samples(tmp_path)
    with pytest.raises(FoveateError, match=r"cannot be read from the hub: give --data-root"):
        AMBER().samples()
    with pytest.raises(FoveateError, match="at least one split"):
        replace(AMBER(), splits=())
