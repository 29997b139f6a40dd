"""docs/models.md, made of what the survey found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.survey.shrink import VARIANTS
from tests.survey.walk import turned_away

ROOT = Path(__file__).parents[2]
FOUND, PAGE = ROOT / "tests/survey/found.json", ROOT / "docs/models.md"

INTRODUCTION = """# Models

This page is made by `python tools/survey.py` and held by `tests/test_survey.py` to what the
installed code does. It walks every image-text-to-text type of transformers {version}, builds each
small on random weights, and runs methods on it. What a type does on its published weights is not
known from that: `foveate doctor --model NAME` tells what is found in a model before it is loaded.

A type's default configuration names one language model, and published models may have another.
`internvl with qwen3` and `with qwen3_moe` are those of InternVL 3.5, `paligemma with gemma2` is
PaliGemma 2, and `idefics2 without window` is Idefics2 loaded with no sliding window.

{counts}

## Accepted

*layers*: how many decoder layers see the whole image through plain attention and can be edited, of
all of them, in the default configuration. *layout*: a file knows where image tokens lie on the
image, for heat maps and for ViCrop, CARVE and LASER; without a file foveate looks, and
`foveate doctor --model NAME --probe` says how well that goes. *edits*: the last row is edited and
no other, leaving restores the model, and PAI and CLVS equal slow references on full attention maps.
*unified*: CLVS with unified positions does, too. *stream*: a second stream of text alone equals
whole runs by hand. *batch*: a padded batch equals single runs. *static*: a static cache equals a
dynamic one. *prefix*: a prompt on a forked prefix equals the whole. *CLI*: can be trained for
cross-layer injection. Prompts of the survey hold placeholders without pixels.

| type | layers | layout | edits | unified | stream | batch | static | prefix | CLI |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{accepted}

{notes}

## Refused

What `enhance` says when a method that edits attention is switched on.

{refused}

## Not built

{unbuilt}
"""


def page(found: dict[str, Any]) -> str:
    """The page."""
    rows = found["types"]
    notes: list[str] = []
    refused = {k: v.get("refused") or turned_away(v) for k, v in rows.items()}
    refused = {k: said for k, said in refused.items() if said}
    accepted = {k: v for k, v in rows.items() if "checks" in v and k not in refused}
    unbuilt = {k: v.get("unbuilt") or v.get("crash") for k, v in rows.items()}
    unbuilt = {k: v for k, v in unbuilt.items() if v and k not in refused}
    table = [_line(name, row, notes) for name, row in sorted(accepted.items())]
    counts = (
        f"Of {_types(rows)} types {_types(accepted)} are accepted, {_types(refused)} are refused, "
        f"each with its reason, and {_types(unbuilt)} cannot be built where this was run."
    )
    return INTRODUCTION.format(
        version=found["transformers"],
        counts=counts,
        accepted="\n".join(table),
        notes="\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)),
        refused="\n".join(_reasons(refused)),
        unbuilt="\n".join(_reasons(unbuilt)),
    )


def _types(group: dict[str, Any]) -> int:
    return len(group.keys() - VARIANTS.keys())


def _line(name: str, row: dict[str, Any], notes: list[str]) -> str:
    """A row of the table; what is not plainly yes becomes a numbered note."""
    checks, layers = row["checks"], row["layers"]
    edits = {checks[key] for key in ("rows", "boost", "smoothing")}
    wrong = next((found for found in sorted(edits) if found != "yes"), "yes")
    cells = [wrong, *(checks[key] for key in ("unified", "stream", "batch", "static", "prefix"))]
    marks = [cell if cell in ("yes", "no") else _noted(cell, notes) for cell in cells]
    label = f"`{name}`"
    if not row["image_token"]:
        label += _mark("Its default configuration names no image token.", notes)
    if "repaired" in row:
        label += _mark(f"In this transformers {row['repaired']}; repaired for the survey.", notes)
    full = f"{layers.get('full_attention', 0)} of {sum(layers.values())}"
    flags = ["yes" if row[key] else "" for key in ("layout", "cli")]
    return f"| {' | '.join([label, full, flags[0], *marks, flags[1]])} |"


def _noted(cell: str, notes: list[str]) -> str:
    word = "refused" if cell.startswith("refused: ") else "fails"
    return word + _mark(cell.removeprefix("refused: "), notes)


def _mark(note: str, notes: list[str]) -> str:
    if note not in notes:
        notes.append(note)
    return f" ({notes.index(note) + 1})"


def _reasons(sentences: dict[str, str]) -> list[str]:
    return [f"- `{name}`: {' '.join(said.split())}" for name, said in sorted(sentences.items())]
