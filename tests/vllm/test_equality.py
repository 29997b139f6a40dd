"""Every answer of vLLM with a method is the answer of transformers with that method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from tests.vllm import answers  # noqa: E402

METHODS = [
    "",
    "clvs",
    "clvs(stop_threshold=0, unified_positions=False)",
    "clvs(stop_threshold=0)",
    "clvs(stop_threshold=0, unified_positions='visual')",
    "clvs(stop_threshold=0.9)",
    "clvs(stop_threshold=0, memory_norm=True, pool='mean', final_norm=True)",
    "scalingvis(weight=2.0)",
    "pai(alpha=1.0, gamma=1.0)",
    "pai(alpha=1.0, gamma=1.0, boost_first_token=False)",
    "devils(alpha=1.0)",
    "tarac(beta=1.5, alpha=0.8)",
    "vaf(enhance=1.8, suppress=0.4)",
    "adhh(threshold=0.3, heads=((2, 0), (2, 1), (5, 3)))",
    "clvs(stop_threshold=0, smoothing=0.5)+pai(alpha=0.5, gamma=1.0)",
    "",
]
NEAR = 2e-4  # of a log-probability; the plain model's own difference is a third of that
SETTINGS: dict[str, dict[str, Any]] = {
    "eager": {},
    "chunks, small blocks, prefix cache": {
        "options": {
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 64,
            "block_size": 32,
        },
        "turns": 2,
    },
    "compiled": {"options": {"enforce_eager": False}},
    "two ranks": {"options": {"tensor_parallel_size": 2}},
    "preempted": {"options": {"kv_cache_memory_bytes": 9 * 2**20, "block_size": 32}},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("vllm")
    model = answers.pocket(folder / "pocket")
    asked = answers.requests(folder, METHODS)
    return {"model": str(model), "requests": asked, "out": str(folder / "answers")}


@pytest.fixture(scope="module")
def reference(job: dict[str, Any]) -> list[dict[str, Any]]:
    return answers.run("transformers", job)[0]


def apart(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The worst difference of a log-probability."""
    assert ours["ids"] == theirs["ids"]
    return float((ours["rows"] - theirs["rows"]).abs().max())


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_method_gives_the_answers_of_transformers(
    setting: str, job: dict[str, Any], reference: list[dict[str, Any]]
) -> None:
    asked = job | SETTINGS[setting] | {"out": job["out"] + "-vllm"}
    environment = {} if setting == "two ranks" else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for turn in answers.run("vllm", asked, **environment):
        for method, ours, theirs in zip(METHODS, turn, reference, strict=True):
            assert ours["tokens"] == theirs["tokens"], method
            assert apart(ours, theirs) < NEAR, method


def test_without_the_plug_in_every_answer_differs(
    job: dict[str, Any], reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = job | {"out": str(tmp_path / "plain")}
    environment = {"FOVEATE_VLLM": "off", "VLLM_PLUGINS": ""}
    (turn,) = answers.run("vllm", asked, VLLM_ENABLE_V1_MULTIPROCESSING="0", **environment)
    for method, ours, theirs in zip(METHODS, turn, reference, strict=True):
        assert (apart(ours, theirs) > 0.1) == bool(method), method
