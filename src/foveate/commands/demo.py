"""`foveate demo`: what methods gain, leave and spoil, on drawn scenes, in the terminal and a page.

The questions are fixed. `benchmarks/demo.py` prints how they were found.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.files import make_folder, replacing, write_text
from . import app
from .common import load, new_table, print_table

if TYPE_CHECKING:
    from PIL import Image

    from ..insight.pages.demo import Row, Said, Scene
    from ..vlm.vlm import VLM

PRINT = "What letter is on the car?"
HABIT = "Which colour does the lamp have?"
SPOILED = "Is the hat small?"
READERS = ("vanilla", "vicrop", "laser")
AGAINST_HABIT = ("vanilla", "clvs", "pai", "vcd")
SPOILER = ("vanilla", "laser")
SEVERAL = 8  # scenes with a print
SEES = 96  # pixels of a side, to which the pocket model brings every picture
AVERAGES = "docs/look-again (reading print) and docs/pocket-bench (everything else)"


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Write index.html and the pictures to this folder.")
    ] = Path("demo"),
) -> None:
    """Show on drawn scenes what methods gain, leave and spoil: a table, and one page with pictures.

    Asks the pocket model, without a download, in less than half a minute.
    """
    from ..insight.pages.demo import page
    from ..insight.plots.chain import Link, show_chain
    from ..vlm.look import Chain

    folder = make_folder(out)
    vlm = load("pocket")
    scenes = [_fine_print(vlm), _habit(vlm), _spoiled(vlm)]
    rows = list(_several(vlm))
    with replacing(folder / "scene.png") as part:
        scenes[0].picture.save(part)
    plain, laser = scenes[0].answers[0], scenes[0].answers[-1]
    *_, added, crop = (panel for panel in laser.panels if "hidden" not in panel.title)
    chain = Chain(lambda: [plain.panels[0], added, crop])
    answers = {"plain": f"{plain.answer} ({plain.probability:.2f})"}
    link = Link(laser.method, f"{laser.answer} ({laser.probability:.2f})", chain)
    show_chain(scenes[0].question, [link], answers, folder / "fine-print.png")
    write_text(folder / "index.html", page(scenes, rows, AVERAGES))
    print_table(_table(scenes))
    counts = {name: sum(row.answers[name][1] for row in rows) for name in READERS}
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"The first {len(rows)} scenes with a print, none left out; read rightly: {told}.")
    print(f"Averages over many scenes: {AVERAGES}.")
    print(f"The page, with what each method looked at: {folder / 'index.html'}")
    print(f'Next: foveate ask {folder / "scene.png"} "{PRINT}" --method vanilla --method laser')


def picture_of(number: int, habit: str) -> tuple[Any, Image.Image]:
    """A held-out scene, as data and drawn."""
    from ..scenes import questions, world

    scene = world.sample(questions.FIRST_HELD_OUT + number, habit)
    return scene, world.draw(scene)


def print_questions() -> Iterator[tuple[Image.Image, str, str]]:
    """(picture, question, truth) of every held-out scene with a single printed thing, in order.

    Scenes with an even number follow the habits of the training scenes, the others do not.
    """
    from ..scenes import questions

    number = 0
    while True:
        scene, picture = picture_of(number, "against" if number % 2 else "with")
        asked = questions.opened(questions.look(scene), random.Random(number), "print")
        if asked:
            yield picture, asked.text, asked.answer
        number += 1


def answered(
    vlm: VLM,
    picture: Image.Image,
    question: str,
    truth: str,
    methods: Sequence[str],
    *,
    drawn: bool = True,
) -> list[Said]:
    """The answers of methods; where `drawn`, with the pictures of those that look again."""
    from ..insight.pages.demo import Said

    given = []
    for method in methods:
        answer = vlm.ask(picture, question, method, max_new_tokens=8)
        chain = answer.chat.notes.get("chain")
        chance = answer.probability or 0.0
        panels = chain.panels if chain and drawn else ()
        given.append(Said(method, answer.text, chance, answer.text == truth, panels))
    return given


def _fine_print(vlm: VLM) -> Scene:
    from PIL import Image

    from ..insight.pages.demo import Scene
    from ..vlm.look import Panel

    _, picture = picture_of(0, "with")
    first, *others = answered(vlm, picture, PRINT, "e", READERS)
    small = picture.resize((SEES, SEES), Image.Resampling.BICUBIC)
    seen = small.resize((3 * SEES, 3 * SEES), Image.Resampling.NEAREST)
    first = replace(first, panels=[Panel(f"what the model sees: {SEES} x {SEES} pixels", seen)])
    return Scene(
        title="A letter too small to read",
        told=f"The model brings every picture to {SEES} x {SEES} pixels. There the letter on the "
        "car has a height of four pixels, and the plain answer is a guess. ViCrop and LASER first "
        "look where the question makes the model look, cut that part out of the original picture, "
        "and ask again.",
        picked="Found as the first scene with a printed letter.",
        picture=picture,
        question=PRINT,
        truth="e",
        answers=[first, *others],
    )


def _habit(vlm: VLM) -> Scene:
    from ..insight.pages.demo import Scene

    _, picture = picture_of(0, "against")
    return Scene(
        title="A question against the habit",
        told="In the scenes that this model was trained on, most lamps are yellow. This one is "
        "not. CLVS changes where the model looks, VCD subtracts what it would say to a noisy "
        "picture, and PAI does both in its way. On average over thousands of questions none of the "
        "three helps this model.",
        picked="Found as the first colour question, in scenes against the habit, which the plain "
        "model answers with the usual colour. The methods are one of each sort.",
        picture=picture,
        question=HABIT,
        truth="green",
        answers=answered(vlm, picture, HABIT, "green", AGAINST_HABIT),
    )


def _spoiled(vlm: VLM) -> Scene:
    from ..insight.pages.demo import Scene

    _, picture = picture_of(0, "against")
    return Scene(
        title="A question that looking again spoils",
        told="The hat is small beside the other things. LASER's crop cuts the hat at its edge and "
        "enlarges what is left, and the model no longer sees how small it is. Methods that crop "
        "help to read and do harm where the rest of the scene matters.",
        picked="Found as the first question about the same scene that the plain model answers "
        "rightly and LASER wrongly.",
        picture=picture,
        question=SPOILED,
        truth="yes",
        answers=answered(vlm, picture, SPOILED, "yes", SPOILER),
    )


def _several(vlm: VLM) -> Iterator[Row]:
    from ..insight.pages.demo import Row

    for picture, question, truth in islice(print_questions(), SEVERAL):
        given = answered(vlm, picture, question, truth, READERS, drawn=False)
        yield Row(picture, question, truth, {s.method: (s.answer, s.right) for s in given})


def _table(scenes: Sequence[Scene]) -> Any:
    table = new_table("question", "truth", "method", "answer", "probability", "")
    for scene in scenes:
        head = [scene.question, scene.truth]
        for said in scene.answers:
            verdict = "right" if said.right else "wrong"
            table.add_row(*head, said.method, said.answer, f"{said.probability:.2f}", verdict)
            head = ["", ""]
        table.add_section()
    return table
