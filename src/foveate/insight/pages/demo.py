"""The demo as one HTML page that needs nothing else: what was asked, and how each answer came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image, ImageDraw

from ...vlm.look import Panel
from ..plots.chain import shaded
from ..plots.style import BLUE, PAPER
from .document import data_uri, document, fill

SIDE = 288  # pixels of a picture's longer side
STORED = {"quality": 88}


@dataclass(frozen=True)
class Said:
    """One method's answer to a question.

    Attributes:
        probability: of the answer, 0 to 1. panels: how the method came to it.
    """

    method: str
    answer: str
    probability: float
    right: bool
    panels: Sequence[Panel] = ()


@dataclass(frozen=True)
class Scene:
    """One question about one picture, and every answer to it.

    Attributes:
        told: what to see, in sentences. picked: how the question was found.
    """

    title: str
    told: str
    picked: str
    picture: Image.Image
    question: str
    truth: str
    answers: Sequence[Said]


@dataclass(frozen=True)
class Row:
    """One of several questions, with each method's answer and whether it is right."""

    picture: Image.Image
    question: str
    truth: str
    answers: dict[str, tuple[str, bool]]


def page(scenes: Sequence[Scene], rows: Sequence[Row], where: str) -> str:
    """The whole page: no outside resource, usable from a file.

    Args:
        scenes: shown one after the other; the first has the rows below it.
        where: to read about averages, as text.
    """
    first, *rest = (_scene(scene) for scene in scenes)
    body = fill("demo.html", scenes=first + _several(rows) + "".join(rest), where=escape(where))
    return document("foveate: what attention methods do", body, "demo.css")


def _scene(scene: Scene) -> str:
    answers = "".join(_said(said) for said in scene.answers)
    return (
        f"<section><h2>{escape(scene.title)}</h2><p>{escape(scene.told)}</p>"
        f'<div class="asked"><figure>{_img(scene.picture, "The scene")}</figure><div>'
        f'<p class="question">{escape(scene.question)}</p>'
        f"<p>The truth: <b>{escape(scene.truth)}</b></p>{answers}</div></div>"
        f'<p class="soft">{escape(scene.picked)}</p></section>'
    )


def _said(said: Said) -> str:
    panels = "".join(
        f"<figure>{_img(_drawn(panel), panel.title)}<figcaption>{escape(panel.title)}"
        "</figcaption></figure>"
        for panel in said.panels
    )
    chain = f'<div class="chain">{panels}</div>' if panels else ""
    return (
        f'<div class="said"><p><code>{escape(said.method)}</code> '
        f"{_mark(said.answer, said.right)} <span class=soft>probability {said.probability:.2f}"
        f"</span></p>{chain}</div>"
    )


def _several(rows: Sequence[Row]) -> str:
    names = list(rows[0].answers)
    lines = "".join(
        f"<tr><td>{_img(row.picture, 'A scene')}</td><td>{escape(row.question)}</td>"
        f"<td>{escape(row.truth)}</td>"
        + "".join(f"<td>{_mark(*row.answers[name])}</td>" for name in names)
        + "</tr>"
        for row in rows
    )
    counts = (sum(row.answers[name][1] for row in rows) for name in names)
    return (
        f"<section><h3>The first {len(rows)} scenes with a print, none left out</h3>"
        f'<div class="scroll"><table><tr>{_cells("th", ["", "question", "truth", *names])}</tr>'
        f"{lines}<tr>{_cells('td', ['', 'right', '', *map(str, counts)])}</tr>"
        "</table></div></section>"
    )


def _cells(kind: str, texts: Iterable[str]) -> str:
    return "".join(f"<{kind}>{escape(text)}</{kind}>" for text in texts)


def _mark(answer: str, right: bool) -> str:
    kind, sign = ("better", "right") if right else ("worse", "wrong")
    return f'<span class="{kind}">{escape(answer)} <small>({sign})</small></span>'


def _img(picture: Image.Image, told: str) -> str:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return f'<img alt="{escape(told)}" src="{data_uri(small, "JPEG", **STORED)}">'


def _drawn(panel: Panel) -> Image.Image:
    picture = Image.fromarray((255 * shaded(panel, SIDE)).round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for frame in panel.frames:
        box = [part * picture.size[k % 2] for k, part in enumerate(frame)]
        pen.rectangle(box, outline=PAPER, width=6)
        pen.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=BLUE, width=3)
    return picture
