"""Families that vLLM's build for CPUs serves: several pictures, tiles, M-RoPE, sliding windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from tests.vllm import answers, families

METHODS = [
    "",
    "clvs(stop_threshold=0, unified_positions=False)",
    "clvs(stop_threshold=0)",
    "clvs",
    "pai(gamma=1.0)",
    "scalingvis(weight=1.8)",
    "clvs(stop_threshold=0, unified_positions='visual')",
    "vaf(enhance=1.8, suppress=0.4, layers=(2, 5))",
    "tarac(beta=1.5, layers=(2, 5))",
    "",
]
SECOND = [
    "",
    "m3id(forgetting=0.1, beta=0)",
    "pai(gamma=1.5, plausibility=0)",
    "icd(prefix=(20, 31, 42), where='question', beta=0)",
]
NEAR = 5e-4  # of a log-probability


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_answers_as_in_transformers(name: str, tmp_path: Path) -> None:
    """One or two pictures per request, methods and plain requests in one batch."""
    check(name, METHODS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl"])
def test_second_streams_of_a_family(name: str, tmp_path: Path) -> None:
    check(name, SECOND, tmp_path)


def check(name: str, methods: list[str], tmp_path: Path) -> None:
    """Answers of vLLM are those of transformers."""
    tiny = families.FAMILIES[name]
    model = tiny.save(tmp_path / name)
    asked = families.requests(tmp_path, methods, tiny.mark)
    job: dict[str, Any] = {"model": str(model), "requests": asked, "leaves out": tiny.leaves_out}
    (reference,) = answers.run("transformers", job | {"out": str(tmp_path / "reference")})
    job |= {"out": str(tmp_path / "vllm"), "options": {"block_size": 32} | tiny.options}
    (turn,) = answers.run("vllm", job, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    found = []
    for method, ours, theirs in zip(methods, turn, reference, strict=True):
        assert ours["ids"] == theirs["ids"]
        worst = float((ours["rows"] - theirs["rows"]).abs().max())
        found.append((worst, ours["tokens"] == theirs["tokens"], method))
    print(f"\n{name}: {found}")
    assert max(found)[0] < NEAR, max(found)
    assert all(same for _, same, _ in found)
