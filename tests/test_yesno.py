"""What published scorers make of odd answers."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan

import pytest

from foveate.benchmarks.mme import MME
from foveate.evaluation import yesno
from foveate.evaluation.yesno import Counts
from tests import goldens

COLUMNS: dict[str, Callable[[str], str | None]] = {
    "amber_official": yesno.exact,
    "pope_official": yesno.pope,
    "rbench_official": yesno.pope,
    "mme_official": MME().parse,
    "lmms_eval_pope": yesno.lmms,
    "lmms_eval_mme": yesno.lmms_mme,
    "lmms_eval_amber_disc": yesno.lmms_contains,
    "vlmevalkit_yorn": yesno.vlmevalkit,
}


@pytest.mark.parametrize("column", COLUMNS)
@goldens.needed
def test_every_parser_reads_the_80_odd_answers_like_its_scorer(column: str) -> None:
    rows = goldens.read("parse_table.json")["rows"]
    assert len(rows) == 80
    for row in rows:
        expected = row[column].lower()
        ours = COLUMNS[column](row["answer"])
        assert ours == (expected if expected in ("yes", "no") else None), row["answer"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        (" no.", "no"),
        ("**No**, there is none", "no"),
        ('"Yes', "yes"),
        ("Yes, but no dog", "yes"),
        ("Answer: NO", "no"),
        ("There is no dog. Yes, a cat.", "no"),
        ("it is yes or no", None),
        ("I know", None),
        ("Not sure", None),
        ("A cat. No dog.", None),
        ("no, no and no", "no"),
        ("", None),
    ],
)
def test_the_first_word_converter(answer: str, said: str | None) -> None:
    assert yesno.first_word(answer) == said


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("It isn't there", "no"),
        ("NO", "no"),
        ("A cat. Not a dog", "yes"),
        ("A cat. It is not", "no"),
        ("", "yes"),
    ],
)
def test_the_variant_of_opera(answer: str, said: str) -> None:
    assert yesno.opera(answer) == said


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes", "yes"), ("No", "no"), ("NO", "yes"), ("not sure", "no"), ("", "yes"), ("YES", "yes")],
)
def test_the_variant_of_vicrop(answer: str, said: str) -> None:
    assert yesno.vicrop(answer) == said


def test_vlmevalkit_drops_32_full_stops_and_keeps_those_before_digits() -> None:
    assert yesno.vlmevalkit("." * 32 + "no") == "no"
    assert yesno.vlmevalkit("." * 33 + "no") is None
    assert yesno.vlmevalkit("no .5") == "no"
    assert yesno.vlmevalkit("no/yes") is None
    assert yesno.vlmevalkit("no/1,000") is None  # a number with a comma: marks vanish, not split
    assert yesno.vlmevalkit("no/1 000") == "no"


def test_counts_with_answers_that_cannot_be_read() -> None:
    pairs = [
        ("yes", "yes"),
        ("no", "yes"),
        (None, "yes"),
        ("yes", "no"),
        (None, "no"),
        ("no", "no"),
    ]
    counts = Counts.of(pairs, "yes")
    assert (counts.hits, counts.false, counts.rejected, counts.missed) == (1, 1, 1, 2)
    assert (counts.right, counts.total, counts.said) == (2, 6, 2)
    assert counts.percent()["recall"] == pytest.approx(100 / 3)
    assert Counts.of(pairs, "yes", only_read=True).percent()["recall"] == 50


def test_what_is_not_defined_is_nan_or_what_the_harness_says() -> None:
    counts = Counts.of([("no", "yes"), ("no", "no")], "yes")
    assert isnan(counts.percent()["precision"])
    assert isnan(counts.percent()["f1"])
    assert counts.percent(undefined=0.0)["f1"] == 0
    assert counts.percent()["accuracy"] == 50
