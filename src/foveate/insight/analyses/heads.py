"""Which heads look at the image, and which of them at the object that is asked about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...base.stats import mean, ratio
from ...families.layout import WHOLE
from ...vlm.look import read
from ..analysis import Analysis, Measurement, Numbers, Stack, about, percent, pooled, rounded
from ..truth import AnnotatedImage, exists

if TYPE_CHECKING:
    from ...vlm.vlm import VLM
    from ..plots.analysis import Sheet

BEST = 10  # heads that are listed


@dataclass(frozen=True)
class Heads(Analysis):
    """Attention to the image and to the object, of every layer and head of the plain model.

    For every kind of thing on a picture the model is asked whether it is there; attention is that
    of the prompt's last row.

    Attributes:
        covered: a token is in an object's mask where at least this share of its place is covered.
    """

    covered: float = 0.5

    name: ClassVar[str] = "heads"
    title: ClassVar[str] = "Which heads look at the image"

    def check(self) -> None:
        self.require(0 < self.covered <= 1, "covered must lie above 0 and not above 1")

    def measure(self, vlm: VLM, picture: AnnotatedImage, stacks: dict[str, Stack]) -> Measurement:
        chats = about(vlm, picture, [exists(kind) for kind in picture.objects])
        readings = read(vlm, chats, None, heads="all")
        objects = []
        for kind, reading in zip(picture.objects, readings, strict=True):
            weights = reading.weights[0].double()
            cells = picture.target(kind).tokens(reading.grids, weights.shape[-1], [WHOLE])
            inside = cells >= self.covered
            objects.append(
                {
                    "object": kind,
                    "area": inside.double().mean().item(),
                    "on_image": rounded(weights.sum(-1)),
                    "on_object": rounded(weights[..., inside].sum(-1)),
                }
            )
        return {"layers": list(readings[0].layers), "objects": objects}

    def count(self, rows: Sequence[Measurement]) -> Numbers:
        asked, pictures = pooled(rows, "objects")
        image = mean([o["on_image"] for o in asked], pictures)
        pictures = [picture for picture, o in zip(pictures, asked, strict=True) if o["area"]]
        seen = [o for o in asked if o["area"]]
        shares = [ratio(np.array(o["on_object"]), np.array(o["on_image"])) for o in seen]
        times = [share / o["area"] for share, o in zip(shares, seen, strict=True)]
        numbers: Numbers = {
            "layers": rows[0]["layers"],
            "questions": len(asked),
            "objects": len(seen),
            "image": image,
            "most": _highest(image),
        }
        if seen:
            numbers |= {"share": mean(shares, pictures), "times": mean(times, pictures)}
            numbers["most_on_object"] = _highest(numbers["share"])
        return numbers

    def caption(self, numbers: Numbers) -> str:
        image = np.array(numbers["image"]["mean"])
        layer, head = numbers["most"][0]
        told = [
            f"{numbers['questions']:,} questions of the form {exists('thing')!r}, all answered yes "
            "in truth. Attention: the sum of the weights of the prompt's last row on visual "
            f"tokens, per layer and head. {int((image >= 0.5).sum())} of {image.size} heads give "
            f"half of their attention or more to the image; the most, "
            f"{percent(image[layer, head])}, gives {self._place(numbers, layer, head)}."
        ]
        if "share" in numbers:
            layer, head = numbers["most_on_object"][0]
            share = numbers["share"]["mean"][layer][head]
            told.append(
                f"On the object: the share of a head's attention to the image that falls on the "
                f"tokens of the object's mask ({numbers['objects']:,} questions, those whose mask "
                f"covers a token by {percent(self.covered, 0)}), also as a multiple of the mask's "
                f"share of the tokens, which is what attention spread evenly gives. The most, "
                f"{percent(share)}, {numbers['times']['mean'][layer][head]:.1f} times as much as "
                f"spread evenly, gives {self._place(numbers, layer, head)}."
            )
        told.append("Bars' ends: 95 % t-intervals over pictures.")
        return " ".join(told)

    def draw(self, numbers: Numbers, sheet: Sheet) -> None:
        from ..plots.analysis import ranked, table

        layers = numbers["layers"]

        def on_image(panel: Any) -> None:
            table(panel, 100 * np.array(numbers["image"]["mean"]).T, layers, "%")

        def times(panel: Any) -> None:
            table(panel, np.array(numbers["times"]["mean"]).T, layers, "times", middle=1.0)

        def list_of(panel: Any, kind: str, most: str) -> None:
            places = numbers[most]
            ranked(panel, [f"layer {layers[la]}, head {he}" for la, he in places],
                   {k: [100 * v[la][he] for la, he in places]
                    for k, v in numbers[kind].items()})  # fmt: skip

        sheet.add("Attention to the image", "layer", "head", on_image)
        if "share" in numbers:
            sheet.add("To the object, against spread evenly", "layer", "head", times)
        sheet.add("Most on the image", "% of the head's attention", "",
                  lambda panel: list_of(panel, "image", "most"))  # fmt: skip
        if "share" in numbers:
            sheet.add("Most on the object", "% of the head's attention to the image", "",
                      lambda panel: list_of(panel, "share", "most_on_object"))  # fmt: skip

    def _place(self, numbers: Numbers, layer: int, head: int) -> str:
        return f"head {head} of layer {numbers['layers'][layer]}"


def _highest(values: Numbers) -> list[list[int]]:
    """(index of the layer, head) of the highest means, highest first."""
    means = np.nan_to_num(np.array(values["mean"]), nan=-math.inf)
    order = np.argsort(-means, axis=None, kind="stable")[:BEST]
    return [list(map(int, np.unravel_index(place, means.shape))) for place in order]
