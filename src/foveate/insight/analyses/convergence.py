"""Is a layer that is certain also done? (CLVS, arXiv 2509.12897, Figure 4)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...backends.transformers.anatomy import anatomy
from ...backends.transformers.record import Recorder
from ...base.stats import correlation, mean, proportion
from ...core import Sequences, Stream
from ...methods.clvs import CLVS
from ...vlm.answering import answer_all, complete
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

BINS = 10  # of uncertainty


@dataclass(frozen=True)
class Lens(Recorder, register=False):
    """Keep the last row of the residual stream after every layer; changes nothing.

    The record's values are (B, layers, D); `keep` and `heads` have no meaning here.
    """

    def wants(self, stage: str) -> bool:
        return stage == "before"

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        if seq.phase != "prefix":
            memory = seq.memory
            if stream.layer == 0:
                memory["visual"] = seq.visual
                memory["steps"] = [*memory.get("steps", ()), []]
            else:
                memory["steps"][-1].append(stream.last)
        return stream.x


@dataclass(frozen=True)
class Convergence(Analysis):
    """A layer's uncertainty against whether its greedy token is already the model's.

    After every layer the residual stream of the prompt's last row is unembedded (the logit lens):
    the uncertainty is u of CLVS's eq. (8), and the layer has converged where the token with the
    largest logit is the token that the model writes. The last layer, which writes it, is shown but
    not counted.

    Attributes:
        top_k, final_norm: of the lens, as in `clvs`; published: 10 tokens, no norm.
    """

    top_k: int = CLVS.top_k
    final_norm: bool = CLVS.final_norm

    name: ClassVar[str] = "convergence"
    title: ClassVar[str] = "Uncertainty and convergence of layers"
    source: ClassVar[str] = "CLVS, arXiv 2509.12897, Figure 4"
    needs: ClassVar[tuple[str, ...]] = ("scipy", "statsmodels")

    def check(self) -> None:
        self.require(self.top_k >= 2, "top_k must be 2 or more")

    def measure(self, vlm: VLM, picture: AnnotatedImage, stacks: dict[str, Stack]) -> Measurement:
        asked = picture.asked()
        chats = about(vlm, picture, [question.text for question in asked])
        answers = complete(answer_all(vlm, chats, (Lens(),), 1))
        questions = []
        for question, answer in zip(asked, answers, strict=True):
            assert answer.record is not None
            u, tokens, written = self.lens(vlm.model, answer.record.values[0][0])
            converged = (tokens == written).int().tolist()
            questions.append({"group": question.group, "u": rounded(u), "converged": converged})
        return {"questions": questions}

    def lens(self, model: Any, stream: Tensor) -> tuple[Tensor, Tensor, int]:
        """What each layer would say.

        Args:
            stream: (L, D), the residual stream after each layer.

        Returns:
            u (L,) float32, the greedy tokens (L,) int64, and the model's own greedy token.
        """
        clvs = CLVS(top_k=self.top_k, final_norm=self.final_norm)
        known = anatomy(model)
        with torch.no_grad():
            seen = known.norm(stream) if self.final_norm else stream
            tokens = known.unembed(seen).argmax(-1)
            written = known.unembed(known.norm(stream[-1])).argmax(-1)
            return clvs.uncertainty(stream, known), tokens, int(written)

    def count(self, rows: Sequence[Measurement]) -> Numbers:
        asked, pictures = pooled(rows, "questions")
        u = np.array([q["u"] for q in asked])  # (N, L)
        converged = np.array([q["converged"] for q in asked])
        depth = u.shape[1]
        counted = slice(0, max(1, depth - 1))
        x, y = u[:, counted].ravel(), converged[:, counted].ravel()
        groups = np.repeat(np.unique(pictures, return_inverse=True)[1], u[:, counted].shape[1])
        edges = np.linspace(0, 1, BINS + 1)
        place = np.digitize(x, edges[1:-1])
        return {
            "layers": list(range(depth)),
            "questions": len(asked),
            "uncertainty": mean(u, pictures),
            "converged": mean(converged, pictures),
            "pairs": len(x),
            "correlation": correlation(x, y),
            "by_layer": [correlation(u[:, la], converged[:, la]) for la in range(depth)],
            "logistic": logistic(x, y, groups),
            "stop": {
                "layer": (layer := min(math.floor(CLVS.stop_from * depth) + 1, depth - 1)),
                "share": float((stops := u[:, layer] < CLVS.stop_threshold).mean()),
                "converged": float(converged[stops, layer].mean()) if stops.any() else math.nan,
            },
            "bins": [
                {"from": edges[b], "to": edges[b + 1], **proportion(y[place == b])}
                for b in range(BINS)
            ],
        }

    def caption(self, numbers: Numbers) -> str:
        r, fit = numbers["correlation"]["r"], numbers["logistic"]
        told = [
            f"{numbers['questions']:,} questions, {numbers['pairs']:,} pairs of question and "
            f"layer. Uncertainty: u of CLVS's eq. (8), over the {self.top_k} largest logits of the "
            f"residual stream after the layer, {'with' if self.final_norm else 'without'} the "
            "final norm. Converged: the layer's largest logit is that of the token the model "
            "writes. The last layer is in the curves, but not in the pairs."
        ]
        if math.isnan(r):
            told.append("No correlation can be given, as one of the two does not vary.")
        else:
            told.append(f"Point-biserial correlation of u and convergence: {r:+.3f}.")
        if fit is not None:
            told.append(
                f"Logistic regression: a step of u by 0.1 multiplies the odds of convergence by "
                f"{fit['odds']['mean']:.2f} (95 % interval {fit['odds']['low']:.2f} to "
                f"{fit['odds']['high']:.2f}, {chance(fit['p'])}; errors clustered by picture)."
            )
        stop = numbers["stop"]
        told.append(
            f"In layer {stop['layer']}, the first that CLVS tests, u lies below its threshold "
            f"{CLVS.stop_threshold:g} for {percent(stop['share'])} of the questions; of these "
            f"{percent(stop['converged'])} have converged."
        )
        told.append(
            "Both u and convergence go with depth, so the correlation within each layer is shown, "
            "too; its intervals take questions as independent. Bands of the curves: 95 % "
            "t-intervals over pictures; of bins: Wilson's 95 % interval of the pairs."
        )
        return " ".join(told)

    def draw(self, numbers: Numbers, sheet: Sheet) -> None:
        from ..plots.analysis import SERIES, band, marks, whole, zero
        from ..plots.style import INK

        layers = numbers["layers"]

        def curves(panel: Any) -> None:
            band(panel, layers, numbers["uncertainty"], SERIES[1], "uncertainty u")
            band(panel, layers, numbers["converged"], SERIES[0], "share converged")
            panel.set_ylim(-0.03, 1.03)
            whole(panel, layers)

        def binned(panel: Any) -> None:
            bins = [b for b in numbers["bins"] if b["n"]]
            middle = [(b["from"] + b["to"]) / 2 for b in bins]
            marks(panel, middle, bins, SERIES[0], "share converged")
            if fit := numbers["logistic"]:
                band(panel, fit["u"], fit["curve"], INK, "logistic regression", dots=False)
            panel.set_xlim(-0.02, 1.02)
            panel.set_ylim(-0.03, 1.03)

        def within(panel: Any) -> None:
            zero(panel)
            known = [la for la in layers if not math.isnan(numbers["by_layer"][la]["r"])]
            points = [numbers["by_layer"][la] for la in known]
            marks(panel, known, [r | {"mean": r["r"]} for r in points], SERIES[2], "")
            whole(panel, layers)

        def counts(panel: Any) -> None:
            middle = [(b["from"] + b["to"]) / 2 for b in numbers["bins"]]
            done = np.array([b["n"] * (b["mean"] or 0) if b["n"] else 0 for b in numbers["bins"]])
            every = np.array([b["n"] for b in numbers["bins"]])
            panel.bar(middle, done, 0.9 / BINS, color=SERIES[0], label="converged")
            panel.bar(middle, every - done, 0.9 / BINS, done, color=SERIES[1], label="not")
            panel.set_xlim(-0.02, 1.02)

        sheet.add("By layer", "layer", "", curves)
        sheet.add("Convergence over uncertainty", "uncertainty u", "share converged", binned)
        sheet.add("Correlation within a layer", "layer", "point-biserial r", within)
        sheet.add("How often", "uncertainty u", "pairs of question and layer", counts)


def logistic(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Numbers | None:
    """Logistic regression of y on x (statsmodels), errors clustered by group; None if impossible.

    Returns:
        "coefficients" (constant, slope), "p" of the slope, "odds": factor per step of x by 0.1,
        "u" and "curve": the fit from the smallest to the largest x, {"mean", "low", "high"}.
    """
    import statsmodels.api as sm
    from statsmodels.tools.sm_exceptions import ModelWarning, PerfectSeparationError

    if len(np.unique(y)) < 2 or np.ptp(x) == 0 or len(np.unique(groups)) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)  # no fit: one side of a threshold is all ones
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            fit = sm.Logit(y, sm.add_constant(x)).fit(
                disp=0, cov_type="cluster", cov_kwds={"groups": groups}
            )
        except (ModelWarning, PerfectSeparationError, np.linalg.LinAlgError):
            return None
    low, high = fit.conf_int(0.05)[1]
    at = np.linspace(x.min(), x.max(), 60)
    frame = fit.get_prediction(sm.add_constant(at)).summary_frame(alpha=0.05)
    return {
        "coefficients": fit.params.tolist(),
        "p": float(fit.pvalues[1]),
        "odds": {
            "mean": math.exp(fit.params[1] / 10),
            "low": math.exp(low / 10),
            "high": math.exp(high / 10),
        },
        "u": at.tolist(),
        "curve": {
            "mean": frame["predicted"].tolist(),
            "low": frame["ci_lower"].tolist(),
            "high": frame["ci_upper"].tolist(),
        },
    }
