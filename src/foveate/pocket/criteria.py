"""What a testbed must show before any method is tried on it, measured on scenes of its own.

    measure(folder=WEIGHTS, n=40) -> dict              # ready for JSON
    rows(report) -> [(criterion, wanted, measured, whether it is met), ...]
    format_criteria(report) -> str                     # the same as markdown

A method that brings attention back to the picture can only help a model that errs as large models
do: it attends to the picture with a fraction of its attention, loses sight of the object in its
later layers, and knows habits that compete with what it sees. No method runs here.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backends.transformers.anatomy import anatomy
from ..backends.transformers.enhance import enhance
from ..backends.transformers.record import Recorder
from ..insight.analyses.decay import Decay
from ..insight.truth import drawn, exists
from ..methods.var import VAR, find_sink_dims
from ..scenes import habits, questions, world
from ..vlm.answering import answer_all, complete
from ..vlm.vlm import VLM
from . import build

VALIDATION = questions.FIRST_HELD_OUT + 800_000_000  # scenes of no training, exam or benchmark
HABITS = ("with", "against")
CATEGORIES = ("existence", "attribute", "relation")
IMAGE = (0.15, 0.45)  # wanted share of attention in the middle layers
WITH, AGAINST, BLIND = 0.90, (0.60, 0.80), 0.75  # wanted accuracies, and blind answers as usual
PUBLISHED = 20.0, 4096  # VAR's threshold, and the width that it was found at

Watch = Callable[[int, int], None]


@torch.no_grad()
def measure(
    folder: Path | str = build.WEIGHTS, n: int = 40, seed: int = 0, watch: Watch | None = None
) -> dict[str, Any]:
    """Measure every criterion on n validation scenes with the habit and n against it.

    Returns:
        "accuracy": {habit: {category: share}}; "blind": {category: {"usual" (share of the blind
        answers that are the habit's), "n"}}; "led": share of the wrong answers against the habit
        that are the habit's; "layers": {"image", "object", "bos"} (shares of the attention of the
        prompt's last row, per layer); "decay": as `insight.analyses.decay`; "sinks"; "depth", "n".
    """
    vlm = VLM(*build.load_pocket(folder))
    right: dict[str, dict[str, list[bool]]] = {habit: defaultdict(list) for habit in HABITS}
    blind: dict[str, list[bool]] = defaultdict(list)
    led: list[bool] = []
    read: list[dict[str, Any]] = []
    first: list[np.ndarray] = []
    sinks = _Sinks(vlm)
    decay = Decay()
    for k in range(n):
        for habit in HABITS:
            scene = world.sample(VALIDATION + seed * 1_000_003 + k, habit)
            picture = drawn(scene)
            image = picture.load()
            exam = questions.exam(scene, random.Random(f"criteria-{seed}-{k}"))
            exam = [q for q in exam if q.category in CATEGORIES and q.label]
            seen = _answers(vlm, [vlm.chat([image], q.text, None) for q in exam])
            guessed = _answers(vlm, [vlm.chat([], q.text, None) for q in exam])
            for question, answer, guess in zip(exam, seen, guessed, strict=True):
                usual, correct = habits.usual(question), answer == question.answer
                right[habit][question.category].append(correct)
                if usual is not None:
                    blind[question.category].append(guess == usual)
                    if habit == "against" and not correct:
                        led.append(answer == usual)
            read.append({"picture": picture.name} | decay.measure(vlm, picture, {"vanilla": ()}))
            asked = [vlm.chat([image], exists(picture.objects[0]), None)]
            record = complete(answer_all(vlm, asked, (Recorder(),), 1))[0].record
            assert record is not None
            first.append(record.values[0][0, :, 0].double().cpu().numpy())
            sinks.look(asked)
        if watch:
            watch(k + 1, n)
    figures = decay.count(read)["methods"]["vanilla"]
    return {
        "n": n,
        "seed": seed,
        "depth": len(first[0]),
        "accuracy": {h: {c: float(np.mean(right[h][c])) for c in CATEGORIES} for h in HABITS},
        "blind": {
            c: {"usual": float(np.mean(blind[c])), "n": len(blind[c])}
            for c in CATEGORIES
            if blind[c]
        },
        "led": float(np.mean(led)) if led else None,
        "layers": {
            "image": figures["image"]["mean"],
            "object": figures["object"]["mean"],
            "bos": np.mean(first, 0).tolist(),
        },
        "decay": figures["decay"],
        "sinks": sinks.told(),
    }


def _answers(vlm: VLM, chats: list[Any]) -> list[str]:
    answers = complete(answer_all(vlm, chats, (), 5))
    return [answer.text.strip().lower() for answer in answers]


class _Sinks:
    """VAR's test at the published threshold, and at one scaled to the model's width."""

    def __init__(self, vlm: VLM):
        self.vlm, self.found = vlm, list[int]()
        known = anatomy(vlm.model)
        self.width, self.depth = known.width, known.depth
        threshold, width = PUBLISHED
        self.scaled = threshold * math.sqrt(self.width / width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is found is told below
            self.dims = find_sink_dims(known, threshold) or ()
            self.scaled_dims = find_sink_dims(known, self.scaled) or ()
        states = known.first_token()
        assert states is not None
        rms = states.square().mean(-1, keepdim=True).sqrt()
        self.largest = (states.abs() / rms)[list(middle(self.depth))].max().item()

    def look(self, chats: list[Any]) -> None:
        """Count the visual tokens that are sinks of some middle layer at the scaled threshold."""
        if not self.scaled_dims:
            self.found.append(0)
            return
        inputs = self.vlm.inputs(chats)
        method = VAR(sink_threshold=self.scaled, sink_dims=self.scaled_dims, keep=0.999)
        with enhance(self.vlm.model, method):
            out = self.vlm.model(**inputs, use_cache=True)
        visual = inputs["input_ids"] == self.vlm.model.config.image_token_id
        layers = [v for k, v in VAR.sinks(out).items() if k in middle(self.depth)]
        self.found.append(int((torch.stack(layers).any(0) & visual).sum()))

    def told(self) -> dict[str, Any]:
        return {
            "published": list(self.dims),
            "scaled_threshold": round(self.scaled, 2),
            "scaled": list(self.scaled_dims),
            "phi_of_bos": round(self.largest, 2),
            "phi_at_most": round(math.sqrt(self.width), 2),
            "visual": float(np.mean(self.found)),
        }


def middle(depth: int) -> range:
    """The middle layers, as VAR counts them: from a quarter of the depth up to three quarters."""
    return range(depth // 4, max(depth // 4 + 1, 3 * depth // 4))


# -- the verdict -----------------------------------------------------------------------------------


def rows(report: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(criterion, what is wanted, what was measured, whether it is met)."""
    layers = middle(report["depth"])
    image = [report["layers"]["image"][i] for i in layers]
    share = float(np.mean(image))
    drop = report["decay"]
    later = drop["later"] or {"mean": math.nan, "low": math.nan, "high": math.nan}
    falls = drop["peak"] in layers and later["high"] < 0
    blind = report["blind"].values()
    usual = sum(b["usual"] * b["n"] for b in blind) / sum(b["n"] for b in blind)
    made = [
        (
            "attention to the image, middle layers",
            f"{_percent(IMAGE[0])} to {_percent(IMAGE[1])}",
            f"{_percent(share)} ({_percent(min(image))} to {_percent(max(image))})",
            IMAGE[0] <= share <= IMAGE[1],
        ),
        (
            "attention to the object",
            f"highest in layers {layers[0]} to {layers[-1]}, then less",
            f"highest in layer {drop['peak']}, then {_percent(later['mean'], '+')}",
            falls,
        ),
        ("sinks by VAR's test", "one, or why not", _sinks(report["sinks"]), True),
    ]
    for habit, low, high in (("with", WITH, 1.0), ("against", *AGAINST)):
        for category, accuracy in report["accuracy"][habit].items():
            wanted = f"{_percent(low)} to {_percent(high)}"
            name = f"{category}, {habit} the habit"
            met = low <= accuracy <= high
            made.append((name, wanted, _percent(accuracy), met))
    made.append(
        (
            "blind answers that are the habit's",
            f"{_percent(BLIND)} or more",
            f"{_percent(usual)} ("
            + ", ".join(f"{c} {_percent(b['usual'])}" for c, b in report["blind"].items())
            + ")",
            usual >= BLIND,
        )
    )
    return made


def _sinks(sinks: dict[str, Any]) -> str:
    if sinks["published"]:
        told = f"dimensions {_listed(sinks['published'])}"
    else:
        told = (
            f"none: phi is {sinks['phi_of_bos']} on BOS and can be {sinks['phi_at_most']} at most"
        )
    if sinks["scaled"]:
        told += f"; scaled to the width ({sinks['scaled_threshold']}): dimensions "
        told += f"{_listed(sinks['scaled'])}, {sinks['visual']:.1f} visual tokens per picture"
    else:
        told += f"; scaled to the width ({sinks['scaled_threshold']}): none"
    return told


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.0f} %"


def format_criteria(report: dict[str, Any]) -> str:
    """The verdict as markdown, and the attention layer by layer."""
    lines = ["| criterion | wanted | measured | met |", "|---|---|---|---|"]
    for name, wanted, measured, met in rows(report):
        lines.append(f"| {name} | {wanted} | {measured} | {'yes' if met else 'no'} |")
    numbers = " | ".join(str(i) for i in range(report["depth"]))
    lines += ["", f"| attention in layer | {numbers} |", "|---" * (report["depth"] + 1) + "|"]
    for name, values in report["layers"].items():
        lines.append(f"| to the {name} | " + " | ".join(_percent(v) for v in values) + " |")
    if report["led"] is not None:
        lines += ["", f"Of the wrong answers against the habit {_percent(report['led'])} are its."]
    return "\n".join(lines)
