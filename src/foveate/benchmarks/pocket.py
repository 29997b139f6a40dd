"""pocket-bench: the shapes of the real benchmarks on drawn scenes, with and against the habit."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal, get_args

from PIL import Image

from ..evaluation import yesno
from ..evaluation.benchmark import (
    Benchmark,
    EvalRecord,
    Mentions,
    Sample,
    Table,
    answered,
    by_split,
    percent,
    prefixed,
    unread_note,
)
from ..evaluation.data import Data
from ..evaluation.vocabulary import of_scenes
from ..scenes import questions, world
from ..scenes.questions import View

Category = Literal[
    "existence-random",
    "existence-popular",
    "existence-adversarial",
    "attribute",
    "relation",
    "pairs",
    "number",
    "print",
    "captions",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
HABITS = ("with", "against")
TASKS = ("existence", "number", "position", "attribute")  # of pairs: MME's existence .. color
FIRST_SCENE = 2_000_000_000  # training, exams, exports and head searches use seeds far below
PROMPT = "Please describe this image in detail."
SIZE = 768

YES_NO = tuple(c for c in CATEGORIES if c not in ("number", "print", "captions"))
MEASURES: dict[str, dict[str, str]] = {  # category -> its lines of the table
    **{category: {"accuracy": category.replace("-", ", ").capitalize()} for category in CATEGORIES},
    "pairs": {"acc": "Pairs", "acc+": "Pairs, both right"},
    "captions": {"chair": "Captions, CHAIR", "cover": "Captions, Cover", "hal": "Captions, Hal"},
}
Asked = tuple[str, str | list[str], str, tuple[int, ...]]
"""Text, label, topic, and the scene's things that it is about."""
NUMERALS = {word: str(number) for number, word in enumerate(questions.NUMBERS)}


@dataclass(frozen=True)
class PocketBench(Benchmark):
    """Existence, attributes, relations, pairs, numbers, fine print and captions of drawn scenes.

    Needs no data. Every category has a split of scenes with the habits of the pocket model's
    training scenes and one of scenes against all of them (``foveate.scenes.world``), none of which
    was seen in training or in its exams. A scene is asked up to 17 questions.

    * existence, as in POPE: negatives drawn from all kinds that are absent, from the six that
      scenes show most, or from the three that the habit puts beside what is there.
    * attribute (color, pattern, size), relation (left, right, above, below): yes/no.
    * pairs, as in MME: two questions on one fact, in turn on existence, number, position and
      attribute; ``acc`` per question, ``acc+`` per pair, ``score`` their sum.
    * number: "How many ... are there?", in half of the cases one; digits and words are equal.
    * print: the letter or digit on a thing, 33 of the picture's 768 pixels high: for methods that
      look closer. ``meta["boxes"]`` has the thing's [left, top, right, bottom] in pixels.
    * captions, as in AMBER: ``chair``, share of named things that are not there; ``cover``, share
      of kinds there that are named; ``hal``, share of captions that name one that is not there;
      ``length`` in words.

    All in percent but the length. Yes/no: half of the labels are yes, the positive class is yes,
    answers are read by ``yesno.first_word``. Number and print: the whole answer, without case and
    outer marks, must be the label.

    Attributes:
        categories: what to ask. A category's questions do not depend on the others.
        questions: how many per category and habit, an even number; a smaller one asks the first
            of them.
        seed: another one draws other scenes.
        max_new_tokens: length limit of captions.
        word_tokens: length limit of all other answers, in ``meta["max_new_tokens"]`` of their
            samples.
    """

    max_new_tokens: int = 128
    word_tokens: int = 16
    categories: tuple[Category, ...] = CATEGORIES
    questions: int = 200
    seed: int = 0

    name: ClassVar[str] = "pocket"
    title: ClassVar[str] = "pocket-bench"
    origin: ClassVar[str] = "drawn by foveate"
    digits: ClassVar[int] = 1

    def check(self) -> None:
        super().check()
        self.require(bool(self.categories), "categories must name at least one category")
        self.require(
            self.questions >= 2 and self.questions % 2 == 0,
            "questions must be an even number, 2 or more, as half of the answers are yes",
        )
        self.require(self.seed >= 0, "seed must be 0 or more")
        self.require(self.word_tokens >= 1, "word_tokens must be 1 or more")

    # -- questions ---------------------------------------------------------------------------------

    def read(self, data: Data) -> Iterator[Sample]:
        """Scene by scene, habits in turn, so that any beginning of the list is as the whole."""
        asked = {(category, habit): 0 for category in self.categories for habit in HABITS}
        number = 0
        while any(count < self.questions for count in asked.values()):
            for habit in HABITS:
                open_ = [c for c in self.categories if asked[c, habit] < self.questions]
                if open_:
                    scene = world.sample(FIRST_SCENE + 1_000_003 * self.seed + number, habit)
                    for category in open_:
                        rng = random.Random(f"pocket-bench-{category}-{habit}-{scene.seed}")
                        asking = ask(questions.look(scene), rng, category, TASKS[number % 4])
                        for question in asking[: self.questions - asked[category, habit]]:
                            line = asked[category, habit]
                            yield self._sample(scene, line, category, question)
                            asked[category, habit] += 1
            number += 1

    def _sample(self, scene: world.Scene, line: int, category: Category, question: Asked) -> Sample:
        text, label, topic, things = question
        meta: dict[str, Any] = {"category": category, "habit": scene.habit, "topic": topic}
        if category != "captions":
            meta["max_new_tokens"] = self.word_tokens
        if category == "print":
            boxes = world.boxes(scene, SIZE)
            meta["boxes"] = [list(boxes[thing]) for thing in things]
        split, name = f"{category}/{scene.habit}", f"{scene.habit}-{scene.seed}"
        image = functools.partial(picture, scene.seed, scene.habit)
        return self.sample(split, line, line, text, label, image, name, meta=meta)

    # -- answers -----------------------------------------------------------------------------------

    def parse(self, answer: str) -> str:
        """Yes or no where the answer says so; else all of it, without case and outer marks."""
        return yesno.first_word(answer) or re.sub(r"^\W+|\W+$", "", answer.lower())

    def grade(self, record: EvalRecord) -> float:
        """1 for the right answer, and for a caption that names nothing that is not there."""
        label = record["label"]
        if record["meta"]["category"] == "captions":
            return float(set(named(record["answer"])) <= set(label))
        return float(self.parse(record["answer"]) in (label, NUMERALS.get(label)))

    def mentions(self, record: EvalRecord) -> Mentions | None:
        if record["meta"]["category"] != "captions":
            return None
        kinds, there = named(record["answer"]), set(record["label"])
        invented = sum(kind not in there for kind in kinds)
        return Mentions(invented, len(kinds), len(there & set(kinds)), len(there))

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for split, group in by_split(records).items():
            scores |= prefixed(split, self._metrics(group[0]["meta"]["category"], group))
        return scores

    def _metrics(self, category: Category, group: list[EvalRecord]) -> dict[str, float]:
        if category == "captions":
            return caption_scores(group)
        if category == "pairs":
            return yesno.pair_scores((r["line"], self.grade(r) == 1) for r in group)
        if category in YES_NO:
            said = [(self.parse(r["answer"]), r["label"]) for r in group]
            return yesno.Counts.of(said, "yes").percent()
        return {"accuracy": percent(map(self.grade, group))}

    def notes(self, records: Iterable[EvalRecord]) -> list[str]:
        records = list(records)
        given = [r for r in answered(records) if r["meta"]["category"] in YES_NO]
        unread = [r["answer"] for r in given if self.parse(r["answer"]) not in ("yes", "no")]
        what = "to yes/no questions say neither"
        return super().notes(records) + unread_note(unread, len(given), what)

    def table(self, scores: dict[str, float]) -> Table:
        """Per category accuracy (or what the line says), F1 and yes ratio of both habits."""
        heads, rows = ["Category"], list[list[str | float]]()
        for habit in HABITS:
            heads += [f"{habit} the habit", f"{habit}, F1", f"{habit}, yes ratio"]
        for category in CATEGORIES:
            for key, line in MEASURES[category].items():
                cells: list[str | float] = [
                    scores.get(f"{category}/{habit}/{column}", "")
                    for habit in HABITS
                    for column in (key, "f1", "yes_ratio")
                ]
                if any(cell != "" for cell in cells):
                    rows.append([line, *cells])
        return heads, rows


def ask(view: View, rng: random.Random, category: Category, task: str) -> list[Asked]:
    """What is asked about one scene; nothing where all is ambiguous.

    Yes/no questions come in pairs, the yes first; `task` is what "pairs" asks about.
    """
    if category == "captions":
        return [(PROMPT, sorted(view.counts()), "caption", ())]
    if category == "number":  # of a kind that is there once, and of one that is there more often
        drawn = [questions.opened(view, rng, category) for _ in range(20)]
        chosen = list(
            {question.answer == "one": question for question in drawn if question}.values()
        )
        chosen = chosen if len(chosen) == 2 else []
    elif category == "print":  # on two things, where there are two
        drawn = [questions.opened(view, rng, category) for _ in range(2)]
        chosen = list({question.things: question for question in drawn if question}.values())
    elif category == "pairs":
        chosen = list(questions.pairs(view, rng, task) or ())
    else:
        kind, _, split = category.partition("-")
        chosen = list(questions.pairs(view, rng, kind, split) or ())
    topics = [task if category == "pairs" else q.topic for q in chosen]
    return [(q.text, q.answer, topic, q.things) for q, topic in zip(chosen, topics, strict=True)]


def picture(seed: int, habit: str) -> Image.Image:
    """The scene drawn at 768 x 768 pixels; about a quarter of a second on one core."""
    return world.draw(world.sample(seed, habit), SIZE)


def caption_scores(group: list[EvalRecord]) -> dict[str, float]:
    """CHAIR, Cover and Hal over all captions, in percent, and their mean length in words."""
    told = [(named(record["answer"]), set(record["label"])) for record in group]
    return {
        "chair": percent(kind not in there for kinds, there in told for kind in kinds),
        "cover": percent(kind in kinds for kinds, there in told for kind in there),
        "hal": percent(not there.issuperset(kinds) for kinds, there in told),
        "length": fmean(len(record["answer"].split()) for record in group),
    }


def named(caption: str) -> list[str]:
    """The kinds of things that a caption names, repeats kept."""
    return [mention.category for mention in of_scenes().find(caption)]
