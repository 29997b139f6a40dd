"""Which vision layer reaches which decoder layer? (CLI, arXiv 2601.10710, Figure 1(b))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ...backends.transformers.anatomy import anatomy
from ...base.errors import FoveateError
from ...base.stats import mean
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
        methods = [m for stack in stacks.values() for m in stack if isinstance(m, CLI)]
        if not any(method.path or method.seed is not None for method in methods):
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
            (method,) = (m.resolve(anatomy(vlm.model)) for m in stack if isinstance(m, CLI))
            found[name] = {
                "layers": list(method.layers or ()),
                "vision_layers": list(method.vision_layers or ()),
                "gates": rounded(gates),  # (questions, decoder layers, vision layers)
            }
        return {"methods": found}

    def count(self, rows: Sequence[Measurement]) -> Numbers:
        methods: Numbers = {}
        for name, first in rows[0]["methods"].items():
            by_picture = [np.array(row["methods"][name]["gates"]) for row in rows]
            gates = np.concatenate(by_picture)
            pictures = [row["picture"] for row in rows]
            methods[name] = {
                "layers": first["layers"],
                "vision_layers": first["vision_layers"],
                "questions": len(gates),
                "gate": mean(gates, np.repeat(pictures, list(map(len, by_picture))).tolist()),
                "deviation": gates.std(0).tolist(),
            }
        return {"methods": methods}

    def caption(self, numbers: Numbers) -> str:
        methods = numbers["methods"]
        sentences = [
            "The gate, what a vision layer's projected features are multiplied by before they are "
            "added to the image positions at the entry of a decoder layer: mean over pictures of "
            "each picture's own mean over its questions, after ± the standard deviation over "
            "questions where there is any."
        ]
        for name, counted in methods.items():
            start = f"{name}: " * (len(methods) > 1)
            most, least = (_pair(counted, choose) for choose in (np.nanargmax, np.nanargmin))
            sentences.append(
                f"{start}{counted['questions']:,} questions; most {most}, least {least} "
                "(95 % t-intervals over pictures)."
            )
        if any(np.isnan(counted["gate"]["mean"]).any() for counted in methods.values()):
            sentences.append("Grey: not connected.")
        return " ".join(sentences)

    def draw(self, numbers: Numbers, sheet: Sheet) -> None:
        from ..plots.gates import pairs

        for name, counted in numbers["methods"].items():

            def panel(axes: Any, counted: Numbers = counted) -> None:
                gates = np.array(counted["gate"]["mean"], float)
                spread = np.array(counted["deviation"], float)
                pairs(axes, gates, spread, counted["vision_layers"], counted["layers"])

            title = "Mean gate" if len(numbers["methods"]) == 1 else short(name)
            sheet.add(title, "decoder layer", "vision layer", panel)


def _pair(counted: Numbers, choose: Any) -> str:
    """The pair of layers that `choose` picks by its mean gate, in words and with its interval."""
    gate = {key: np.array(value, float) for key, value in counted["gate"].items()}
    layer, vision = np.unravel_index(choose(gate["mean"]), gate["mean"].shape)
    value, low, high = (float(gate[key][layer, vision]) for key in ("mean", "low", "high"))
    return (
        f"{value:.3g} ({low:.3g} to {high:.3g}) from vision layer "
        f"{counted['vision_layers'][vision]} into decoder layer {counted['layers'][layer]}"
    )


def short(name: str, most: int = 50) -> str:
    """A method's text form, with its middle left out where it is long."""
    half = (most - 5) // 2
    return name if len(name) <= most else f"{name[:half]} ... {name[-half:]}"
