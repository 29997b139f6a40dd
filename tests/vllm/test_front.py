"""A `VLM` whose answers come from vLLM: its answers, crops, maps and records are transformers'."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from PIL import Image

from foveate import VLM, FoveateError, commands
from foveate.benchmarks.pocket import PocketBench
from foveate.core.method import as_stack
from foveate.evaluation.ask import Plan, evaluate
from foveate.evaluation.run import RECORDS, read_run
from foveate.insight.trace import trace
from foveate.scenes.questions import FIRST_HELD_OUT
from foveate.scenes.world import draw, sample
from foveate.vlm.served import ServedVLM

SIZES = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 2**28}
OPTIONS = [f"{name}={value}" for name, value in SIZES.items()]
QUESTIONS = ("Is there a car in the image?", "What is in the image?", "Describe this image.")
NEAR = 1e-4


@pytest.fixture(scope="module")
def served() -> Iterator[ServedVLM]:
    vlm = ServedVLM.load("pocket", **SIZES)
    yield vlm
    vlm.engine.close()


@pytest.fixture(scope="module")
def plain() -> VLM:
    return VLM.load("pocket")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Image.Image, str]]:
    scenes = [draw(sample(FIRST_HELD_OUT + number)) for number in range(4)]
    return [(scene, question) for scene in scenes for question in QUESTIONS]


@pytest.mark.parametrize(
    "method",
    [
        *("vanilla", "clvs", "pai(gamma=1)", "clvs(smoothing=0.5)+pai(alpha=0.5, gamma=1)"),
        *("vicrop", "carve+clvs", "laser(vat='never')"),
    ],
)
def test_answers_and_crops_are_those_of_transformers(
    method: str, served: ServedVLM, plain: VLM, pairs: list[Any]
) -> None:
    ours = served.batch(pairs, method, max_new_tokens=12)
    theirs = plain.batch(pairs, method, max_new_tokens=12)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.text, one.tokens) == (other.text, other.tokens)
        assert one.probabilities == pytest.approx(other.probabilities, abs=5e-4)
        assert one.yes == pytest.approx(other.yes, abs=5e-4)
        assert one.chat.notes.get("crop") == other.chat.notes.get("crop")


@pytest.mark.parametrize("heads", ["mean", "max", (0, 3)])
def test_a_trace_shows_the_maps_of_transformers(
    heads: Any, served: ServedVLM, plain: VLM, pairs: list[Any]
) -> None:
    image, question = pairs[1]
    methods = ["vanilla", "clvs", "clvs(stop_threshold=0)", "vicrop+clvs"]
    ours, theirs = (
        trace(vlm, image, question, methods, heads=heads, max_new_tokens=6).runs
        for vlm in (served, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one.tokens, one.layers, one.stopped) == (other.tokens, other.layers, other.stopped)
        # float16 holds weights up to 1 in steps of 2**-11, half of which is the rounding's
        apart = np.abs(one.attention.astype(float) - other.attention.astype(float))
        assert apart.max() <= max(NEAR, 2**-11 * float(other.attention.max()))
        assert np.abs(one.uncertainty - other.uncertainty).max() < NEAR
        assert len(one.pictures) == len(other.pictures)
    assert np.abs(ours[0].attention.astype(float) - ours[2].attention).max() > 0.01


def test_readings_are_exact(served: ServedVLM, plain: VLM, pairs: list[Any]) -> None:
    image, question = pairs[2]
    for method in ("vanilla", "clvs(stop_threshold=0)"):
        one, other = (
            vlm.ask(image, question, method, max_new_tokens=6, record=True).record
            for vlm in (served, plain)
        )
        assert one is not None
        assert other is not None
        assert one.layers == other.layers
        assert one.values.keys() == other.values.keys()
        for step in other.values:
            apart = (one.image(step)[0] - other.image(step)[0]).abs().max()
            assert float(apart) < NEAR


def records(folder: Path) -> dict[Any, dict[str, Any]]:
    rows = map(json.loads, (folder / RECORDS).read_text().splitlines())
    return {(row["split"], row["line"], row["method"]): row for row in rows}


def check_alike(ours: dict[Any, dict[str, Any]], theirs: dict[Any, dict[str, Any]]) -> None:
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        other = theirs[key]
        assert row.keys() == other.keys()
        for name in row.keys() - {"ms"}:
            expected = other[name]
            if isinstance(expected, float):
                expected = pytest.approx(expected, abs=5e-4)
            assert row[name] == expected, (key, name)


def test_an_evaluation_has_the_records_and_scores_of_transformers(
    served: ServedVLM, plain: VLM, tmp_path: Path
) -> None:
    bench = PocketBench()
    methods = ["vanilla", "clvs", "pai(gamma=1)"]
    results = {}
    for name, vlm in (("vllm", served), ("plain", plain)):
        plan = Plan([bench], methods, tmp_path / name, limit=2)
        results[name] = evaluate(plan, vlm)["benchmarks"][str(bench)]["methods"]
    check_alike(records(tmp_path / "vllm"), records(tmp_path / "plain"))
    for method in results["plain"]:
        ours, theirs = (results[name][method]["scores"] for name in ("vllm", "plain"))
        assert ours == pytest.approx(theirs, abs=1e-6, nan_ok=True)
    begun = read_run(tmp_path / "vllm")
    assert begun["engine"] == {"name": "vllm", **SIZES}
    assert begun["versions"][0]["vllm"].startswith("0.32.")
    with pytest.raises(FoveateError, match="engine"):  # not to be continued by another one
        evaluate(Plan([bench], methods, tmp_path / "vllm", limit=2), plain)


def test_sampled_answers_are_drawn_alike_however_they_are_batched(
    served: ServedVLM, tmp_path: Path
) -> None:
    from foveate.evaluation.sampled import Sampled

    folders = []
    for size in (1, 64):
        plan = Plan(
            [PocketBench()],
            [(Sampled(temperature=1.5),)],
            tmp_path / str(size),
            limit=4,
            batch_size=size,
        )
        evaluate(plan, served)
        folders.append({k: row["answer"] for k, row in records(plan.folder).items()})
    assert folders[0] == folders[1]
    assert len(set(folders[0].values())) > 3


def test_methods_that_vllm_cannot_run_are_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vlm = ServedVLM.load("pocket")
    for method in ("sid", "laser", "opera"):
        with pytest.raises(FoveateError, match=f"{method} needs .* foveate with transformers"):
            evaluate(Plan([PocketBench()], [method], tmp_path / method), vlm)
    with (
        pytest.raises(FoveateError, match="layer 99 does not exist"),
        vlm.using(as_stack("devils(layers=(99,))")),
    ):
        pass
    with pytest.raises(SystemExit) as end:
        commands.main(["eval", "pocket", "--engine", "vllm", "-m", "pocket", "--device", "cpu",
                       "--out", str(tmp_path / "no")])  # fmt: skip
    assert end.value.code == 2
    assert "vLLM chooses its device itself" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_and_leaves_no_process(plain: VLM, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "foveate.commands", "eval", "pocket", "--engine", "vllm"]
    command += ["--limit", "2", "--batch-size", "4", "--out", str(out)]
    command += [part for option in OPTIONS for part in ("--vllm", option)]
    given = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, env=given, stdout=log, stderr=log)
        file = out / RECORDS
        while not file.exists() or file.read_bytes().count(b"\n") < 8:
            assert first.poll() is None, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.2)
        children = _children(first.pid)
        first.send_signal(signal.SIGKILL)
        first.wait()
    begun = len(records(out))
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "vLLM's processes have outlived the command"
        time.sleep(0.2)
    subprocess.run(command, env=given, check=True, capture_output=True, timeout=600)
    assert 8 <= begun < len(records(out))
    evaluate(Plan([PocketBench()], ["vanilla", "clvs"], tmp_path / "plain", limit=2), plain)
    check_alike(records(out), records(tmp_path / "plain"))


def _children(process: int) -> list[int]:
    """The processes below one, Linux only; without Python's own tracker of resources."""
    found = []
    for child in Path(f"/proc/{process}/task").glob("*/children"):
        for one in map(int, child.read_text().split()):
            named = Path(f"/proc/{one}/cmdline").read_text()
            found += ([] if "resource_tracker" in named else [one]) + _children(one)
    return found
