"""The verdict: tests of significance, merged runs, and the three files that tell of them."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate import FoveateError
from foveate.base.stats import holm, interval, mcnemar, significant
from foveate.commands import main
from foveate.core.method import methods
from foveate.evaluation import published as papers
from foveate.evaluation.benchmark import parse
from foveate.evaluation.results import Section
from foveate.evaluation.results import report as write_report
from foveate.evaluation.verdict import Verdict
from foveate.evaluation.words import longest_repeat, repeated_pairs, words
from foveate.insight.pages.report import html

# -- significance ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (0, 6, 2 / 64),
        (8, 1, 2 * (1 + 9) / 512),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (5, 5, 1),
        (2, 1, 1),
    ],
)
def test_mcnemar_by_hand(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p)


def test_mcnemar_of_many_answers_is_near_the_normal_limit() -> None:
    gained, lost = 5200, 4900
    z = (gained - lost - 1) / math.sqrt(gained + lost)
    assert mcnemar(gained, lost) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    assert 0 <= mcnemar(9000, 10) < 1e-300


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []


def test_without_statsmodels_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for test in (lambda: mcnemar(2, 1), lambda: holm([0.5])):
        with pytest.raises(FoveateError, match=r"pip install 'foveate\[eval\]'`\.$"):
            test()


def simulated(rng: np.random.Generator, images: int = 80) -> tuple[list[float], list[int]]:
    """Changes -1, 0 or 1 with mean 0.1; the 6 questions of an image mostly change together."""
    chances = [0.15, 0.6, 0.25]
    own = rng.choice([-1, 0, 1], p=chances, size=(images, 6))
    common = rng.choice([-1, 0, 1], p=chances, size=(images, 1))
    together = rng.random((images, 6)) < 0.8
    clusters = np.repeat(np.arange(images), 6)
    return np.where(together, common, own).ravel().tolist(), clusters.tolist()


def test_the_interval_covers_the_truth_and_needs_clusters_for_it() -> None:
    rng = np.random.default_rng(0)
    covered = alone = 0
    for i in range(300):
        changes, clusters = simulated(rng)
        low, high = interval(changes, clusters, seed=i, resamples=1000) or (1, 0)
        covered += low <= 0.1 <= high
        low, high = interval(changes, range(len(changes)), seed=i, resamples=1000) or (1, 0)
        alone += low <= 0.1 <= high
    assert 0.91 <= covered / 300 <= 0.985
    assert alone / 300 < 0.8


def test_the_interval_is_that_of_the_plain_loop_over_images() -> None:
    rng = np.random.default_rng(1)
    clusters = rng.integers(0, 40, 300).tolist()
    changes = rng.choice([-1, -0.3, 0, 0, 1], size=300).tolist()
    groups = [[c for c, k in zip(changes, clusters, strict=True) if k == g] for g in set(clusters)]
    means = []
    for _ in range(4000):
        drawn = [groups[i] for i in rng.integers(0, len(groups), len(groups))]
        means.append(np.concatenate(drawn).mean())
    found = interval(changes, [f"image {c}" for c in clusters], seed=3)
    assert found == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert found == interval(changes, clusters, seed=3)
    assert found != interval(changes, clusters, seed=4)


def test_one_image_has_no_interval_and_significance_wants_both_tests() -> None:
    assert interval([1, 0, 1], ["a", "a", "a"]) is None
    assert not significant(0.001, None)
    assert not significant(0.001, (-0.1, 0.5))
    assert not significant(0.06, (0.1, 0.5))
    assert significant(0.04, (0.1, 0.5))
    assert significant(0.04, (-0.5, -0.1))


# -- repetition ------------------------------------------------------------------------------------


def test_words_and_repetition_by_hand() -> None:
    said = words("A red-hot cup, a RED-HOT cup; it's a cup.")
    assert said == ["a", "red-hot", "cup", "a", "red-hot", "cup", "it's", "a", "cup"]
    assert repeated_pairs(said) == pytest.approx(2 / 8)
    assert longest_repeat(said) == 3
    assert longest_repeat(["the", "cat", "the", "cat", "the", "cat"]) == 4
    assert longest_repeat(["one", "two", "three"]) == longest_repeat([]) == 0
    assert repeated_pairs(["word"]) == repeated_pairs([]) == 0


def test_the_longest_repeat_is_that_of_all_pairs_of_places() -> None:
    rng = random.Random(0)
    for _ in range(50):
        said = rng.choices("abcd", k=rng.randrange(2, 40))
        longest = 0
        for i in range(len(said)):
            for j in range(i + 1, len(said)):
                length = 0
                while j + length < len(said) and said[i + length] == said[j + length]:
                    length += 1
                longest = max(longest, length)
        assert longest_repeat(said) == longest


# -- a run made by hand ----------------------------------------------------------------------------

POPE = "pope(splits=('popular',))"
COLORS = {"0.png": (250, 0, 0), "1.png": (0, 0, 250), "2.png": (0, 250, 0)}
LABELS = ("yes", "no", "yes", "no", "yes", "no")
ANSWERS = {  # right: 4, 5 and 2 of 6
    "vanilla": ["Yes", "Yes", "No", "No", "Yes", "No"],
    "clvs": ["Yes", "No", "Yes", "No", "Yes", "Yes"],
    "vcd": ["No", "Yes", "No", "No", "No", "No"],
}


def record(line: int, method: str, answer: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "benchmark": POPE,
        "split": "popular",
        "line": line,
        "id": str(line + 1),
        "image": f"{line // 2}.png",
        "question": f"Is there a thing {line}?",
        "prompt": f"Is there a thing {line}?",
        "label": LABELS[line % 6],
        "meta": {},
        "method": method,
        "answer": answer,
        "error": None if answer is not None else "OSError: broken",
        "ms": 10.0 * (line + 1),
    } | changes


def rows(given: dict[str, list[str]] = ANSWERS) -> list[dict[str, Any]]:
    return [record(i, m, answer) for m, said in given.items() for i, answer in enumerate(said)]


def run(folder: Path, records: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    configuration = {
        "benchmarks": list(dict.fromkeys(r["benchmark"] for r in records)),
        "model": "pocket",
        "dtype": "float32",
        "methods": list(dict.fromkeys(r["method"] for r in records)),
        "root": None,
        "limit": None,
        "shard": [0, 1],
        "seed": 0,
    } | settings
    (folder / "run.json").write_text(json.dumps(configuration))
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    results = {"environment": {"foveate": "1.2"}, "benchmarks": {POPE: {"problems": {"gaps": 2}}}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The user's data: six questions about three plain images."""
    home = tmp_path / "data"
    (home / "pope").mkdir(parents=True)
    (home / "coco" / "val2014").mkdir(parents=True)
    lines = [
        {"question_id": i + 1, "image": r["image"], "text": r["question"], "label": r["label"]}
        for i, r in enumerate(rows({"vanilla": ANSWERS["vanilla"]}))
    ]
    (home / "pope" / "coco_pope_popular.json").write_text("\n".join(map(json.dumps, lines)))
    for name, color in COLORS.items():
        Image.new("RGB", (400, 300), color).save(home / "coco" / "val2014" / name)
    return home


def report(folders: list[Path], out: Path, **options: Any) -> list[Section]:
    """The report with its page, as the command writes them."""
    sections = write_report(folders, out, **options)
    (out / "report.html").write_text(html(sections))
    return sections


def only(sections: list[Section]) -> Verdict:
    [section] = sections
    [verdict] = section.verdicts
    return verdict


def by_method(verdict: Verdict) -> dict[str, Any]:
    return {result.method: result for result in verdict.results}


def test_the_report_of_six_questions(tmp_path: Path, root: Path) -> None:
    out = tmp_path / "out"
    verdict = only(report([run(tmp_path / "run", rows(), root=str(root))], out))
    assert (verdict.questions, verdict.images) == (6, 3)
    found = by_method(verdict)
    assert list(found) == ["vanilla", "clvs", "vcd"]
    assert [r.answered for r in verdict.results] == [6, 6, 6]
    assert found["vanilla"].test is None
    assert [found[m].yes_ratio for m in found] == pytest.approx([50, 200 / 3, 100 / 6])
    assert found["clvs"].label_yes_ratio == 50
    assert found["clvs"].ms == 35

    clvs, vcd = found["clvs"].test, found["vcd"].test
    assert (clvs.questions, clvs.images, clvs.gained, clvs.lost) == (6, 3, 2, 1)
    assert (clvs.vanilla, clvs.method) == pytest.approx((400 / 6, 500 / 6))
    assert clvs.difference == pytest.approx(100 / 6)
    assert (clvs.low, clvs.high) == (-50, 50)  # images change by 1/2, 1/2 and -1/2
    assert (vcd.gained, vcd.lost, vcd.p) == (0, 2, 0.5)
    assert (clvs.p, clvs.corrected, vcd.corrected) == (1, 1, 1)
    assert clvs.verdict == vcd.verdict == "not significant"
    assert found["clvs"].splits == []

    scores = parse(POPE)[0].score([r for r in rows() if r["method"] == "clvs"])
    assert found["clvs"].scores == scores
    assert verdict.heads[:3] == ["Split", "Method", "Accuracy"]
    assert [row[:2] for row in verdict.rows[:3]] == [["Popular", m] for m in found]
    assert verdict.rows[1][2] == scores["popular/accuracy"]
    assert verdict.published == []

    told = json.loads((out / "report.json").read_text())
    assert told["sections"][0]["verdicts"][0]["results"][1]["test"]["gained"] == 2
    assert told["sections"][0]["environments"] == [{"foveate": "1.2"}]
    text = (out / "report.md").read_text()
    assert "+16.67 points" in text
    assert "gained 2, lost 1; n = 6 questions on 3 images" in text


def test_examples_show_the_answers_that_changed_and_their_pictures(
    tmp_path: Path, root: Path
) -> None:
    folder = run(tmp_path / "run", rows(), root=str(root))
    clvs = by_method(only(report([folder], tmp_path / "out")))["clvs"]
    assert [(e.line, e.label, e.vanilla, e.answer) for e in clvs.gained] == [
        (1, "no", "Yes", "No"),
        (2, "yes", "No", "Yes"),
    ]
    assert [(e.line, e.image) for e in clvs.lost] == [(5, "2.png")]
    for example in (*clvs.gained, *clvs.lost):
        encoded = example.thumbnail.removeprefix("data:image/jpeg;base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert max(picture.size) == 160
        middle = np.asarray(picture.convert("RGB"))[60, 80].astype(int)
        assert np.abs(middle - COLORS[example.image]).max() < 12
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 5
    assert "thumbnail" not in (tmp_path / "out" / "report.json").read_text()


@pytest.mark.parametrize("why", ["not wanted", "no data", "other data", "broken picture"])
def test_without_the_data_there_are_no_pictures(tmp_path: Path, root: Path, why: str) -> None:
    if why == "other data":
        path = root / "pope" / "coco_pope_popular.json"
        path.write_text(path.read_text().replace("thing", "dog"))
    if why == "broken picture":
        for name in COLORS:
            (root / "coco" / "val2014" / name).write_bytes(b"no picture")
    place = tmp_path / "nowhere" if why == "no data" else root
    folder = run(tmp_path / "run", rows(), root=str(place))
    verdict = only(report([folder], tmp_path / "out", images=why != "not wanted"))
    examples = [e for r in verdict.results for e in (*r.gained, *r.lost)]
    assert len(examples) == 5
    assert all(e.thumbnail is None for e in examples)


def test_the_data_may_be_elsewhere_now(tmp_path: Path, root: Path) -> None:
    folder = run(tmp_path / "run", rows(), root=str(tmp_path / "gone"))
    verdict = only(report([folder], tmp_path / "out", root=root))
    assert by_method(verdict)["clvs"].gained[0].thumbnail


def test_many_examples_are_few_and_of_different_images(tmp_path: Path) -> None:
    told = [record(i, m, "Yes" if m == "clvs" else "No", label="yes") for i in range(60)
            for m in ("vanilla", "clvs")]  # fmt: skip
    verdict = only(report([run(tmp_path / "run", told)], tmp_path / "out", images=False))
    gained = by_method(verdict)["clvs"].gained
    assert [e.image for e in gained] == ["0.png", "7.png", "15.png", "22.png"]


def test_the_command_prints_the_verdicts(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", rows())
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), "--data-root", str(root)])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"pocket, POPE: {POPE}: clvs makes no significant difference: +16.67 points"
    )
    assert lines[-2] == f"report: {folder / 'report.html'}"
    assert (folder / "report.html").read_text().count("<img ") == 5
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), str(folder)])
    assert end.value.code == 2
    assert "say where to write" in capsys.readouterr().err


# -- verdicts --------------------------------------------------------------------------------------


def test_what_helps_and_what_hurts_is_said(tmp_path: Path) -> None:
    told = []
    for i in range(40):
        told.append(record(i, "vanilla", "Yes" if i % 2 else "No", label="yes"))
        told.append(record(i, "clvs", "Yes", label="yes"))
        told.append(record(i, "vcd", "No", label="yes"))
        told.append(record(i, "vaf", "Yes" if i % 2 else "No", label="yes"))
    verdict = only(report([run(tmp_path / "run", told)], tmp_path / "out", images=False))
    found = by_method(verdict)
    verdicts = {m: found[m].test.verdict for m in ("clvs", "vcd", "vaf")}
    assert verdicts == {"clvs": "better", "vcd": "worse", "vaf": "no score changed"}
    assert found["clvs"].test.p == 2 / 2**20
    assert found["clvs"].test.corrected == 6 / 2**20
    assert found["vaf"].test.corrected == 1
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "+50.00 points" in text
        assert "-50.00 points" in text


def test_splits_are_tested_by_themselves(tmp_path: Path) -> None:
    both = "pope(splits=('popular', 'random'))"
    told = []
    for split, answer in (("popular", "Yes"), ("random", "No")):
        for i in range(40):
            common = {"benchmark": both, "split": split, "label": "yes"}
            common["image"] = f"{i}.png"
            told.append(record(i, "vanilla", "Yes" if i % 2 else "No", **common))
            told.append(record(i, "clvs", answer, **common))
    verdict = only(report([run(tmp_path / "run", told)], tmp_path / "out", images=False))
    clvs = by_method(verdict)["clvs"]
    assert (clvs.test.difference, clvs.test.verdict) == (0, "not significant")
    assert clvs.test.images == 40
    assert [(t.what, t.difference, t.verdict) for t in clvs.splits] == [
        ("popular", 50, "better"),
        ("random", -50, "worse"),
    ]
    assert [t.corrected for t in clvs.splits] == [4 / 2**20] * 2


def test_captions_get_length_and_repetition(tmp_path: Path) -> None:
    said = {
        "vanilla": "A dog and a cat sit on the long table near a window.",
        "clvs": "A dog and a cat and a dog and a cat and a dog and a cat.",
    }
    told = [
        record(
            i, method, text, benchmark="chair(words='singular')", split="captions",
            label=["dog"], meta={"named": ["dog"] + ["cat"] * (method == "clvs")},
        )
        for method, text in said.items()
        for i in range(3)
    ]  # fmt: skip
    verdict = only(report([run(tmp_path / "run", told)], tmp_path / "out", images=False))
    vanilla, clvs = verdict.results
    assert (vanilla.captions.answers, vanilla.captions.words) == (3, 13)
    assert (vanilla.captions.repeated, vanilla.captions.longest) == (0, 1)
    assert clvs.captions.words == 17
    assert clvs.captions.repeated == pytest.approx(100 * 11 / 16)
    assert clvs.captions.longest == 11
    assert vanilla.yes_questions == 0
    assert math.isnan(vanilla.yes_ratio)
    assert clvs.test.difference == -100
    assert [e.label for e in clvs.lost] == ["dog", "dog"]


def test_what_cannot_be_scored_here_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    common: dict[str, Any] = {"benchmark": "chair", "label": ["dog"], "meta": {"synonyms": []}}
    told = [record(0, method, "A dog.", **common) for method in ("vanilla", "clvs")]
    verdict = only(report([run(tmp_path / "run", told)], tmp_path / "out", images=False))
    assert all(r.notes[0].startswith("Not scored: Words of captions") for r in verdict.results)
    assert verdict.results[1].test is None
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("Not scored") == 1


def test_without_vanilla_there_are_tables_only(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", [r for r in rows() if r["method"] != "vanilla"])
    verdict = only(report([folder], tmp_path / "out"))
    assert verdict.notes == ["In the data: 2 gaps.", "No vanilla answers are here to compare with."]
    assert all(r.test is None and r.scores for r in verdict.results)


# -- merging ---------------------------------------------------------------------------------------


def plain(out: Path) -> dict[str, Any]:
    """report.json without the folders' names."""
    told = json.loads((out / "report.json").read_text())
    for section in told["sections"]:
        del section["folders"]
    return told


def test_shards_are_one_run(tmp_path: Path, root: Path) -> None:
    whole = run(tmp_path / "whole", rows(), root=str(root))
    for i in range(2):
        told = [r for r in rows() if r["line"] // 2 % 2 == i]
        run(tmp_path / "split" / f"shard-{i}-of-2", told, root=str(root), shard=[i, 2])
    report([whole], tmp_path / "a")
    report([tmp_path / "split"], tmp_path / "b")
    shards = sorted((tmp_path / "split").iterdir(), reverse=True)
    report([*shards, shards[0]], tmp_path / "c")
    assert plain(tmp_path / "a") == plain(tmp_path / "b") == plain(tmp_path / "c")
    [section] = report(shards[:1], tmp_path / "d")
    assert section.notes == ["Only 1 of 2 shards are here: questions are missing."]


def test_methods_of_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = run(tmp_path / "1", [r for r in rows() if r["method"] == "clvs"], limit=6)
    second = run(tmp_path / "2", [r for r in rows() if r["method"] != "clvs"])
    [section] = report([first, second], tmp_path / "out")
    assert [r.method for r in section.verdicts[0].results] == ["vanilla", "clvs", "vcd"]
    assert section.notes == ["Only the first 6 questions of every split were asked."]


@pytest.mark.parametrize("setting", [{"model": "other"}, {"seed": 1}, {"dtype": "bfloat16"}])
def test_other_models_and_settings_are_sections_of_their_own(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    first = run(tmp_path / "1", rows())
    second = run(tmp_path / "2", rows({"vanilla": ["Yes"] * 6}), **setting)
    sections = report([first, second], tmp_path / "out")
    assert [len(s.verdicts[0].results) for s in sections] == [3, 1]


@pytest.mark.parametrize("what", ["answer", "label", "question", "prompt", "image"])
def test_runs_that_contradict_each_other_are_refused(tmp_path: Path, what: str) -> None:
    changed = record(3, "vanilla", "No") | {what: "Yes"}
    first, second = run(tmp_path / "1", rows()), run(tmp_path / "2", [changed])
    with pytest.raises(FoveateError, match=rf"contradict each other.* {what} .*popular, line 3"):
        report([first, second], tmp_path / "out")


def test_failed_and_missing_questions_are_counted(tmp_path: Path) -> None:
    told = [r for r in rows() if (r["line"], r["method"]) not in [(0, "clvs"), (1, "clvs")]]
    told.append(record(1, "clvs", None))
    first = run(tmp_path / "1", told)
    clvs = by_method(only(report([first], tmp_path / "out")))["clvs"]
    assert (clvs.answered, clvs.failed, clvs.missing) == (4, 1, 1)
    assert (clvs.test.questions, clvs.test.images) == (4, 2)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "clvs: 1 questions failed (OSError: broken), 1 are missing." in text
    second = run(tmp_path / "2", [record(1, "clvs", "No")])
    for both in ([first, second], [second, first]):  # what was answered elsewhere has not failed
        clvs = by_method(only(report(both, tmp_path / "out")))["clvs"]
        assert (clvs.answered, clvs.failed, clvs.missing) == (5, 0, 1)


def test_a_half_written_last_line_is_left_out_and_not_touched(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", rows())
    path = folder / "records.jsonl"
    report([folder], tmp_path / "a")
    path.write_bytes(path.read_bytes() + b'{"benchmark": "po')
    before = path.read_bytes()
    report([folder], tmp_path / "b")
    assert plain(tmp_path / "a") == plain(tmp_path / "b")
    assert path.read_bytes() == before
    (folder / "results.json").unlink()
    [section] = report([folder], tmp_path / "out")
    assert section.notes == [f"The run in {folder} has not ended: questions may be missing."]


def test_the_last_record_of_a_key_counts(tmp_path: Path) -> None:
    told = [record(1, "clvs", None), *rows()]
    clvs = by_method(only(report([run(tmp_path / "run", told)], tmp_path / "out")))["clvs"]
    assert (clvs.answered, clvs.failed) == (6, 0)


@pytest.mark.parametrize("line", [b"{", b"[]", b"7", b'{"benchmark": "pope"}', b"\xff\xfe"])
def test_a_damaged_line_is_one_sentence(tmp_path: Path, line: bytes) -> None:
    folder = run(tmp_path / "run", rows())
    path = folder / "records.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(FoveateError, match=r"Line 1 of .*records.jsonl is damaged .*: delete"):
        report([folder], tmp_path / "out")


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="is no folder of a run"):
        report([tmp_path], tmp_path / "out")
    with pytest.raises(FoveateError, match="Name at least one folder"):
        report([], tmp_path / "out")
    empty = run(tmp_path / "empty", [])
    with pytest.raises(FoveateError, match="There is no record in"):
        report([empty], tmp_path / "out")
    (empty / "records.jsonl").unlink()
    with pytest.raises(FoveateError, match="There is no record in"):
        report([empty], tmp_path / "out")
    (empty / "run.json").write_text("[]")
    with pytest.raises(FoveateError, match="is no folder of a run"):
        report([empty], tmp_path / "out")
    (empty / "run.json").write_text("{}")
    with pytest.raises(FoveateError, match="names no model"):
        report([empty], tmp_path / "out")
    folder = run(tmp_path / "run", rows())
    with pytest.raises(FoveateError, match="cannot be made a folder"):
        report([folder], folder / "run.json")
    unknown = run(tmp_path / "unknown", [record(0, "vanilla", "Yes", benchmark="popes")])
    with pytest.raises(FoveateError, match="no benchmark 'popes'"):
        report([unknown], tmp_path / "out")


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags close in order, and collects what matters."""

    VOID = ("meta", "img", "line", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path: Path, root: Path) -> None:
    report([run(tmp_path / "run", rows(), root=str(root))], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "iframe", "object"}
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[\w+/=]+", "", text))
    for tag, name, value in page.attributes:
        if name == "src":
            assert value.startswith("data:image/jpeg;base64,")
        if name == "href":
            assert value.startswith("#")
            assert (value[1:]) in [v for _, n, v in page.attributes if n == "id"]
        if name.startswith("on"):
            raise AssertionError(f"{tag} has a script in {name}")
    assert ("html", "lang", "en") in page.attributes
    assert ("meta", "name", "viewport") in page.attributes
    assert all(
        ("div", "tabindex", "0") in page.attributes[i - 3 : i + 3]
        for i, entry in enumerate(page.attributes)
        if entry == ("div", "class", "scroll")
    )
    images = sum(tag == "img" and name == "src" for tag, name, _ in page.attributes)
    assert images == sum(tag == "img" and name == "alt" for tag, name, _ in page.attributes) == 5


def test_answers_are_text_and_not_markup(tmp_path: Path) -> None:
    evil = 'Yes | <script>alert("1")</script>\n# *not*'
    told = [record(0, "vanilla", "No", question=evil), record(0, "clvs", evil, question=evil)]
    report([run(tmp_path / "run", told)], tmp_path / "out", images=False)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.open == []
    assert evil in page.words
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<script>" not in re.sub(r"\\.", "", text)
    table = [line for line in text.splitlines() if "alert" in line]
    assert len(table) == 1
    assert len(re.findall(r"(?<!\\)\|", table[0])) == 7


CLVS, CARVE = "CLVS paper, arXiv 2509.12897", "CARVE paper, arXiv 2509.06461"

# -- the papers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llava-hf/llava-1.5-7b-hf", "LLaVA-1.5-7B"),
        ("liuhaotian/llava-v1.5-13b", "LLaVA-1.5-13B"),
        ("/data/models/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B"),
        ("/hub/models--llava-hf--llama3-llava-next-8b-hf/snapshots/ab12", "LLaVA-NeXT-8B"),
        ("C:\\models\\llava-1.5-7b-hf", "LLaVA-1.5-7B"),
        ("me/llava-1.5-7b-hf-tuned", None),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", None),
        ("pocket", None),
    ],
)
def test_models_are_known_by_the_last_part_of_their_names(name: str, model: str | None) -> None:
    assert papers.model_of(name) == model


def test_papers_stand_beside_ours_where_model_and_questions_match(tmp_path: Path) -> None:
    settings = {"model": "llava-hf/llava-1.5-7b-hf"}
    told = rows({"vanilla": ANSWERS["vanilla"], "clvs(smoothing=0.7)": ANSWERS["clvs"]})
    verdict = only(report([run(tmp_path / "run", told, **settings)], tmp_path / "out"))
    found = {(b.method, b.score): b for b in verdict.published if b.source == CLVS}
    assert {score for _, score in found} == {
        "popular/accuracy", "popular/recall", "popular/f1"
    }  # fmt: skip
    ours = found["clvs(smoothing=0.7)", "popular/accuracy"]
    assert ours.paper == 84.1
    assert ours.ours == pytest.approx(500 / 6)
    assert ours.difference == pytest.approx(500 / 6 - 84.1)
    assert ours.gain == pytest.approx(84.1 - 85.0)
    assert ours.our_gain == pytest.approx(100 / 6)
    assert ours.fewer == 6
    assert found["vanilla", "popular/f1"].gain is None
    assert "6 of its 9000" in (tmp_path / "out" / "report.md").read_text()

    moved = [r | {"benchmark": "pope(source='gqa', splits=('popular',))"} for r in told]
    verdict = only(report([run(tmp_path / "gqa", moved, **settings)], tmp_path / "out"))
    assert verdict.published == []


def one_of_each(name: str) -> dict[str, float]:
    """Scores of a benchmark of which every part was answered rightly."""
    common = {"id": "1", "image": None, "answer": "Yes", "label": "yes"}
    metas: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "amber": [("s", {"kind": kind}) for kind in ("existence", "state", "number", "action")]
        + [("s", {"kind": "relation"})],
        "pope": [(split, {}) for split in ("random", "popular", "adversarial")],
        "rbench": [("image", {"subsets": {"1": 1}, "last_label": "yes", "kind": ""})],
        "mme": [(t, {}) for t in ("existence", "count", "position", "color", "OCR")],
        "aokvqa": [("direct", {})],
        "vstar": [("direct_attributes", {"options": ["(A) red", "(B) blue"]})],
        "textvqa": [("val", {})],
    }
    given = [
        common | {"split": split, "line": i, "meta": meta}
        for i, (split, meta) in enumerate(metas[name])
    ]
    return parse(name)[0].score(given)


@pytest.mark.parametrize("name", sorted({row.benchmark for row in papers.ROWS}))
def test_every_published_number_has_a_score_of_ours(name: str) -> None:
    scores = one_of_each(name)
    own = [row for row in papers.ROWS if row.benchmark == name]
    for row in own:
        assert row.values.keys() <= scores.keys()
        assert row.model in papers.MODELS
        assert row.source in papers.PROTOCOLS
        assert all(0 <= value <= 200 for value in row.values.values())


def test_the_rows_are_those_of_the_papers() -> None:
    found = {(r.model, r.benchmark, r.method, r.variant, r.source): r.values for r in papers.ROWS}
    assert len(found) == len(papers.ROWS)
    seven = ("LLaVA-1.5-7B", "amber")
    assert found[*seven, "clvs", "", CLVS]["all/f1"] == 78.1
    assert found[*seven, "clvs", "", CLVS]["existence/accuracy"] == 77.6
    assert found[*seven, "vaf", "", CLVS] == {"all/accuracy": 68.7, "all/f1": 70.9}
    next_ = found["LLaVA-NeXT-8B", "pope", "clvs", "", CLVS]
    assert (next_["popular/accuracy"], next_["adversarial/f1"]) == (86.1, 82.2)
    carve = ("LLaVA-1.5-13B", "carve", "t_end", CARVE)
    key = "average/accuracy"
    assert found["LLaVA-1.5-13B", "pope", *carve[1:]][key] == 90.7
    assert found["LLaVA-1.5-13B", "vstar", *carve[1:]]["overall/accuracy"] == 74.3
    assert found["Qwen2.5-VL-3B", "aokvqa", "vanilla", "", CARVE]["direct/accuracy"] == 73
    mme = found["LLaVA-1.5-13B", "mme", "clvs", "", CLVS]
    assert sum(mme.values()) == pytest.approx(795.8)
    crops = {"carve", "vicrop"}  # look-again methods
    assert {row.method for row in papers.ROWS} - crops <= {"vanilla", *methods()}
