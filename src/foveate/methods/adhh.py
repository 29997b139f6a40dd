"""AD-HH: adaptive deactivation of hallucination heads (modular attribution, ICLR 2025).

A few heads copy text and so cause words that the image does not show. When such a head looks
mostly at the text for the current token, its attention to that text is cut.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.artifact import HEADS, Artifact, check_model, read_config
from ..core import Anatomy, FoveateError, Method, Rows, file

PUBLISHED = Path(__file__).with_suffix(".json")  # the authors' lists, most influential head first
POCKET = Path(__file__).parent.parent / "pocket" / "heads"

Pairs = tuple[tuple[int, int], ...]
"""(layer, head), counted from 0."""


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
        threshold: share of text from which a head is cut, 0 or more; above 1 never cuts.
            Published: 0.5 in the authors' comparison script, 0.4 in their caption script.
        heads: ((layer, head), ...), 0-based; or what ``foveate heads`` writes, a folder or the
            name of a hub repository; or a JSON file with a list of pairs, which may name its model
            as in ``{"heads": [[16, 29]], "model": {"layers": 32}}``; or "auto": the authors' lists
            for LLaVA-1.5 7B and 13B and LLaVA-1.6 34B, known by architecture and shape, and the
            pocket model's own.
        layers: only listed heads of these layers are cut. None: all listed heads.
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
    remembers: ClassVar[bool] = False
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

    def _pairs(self, shape: dict[str, Any]) -> Pairs:
        if isinstance(self.heads, tuple):
            return _sorted(self.heads)
        if self.heads != "auto":
            path = Path(self.heads).expanduser()
            return _listed(path, shape) if path.is_file() else _kept(self.heads, shape)
        for entry in _published():
            if entry["model"].items() <= shape.items():
                return _sorted(entry["heads"])
        if read_config(POCKET, HEADS)["model"] == shape:
            return _kept(POCKET, shape)
        raise FoveateError(
            f"adhh has no list of heads for this model ({shape['model_type']}, "
            f"{shape['layers']} layers of {shape['attention_heads']} heads): find one with "
            "`foveate heads MODEL` and name the folder it writes, as in adhh(heads='FOLDER')."
        )


def _kept(path: Path | str, shape: Mapping[str, Any]) -> Pairs:
    """The heads of an artifact."""
    check_model(path, HEADS, shape)
    heads = Artifact.from_pretrained(path, HEADS).tensors.get("heads")
    if heads is None or heads.dim() != 2 or heads.shape[1] != 2 or heads.is_floating_point():
        raise FoveateError(
            f"{path} is damaged: it has no heads (N, 2). Make it again with `foveate heads MODEL`."
        )
    return _sorted(heads.tolist())


def _listed(path: Path, shape: Mapping[str, Any]) -> Pairs:
    """The heads of a JSON file; a bare list of pairs serves every model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FoveateError(f"adhh cannot read the file {path}: {error.strerror}.") from error
    except ValueError as error:
        raise FoveateError(f"The file {path} is not JSON ({error}): make it again.") from None
    entry = content if isinstance(content, dict) else {"heads": content}
    pairs, model = entry.get("heads"), entry.get("model", {})
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise FoveateError(
            f"The file {path} holds no list of [layer, head] pairs, counted from 0, such as "
            '{"heads": [[16, 29], [26, 9]]}.'
        )
    if not isinstance(model, dict):
        raise FoveateError(
            f'In {path}, "model" must be an object such as {json.dumps(dict(shape))}.'
        )
    different = [
        f"{key} {model[key]!r} instead of {value!r}"
        for key, value in shape.items()
        if model.get(key, value) != value
    ]
    if different:
        raise FoveateError(
            f"The heads in {path} were found for another model ({', '.join(different)}): "
            "run `foveate heads MODEL` for this one."
        )
    return _sorted(pairs)


@functools.cache
def _published() -> Any:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int and number >= 0 for number in value)
    )


def _sorted(pairs: Any) -> Pairs:
    return tuple(sorted({(layer, head) for layer, head in pairs}))
