"""Checks of a checkpoint: each sees what it is there for, and a failure is exit code 1."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from foveate import VLM
from foveate.core.method import Method, get
from foveate.insight.verify import checks, report
from foveate.insight.verify.lab import Finding, Lab, Produced, apart, distance
from tests import drawn, tiny


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(tiny.vlm())


@dataclass(frozen=True)
class Spoils(Method, register=False):
    """Changes a weight of the model and leaves it so."""

    name: ClassVar[str] = "spoils"
    neutral: ClassVar[dict[str, Any]] = {}
    victim: ClassVar[Any] = None

    def logits(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        with torch.no_grad():
            self.victim.weight.mul_(1.5)
        return logits


def test_a_method_that_does_not_restore_the_model_is_caught() -> None:
    lab = Lab(tiny.vlm())
    Spoils.victim = lab.vlm.model.get_output_embeddings()
    found = checks.tried(lambda: checks.leaving(lab, (Spoils(),)))
    assert (found.passed, found.text) == (False, "the plain model differs after the method")


def test_neutral_parameters_that_are_not_are_caught(lab, monkeypatch) -> None:
    stack = (get("pai")(),)
    assert checks.neutral(lab, stack).passed
    monkeypatch.setattr(type(stack[0]), "neutral", {"alpha": 0.1, "gamma": 1.0})
    monkeypatch.setattr(type(stack[0]), "is_neutral", False)
    assert checks.neutral(lab, stack).passed is False


def test_results_that_are_apart_are_caught(lab) -> None:
    torch.manual_seed(0)
    tokens, logits = torch.zeros(2, 3, dtype=torch.long), torch.randn(3, 2, 50)
    a, near = Produced(tokens, logits), Produced(tokens, logits + 1e-6)
    assert checks._judged(lab, (get("clvs")(),), "x", a, near).passed
    far = logits.clone()
    far[2, 1] += 2 * torch.randn(50)
    found = checks._judged(lab, (get("clvs")(),), "x", a, Produced(tokens, far))
    assert found.passed is False
    assert found.numbers["gap"] > 0.5
    parted = tokens.clone()
    parted[1, 0] = 1  # what follows another token is another text
    assert apart(a, Produced(parted, far)) == (0.0, 1)
    known = torch.tensor([1.0, 2.0, -torch.inf, 4.0])
    assert distance(known, known) == 0.0


def test_bright_patches_find_a_wrong_layout(lab, monkeypatch) -> None:
    assert checks.layout(lab).passed
    grids = lab.vlm.grids

    def mirrored(chat: Any) -> list[Any]:
        (grid,) = grids(chat)
        left, top, right, bottom = grid.box
        return [replace(grid, box=(left + 0.5, top, right + 0.5, bottom))]

    monkeypatch.setattr(lab.vlm, "grids", mirrored)
    assert checks.layout(lab).passed is False


def test_an_error_is_a_failure_and_a_refusal_is_not(lab) -> None:
    def fails() -> Finding:
        raise RuntimeError("CUDA out of memory")

    assert checks.tried(fails) == Finding(False, "RuntimeError: CUDA out of memory")
    found = checks.tried(lambda: checks.static(lab, (get("opera")(),)))
    assert found.passed is None
    assert "leave out cache_implementation" in found.text


def test_bad_input_is_one_sentence(run, tmp_path) -> None:
    for given, told in {
        ("nothing",): "There is no model or folder 'nothing'",
        ("pocket", "--method", "clv", "--out", tmp_path): "did you mean 'clvs'",
        ("pocket", "--data", tmp_path / "no"): "is not a folder",
        ("pocket", "--data", tmp_path, "--out", tmp_path): "coco_pope_adversarial.json is missing",
    }.items():
        code, out, err = run("verify", *given)
        assert (code, out) == (2, "")
        assert told in err
        assert err.endswith(".\n")


@pytest.mark.slow
def test_the_pocket_model_is_verified_goes_on_and_says_what_fails(
    run, tmp_path, monkeypatch
) -> None:
    root = drawn.pope(tmp_path / "data", 4)
    given = ("verify", "pocket", "--method", "clvs", "--out", tmp_path / "out")
    code, out, _ = run(*given)
    assert code == 0
    assert "layout: 9 of 9 bright patches" in out
    path = tmp_path / "out" / "pocket.json"
    first = json.loads(path.read_text())
    assert first["passed"]
    assert {row["method"] for row in first["findings"]} == {"", "vanilla", "clvs"}

    def broken(lab: Lab, stack: Any) -> Finding:
        return Finding(False, "is broken")

    lines = path.with_suffix(".jsonl").read_text().splitlines()  # as a kill leaves them
    path.with_suffix(".jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:30])
    monkeypatch.setitem(checks.METHOD, "bfloat16 against float32", broken)
    code, out, _ = run(*given, "--data", root, "--questions", 4)
    assert code == 1
    assert "failed: bfloat16 against float32, clvs: is broken" in out
    assert "POPE, 4 questions, clvs: " in out
    found = json.loads(path.read_text())
    assert not found["passed"]
    assert found["findings"][: len(lines) - 3] == first["findings"][: len(lines) - 3]
    row = dict(zip(report.COLUMNS, report.table_row(found), strict=True))
    assert row["methods"] == "1"
    assert "(bfloat16 against float32 failed)" in row["checks passed"]
    assert row["POPE, plain"].endswith("of 4 right")


def test_every_check_runs_on_a_tiny_model_and_names_of_files_are_plain(lab) -> None:
    stack = (get("clvs")(),)
    for name in ("batch against single", "cached against uncached", "static cache"):
        for used in ((), stack):
            assert checks.METHOD[name](lab, used).passed, name
    assert checks.precision(lab, stack).passed
    assert lab.vlm.model.get_decoder().config.num_hidden_layers == len(
        lab.vlm.model.get_decoder().layers
    )
    vlm = VLM(lab.vlm.model, lab.vlm.processor, "llava-hf/llava-1.5-7b-hf")
    assert report.file_name(vlm) == "llava-hf-llava-1.5-7b-hf"
