"""Second streams in vLLM: answers are those of transformers, whatever the scheduler does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from foveate.backends.vllm import compat
from foveate.base.errors import FoveateError
from foveate.core.method import parse
from tests.vllm import answers
from tests.vllm.test_equality import NEAR, apart

METHODS = [
    "vcd(beta=0)",
    "",
    "vcd",
    "m3id(forgetting=0.1, beta=0)",
    "m3id(confidence=0.9)",
    "pai(alpha=0.0, gamma=1.5, plausibility=0)",
    "pai(alpha=1.0, gamma=1.5)",
    "icd(prefix=(20, 31, 42), where='question', beta=0)",
    "clvs(stop_threshold=0)+vcd(alpha=0.5, beta=0)",
    "tarac(beta=1.5)+m3id(beta=0)",
    "vcd(beta=0)+dola(plausibility=0)",
    "dola(plausibility=0)+m3id(beta=0)",
    "adaptvis(threshold=0, high=3.0)",
    "adaptvis(threshold=1, decimals=None, low=0.2)",
    "adaptvis(threshold=0.9, low=0.2, high=2.5)",
    "tarac(beta=1.5)+adaptvis(threshold=0, high=3.0)+deco",
    "only(gamma=1.0, alpha_pos=1.0, beta=0, layers=(2,))",
    "only",
    "clvs(stop_threshold=0)+only(gamma=0, beta=0)",
    "",
]
SETTINGS: dict[str, dict[str, Any]] = answers.SETTINGS | {
    "in step": {"options": {"async_scheduling": False}},
    "three rows": {"options": {"max_num_seqs": 3}},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answers.job(tmp_path_factory.mktemp("twins"), METHODS)


@pytest.fixture(scope="module")
def reference(job: dict[str, Any]) -> list[dict[str, Any]]:
    return answers.run("transformers", job)[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_second_streams_give_the_answers_of_transformers(
    setting: str, job: dict[str, Any], reference: list[dict[str, Any]]
) -> None:
    asked = job | SETTINGS[setting] | {"out": job["out"] + "-vllm"}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if setting == "two ranks":
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    for turn in answers.run("vllm", asked, **environment):
        for method, ours, theirs in zip(METHODS, turn, reference, strict=True):
            assert ours["tokens"] == theirs["tokens"], method
            assert apart(ours, theirs) < NEAR, method
            if method:
                rows = {"last": answers.STEPS, "prompt": 1}
                assert ours["edited"] == [{m.name: rows[m.rows] for m in parse(method)}]


def settings(**changed: Any) -> Any:
    """What vLLM is started with, as far as second streams mind."""
    given = {"policy": "fcfs", "max_num_seqs": 2, "mm_processor_cache_type": "lru"}
    given |= {"kv_transfer_config": None, "ec_transfer_config": None, "use_v2_model_runner": False}
    given |= changed
    every = SimpleNamespace(**given)
    return SimpleNamespace(
        scheduler_config=every,
        use_v2_model_runner=every.use_v2_model_runner,
        model_config=SimpleNamespace(multimodal_config=every),
        kv_transfer_config=every.kv_transfer_config,
        ec_transfer_config=every.ec_transfer_config,
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"policy": "priority"}, "priority policy"),
        ({"max_num_seqs": 1}, "max_num_seqs"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"ec_transfer_config": object()}, "encoder connector"),
        ({"mm_processor_cache_type": "shm"}, "shared-memory cache"),
        ({"use_v2_model_runner": True}, "V2 model runner"),
    ],
)
def test_a_scheduler_of_other_rules_is_refused(changed: dict[str, Any], reason: str) -> None:
    compat.refuse_second_streams(settings())
    with pytest.raises(FoveateError, match=reason):
        compat.refuse_second_streams(settings(**changed))
