"""Does clutter spread attention? (CARVE, arXiv 2509.06461, Figures 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...backends.transformers.anatomy import anatomy
from ...base.stats import correlation, mean, proportion
from ...methods.carve import CARVE
from ...vlm.look import GENERAL, SHORT, read
from ..analysis import Analysis, Measurement, Numbers, Stack, about, chance, pooled, rounded
from ..truth import AnnotatedImage

if TYPE_CHECKING:
    from ...vlm.vlm import VLM
    from ..plots.analysis import Sheet

BINS = 10
FEWEST = 3  # pictures of which an interval is shown
HUES = 180  # of OpenCV
KINDS = ("attention", "contrast")


@dataclass(frozen=True)
class Complexity(Analysis):
    """Texture and colour of a picture against the entropy of the attention to it.

    Texture complexity is the share of Canny's edge pixels, colour complexity the entropy of the
    180 hues divided by ln 180 (section 3). Entropy is that of the last query row's attention to
    the image at the step that ends the answer, mean over heads, normalised to sum 1 over the N_v
    visual tokens and divided by ln N_v; averaged over CARVE's layers. The paper takes the
    contrasted attention of its eq. (4.6); the attention itself is read beside it.

    Attributes:
        low, high: Canny's thresholds (inferred: 100 and 200).
        steps: most tokens of an answer; 32 in the authors' code.
        layers: whose entropy is averaged; None = CARVE's 20 to 25, scaled on shallow models.
    """

    low: float = 100.0
    high: float = 200.0
    steps: int = 32
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "complexity"
    title: ClassVar[str] = "Visual complexity and the entropy of attention"
    source: ClassVar[str] = "CARVE, arXiv 2509.06461, Figures 4 and 5"
    needs: ClassVar[tuple[str, ...]] = ("scipy", "statsmodels", "cv2")

    def check(self) -> None:
        self.require(0 < self.low <= self.high, "the thresholds must be 0 < low <= high")
        self.require(self.steps >= 1, "steps must be 1 or more")

    def measure(self, vlm: VLM, picture: AnnotatedImage, stacks: dict[str, Stack]) -> Measurement:
        asked = picture.asked()
        texts = [GENERAL, *(question.text for question in asked)]
        chats = about(vlm, picture, [text + SHORT for text in texts])
        general, *readings = read(vlm, chats, None, max_new_tokens=self.steps)
        clutter = general.weights[-1].double()
        questions = []
        for question, reading in zip(asked, readings, strict=True):
            weights = reading.weights[-1].double()
            questions.append(
                {
                    "group": question.group,
                    "right": question.right(reading.answer.text),
                    "attention": rounded(entropy(weights)),
                    "contrast": rounded(entropy(weights / (clutter + CARVE.ratio_floor))),
                }
            )
        deep = CARVE(layers=self.layers).resolve(anatomy(vlm.model)).layers or ()
        return {
            "texture": texture(chats[0].images[0], self.low, self.high),
            "color": color(chats[0].images[0]),
            "layers": list(general.layers),
            "deep": [general.layers.index(layer) for layer in deep],
            "questions": questions,
        }

    def count(self, rows: Sequence[Measurement]) -> Numbers:
        asked, pictures = pooled(rows, "questions")
        deep = rows[0]["deep"]
        curves = {kind: np.array([q[kind] for q in asked]) for kind in KINDS}
        means = {kind: curve[:, deep].mean(1) for kind, curve in curves.items()}
        of_picture = {
            kind: np.array(
                [means[kind][np.array(pictures) == row["picture"]].mean() for row in rows]
            )
            for kind in KINDS
        }
        hits = np.array([int(q["right"]) for q in asked])
        complexities = {k: np.array([row[k] for row in rows]) for k in ("texture", "color")}
        return {
            "layers": rows[0]["layers"],
            "deep": [rows[0]["layers"][place] for place in deep],
            "questions": len(asked),
            "by_layer": {kind: mean(curve, pictures) for kind, curve in curves.items()},
            "complexity": {
                name: {
                    "smallest": float(values.min()),
                    "largest": float(values.max()),
                    **{
                        kind: {
                            "bins": binned(scaled(values), of_picture[kind]),
                            **spearman(values, of_picture[kind]),
                        }
                        for kind in KINDS
                    },
                }
                for name, values in complexities.items()
            },
            "accuracy": {
                kind: {"bins": tenths(means[kind], hits), **correlation(means[kind], hits)}
                for kind in KINDS
            },
            "right": float(hits.mean()),
        }

    def caption(self, numbers: Numbers) -> str:
        deep = numbers["deep"]
        told = [
            f"{numbers['questions']:,} questions, {100 * numbers['right']:.1f} % answered "
            "correctly. Entropy: of the last row's attention to the image at the step that ends "
            "the answer, mean over heads, as a share of the largest possible, mean over layers "
            f"{', '.join(map(str, deep))}. Attention: with the question; contrast: divided by the "
            "attention with a general instruction (eq. 4.6), as the paper has it. Texture: share "
            f"of Canny's edge pixels (thresholds {self.low:g}, {self.high:g}); colour: entropy of "
            "the hues; both are scaled from the smallest to the largest of these pictures."
        ]
        for name, word in (("texture", "texture"), ("color", "colour")):
            figures = numbers["complexity"][name]
            r = [f"{k} {_signed(figures[k]['rho'])} ({chance(figures[k]['p'])})" for k in KINDS]
            told.append(
                f"Spearman's correlation of {word} ({figures['smallest']:.3f} to "
                f"{figures['largest']:.3f}) and entropy over pictures: {', '.join(r)}."
            )
        r = [
            f"{k} {_signed(numbers['accuracy'][k]['r'])} ({chance(numbers['accuracy'][k]['p'])})"
            for k in KINDS
        ]
        told.append(
            f"Point-biserial correlation of entropy and being right over questions, taken as "
            f"independent: {', '.join(r)}. Bars and bands: 95 % t-intervals over pictures, of "
            "accuracy Wilson's 95 % interval of tenths of the questions."
        )
        return " ".join(told)

    def draw(self, numbers: Numbers, sheet: Sheet) -> None:
        from ..plots.analysis import SERIES, bands, marks

        colors = dict(zip(KINDS, SERIES, strict=False))

        def over(panel: Any, name: str) -> None:
            for shift, kind in ((-0.007, "attention"), (0.007, "contrast")):
                bins = [b for b in numbers["complexity"][name][kind]["bins"] if b["n"]]
                middle = [(b["from"] + b["to"]) / 2 + shift for b in bins]
                marks(panel, middle, bins, colors[kind], kind)
            panel.set_xlim(-0.02, 1.02)

        def accuracy(panel: Any) -> None:
            for kind in KINDS:
                bins = numbers["accuracy"][kind]["bins"]
                marks(panel, [b["at"] for b in bins], bins, colors[kind], kind, 100)

        def layers(panel: Any) -> None:
            bands(panel, numbers["layers"], numbers["by_layer"])

        sheet.add("Entropy over texture", "texture complexity, scaled", "entropy / ln N_v",
                  lambda panel: over(panel, "texture"))  # fmt: skip
        sheet.add("Entropy over colour", "colour complexity, scaled", "entropy / ln N_v",
                  lambda panel: over(panel, "color"))  # fmt: skip
        sheet.add("Accuracy over entropy", "entropy / ln N_v", "% right", accuracy)
        sheet.add("Entropy by layer", "layer", "entropy / ln N_v", layers)


# ------------------------------------------------------------------------- what is measured


def entropy(weights: Tensor) -> Tensor:
    """Of weights (..., N_v), normalised to sum 1, as a share of ln N_v: (...), 0 to 1."""
    shares = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1) / math.log(max(weights.shape[-1], 2))


def texture(image: Image.Image, low: float, high: float) -> float:
    """Share of pixels on an edge, by OpenCV's Canny on the grey picture; eq. (3.1)."""
    import cv2

    edges = cv2.Canny(np.asarray(image.convert("L")), low, high)
    return float((edges > 0).mean())


def color(image: Image.Image) -> float:
    """Entropy of OpenCV's 180 hues as a share of ln 180; eq. (3.2)."""
    import cv2

    hues = cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2HSV)[..., 0]
    counts = np.bincount(hues.ravel(), minlength=HUES)
    return float(entropy(torch.from_numpy(counts).double()))


# ---------------------------------------------------------------------------- what is counted


def scaled(values: np.ndarray) -> np.ndarray:
    """From 0, the smallest, to 1, the largest."""
    return (values - values.min()) / max(float(np.ptp(values)), 1e-12)


def binned(x: np.ndarray, y: np.ndarray) -> list[Numbers]:
    """Mean of y, one per picture, in each tenth of x from 0 to 1, with its t-interval.

    The interval is NaN for fewer than `FEWEST` pictures, of which it says nothing.
    """
    edges = np.linspace(0, 1, BINS + 1)
    place = np.digitize(x, edges[1:-1])
    bins = []
    for b in range(BINS):
        values = y[place == b]
        numbers = dict.fromkeys(("mean", "low", "high"), math.nan)
        if len(values):
            numbers = mean(values, range(len(values)))
        if len(values) < FEWEST:
            numbers |= {"low": math.nan, "high": math.nan}
        bins.append({"from": edges[b], "to": edges[b + 1], "n": len(values), **numbers})
    return bins


def tenths(x: np.ndarray, hits: np.ndarray) -> list[Numbers]:
    """Accuracy in ten parts of the questions by x, of equal size but for ties; empty ones left out.

    "at": the mean of x in the part.
    """
    edges = np.quantile(x, np.linspace(0, 1, BINS + 1))[1:-1]
    place = np.digitize(x, edges)
    parts = [place == b for b in range(BINS) if (place == b).any()]
    return [{"at": float(x[part].mean()), **proportion(hits[part])} for part in parts]


def spearman(x: np.ndarray, y: np.ndarray) -> Numbers:
    """Spearman's rank correlation (scipy); NaN where one does not vary."""
    from scipy import stats

    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"rho": math.nan, "p": math.nan}
    test = stats.spearmanr(x, y)
    return {"rho": float(test.statistic), "p": float(test.pvalue)}


def _signed(value: float) -> str:
    return f"{value:+.2f}"
