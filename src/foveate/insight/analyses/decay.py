"""Does attention find the object and drop it? (CLVS, arXiv 2509.12897, Figures 2 and 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...backends.transformers.record import Recorder
from ...base.errors import FoveateError
from ...base.stats import mean, ratio
from ...families.layout import WHOLE
from ...vlm.answering import answer_all, complete
from ..analysis import Analysis, Measurement, Numbers, Stack, about, percent, pooled, rounded
from ..truth import AnnotatedImage, exists

if TYPE_CHECKING:
    from ...vlm.vlm import VLM
    from ..plots.analysis import Sheet

CLIP = 1.0  # a relative increase counts at most this much, as published
AHEAD = 3  # layers after the peak: the paper's 15 to 17 follow one in layer 14


@dataclass(frozen=True)
class Decay(Analysis):
    """Attention to the object that is asked about, layer by layer.

    For every kind of thing on a picture the model is asked whether it is there, and the attention
    of the prompt's last row in each layer, mean over heads, is summed over the visual tokens in
    the thing's mask (the formula is inferred, as the paper's text lost it).

    Attributes:
        covered: a token is in the mask where at least this share of its place is covered
            (inferred: 0.5).
    """

    covered: float = 0.5

    name: ClassVar[str] = "decay"
    title: ClassVar[str] = "Attention to the object that is asked about"
    source: ClassVar[str] = "CLVS, arXiv 2509.12897, Figures 2 and 6"
    methods: ClassVar[tuple[str, ...]] = ("clvs",)
    compares: ClassVar[bool] = True

    def check(self) -> None:
        self.require(0 < self.covered <= 1, "covered must lie above 0 and not above 1")

    def measure(self, vlm: VLM, picture: AnnotatedImage, stacks: dict[str, Stack]) -> Measurement:
        chats = about(vlm, picture, [exists(kind) for kind in picture.objects])
        grids = vlm.grids(chats[0])
        masks = [picture.target(kind) for kind in picture.objects]
        objects: list[Measurement] = [{"object": kind} for kind in picture.objects]
        layers: tuple[int, ...] = ()
        for name, stack in stacks.items():
            answers = complete(answer_all(vlm, chats, (*stack, Recorder()), 1))
            for row, mask, answer in zip(objects, masks, answers, strict=True):
                assert answer.record is not None
                layers, weights = answer.record.layers, answer.record.image()[0].double().cpu()
                inside = mask.tokens(grids, weights.shape[-1], [WHOLE]) >= self.covered
                row["area"] = inside.double().mean().item()
                row[name] = {
                    "object": rounded(weights[:, inside].sum(-1)),
                    "image": rounded(weights.sum(-1)),
                }
        return {"layers": list(layers), "objects": objects}

    def count(self, rows: Sequence[Measurement]) -> Numbers:
        asked, pictures = pooled(rows, "objects")
        pictures = [picture for picture, o in zip(pictures, asked, strict=True) if o["area"]]
        seen = [o for o in asked if o["area"]]
        if not seen:
            raise FoveateError(
                f"decay: not one of {len(asked)} objects covers a visual token by "
                f"{percent(self.covered, 0)}: give a smaller covered."
            )
        layers: list[int] = rows[0]["layers"]
        names = [name for name in seen[0] if name not in ("object", "area")]
        read = {
            name: {kind: np.array([o[name][kind] for o in seen]) for kind in ("object", "image")}
            for name in names
        }
        plain = read["vanilla"]["object"]
        numbers: Numbers = {
            "layers": layers,
            "objects": len(seen),
            "too_small": len(asked) - len(seen),
            "area": mean([o["area"] for o in seen], pictures),
            "methods": {},
        }
        peak = decay(plain, pictures)["peak"]
        for name, values in read.items():
            on_object = values["object"]
            figures = numbers["methods"][name] = {
                "object": mean(on_object, pictures),
                "image": mean(values["image"], pictures),
                "share": mean(ratio(on_object, values["image"]), pictures),
                "peaks": np.bincount(on_object.argmax(1), minlength=len(layers)).tolist(),
                "decay": decay(on_object, pictures),
            }
            if name != "vanilla":
                more = np.minimum(ratio(on_object, plain) - 1, CLIP)
                figures["increase"] = mean(more, pictures)
                figures["increase_all"] = mean(np.nanmean(more, 1), pictures)
                if peak is not None and (after := more[:, peak + 1 : peak + 1 + AHEAD]).size:
                    figures["increase_next"] = mean(np.nanmean(after, 1), pictures)
        return numbers

    def caption(self, numbers: Numbers) -> str:
        told = [
            f"{numbers['objects']:,} questions of the form {exists('thing')!r}, one per kind of "
            f"thing on the picture and all answered yes in truth; {numbers['too_small']:,} more "
            f"have masks that cover no visual token by {percent(self.covered, 0)} and are left "
            "out. Attention: weights of the prompt's last row, mean over heads, summed over the "
            "visual tokens in the mask. Share: the same divided by the attention to the whole "
            "image, which would be the dotted line if attention were spread evenly. Bands: 95 % "
            "t-intervals over pictures."
        ]
        for name, figures in numbers["methods"].items():
            told.append(f"{name}: {_fall(figures['decay'], numbers['layers'])}")
            if name != "vanilla":
                change = [f"{_told(figures['increase_all'])} on average over all layers"]
                if "increase_next" in figures:
                    change.append(
                        f"{_told(figures['increase_next'])} in those after vanilla's peak"
                    )
                told.append(
                    f"Its attention to the object against vanilla's is {', '.join(change)} "
                    "(each question and layer counts +100 % at most)."
                )
        return " ".join(told)

    def draw(self, numbers: Numbers, sheet: Sheet) -> None:
        from ..plots.analysis import SERIES, bands, bars, whole, zero
        from ..plots.style import QUIET

        layers, methods = numbers["layers"], numbers["methods"]

        def curves(panel: Any, kind: str) -> None:
            bands(panel, layers, {n: m[kind] for n, m in methods.items()}, scale=100)

        def shares(panel: Any) -> None:
            curves(panel, "share")
            panel.axhline(100 * numbers["area"]["mean"], color=QUIET, ls=":", label="spread evenly")

        def peaks(panel: Any) -> None:
            bars(panel, layers, {n: [100 * c / numbers["objects"] for c in m["peaks"]]
                                 for n, m in methods.items()})  # fmt: skip
            whole(panel, layers)

        def more(panel: Any) -> None:
            zero(panel)
            others = {n: m["increase"] for n, m in methods.items() if "increase" in m}
            bands(panel, layers, others, SERIES[1:] + SERIES[:1], 100)

        sheet.add("Attention to the object", "layer", "% of all attention",
                  lambda panel: curves(panel, "object"))  # fmt: skip
        sheet.add("Share of the image's attention", "layer", "% of attention to the image", shares)
        sheet.add("Where attention to the object peaks", "layer", "% of questions", peaks)
        if len(methods) > 1:
            title = "More attention to the object than vanilla"
            sheet.add(title, "layer", "%, at most 100 each", more)


def decay(values: np.ndarray, pictures: Sequence[Any]) -> Numbers:
    """What is lost after the peak of the mean curve.

    The peak is looked for on every other picture, and what follows it is read on the rest, so that
    a layer that is highest by chance does not make a drop.

    Args:
        values: (N, layers). pictures: which picture each of the N is of.

    Returns:
        "peak" (index of the layer, None where there are too few pictures); "next" and "later":
        {"mean", "low", "high"} of the change in the next `AHEAD`, and in all later layers, as a
        fraction of the mean at the peak; NaN where the peak is the last layer.
    """
    order = list(dict.fromkeys(pictures))
    rank = np.array([order.index(picture) % 2 for picture in pictures])
    if len(order) < 4:
        return {"peak": None, "next": None, "later": None}
    chosen, tested = values[rank == 0], values[rank == 1]
    chosen_pictures, tested_pictures = (
        [picture for picture, side in zip(pictures, rank, strict=True) if side == wanted]
        for wanted in (0, 1)
    )
    peak = int(np.argmax(mean(chosen, chosen_pictures)["mean"]))
    height = mean(tested[:, peak], tested_pictures)["mean"]
    drop: Numbers = {"peak": peak}
    for kind, last in (("next", peak + 1 + AHEAD), ("later", values.shape[1])):
        after = tested[:, peak + 1 : last]
        change = after.mean(1) - tested[:, peak] if after.size else tested[:, peak] * math.nan
        drop[kind] = {k: float(v) / height for k, v in mean(change, tested_pictures).items()}
    return drop


def _fall(drop: Numbers, layers: Sequence[int]) -> str:
    """The drop in words."""
    if drop["peak"] is None:
        return "too few pictures to say whether attention drops after a peak."
    peak = layers[drop["peak"]]
    if peak == layers[-1]:
        return f"attention to the object is highest in the last layer, {peak}: nothing follows it."
    change = [
        f"{_told(drop['next'])} in the next {min(AHEAD, len(layers) - 1 - drop['peak'])}",
        f"{_told(drop['later'])} over all later layers",
    ]
    return (
        f"on half of the pictures attention to the object is highest in layer {peak}; on the other "
        f"half it changes from there by {change[0]}, {change[1]}."
    )


def _told(change: Numbers) -> str:
    ends = f"{percent(change['low'], sign=True)} to {percent(change['high'], sign=True)}"
    return f"{percent(change['mean'], sign=True)} ({ends})"
