"""Every benchmark's score against the slow restatement of its rule, on our own question files."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.benchmarks import amber
from foveate.benchmarks.amber import AMBERCaptions
from foveate.benchmarks.chair import PAIRS
from foveate.evaluation import yesno
from foveate.evaluation.benchmark import Benchmark, Sample, benchmarks, parse
from foveate.evaluation.vqa import CONTRACTIONS, letter, nearest, normalise, punctuation
from tests import goldens
from tests.references.scorers import amber_captions, chair
from tests.references.scorers import answers as slow

IMAGES = (
    "amber/images/AMBER_1.jpg",
    "coco/val2014/COCO_val2014_000000000101.jpg",
    "coco/val2014/COCO_val2014_000000000301.jpg",
    "coco/val2017/000000000201.jpg",
    "gqa/images/901.jpg",
    "hallusion_bench/VD/illusion/0_0.png",
    "mme/MME_Benchmark_release_version/existence/existence_1.jpg",
    "rbench/images/0000000000000000.jpg",
    "textvqa/train_images/000000000000abc0.jpg",
    "vstar_bench/direct_attributes/own_0.jpg",
)
CASES = [
    *("amber(parser=exact)", "amber(parser=lmms)", "amber(parser=vlmevalkit)"),
    *("pope", "pope(parser=lmms)", "pope(parser=vlmevalkit)", "pope(parser=opera)"),
    *("pope(parser=vicrop)", "pope(source=gqa)", "pope(source=aokvqa)", "pope(version=e3e3926)"),
    *("rbench", "rbench(parser=lmms)", "rbench(parser=vlmevalkit)"),
    *("mme", "mme(parser=lmms)", "mme(parser=vlmevalkit)"),
    *("aokvqa(parser=official)", "aokvqa", "aokvqa(accuracy=vqa, difficult=True)"),
    *("aokvqa(accuracy=vicrop)", "textvqa", "textvqa(accuracy=vicrop)"),
    *("vstar", "vstar(parser=vicrop)", "chair(words=singular)"),
    *("hallusionbench(parser=vlmevalkit)", "hallusionbench(parser=contains, figures=only)"),
]
_YES_NO = """Yes|No|yes|no|YES|NO|Yes.|No.|No, it is not.|Yes, but no owl|Not sure|I know|Nope|No!
no?|"No"|**No**|**Yes**|yes/no|No\tlight|I do not think so. Yes|isn't|It isn't there|nothing
A kayak. No.|eyes|y|N|n.|not|None|yes yes|No,no|Answer: no|yesno|no 1,000|no/1,000|no .5|no - no
No | No"""
YES_NO = [*_YES_NO.replace("\n", "|").split("|"), "Yes\nno", "No\n"]
LETTERS = """A|b|(C)|D.|The answer is C|Answer: B|option d]|I choose B|Because|blue|It is (B) or (C)
Answer is A|answer  is  b|choice IS: c|zebra|none of them|Is it c?|answers B|my option isA|on D side
the choice:D|E""".replace("\n", "|").split("|")
PIECES = [*"abcdnyABCD .,;:/-_'\"?!()\n\t1234", "yes", "no", "No", "not", "n't"]
PIECES += [" answer ", "is ", "the ", "dont ", "ten "]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return goldens.data_root(tmp_path_factory.mktemp("data"), *IMAGES, source=goldens.QUESTIONS)


def answer(benchmark: Benchmark, sample: Sample, rng: random.Random) -> str:
    """A right answer, a likely one, or an odd one."""
    kind, label = benchmark.name, sample.label
    if kind == "chair":
        words = [*benchmark_words(), "a", "the", "of", "photo", "toilet", "seat", ",", ";"]
        return " ".join(rng.choices(words, k=rng.randrange(1, 20))) + "."
    if kind in ("aokvqa", "textvqa"):
        options = sample.meta.get("choices", label)
        likely = rng.choice(options)
        odd = [likely.upper(), f" {likely}.", f"The {likely}", f"{likely}!", *LETTERS]
        return rng.choice([likely, likely, rng.choice(odd)])
    if kind == "vstar":
        shown = sample.meta["options"]
        return rng.choice([label, rng.choice(shown), rng.choice(shown)[4:], rng.choice(LETTERS)])
    return rng.choice([label.capitalize(), label.capitalize(), rng.choice(YES_NO)])


def benchmark_words() -> list[str]:
    text = (goldens.QUESTIONS / "chair" / "synonyms.txt").read_text()
    return [*text.replace("\n", " ").replace(",", " ").split(), *chair.SINGULAR, *chair.PAIRS]


@pytest.mark.parametrize("text", CASES)
def test_scores_equal_the_slow_restatement(text: str, root: Path) -> None:
    (benchmark,) = parse(text)
    reference = importlib.import_module(f"tests.references.scorers.{benchmark.name}")
    samples = benchmark.samples(root)
    rng = random.Random(0)
    for turn in range(20):
        always = {0: "Yes", 1: "No"}.get(turn)
        answers = {(s.split, s.line): always or answer(benchmark, s, rng) for s in samples}
        given = goldens.records(samples, answers.values())
        rng.shuffle(given)
        expected = reference.score(root, answers, benchmark.parameters())
        assert benchmark.score(given) == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


def test_every_benchmark_but_our_own_is_restated() -> None:
    assert {parse(text)[0].name for text in CASES} == benchmarks().keys() - {
        "pocket",
        "amber_captions",  # below
    }


def first_letters(first: str, second: str) -> float:
    return 0.9 if first[0] == second[0] else 0.1


class Alike(AMBERCaptions):
    """Words with the same first letter are alike."""

    def similar(self, first: str, second: str) -> float:
        return first_letters(first, second)


@pytest.mark.parametrize(
    ("benchmark", "options"),
    [(AMBERCaptions(similarity="equal"), {}), (Alike(), {"similar": first_letters})],
)
def test_caption_scores_equal_the_slow_restatement(
    benchmark: AMBERCaptions, options: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions are nouns alone here: what finds them is nltk's."""
    monkeypatch.setattr(amber, "_nouns", lambda text: text.split())
    samples = benchmark.samples(root)
    words = [*samples[0].meta["vocabulary"], *["light", "shade", "tree", "Owl"]]
    for seed in range(50):
        rng = random.Random(seed)
        nouns = {("generative", s.line): rng.choices(words, k=rng.randrange(8)) for s in samples}
        given = goldens.records(samples, map(" ".join, nouns.values()))
        expected = amber_captions.score(root, nouns, {}, **options)
        assert benchmark.score(reversed(given)) == expected


READERS: dict[str, tuple[Callable[[str], Any], Callable[[str], Any]]] = {
    "pope": (yesno.pope, slow.pope),
    "opera": (yesno.opera, slow.opera),
    "vicrop": (yesno.vicrop, slow.vicrop),
    "lmms": (yesno.lmms, slow.lmms),
    "amber": (yesno.exact, slow.amber),
    "contains": (yesno.lmms_contains, slow.contains),
    "mme": (yesno.mme, slow.mme),
    "lmms_mme": (yesno.lmms_mme, slow.lmms_mme),
    "vlmevalkit": (yesno.vlmevalkit, slow.vlmevalkit),
    "marks": (punctuation, slow.without_marks),
    "normaliser": (normalise, slow.normalised),
    "letter": (letter, slow.letter),
    "nearest": (lambda a: nearest(a, LETTERS), lambda a: slow.nearest(a, LETTERS)),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_reads_odd_answers_like_its_restatement(name: str) -> None:
    ours, theirs = READERS[name]
    rng = random.Random(0)
    odd = ["".join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(1000)]
    listed = [*YES_NO, *LETTERS, "", "." * 40, ".5" + "." * 33 + "no", "eight owls"]
    assert {text: ours(text) for text in listed + odd} == {
        text: theirs(text) for text in listed + odd
    }


def test_tables_of_words_hold_what_the_restatements_use() -> None:
    assert chair.PAIRS.items() <= PAIRS.items()
    assert len(PAIRS) == 55
    assert len(CONTRACTIONS) == 114
