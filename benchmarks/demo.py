"""How the questions of `foveate demo` were found: by what the pocket model answers, in order.

    python benchmarks/demo.py

Held-out scenes are gone through in the order of their numbers, and the questions of a scene in the
order in which `foveate.scenes.questions.exam` asks them. Nothing else was looked at.
"""

from __future__ import annotations

import random

from foveate import VLM
from foveate.commands.demo import picture_of
from foveate.scenes import questions, world

SCENES = 100  # at most


def found(vlm: VLM) -> dict[str, tuple[int, str, str]]:
    """For each part of the demo its scene's number, question and truth."""
    return {"print": _print(), "habit": _habit(vlm), "spoiled": _spoiled(vlm)}


def _print() -> tuple[int, str, str]:
    """The first scene with the habit that shows a letter on a thing of which there is one."""
    for number in range(SCENES):
        scene, _ = picture_of(number, "with")
        for i in questions.look(scene).single():
            thing = scene.things[i]
            if thing.print in world.LETTERS and thing.print:
                return number, f"What letter is on the {thing.kind}?", thing.print.lower()
    raise LookupError("no letter")


def _habit(vlm: VLM) -> tuple[int, str, str]:
    """The first colour that the plain model answers as usual, where it is another."""
    for number in range(SCENES):
        scene, picture = picture_of(number, "against")
        for asked in questions.exam(scene, random.Random(number)):
            if asked.label is None and asked.topic == "color":
                usual = world.KINDS[scene.things[asked.things[0]].kind].color
                if vlm.ask(picture, asked.text, max_new_tokens=8).text == usual != asked.answer:
                    return number, asked.text, asked.answer
    raise LookupError("no habit")


def _spoiled(vlm: VLM) -> tuple[int, str, str]:
    """The first question that plain answers rightly and LASER wrongly."""
    for number in range(SCENES):
        scene, picture = picture_of(number, "against")
        for asked in questions.exam(scene, random.Random(number)):
            plain, laser = (
                vlm.ask(picture, asked.text, method, max_new_tokens=8).text
                for method in (None, "laser")
            )
            if plain == asked.answer != laser:
                return number, asked.text, asked.answer
    raise LookupError("nothing spoiled")


if __name__ == "__main__":
    for part, (number, text, truth) in found(VLM.load("pocket")).items():
        print(f"{part}: scene {number}, {text} {truth}")
