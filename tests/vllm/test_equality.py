"""Every answer of vLLM with a method is the answer of transformers with that method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from foveate.core.method import parse
from tests.vllm import answers

VAR = (  # as the pocket model has no sinks at the published threshold
    "var(sink_threshold=1.0, max_sink_fraction=0.9, min_visual_mass=0.05, keep=0.1, "
    "sink_dims=(3, 17))"
)
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
    "spin(keep=0.5)",
    "tarac(beta=1.5, alpha=0.8)",
    "vaf(enhance=1.8, suppress=0.4)",
    "adhh(threshold=0.3, heads=((2, 0), (2, 1), (5, 3)))",
    "clvs(stop_threshold=0, smoothing=0.5)+pai(alpha=0.5, gamma=1.0)",
    VAR,
    f"{VAR}+tarac",
    "dola(plausibility=0)",
    "dola",
    "deco(alpha=2.0, top_p=2.0, top_k=0)",
    "deco",
    "clvs(stop_threshold=0.9)+dola(plausibility=0)+deco(alpha=1.0, top_p=2.0, top_k=0)",
    "",
]
NEAR = 2e-4  # of a log-probability; the plain model's own difference is a third of that


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answers.job(tmp_path_factory.mktemp("vllm"), METHODS)


@pytest.fixture(scope="module")
def reference(job: dict[str, Any]) -> list[dict[str, Any]]:
    return answers.run("transformers", job)[0]


def apart(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The worst difference of a log-probability; none between two that are -inf."""
    assert ours["ids"] == theirs["ids"]
    one, two = ours["rows"], theirs["rows"]
    return float((one - two).abs().masked_fill(one == two, 0).max())


@pytest.mark.parametrize("setting", answers.SETTINGS)
def test_every_method_gives_the_answers_of_transformers(
    setting: str, job: dict[str, Any], reference: list[dict[str, Any]]
) -> None:
    asked = job | answers.SETTINGS[setting] | {"out": job["out"] + "-vllm"}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if setting == "two ranks":
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    for n, turn in enumerate(answers.run("vllm", asked, **environment)):
        for method, ours, theirs in zip(METHODS, turn, reference, strict=True):
            assert ours["tokens"] == theirs["tokens"], method
            assert apart(ours, theirs) < NEAR, method
            assert_counted(method, ours)
            if n:  # var reads every row of the prompt
                assert bool(ours["cached"]) == ("var(" not in method), method


def assert_counted(method: str, answer: dict[str, Any]) -> None:
    """Every row that a method of an answer edits was counted, and once."""
    if not method:
        assert answer["edited"] is None
        return
    ids, (rows,) = answer["ids"], answer["edited"]
    after_image = len(ids) - ids[::-1].index(max(ids, key=ids.count))  # image tokens are the most
    computed = len(ids) - max(after_image, answer["cached"])
    expected = {"last": answers.STEPS, "prompt": 1, "text": answers.STEPS - 1 + computed}
    assert rows == {m.name: expected[m.rows] for m in parse(method)}, method


def test_every_method_changes_its_answer(
    job: dict[str, Any], reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    plain = [one | {"method": ""} for one in job["requests"]]
    (turn,) = answers.run("transformers", job | {"requests": plain, "out": str(tmp_path / "plain")})
    for method, ours, theirs in zip(METHODS, turn, reference, strict=True):
        assert (apart(ours, theirs) > 0.1) == bool(method), method


def test_a_plug_in_that_is_switched_off_refuses_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import SamplingParams

    from foveate.backends.vllm.requests import Requests

    monkeypatch.setenv("FOVEATE_VLLM", "off")
    Requests.validate_params(SamplingParams())
    with pytest.raises(ValueError, match="switched off"):
        Requests.validate_params(SamplingParams(extra_args={"foveate": "clvs"}))


def test_the_prefix_cache_never_mixes_edited_and_plain_blocks(
    job: dict[str, Any], tmp_path: Path
) -> None:
    """A prompt whose last row, which CLVS edits, closes a block; then a turn on top of it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    picture, method = job["requests"][0]["images"], "clvs(stop_threshold=0)"

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    image = ids("<image>")
    begin = ids("USER: <image>") + ids(" Is there a sun")
    end = ids(" in the image? ASSISTANT:")
    width, size = 144 - len(image), 32  # the image is 144 tokens in the cache
    filler = (ids(" in the image") * 40)[: -(len(begin) + len(end) + width) % size]
    first = begin + filler + end

    def ask(ids: list[int], method: str, **more: Any) -> dict[str, Any]:
        return {"method": method, "images": picture, "ids": ids, "prompt": ""} | more

    def answer(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = {"requests": requests, "options": {"block_size": size}, "in order": True}
        asked |= {"out": str(tmp_path / "out")}
        return answers.run("vllm", job | asked, VLLM_ENABLE_V1_MULTIPROCESSING="0")[0]

    (edited,) = answer([ask(first, method, steps=40)])
    second = first + edited["tokens"] + ids(" Is there a car? ASSISTANT:")
    _, plain, again, fresh_plain, fresh_edited = answer(
        [
            ask(first, method, steps=40),
            ask(second, ""),
            ask(second, method),
            ask(second, "", fresh=True),
            ask(second, method, fresh=True),
        ]
    )
    assert plain["cached"] == (len(edited["ids"]) - size), "up to the edited block it is shared"
    assert again["cached"] > plain["cached"]
    assert apart(plain, fresh_plain) < NEAR
    assert fresh_plain["tokens"] == plain["tokens"]
    assert apart(again, fresh_edited) < NEAR
    assert apart(again, plain) > 0.1
