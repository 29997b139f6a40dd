"""CHAIR: which of COCO's 80 objects does a caption name that are not in the photograph?"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import nan
from statistics import fmean
from typing import Any, ClassVar, Literal

from ..base.errors import FoveateError
from ..evaluation.benchmark import (
    Benchmark,
    EvalRecord,
    Mentions,
    Sample,
    Table,
    answered,
    percent,
)
from ..evaluation.data import Data
from ..evaluation.words import lemmas

PROMPT = "Please describe this image in detail."
LISTS = ("chair/image_ids.json", "chair/opera_500_image_ids.json")
SYNONYMS = ("chair/synonyms.txt", "coco/synonyms.txt")
ANNOTATIONS = "coco/annotations/{kind}_{part}2014.json"
FOLDERS = ("coco/{part}2014", "coco/images/{part}2014", "{part}2014")

# Two words that are one object. "wine glas" is what the original's singular made of "wine glass".
_TOGETHER = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, "
    "fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, "
    "tennis racket, wine glass, hot dog, cell phone, mobile phone, teddy bear, hair drier, "
    "potted plant, laptop computer, stove top oven, home plate, train track"
)
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
PAIRS = {
    **{pair: pair for pair in _TOGETHER.split(", ")},
    **{f"{age} {animal}": animal for animal in _ANIMALS.split() for age in ("baby", "adult")},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    **{"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"},
}

ENDINGS = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"))
IRREGULAR = {"geese": "goose", "mice": "mouse", "feet": "foot", "calves": "calf"}


@dataclass(frozen=True)
class CHAIR(Benchmark):
    """Objects that captions make up, on images of COCO val2014 (arXiv 1809.02156).

    CHAIRs: share of captions with an object that is not there; CHAIRi: share of mentions of such
    objects; Recall: share of the objects there that are named; all in percent. Length: mean
    number of words and marks. An object is there if it is annotated or one of the five reference
    captions names it. Objects come from the words of the caption, or from ``meta["named"]`` of
    the records where they are stored. `foveate report` compares captions at equal length, too.

    The images are those listed in ``chair/image_ids.json`` (or OPERA's list of 500) under the
    data root; without a list they are drawn from val2014.

    Attributes:
        words: "wordnet" is OPERA's and lmms-eval's rule: nltk's tokenizer, tagger and lemmatizer,
            so "skiing" as a verb names skis, and "men" no person. "singular" is ours: singular
            forms only, near the original script (which needs Python 2), without nltk; "men"
            names a person there.
        images: how many images to draw where there is no list; 500 as in most papers.
        seed: of the draw.
        max_new_tokens: 512 in OPERA, 2048 in lmms-eval.
        suffix: follows "Please describe this image in detail.", OPERA's and lmms-eval's prompt.
    """

    max_new_tokens: int = 512
    words: Literal["wordnet", "singular"] = "wordnet"
    images: int = 500
    seed: int = 0

    name: ClassVar[str] = "chair"
    title: ClassVar[str] = "CHAIR"
    paper: ClassVar[str] = "1809.02156"
    origin: ClassVar[str] = (
        "synonyms.txt from github.com/LisaAnne/Hallucination, images and annotations of COCO 2014 "
        "from cocodataset.org"
    )
    digits: ClassVar[int] = 1

    def check(self) -> None:
        super().check()
        self.require(self.images >= 1, "images must be 1 or more")

    # -- questions ---------------------------------------------------------------------------------

    def read(self, data: Data) -> Iterator[Sample]:
        self.split_words("a dog", frozenset())  # nltk must be there before captions are made
        synonyms = data.text(data.need(*SYNONYMS)).strip().splitlines()
        listed = data.find(*LISTS)
        wanted = [int(image) for image in data.json(listed)] if listed else self._drawn(data)
        objects = self.objects_there(data, set(wanted), synonyms)
        for line, image in enumerate(wanted):
            if image not in objects:
                data.problems.add("images without annotation", str(image))
                continue
            part, there = objects[image]
            name = f"COCO_{part}2014_{image:012}.jpg"
            path = data.image(name, *(folder.format(part=part) for folder in FOLDERS))
            meta = {"synonyms": synonyms}
            yield self.sample("captions", line, image, PROMPT, sorted(there), path, name, meta=meta)

    def _drawn(self, data: Data) -> list[int]:
        path = data.need(ANNOTATIONS.format(kind="instances", part="val"))
        known = sorted(image["id"] for image in data.json(path)["images"])
        return random.Random(self.seed).sample(known, min(self.images, len(known)))

    def objects_there(
        self, data: Data, wanted: set[int], synonyms: Sequence[str]
    ) -> dict[int, tuple[str, set[str]]]:
        """Image id -> the part of COCO 2014 it is in, and its objects.

        Annotated objects and those named in the reference captions. The training part is read
        only for images that are not in val2014.
        """
        table = Objects(synonyms)
        shown: dict[int, tuple[str, set[str]]] = {}
        for part in ("val", "train"):
            if not wanted - shown.keys():
                break
            path = data.need(ANNOTATIONS.format(kind="instances", part=part))
            instances = data.json(path)
            shown |= {i["id"]: (part, set()) for i in instances["images"] if i["id"] in wanted}
            names = {kind["id"]: kind["name"] for kind in instances["categories"]}
            if lost := sorted(set(names.values()) - table.object.keys()):
                raise FoveateError(
                    f"chair: the synonyms lack COCO's {', '.join(lost)}: get synonyms.txt again."
                )
            for entry in instances["annotations"]:
                if image := shown.get(entry["image_id"]):
                    image[1].add(table.object[names[entry["category_id"]]])
            path = data.need(ANNOTATIONS.format(kind="captions", part=part))
            for entry in data.json(path)["annotations"]:
                if image := shown.get(entry["image_id"]):
                    words = self.split_words(entry["caption"], table.parts)
                    image[1].update(table.named(words)[0])
        return shown

    # -- answers -----------------------------------------------------------------------------------

    def split_words(self, caption: str, known: frozenset[str]) -> list[str]:
        """The words and marks of a caption in the form that the synonyms have; `known` are these.

        Raises `FoveateError` where nltk or its data is missing.
        """
        if self.words == "singular":
            return [singular(word, known) for word in _tokens(caption.lower())]
        return list(_lemmas(caption.lower()))

    def judge(self, record: EvalRecord) -> dict[str, Any]:
        """Of one caption: `named` objects with repeats, those `invented`, and `length` in words."""
        there, meta = set(record["label"]), record["meta"]
        if "named" in meta:
            named, length = meta["named"], nan
        else:
            table = _table(tuple(meta["synonyms"]))
            named, length = table.named(self.split_words(record["answer"], table.parts))
        return {
            "named": named,
            "invented": [word for word in named if word not in there],
            "covered": len(there & set(named)),
            "there": len(there),
            "length": length,
        }

    def grade(self, record: EvalRecord) -> float:
        """1 for a caption that invents nothing."""
        return float(not self.judge(record)["invented"])

    def mentions(self, record: EvalRecord) -> Mentions | None:
        if "named" in record["meta"]:
            return None
        one = self.judge(record)
        return Mentions(len(one["invented"]), len(one["named"]), one["covered"], one["there"])

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        judged = [self.judge(record) for record in answered(records)]
        if not judged:
            return {}

        there = sum(j["there"] for j in judged)
        return {
            "chair_s": percent(bool(j["invented"]) for j in judged),
            "chair_i": percent(word in j["invented"] for j in judged for word in j["named"]),
            "recall": 100 * sum(j["covered"] for j in judged) / there if there else nan,
            "length": fmean(j["length"] for j in judged),
        }

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        notes = super().notes(records)
        if self.words == "singular":
            notes.append(
                "Objects are found by singular forms instead of nltk's lemmas: CHAIR numbers may "
                "differ from OPERA's by a few tenths of a percent."
            )
        return notes

    def table(self, scores: dict[str, float]) -> Table:
        rows: list[list[str | float]] = [[self.title, *scores.values()]] if scores else []
        return ["", "CHAIRs", "CHAIRi", "Recall", "Length"], rows


class Objects:
    """The synonym table: one object per line, first its name, then other words for it.

    Attributes:
        object: word, or two words, -> the name of the object; exactly as written, so entries with
            capitals or a doubled space never match, as in the original.
        parts: every single word of the table and of `PAIRS`.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.object: dict[str, str] = {}
        for line in lines:
            words = line.strip().split(", ")
            self.object |= dict.fromkeys(words, words[0])
        self.parts = frozenset(" ".join([*self.object, *PAIRS, *PAIRS.values()]).split())

    def named(self, words: Sequence[str]) -> tuple[list[str], int]:
        """The objects that `words` name, with repeats, and how many words there are.

        `PAIRS` count as one word. Where a toilet is named, a seat is not a chair.
        """
        joined: list[str] = []
        i = 0
        while i < len(words):
            pair = PAIRS.get(" ".join(words[i : i + 2]))
            joined.append(words[i] if pair is None else pair)
            i += 1 if pair is None else 2
        seatless = "toilet" in joined
        named = [
            self.object[word]
            for word in joined
            if word in self.object and not (seatless and word == "seat")
        ]
        return named, len(joined)


_table: Callable[[tuple[str, ...]], Objects] = functools.lru_cache(maxsize=4)(Objects)


def singular(word: str, known: frozenset[str]) -> str:
    """The form of `word` that is known, trying plural endings; else the word."""
    if word in known:
        return word
    forms = [word.removesuffix(old) + new for old, new in ENDINGS if word.endswith(old)]
    return next((form for form in [IRREGULAR.get(word, ""), *forms] if form in known), word)


def _tokens(text: str) -> list[str]:
    """Words, with hyphens inside, and single marks."""
    return re.findall(r"'s\b|n't\b|\w+(?:-\w+)*|[^\w\s]", text)


def _lemmas(text: str) -> tuple[str, ...]:
    """OPERA's words."""
    otherwise = ", or use chair(words=singular), which needs none"
    return tuple(lemma for lemma, _ in lemmas(text, otherwise))
