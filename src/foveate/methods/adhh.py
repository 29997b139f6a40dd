"""AD-HH: adaptive deactivation of hallucination heads (modular attribution, ICLR 2025).

A few heads copy text and so cause words that the image does not show. When such a head looks
mostly at the text for the current token, its attention to that text is cut.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Anatomy, FoveateError, Method, Rows, file

Pairs = tuple[tuple[int, int], ...]

POCKET = Path(__file__).parent.parent / "pocket" / "heads.json"

# The authors' lists, most influential head first
# fmt: off
LLAVA_1_5_7B: Pairs = (
    (16, 29), (26, 9), (13, 31), (15, 10), (20, 12), (30, 9), (19, 18), (17, 0), (18, 9), (26, 28),
    (19, 27), (18, 26), (15, 25), (14, 16), (31, 26), (15, 24), (31, 3), (22, 20), (27, 29),
    (17, 28),
)
LLAVA_1_5_13B: Pairs = (  # its head in layer 0 is meant
    (0, 8), (29, 27), (23, 18), (20, 11), (36, 26), (19, 37), (22, 16), (22, 34), (21, 31),
    (20, 34), (37, 11), (17, 25), (35, 10), (17, 5), (15, 26), (0, 22), (19, 5), (19, 0), (14, 1),
    (23, 20), (21, 6), (30, 24), (26, 27), (21, 32), (15, 28), (15, 31), (19, 30), (20, 8),
    (19, 14), (14, 9), (39, 26), (25, 1), (18, 32), (17, 27), (39, 32),
)
LLAVA_1_6_34B: Pairs = (
    (45, 34), (43, 4), (43, 48), (44, 29), (35, 47), (40, 27), (54, 34), (37, 48), (43, 2),
    (41, 34),
)
# fmt: on

# (model_type, text_model_type, hidden_size, layers, attention_heads, key_value_heads) -> list
PUBLISHED: dict[tuple[Any, ...], Pairs] = {
    ("llava", "llama", 4096, 32, 32, 32): LLAVA_1_5_7B,
    ("llava", "llama", 5120, 40, 40, 40): LLAVA_1_5_13B,
    ("llava_next", "llama", 7168, 60, 56, 8): LLAVA_1_6_34B,
}


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
        cut = rows.plan[rows.layer].to(rows.x.device) & (looks >= self.threshold)
        return rows.x.masked_fill(cut & text, 0.0)

    def _pairs(self, known: dict[str, Any]) -> Pairs:
        if isinstance(self.heads, tuple):
            return tuple(sorted(set(self.heads)))
        if self.heads != "auto":
            return read(self.heads, known)
        published = PUBLISHED.get(tuple(known.values())[:-1])  # whatever the vocabulary
        if published is not None:
            return tuple(sorted(published))
        if POCKET.is_file() and _content(POCKET).get("model") == known:
            return read(POCKET, known)
        raise FoveateError(
            f"adhh has no list of heads for this model ({known['model_type']}, {known['layers']} "
            f"layers of {known['attention_heads']} heads): find one with `foveate heads MODEL` and "
            "name the file it writes, as in adhh(heads='heads.json')."
        )


def read(path: str | Path, here: dict[str, Any]) -> Pairs:
    """The (layer, head) pairs of a JSON file, sorted.

    The file is a list of pairs, or an object with such a list as "heads" and, where it says for
    which model, that model's shape (`Anatomy.shape`) as "model"; `here` is the present one's.

    Raises:
        FoveateError: if there is no such file, it is not of this form, or made for another model.
    """
    content = _content(Path(path))
    meant = content.get("model", {})
    if not isinstance(meant, dict):
        raise FoveateError(f'In {path}, "model" must be an object such as {json.dumps(here)}.')
    other = [
        f"{k} {meant[k]!r} instead of {here[k]!r}" for k in here if meant.get(k, here[k]) != here[k]
    ]
    if other:
        raise FoveateError(
            f"The heads in {path} were found for another model ({', '.join(other)}): "
            "run `foveate heads MODEL` for this one."
        )
    return content["heads"]


def _content(path: Path) -> dict[str, Any]:
    """The object in a file of heads, its "heads" being sorted pairs of whole numbers."""
    try:
        content = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError:
        raise FoveateError(
            f"adhh cannot read the file {str(path)!r}: heads must be 'auto', a JSON file made by "
            "`foveate heads MODEL`, or pairs such as ((16, 29), (26, 9))."
        ) from None
    except ValueError as error:
        raise FoveateError(f"The file {path} is not JSON ({error}): make it again.") from None
    content = content if isinstance(content, dict) else {"heads": content}
    pairs = content.get("heads")
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise FoveateError(
            f"The file {path} holds no list of [layer, head] pairs, counted from 0, such as "
            '{"heads": [[16, 29], [26, 9]]}: make it with `foveate heads MODEL`.'
        )
    return content | {"heads": tuple(sorted({(layer, head) for layer, head in pairs}))}


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int and number >= 0 for number in value)
    )
