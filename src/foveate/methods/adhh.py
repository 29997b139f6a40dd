"""AD-HH: adaptive deactivation of hallucination heads (modular attribution, ICLR 2025).

A few heads copy text and so cause words that the image does not show. When such a head looks
mostly at the text for the current token, its attention to that text is cut.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import headlist
from ..core import Anatomy, FoveateError, Method, Rows, file

PUBLISHED = Path(__file__).with_suffix(".json")  # the authors' lists, most influential head first
POCKET = Path(__file__).parent.parent / "pocket" / "heads.json"


@dataclass(frozen=True)
class ADHH(Method):
    """Adaptive deactivation of hallucination heads that look mostly at the text.

    Acts on the last query row of the listed heads, in prefill and at every decode step: where a
    head's weights on the columns after the last visual token (question and generated tokens; the
    text before the image does not count) sum to `threshold` or more, they become 0. The other
    weights stay as they are, so such a row sums to less than 1, as in the authors' code. Decided
    per sample and per head; the authors' code pools the sum over the batch, and skips the method
    under SDPA.

    Attributes:
        threshold: share of text from which a head is cut, 0 to 1; above 1 never cuts. Published:
            0.5 in the authors' comparison script, while their LLaVA caption script says 0.4.
        heads: ((layer, head), ...), 0-based; or the path of a JSON file, either a list of pairs or
            what ``foveate heads`` writes; or "auto": the authors' lists for LLaVA-1.5 7B and 13B
            and LLaVA-1.6 34B, known by architecture and shape, and the pocket model's own.
        layers: leaves only the listed heads of these layers; None = all of them.
    """

    threshold: float = 0.5
    heads: str | tuple[tuple[int, int], ...] = file("auto")

    name: ClassVar[str] = "adhh"
    neutral: ClassVar[dict[str, Any]] = {"threshold": 2.0}
    example: ClassVar[dict[str, Any]] = {
        "threshold": 0.3,
        "heads": ((2, 0), (2, 1), (2, 3)),
    }
    columns: ClassVar = "through"
    row_sum_one: ClassVar[bool] = False

    def check(self) -> None:
        self.require(self.threshold >= 0, "threshold must be 0 or more")
        self.require(
            isinstance(self.heads, str)
            or all(number >= 0 for pair in self.heads for number in pair),
            "heads are pairs of a layer and a head, both counted from 0",
        )

    @property
    def is_neutral(self) -> bool:
        """Whether no head can be cut: a threshold above 1, or no heads."""
        return self.threshold > 1 or self.heads == ()

    def resolve(self, anatomy: Anatomy) -> Method:
        """The same method with `heads` as pairs that the model has, and `layers` where they are.

        Raises:
            FoveateError: if there is no list for this model, or the list does not fit it.
        """
        pairs = self._pairs(anatomy.shape)
        for layer, head in pairs:
            if layer >= anatomy.depth or head >= anatomy.heads:
                raise FoveateError(
                    f"adhh: there is no head ({layer}, {head}), this model has layers 0 to "
                    f"{anatomy.depth - 1} with heads 0 to {anatomy.heads - 1}."
                )
        if self.layers is not None:
            wanted = super().resolve(anatomy).layers or ()
            pairs = tuple(pair for pair in pairs if pair[0] in wanted)
            if not pairs:
                raise FoveateError(
                    f"adhh: no listed head lies in layers={self.layers}, so there is nothing to "
                    "cut: name other layers, or none."
                )
        layers = tuple(sorted({layer for layer, _ in pairs}))
        return Method.resolve(dataclasses.replace(self, heads=pairs, layers=layers), anatomy)

    def setup(self, anatomy: Anatomy) -> dict[int, Tensor]:
        """Layer -> its listed heads, (H, 1, 1) bool on the layer's device."""
        assert isinstance(self.heads, tuple)  # resolved before
        plan = {}
        for layer in self.layers or ():
            mask = torch.zeros(anatomy.heads, 1, 1, dtype=torch.bool)
            mask[[head for at, head in self.heads if at == layer]] = True
            plan[layer] = mask.to(anatomy.layer_device(layer))
        return plan

    def weights(self, rows: Rows) -> Tensor:
        text = rows.after[:, None, None]
        looks = (rows.x * text).sum(-1, keepdim=True)
        here = rows.these_heads(rows.plan[rows.layer].to(rows.x.device)[None])
        cut = here & (looks >= self.threshold)
        return rows.x.masked_fill(cut & text, 0.0)

    def _pairs(self, shape: dict[str, Any]) -> headlist.Pairs:
        if isinstance(self.heads, tuple):
            return tuple(sorted(set(self.heads)))
        if self.heads != "auto":
            return headlist.read(self.heads, shape)
        pairs = headlist.find((PUBLISHED, POCKET), shape)
        if pairs is None:
            raise FoveateError(
                f"adhh has no list of heads for this model ({shape['model_type']}, "
                f"{shape['layers']} layers of {shape['attention_heads']} heads): find one with "
                "`foveate heads MODEL` and name the file it writes, as in adhh(heads='heads.json')."
            )
        return pairs
