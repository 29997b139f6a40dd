"""Which layer does a question change most? (LASER, arXiv 2602.04304, Figures 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ...backends.transformers.anatomy import anatomy
from ...base.errors import FoveateError
from ...base.stats import mean
from ...methods.laser import LASER
from ..analysis import (
    Analysis,
    Measurement,
    Numbers,
    Stack,
    about,
    chance,
    percent,
    pooled,
    rounded,
)
from ..truth import AnnotatedImage

if TYPE_CHECKING:
    from ...vlm.vlm import VLM
    from ..plots.analysis import Sheet


@dataclass(frozen=True)
class Layers(Analysis):
    """LASER's VAQ of every layer, and the layer that it chooses, by kind of question.

    VAQ, eq. (3) to (5), is how much the question adds to the attention to the image; the chosen
    layer, eq. (6), is the one where it adds most.

    Attributes:
        heads, noq: as in `laser`: the heads of a layer that count, and what is read without the
            question.
    """

    heads: int | Literal["all"] = LASER.heads
    noq: Literal["empty", "instruction_only"] = LASER.noq

    name: ClassVar[str] = "layers"
    title: ClassVar[str] = "Where a question changes attention to the image"
    source: ClassVar[str] = "LASER, arXiv 2602.04304, Figures 4 and 5"

    def check(self) -> None:
        LASER(heads=self.heads, noq=self.noq)

    def measure(self, vlm: VLM, picture: AnnotatedImage, stacks: dict[str, Stack]) -> Measurement:
        method = LASER(heads=self.heads, noq=self.noq).resolve(anatomy(vlm.model))
        assert isinstance(method, LASER)
        asked = picture.asked()
        chats = about(vlm, picture, [question.text for question in asked])
        questions = []
        for question, readings in zip(asked, method.readings(vlm, chats), strict=True):
            evidence = method.evidence(*readings)
            questions.append(
                {"group": question.group, "vaq": rounded(evidence.vaq), "layer": evidence.layer}
            )
        return {"layers": list(method.layers or ()), "questions": questions}

    def count(self, rows: Sequence[Measurement]) -> Numbers:
        layers: list[int] = rows[0]["layers"]
        asked, pictures = pooled(rows, "questions")
        if all(q["layer"] is None for q in asked):
            raise FoveateError("layers: no question changes the attention to its picture.")
        vaq = np.array([q["vaq"] for q in asked])
        groups: Numbers = {}
        for name in dict.fromkeys(q["group"] for q in asked):
            places = [i for i, q in enumerate(asked) if q["group"] == name]
            chosen = [asked[i]["layer"] for i in places if asked[i]["layer"] is not None]
            groups[name] = {
                "questions": len(places),
                "unchanged": len(places) - len(chosen),
                "vaq": mean(vaq[places], [pictures[i] for i in places]),
                "chosen": [chosen.count(layer) for layer in layers],
            }
        chosen_by_group = [group["chosen"] for group in groups.values()]
        return {
            "layers": layers,
            "questions": len(asked),
            "vaq": mean(vaq, pictures),
            "chosen": np.sum(chosen_by_group, 0).tolist(),
            "groups": groups,
            "association": association(chosen_by_group),
        }

    def caption(self, numbers: Numbers) -> str:
        layers, groups, every = numbers["layers"], numbers["groups"], numbers["chosen"]
        top = int(np.argmax(numbers["vaq"]["mean"]))
        most = int(np.argmax(every))
        told = [
            f"{numbers['questions']:,} questions ("
            + ", ".join(f"{group['questions']:,} {name}" for name, group in groups.items())
            + "). VAQ: norm of what the question adds to the prompt's last row's attention to the "
            f"image, mean over the {self.heads} heads of a layer with the largest (all, where it "
            "has fewer); without the question is the "
            + ("empty prompt" if self.noq == "empty" else "answer instruction alone")
            + f". Mean VAQ is highest in layer {layers[top]}; layer {layers[most]} is chosen most, "
            f"for {percent(every[most] / max(sum(every), 1))} of the questions."
        ]
        if lost := sum(group["unchanged"] for group in groups.values()):
            told.append(f"{lost:,} questions change nothing and choose no layer.")
        if test := numbers["association"]:
            told.append(
                f"Kind of question and chosen layer: Cramér's V {test['v']:.2f}, chi-squared test "
                f"{chance(test['p'])} (questions taken as independent)."
            )
        told.append("Bands: 95 % t-intervals over pictures.")
        return " ".join(told)

    def draw(self, numbers: Numbers, sheet: Sheet) -> None:
        from ..plots.analysis import SERIES, bands, bars, cells, whole

        layers, groups = numbers["layers"], numbers["groups"]

        def activation(panel: Any) -> None:
            bands(panel, layers, {"": numbers["vaq"]}, SERIES[1:])

        def by_group(panel: Any) -> None:
            bands(panel, layers, {name: group["vaq"] for name, group in groups.items()})

        def chosen(panel: Any) -> None:
            share = 100 * np.array(numbers["chosen"]) / max(sum(numbers["chosen"]), 1)
            bars(panel, layers, {"": share.tolist()})
            whole(panel, layers)

        def shares(panel: Any) -> None:
            counts = np.array([group["chosen"] for group in groups.values()], float)
            cells(panel, 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1), layers, groups)

        sheet.add("VAQ, all questions", "layer", "VAQ", activation)
        sheet.add("Chosen layer, all questions", "layer", "% of questions", chosen)
        if len(groups) > 1:
            sheet.add("VAQ by kind of question", "layer", "VAQ", by_group)
            sheet.add("Chosen layer, % of each kind", "layer", "", shares)


def association(counts: Sequence[Sequence[int]]) -> Numbers | None:
    """Cramér's V and the chi-squared test (scipy) of a table; None where it has one row or column.

    Args:
        counts: rows x columns; empty ones are left out.
    """
    from scipy import stats

    table = np.array(counts)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    if min(table.shape) < 2:
        return None
    return {
        "v": float(stats.contingency.association(table, method="cramer")),
        "p": float(stats.chi2_contingency(table).pvalue),
    }
