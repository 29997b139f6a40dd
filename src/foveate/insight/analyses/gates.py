"""Which vision layer reaches which decoder layer? (CLI, arXiv 2601.10710, Figure 1(b))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ...base.errors import FoveateError
from ...base.intervals import mean
from ...methods.cli.method import CLI
from ..analysis import Analysis, Measurement, Numbers, Stack, rounded
from ..truth import AnnotatedImage

if TYPE_CHECKING:
    from ...vlm.vlm import VLM
    from ..plots.analysis import Sheet


@dataclass(frozen=True)
class Gates(Analysis):
    """The mean gate of every pair of vision layer and decoder layer of an injection.

    The gate is g of CLI: what a vision layer's features are multiplied by before they are added to
    the image positions where they enter a decoder layer. It is read in the prefill of every
    question; an injection that is not gated (`gate=static`) has one number per pair.
    """

    name: ClassVar[str] = "gates"
    title: ClassVar[str] = "Gates of the injection"
    source: ClassVar[str] = "CLI, arXiv 2601.10710, Figure 1(b)"
    methods: ClassVar[tuple[str, ...]] = ("cli",)  # which then asks for its path
    compares: ClassVar[bool] = True
    pictures: ClassVar[int] = 100

    def suit(self, stacks: dict[str, Stack]) -> None:
        found = [method for stack in stacks.values() for method in stack]
        if not any(isinstance(m, CLI) and (m.path or m.seed is not None) for m in found):
            raise FoveateError(
                "gates are those of a trained injection: choose it with --method "
                '"cli(path=FOLDER)", and the model that it was trained with by --model.'
            )

    def measure(self, vlm: VLM, picture: AnnotatedImage, stacks: dict[str, Stack]) -> Measurement:
        injecting = {
            name: stack
            for name, stack in stacks.items()
            if any(isinstance(method, CLI) for method in stack)
        }
        image, asked = picture.load(), picture.asked()
        chats = [vlm.chat([image], question.text, None) for question in asked]
        found: Measurement = {}
        for name, stack in injecting.items():
            with torch.no_grad(), vlm.using(stack, chats):
                gates = CLI.gates(vlm.model(**vlm.inputs(chats)))
            (method,) = (m.resolve(vlm.model) for m in stack if isinstance(m, CLI))
            found[name] = {
                "layers": list(method.layers or ()),
                "vision_layers": list(method.vision_layers or ()),
                "gates": rounded(gates),  # (questions, decoder layers, vision layers)
            }
        return {"methods": found}

    def count(self, rows: Sequence[Measurement]) -> Numbers:
        found: Numbers = {}
        for name, first in rows[0]["methods"].items():
            read = [(row["picture"], np.array(row["methods"][name]["gates"])) for row in rows]
            gates = np.concatenate([own for _, own in read])
            pictures = [picture for picture, own in read for _ in own]
            found[name] = {
                "layers": first["layers"],
                "vision_layers": first["vision_layers"],
                "questions": len(gates),
                "gate": mean(gates, pictures),
                "deviation": gates.std(0).tolist(),
            }
        return {"methods": found}

    def caption(self, numbers: Numbers) -> str:
        told = [
            "The gate, what a vision layer's projected features are multiplied by before they are "
            "added to the image positions at the entry of a decoder layer: mean over pictures of "
            "each picture's own mean over its questions, after ± the standard deviation over "
            "questions where there is any."
        ]
        for name, own in numbers["methods"].items():
            start = f"{name}: " * (len(numbers["methods"]) > 1)
            told.append(
                f"{start}{own['questions']:,} questions; most {self._pair(own, np.nanargmax)}, "
                f"least {self._pair(own, np.nanargmin)} (95 % t-intervals over pictures)."
            )
        if any(np.isnan(own["gate"]["mean"]).any() for own in numbers["methods"].values()):
            told.append("Grey: not connected.")
        return " ".join(told)

    def draw(self, numbers: Numbers, sheet: Sheet) -> None:
        from ..plots.gates import pairs

        for name, own in numbers["methods"].items():

            def panel(axes: Any, own: Numbers = own) -> None:
                middle, around = (
                    np.array(v, float) for v in (own["gate"]["mean"], own["deviation"])
                )
                pairs(axes, middle, around, own["vision_layers"], own["layers"])

            title = "Mean gate" if len(numbers["methods"]) == 1 else short(name)
            sheet.add(title, "decoder layer", "vision layer", panel)

    def _pair(self, own: Numbers, choose: Any) -> str:
        """A pair in words, with its mean and interval."""
        gate = {key: np.array(value, float) for key, value in own["gate"].items()}
        layer, vision = np.unravel_index(choose(gate["mean"]), gate["mean"].shape)
        value, low, high = (float(gate[key][layer, vision]) for key in ("mean", "low", "high"))
        return (
            f"{value:.3g} ({low:.3g} to {high:.3g}) from vision layer "
            f"{own['vision_layers'][vision]} into decoder layer {own['layers'][layer]}"
        )


def short(name: str, most: int = 50) -> str:
    """A method's text form, with its middle left out where it is long."""
    half = (most - 5) // 2
    return name if len(name) <= most else f"{name[:half]} ... {name[-half:]}"
