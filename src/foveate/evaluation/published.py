"""What papers report, as data, to be put beside our own numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .benchmark import Benchmark

CLVS = "CLVS paper, arXiv 2509.12897"
CARVE = "CARVE paper, arXiv 2509.06461"
LOG = "R-Bench log of a third party, prompt not known"

PROTOCOLS = {
    CLVS: "greedy, one new token; LLaVA-1.5 with the question alone, the others with "
    "' Please answer this question with one word.'; an answer to POPE and R-Bench that says no "
    "where the label is no, and yes where it is yes, is right, and any other is a wrong yes.",
    CARVE: "greedy, 336 pixels for LLaVA-1.5 and 448 for Qwen2.5-VL, asked for a single word or "
    "phrase; answers read as in ViCrop: yes or no, or the option, whichever is most alike; "
    "TextVQA by min(0.3 n, 1) without OCR tokens; A-OKVQA's direct answers by a VQA score.",
    LOG: "compare it with care.",
}
"""How the sources asked and scored, as far as is known: other prompts and parsers, other scores."""

MODELS = {
    "LLaVA-1.5-7B": ("llava-1.5-7b-hf", "llava-v1.5-7b"),
    "LLaVA-1.5-13B": ("llava-1.5-13b-hf", "llava-v1.5-13b"),
    "LLaVA-NeXT-8B": ("llama3-llava-next-8b-hf", "llama3-llava-next-8b"),
    "Qwen2.5-VL-3B": ("qwen2.5-vl-3b-instruct",),
    "Qwen2.5-VL-7B": ("qwen2.5-vl-7b-instruct",),
}
"""The models of the papers, and the last parts of the names under which they are shared."""


@dataclass(frozen=True)
class Row:
    """One method on one model and benchmark.

    Attributes:
        model: a key of `MODELS`.
        benchmark: its name.
        method: our method's name, or "vanilla".
        values: the benchmark's own score names -> what the paper prints, mostly percent.
        source: the paper.
        variant: which setting of the method, where the paper has several.
        options: what the benchmark must be set to for the row to be about the same questions.
        questions: how many the paper asked.
    """

    model: str
    benchmark: str
    method: str
    values: dict[str, float]
    source: str
    questions: int
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def model_of(name: str) -> str | None:
    """The papers' model that a hub name or folder means; None for any other.

    One part of the path must be a known last part, whatever its case: ``llava-hf/llava-1.5-7b-hf``,
    ``/models/llava-1.5-7b-hf`` and the hub's cache all are LLaVA-1.5-7B; a fine-tuned
    ``llava-1.5-7b-hf-mine`` is not.
    """
    parts = set(re.split(r"[/\\]|--", name.lower()))
    return next((model for model, tails in MODELS.items() if parts & set(tails)), None)


def rows(model: str, benchmark: Benchmark, methods: set[str]) -> list[Row]:
    """The rows about this model and these questions, for our methods' names."""
    known, options = model_of(model), benchmark.parameters()
    return [
        row
        for row in ROWS
        if row.model == known
        and row.benchmark == benchmark.name
        and row.method in methods
        and all(options.get(key) == value for key, value in row.options.items())
    ]


# -- CLVS: AMBER, accuracy and F1, as printed in its table 1 ---------------------------------------

_AMBER = """
LLaVA-1.5-7B  | vanilla | 71.4/83.3 72.0/64.4 74.1/68.5 72.1/74.8
LLaVA-1.5-7B  | clvs    | 77.6/87.3 72.7/65.4 77.1/73.7 75.0/78.1
LLaVA-1.5-7B  | vcd     | 71.1/74.1
LLaVA-1.5-7B  | pai     | 73.7/76.7
LLaVA-1.5-7B  | var     | 71.8/74.6
LLaVA-1.5-7B  | adhh    | 71.9/74.8
LLaVA-1.5-7B  | vaf     | 68.7/70.9
LLaVA-1.5-7B  | tarac   | 72.0/74.8
LLaVA-1.5-13B | vanilla | 66.0/79.5 75.3/69.5 70.1/45.2 71.5/73.5
LLaVA-1.5-13B | clvs    | 78.4/87.8 78.9/76.7 76.2/64.3 78.4/81.8
LLaVA-1.5-13B | vcd     | 71.3/73.5
LLaVA-1.5-13B | pai     | 75.0/77.6
LLaVA-1.5-13B | var     | 71.0/72.9
LLaVA-1.5-13B | adhh    | 72.1/74.2
LLaVA-1.5-13B | vaf     | 69.5/71.2
LLaVA-1.5-13B | tarac   | 73.0/75.3
LLaVA-NeXT-8B | vanilla | 95.1/97.4 84.0/85.0 67.2/71.5 85.9/89.8
LLaVA-NeXT-8B | clvs    | 93.5/96.6 85.2/85.7 72.1/74.5 86.6/90.0
LLaVA-NeXT-8B | vcd     | 86.1/89.9
LLaVA-NeXT-8B | vaf     | 86.0/89.7
LLaVA-NeXT-8B | tarac   | 85.8/89.8
Qwen2.5-VL-7B | vanilla | 95.3/97.5 83.5/84.4 73.9/75.8 86.5/90.1
Qwen2.5-VL-7B | clvs    | 94.8/97.3 83.9/84.8 74.6/76.2 86.6/90.2
Qwen2.5-VL-7B | vcd     | 85.7/89.4
Qwen2.5-VL-7B | vaf     | 85.7/89.5
Qwen2.5-VL-7B | tarac   | 86.5/90.1
"""

# -- CLVS: POPE on COCO, accuracy, recall, F1 of random, popular, adversarial ----------------------

_POPE = """
LLaVA-1.5-7B  | vanilla | 88.3/81.6/87.5 85.0/81.6/84.5 81.1/81.6/81.2
LLaVA-1.5-7B  | clvs    | 89.0/84.5/88.5 84.1/84.5/84.2 80.1/84.4/81.0
LLaVA-NeXT-8B | vanilla | 87.4/77.1/85.9 85.5/77.1/84.2 82.3/77.1/81.4
LLaVA-NeXT-8B | clvs    | 88.5/79.8/87.4 86.1/79.8/85.2 82.7/79.8/82.2
Qwen2.5-VL-7B | vanilla | 89.9/82.9/89.2 87.9/82.9/87.3 84.8/82.9/84.5
Qwen2.5-VL-7B | clvs    | 90.2/83.1/89.4 87.6/83.1/87.1 84.7/83.1/84.5
"""

# -- CLVS: R-Bench, first subset, accuracy, precision, recall, F1 ----------------------------------

_RBENCH = """
LLaVA-1.5-7B  | vanilla | 67.8/61.6/95.3/74.8
LLaVA-1.5-7B  | clvs    | 69.0/62.5/95.7/75.6
LLaVA-1.5-13B | vanilla | 68.2/61.7/96.9/75.4
LLaVA-1.5-13B | clvs    | 71.3/64.6/95.2/77.0
LLaVA-NeXT-8B | vanilla | 81.9/80.1/85.3/82.6
LLaVA-NeXT-8B | clvs    | 81.9/79.3/86.6/82.8
Qwen2.5-VL-7B | vanilla | 81.6/80.2/84.2/82.1
Qwen2.5-VL-7B | clvs    | 81.8/80.4/84.2/82.3
"""

# -- CLVS: MME, scores of existence, count, position, color, OCR -----------------------------------

_MME = """
LLaVA-1.5-7B  | vanilla | 195.0/158.3/123.3/155.0/125.0
LLaVA-1.5-7B  | clvs    | 195.0/163.3/123.3/170.0/140.0
LLaVA-1.5-13B | vanilla | 190.0/158.3/120.0/160.0/132.5
LLaVA-1.5-13B | clvs    | 190.0/168.3/115.0/175.0/147.5
"""

# -- CARVE: accuracy on A-OKVQA, POPE, V* and TextVQA ----------------------------------------------

_CARVE = """
Qwen2.5-VL-3B | vanilla       | 73.0/86.9/50.3/72.8
Qwen2.5-VL-3B | carve t_start | 76.5/87.1/56.0/76.1
Qwen2.5-VL-3B | carve t_end   | 79.2/88.4/57.1/76.4
Qwen2.5-VL-3B | carve T_full  | 78.3/87.9/56.5/76.3
Qwen2.5-VL-7B | vanilla       | 75.0/87.0/50.8/75.0
Qwen2.5-VL-7B | carve t_start | 77.0/87.9/58.6/80.7
Qwen2.5-VL-7B | carve t_end   | 78.3/89.7/59.7/81.9
Qwen2.5-VL-7B | carve T_full  | 78.0/88.6/58.1/81.7
LLaVA-1.5-7B  | vanilla       | 71.5/83.6/38.7/47.8
LLaVA-1.5-7B  | carve t_start | 73.9/86.8/57.1/57.9
LLaVA-1.5-7B  | carve t_end   | 78.2/89.0/66.5/58.2
LLaVA-1.5-7B  | carve T_full  | 75.4/89.0/66.5/57.9
LLaVA-1.5-13B | vanilla       | 75.7/84.6/42.4/57.1
LLaVA-1.5-13B | carve t_start | 76.2/90.0/65.4/59.2
LLaVA-1.5-13B | carve t_end   | 76.9/90.7/74.3/61.2
LLaVA-1.5-13B | carve T_full  | 76.5/90.1/70.0/61.2
"""

# -- CARVE's table 3: rivals on TextVQA ------------------------------------------------------------

_CARVE_TEXTVQA = """
LLaVA-1.5-7B | vicrop relative attention | 55.17
LLaVA-1.5-7B | vicrop attention gradient | 56.06
LLaVA-1.5-7B | vicrop pure gradient      | 51.67
"""

# -- R-Bench: average of the subsets, accuracy, precision, recall, F1, yes ratio -------------------

_RBENCH_LOG = """
LLaVA-1.5-7B  | vanilla | 70.79/64.14/95.61/76.77/75.27
Qwen2.5-VL-3B | vanilla | 81.14/78.24/86.80/82.30/56.02
"""


def _read(
    text: str,
    benchmark: str,
    groups: tuple[str, ...],
    keys: tuple[str, ...],
    source: str,
    questions: int,
    options: dict[str, Any] | None = None,
) -> list[Row]:
    """Rows of a table above: groups stand apart, their numbers are joined by slashes.

    With fewer groups than there are names, they are the last ones.
    """
    found = []
    for line in text.strip().splitlines():
        model, name, numbers = map(str.strip, line.split("|"))
        method, _, variant = name.partition(" ")
        parts = [[float(number) for number in part.split("/")] for part in numbers.split()]
        values = {
            f"{group}{key}": number
            for group, part in zip(groups[-len(parts) :], parts, strict=True)
            for key, number in zip(keys, part, strict=True)
        }
        found.append(
            Row(model, benchmark, method, values, source, questions, variant, options or {})
        )
    return found


def _read_carve() -> list[Row]:
    """CARVE's table: four benchmarks in a line."""
    homes: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
        ("aokvqa", "direct/accuracy", 1145, {}),
        ("pope", "average/accuracy", 9000, {"source": "coco"}),
        ("vstar", "overall/accuracy", 191, {}),
        ("textvqa", "accuracy", 5000, {}),
    )
    found = []
    for i, (benchmark, key, questions, options) in enumerate(homes):
        lines = [line.rpartition("|") for line in _CARVE.strip().splitlines()]
        text = "\n".join(f"{head}|{numbers.split('/')[i]}" for head, _, numbers in lines)
        found += _read(text, benchmark, ("",), (key,), CARVE, questions, options)
    return found


ROWS: list[Row] = [
    *_read(
        _AMBER,
        "amber",
        ("existence/", "attribute/", "relation/", "all/"),
        ("accuracy", "f1"),
        CLVS,
        14216,
    ),
    *_read(
        _POPE,
        "pope",
        ("random/", "popular/", "adversarial/"),
        ("accuracy", "recall", "f1"),
        CLVS,
        9000,
        {"source": "coco"},
    ),
    *_read(_RBENCH, "rbench", ("subset1/",), ("accuracy", "precision", "recall", "f1"), CLVS, 5498),
    *_read(
        _MME,
        "mme",
        ("",),
        tuple(f"{task}/score" for task in ("existence", "count", "position", "color", "OCR")),
        CLVS,
        280,
    ),
    *_read_carve(),
    *_read(_CARVE_TEXTVQA, "textvqa", ("",), ("accuracy",), CARVE, 5000),
    *_read(
        _RBENCH_LOG,
        "rbench",
        ("average/",),
        ("accuracy", "precision", "recall", "f1", "yes_ratio"),
        LOG,
        7787,
    ),
]
"""Every row, from the papers' own tables."""
