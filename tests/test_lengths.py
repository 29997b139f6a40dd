"""Captions at equal length, recall against CHAIR, and the sampled rows beside methods."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate import FoveateError
from foveate.benchmarks.chair import CHAIR
from foveate.benchmarks.pocket import PocketBench
from foveate.commands import main
from foveate.evaluation.benchmark import EvalRecord
from foveate.evaluation.lengths import (
    COARSE,
    FINE,
    Lengths,
    count_words,
    length_sentences,
    measure_lengths,
    shortened,
)
from foveate.evaluation.results import report
from foveate.evaluation.sampled import Drawing, Sampled
from foveate.insight.pages.report import html
from foveate.insight.plots.lengths import show_lengths
from foveate.vlm.answering import answer_all, complete
from tests import tiny

B = CHAIR(words="singular")
THINGS = ["dog", "cat", "car", "bird", "tree", "cup"]
FILLER = ["a", "the", "near", "big", "small", "and", "on", "of", "there", "is"]


def record(line: int, caption: str | None, there: list[str], method: str) -> EvalRecord:
    return {
        "benchmark": str(B),
        "split": "captions",
        "line": line,
        "id": str(line),
        "image": f"{line // 2}.jpg",
        "question": "Describe.",
        "prompt": "Describe.",
        "label": there,
        "meta": {"synonyms": THINGS},
        "method": method,
        "answer": caption,
    }


def captions(seed: int, count: int = 24) -> list[tuple[str, list[str]]]:
    """Captions whose inventions come late, and what is there."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        there = rng.sample(THINGS, 3)
        words: list[str] = []
        for place in range(rng.randrange(6, 14)):
            words += rng.choices(FILLER, k=rng.randrange(1, 4))
            words.append(rng.choice(THINGS if place > 3 else there))
        found.append((" ".join(words) + ".", there))
    return found


def measured(methods: dict[str, list[str | None]], there: list[list[str]], seed: int = 0) -> Any:
    told = {
        name: {
            ("captions", i): record(i, caption, there[i], name) for i, caption in enumerate(said)
        }
        for name, said in methods.items()
    }
    return measure_lengths(B, told, seed)


def by_hand(said: list[str], there: list[list[str]], limits: list[int]) -> tuple[float, ...]:
    """CHAIRs, CHAIRi and recall of captions cut to so many words each."""
    invents = mentions = invented = covered = total = 0
    for caption, objects, limit in zip(said, there, limits, strict=True):
        named = [w.strip(".") for w in caption.split()[:limit] if w.strip(".") in THINGS]
        wrong = [w for w in named if w not in objects]
        invents += bool(wrong)
        invented += len(wrong)
        mentions += len(named)
        covered += len(set(named) & set(objects))
        total += len(objects)
    return 100 * invents / len(said), 100 * invented / mentions, 100 * covered / total


def test_answers_are_cut_at_words() -> None:
    one = record(0, "  A dog,\n and a   cat. ", ["dog"], "vanilla")
    assert count_words(one) == 5
    assert [shortened(one, n)["answer"] for n in (0, 1, 2, 4)] == [
        "", "  A", "  A dog,", "  A dog,\n and a"
    ]  # fmt: skip
    assert shortened(one, 5) is one
    assert one["answer"] == "  A dog,\n and a   cat. "


def test_whoever_only_stops_earlier_has_vanillas_scores_at_equal_length() -> None:
    found = captions(0)
    plain, there = [caption for caption, _ in found], [objects for _, objects in found]
    rng = random.Random(1)
    less = [" ".join(c.split()[: rng.randrange(8, 20)]) for c in plain]
    lengths = measured({"vanilla": plain, "clvs": less}, there)
    [equal] = lengths.equal
    assert equal.own == equal.vanilla
    assert (equal.difference, equal.low, equal.high) == (0, 0, 0)
    whole = {curve.method: curve.whole for curve in lengths.curves}
    assert whole["clvs"].chair_s < whole["vanilla"].chair_s, "it looks better"
    [told] = length_sentences(lengths)
    assert "no gain is left that is sure: shorter captions may explain its lower CHAIR" in told


def test_all_captions_cut_to_one_length_lie_on_vanillas_curve() -> None:
    found = captions(2)
    plain, there = [caption for caption, _ in found], [objects for _, objects in found]
    lengths = measured({"vanilla": plain, "clvs": [" ".join(c.split()[:11]) for c in plain]}, there)
    [equal], own = lengths.equal, lengths.curves[1].whole
    assert equal.match.recall == own.recall
    assert equal.match.words <= 11
    assert equal.match.chair_i <= own.chair_i
    assert f"once cut to {equal.match.words} words" in next(iter(length_sentences(lengths)))


def test_whoever_invents_less_at_the_same_length_is_told_apart() -> None:
    found = captions(3, 40)
    plain, there = [caption for caption, _ in found], [objects for _, objects in found]
    truer = [
        " ".join(w if w.strip(".") not in THINGS or w.strip(".") in objects else "thing"
                 for w in caption.split())
        for caption, objects in found
    ]  # fmt: skip
    lengths = measured({"vanilla": plain, "clvs": truer}, there)
    [equal] = lengths.equal
    assert equal.own.chair_s == 0
    assert equal.difference == -equal.vanilla.chair_s
    assert equal.low <= equal.difference <= equal.high < 0
    assert "It invents less at equal length, too." in next(iter(length_sentences(lengths)))
    longer = measured({"vanilla": plain, "clvs": [f"{c} {' '.join(THINGS)}" for c in plain]}, there)
    assert longer.equal[0].difference == 0
    assert longer.equal[0].match is None
    assert "more than vanilla has at any length" in next(iter(length_sentences(longer)))


def test_every_number_is_that_of_counting_by_hand() -> None:
    one, other = captions(4), captions(5)
    there = [objects for _, objects in one]
    said = {"vanilla": [c for c, _ in one], "vcd": [c for c, _ in other]}
    lengths = measured(said, there)
    assert lengths.captions == 24
    assert [curve.method for curve in lengths.curves] == ["vanilla", "vcd"]
    for curve, most in zip(lengths.curves, (FINE, COARSE), strict=True):
        assert COARSE < len(curve.cuts) <= most + 1
        words = [cut.words for cut in curve.cuts[:-1]]
        assert words == sorted(set(words))
        assert curve.whole.words is None
        for cut in curve.cuts:
            captions_ = said[curve.method]
            limits = [cut.words or len(c.split()) for c in captions_]
            assert (cut.chair_s, cut.chair_i, cut.recall) == pytest.approx(
                by_hand(captions_, there, limits)
            )
            lengths_ = [min(len(c.split()), n) for c, n in zip(captions_, limits, strict=True)]
            assert cut.length == pytest.approx(sum(lengths_) / 24)
    [equal] = lengths.equal
    limits = [min(len(a.split()), len(b.split())) for a, b in zip(*said.values(), strict=True)]
    for cut, name in ((equal.own, "vcd"), (equal.vanilla, "vanilla")):
        want = by_hand(said[name], there, limits)
        assert (cut.chair_s, cut.chair_i, cut.recall) == pytest.approx(want)
    assert equal.difference == pytest.approx(equal.own.chair_s - equal.vanilla.chair_s)
    scores = B.score([record(i, c, there[i], "") for i, c in enumerate(said["vcd"])])
    whole = lengths.curves[1].whole
    assert (whole.chair_s, whole.chair_i, whole.recall) == pytest.approx(
        (scores["chair_s"], scores["chair_i"], scores["recall"])
    )


def test_only_captions_that_all_have_written_count() -> None:
    found = captions(6, 6)
    there = [objects for _, objects in found]
    plain: list[str | None] = [caption for caption, _ in found]
    lengths = measured({"vcd": [None, *plain[1:]], "vanilla": plain, "vaf": [None] * 6}, there)
    assert lengths.captions == 5
    assert [curve.method for curve in lengths.curves] == ["vanilla", "vcd"]
    assert measured({"vcd": plain}, there) is None
    assert measured({"vanilla": [None] * 6, "vcd": plain}, there) is None


def test_stored_objects_and_other_answers_cannot_be_cut() -> None:
    stored = record(0, "A dog.", ["dog"], "vanilla") | {"meta": {"named": ["dog"]}}
    assert B.mentions(stored) is None  # type: ignore[arg-type]
    yes_no = record(0, "Yes", ["dog"], "vanilla") | {"meta": {"category": "pairs"}}
    assert PocketBench().mentions(yes_no) is None  # type: ignore[arg-type]
    caption = record(0, "A cup and a car.", ["car", "boat"], "") | {
        "meta": {"category": "captions"}
    }
    assert PocketBench().mentions(caption) == (1, 2, 1, 2)


# -- the report ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = captions(7)
    methods = {
        "vanilla": [c for c, _ in found],
        "clvs": [" ".join(c.split()[:9]) for c, _ in found],
        "vanilla, temperature 1.5": [c for c, _ in captions(8)],
    }
    rows = [record(i, c, found[i][1], m) for m, said in methods.items() for i, c in enumerate(said)]
    settings = {"model": "pocket", "benchmarks": [str(B)], "methods": list(methods), "limit": None}
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(settings))
    (run / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_report_tells_draws_and_stores_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), "--no-images"])
    assert end.value.code == 0
    assert f"figure: {folder / 'recall-chair.png'}" in capsys.readouterr().out
    assert Image.open(folder / "recall-chair.png").size[0] > 1000
    page = (folder / "report.html").read_text()
    assert page.count('<img class="figure" src="data:image/png;base64,') == 1
    for text in (page, (folder / "report.md").read_text()):
        assert "At equal length (9.0 words)" in text
        assert "Recall against CHAIR, captions cut to so many words, n = 24" in text
        assert "vanilla, temperature 1.5 writes" in text
    told = (folder / "report.json").read_text()
    [verdict] = json.loads(told)["sections"][0]["verdicts"]
    assert verdict["lengths"]["captions"] == 24
    assert "figure" not in told


def test_without_matplotlib_the_numbers_are_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), "--no-images"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "Recall against CHAIR is not drawn: Drawing needs matplotlib" in said
    assert "At equal length" in (folder / "report.html").read_text()


def test_other_benchmarks_have_no_lengths(folder: Path) -> None:
    [section] = report([folder], folder, images=False)
    assert section.verdicts[0].lengths is not None
    text = (folder / "records.jsonl").read_text().replace('"synonyms"', '"named"')
    (folder / "records.jsonl").write_text(text)
    [section] = report([folder], folder, images=False)
    assert section.verdicts[0].lengths is None
    assert "equal length" not in html([section])


def test_the_figure_names_every_method(tmp_path: Path) -> None:
    import matplotlib as mpl

    found = captions(9)
    there = [objects for _, objects in found]
    said = {"vanilla": [c for c, _ in found], "clvs": [c for c, _ in captions(10)]}
    lengths: Lengths = measured(said, there)
    with mpl.rc_context({"svg.fonttype": "none"}):
        words = show_lengths(lengths, "CHAIR, pocket", tmp_path / "curve.svg").read_text()
    for text in (">clvs<", ">vanilla<", ">vanilla, cut<", "recall (%)", "CHAIRi (%)", "n = 24"):
        assert text in words


# -- sampled rows ----------------------------------------------------------------------------------


def test_answers_are_drawn_at_the_temperature_and_by_the_questions() -> None:
    vlm = tiny.vlm()
    image = Image.new("RGB", (16, 16), "red")
    chats = [vlm.chat([image], f"w{40 + i % 3}", None) for i in range(8)]

    def said(method: Sampled, start: str = "q") -> list[tuple[str, ...]]:
        torch.manual_seed(len(start))
        drawing = Drawing(method, [f"{start}{i}" for i in range(8)])
        found = answer_all(vlm, chats, (), 4, decoding=drawing)
        return [answer.tokens for answer in complete(found)]

    first = said(Sampled(temperature=1.0))
    assert said(Sampled(temperature=1.0)) == first, "whatever the generator was before"
    assert said(Sampled(temperature=1.0, seed=1)) != first
    assert said(Sampled(temperature=1.0), "other") != first
    greedy = [answer.tokens for answer in complete(answer_all(vlm, chats, (), 4))]
    assert said(Sampled(temperature=0.001)) == greedy
    assert first != greedy


def test_draws_follow_the_softmax() -> None:
    vlm, image = tiny.vlm(), Image.new("RGB", (16, 16), "red")
    chat = vlm.chat([image], "red", None)
    with torch.no_grad():
        logits = vlm.model(**vlm.inputs([chat])).logits[0, -1]
    wanted = (logits / 2).softmax(0)
    chats = [vlm.chat([image], "red", None) for _ in range(400)]
    drawing = Drawing(Sampled(temperature=2.0), [str(i) for i in range(400)])
    answers = complete(answer_all(vlm, chats, (), 1, decoding=drawing))
    drawn = torch.zeros(len(wanted))
    for answer in answers:
        for token in vlm.tokenizer.convert_tokens_to_ids(list(answer.tokens)):
            drawn[token] += 1
    best = wanted.topk(8)
    assert (drawn[best.indices] - 400 * best.values).abs().max() < 4 * (400 * 0.25) ** 0.5
    assert best.values.sum() < 0.9
    assert (drawn > 0).sum() > 8, "the whole distribution, not the top of it"


SMALL = "pocket(categories=('captions',), questions=2, max_new_tokens=12)"


def test_eval_writes_sampled_rows_that_a_killed_run_ends_alike(tmp_path: Path, run: Any) -> None:
    def rows(out: Path) -> dict[tuple[str, str, int], str]:
        found = map(json.loads, (out / "records.jsonl").read_text().splitlines())
        return {(r["method"], r["split"], r["line"]): r["answer"] for r in found}

    options = ["--method", "vanilla", "--temperature", "0.5", "--temperature", "2", "--device",
               "cpu"]  # fmt: skip
    out = tmp_path / "whole"
    code, _, _ = run("eval", SMALL, "--out", out, *options)
    assert code == 0
    whole = rows(out)
    names = ["vanilla", "vanilla, temperature 0.5", "vanilla, temperature 2"]
    assert sorted({name for name, *_ in whole}) == names
    by_name = [[a for (m, *_), a in sorted(whole.items()) if m == name] for name in names]
    assert by_name[0] != by_name[2]
    kept = (out / "records.jsonl").read_text().splitlines()[:5]
    (out / "records.jsonl").write_text("\n".join(kept) + "\n")
    assert run("eval", SMALL, "--out", out, *options)[0] == 0
    assert rows(out) == whole
    code, _, said = run("eval", SMALL, "--out", tmp_path / "x", "--temperature", "0")
    assert (code, "temperature must lie above 0" in said) == (2, True)
    code, _, said = run("eval", SMALL, "--out", out / "y", *options, "--temperature", "2")
    assert (code, "vanilla, temperature 2 is given twice" in said) == (2, True)


def test_a_temperature_must_make_sense() -> None:
    for value in (0.0, -1.0, 11.0):
        with pytest.raises(FoveateError, match="the temperature must lie above 0 and up to 10"):
            Sampled(temperature=value)
    assert str(Sampled(temperature=1.0)) == "vanilla, temperature 1"
