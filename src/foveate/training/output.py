"""What a training run writes to its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import FoveateError
from ..base.files import write_text
from ..base.journal import alike, difference, write_json
from ..insight.plots.loss import show_loss
from ..vlm.vlm import VLM
from .check import Checked

PACKAGES = ("foveate", "torch", "transformers", "accelerate")


def begun_run(out: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """run.json of the run in `out`, None where there is none yet.

    Raises:
        FoveateError: where `out` holds a run that cannot go on.
    """
    path = out / "run.json"
    if not path.exists():
        return None
    if not resume:
        raise FoveateError(f"{out} holds a run already: resume it, or choose another folder.")
    run = read_json(path, "settings")
    if not alike(run["settings"], settings):
        raise FoveateError(f"The run in {out} {difference(run['settings'], settings)}.")
    return run


def read_json(path: Path, needed: str) -> dict[str, Any]:
    """A file that a run wrote. Raises `FoveateError` where it is damaged or lacks `needed`."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict) or needed not in content:
            raise ValueError(f"it has no {needed}")
    except (OSError, ValueError, RecursionError) as error:
        raise FoveateError(
            f"{path} is damaged ({error}): delete its folder, or give another --out."
        ) from error
    return content


def write_run(out: Path, settings: dict[str, Any], ended: dict[str, Any] | None = None) -> None:
    """Write run.json; `ended` is what is known only at the end."""
    versions = {name: version(name) for name in PACKAGES}
    write_json(out / "run.json", {"settings": settings, "versions": versions, **(ended or {})})


def report_broken(
    checked: Checked, rows: int, skip: bool, out: Path, say: Callable[[str], None]
) -> None:
    """Write the broken rows to broken.jsonl, and refuse them unless they may be skipped."""
    if not checked.broken:
        return
    rows_told = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in checked.broken]
    write_text(out / "broken.jsonl", "".join(row + "\n" for row in rows_told))
    count = f"{len(checked.broken)} of {rows} rows are broken"
    kinds = "; ".join(checked.problems.lines())
    if not checked.units:
        raise FoveateError(f"All {rows} rows are broken: {kinds}.")
    if not skip:
        raise FoveateError(
            f"{count} ({kinds}), all listed in {out / 'broken.jsonl'}: mend them, or leave them "
            "out with --skip-broken."
        )
    say(f"{count} and left out: {kinds}")


def draw_losses(out: Path, stage: str, method: str, say: Callable[[str], None]) -> float:
    """Draw loss.png from log.jsonl; returns the last loss."""
    with (out / "log.jsonl").open(encoding="utf-8") as file:
        losses = [row["loss"] for row in map(json.loads, file) if row["stage"] == stage]
    try:
        show_loss(method, losses, out / "loss.png")
    except FoveateError as error:
        say(f"no loss.png: {error}")
    return losses[-1]


def save_base(
    vlm: VLM, state: dict[str, Tensor], adapted: Any, dtype: torch.dtype, out: Path
) -> None:
    """The whole model, loaded afresh with the trained `state` put in; LoRA's adapter beside it."""
    # the same commit, as a branch may have moved since
    fresh = VLM.load(vlm.name, dtype=dtype, device="cpu", revision=vlm.commit)
    base = fresh.model
    if adapted is None:
        base.load_state_dict(state, strict=False)
    else:
        from peft import PeftModel

        state = {f"base_model.model.{k}": v for k, v in state.items()}
        adapted.save_pretrained(out / "adapter", state_dict=state)
        base = PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload()
    base.save_pretrained(out / "model")
    fresh.processor.save_pretrained(out / "model")
