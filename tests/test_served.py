"""What stands before vLLM, without vLLM: options, readings, and runs whose engine stops."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from foveate import FoveateError, commands
from foveate.backends.vllm import compat, reading
from foveate.backends.vllm.engine import Engine, Produced, Request, Stopped
from foveate.benchmarks.pocket import PocketBench
from foveate.evaluation.ask import Plan, evaluate
from foveate.evaluation.run import RECORDS
from foveate.evaluation.sampled import Sampled
from foveate.insight.trace import Uncertainty
from foveate.vlm.served import ServedVLM


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--engine", "vllm"], "vLLM is not installed: pip install 'foveate[vllm]'"),
        (["--engine", "vllm", "--device", "cpu"], "vLLM chooses its device itself"),
        (["--engine", "vllm", "--vllm", "eager"], "write it like max_model_len=4096"),
        (["--engine", "vllm", "--one-by-one"], "vLLM batches by itself"),
        (["--tensor-parallel", "2"], "are about --engine vllm"),
        (["--engine", "ray", "--vllm", "a=1"], "are about --engine vllm"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> str:
        raise FoveateError("vLLM is not installed: pip install 'foveate[vllm]'.")

    monkeypatch.setattr(compat, "version", missing)
    with pytest.raises(SystemExit) as end:
        commands.main(["eval", "pocket", "--out", str(tmp_path), *options])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_only_the_program_that_started_the_engine_can_ask_for_readings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = reading.as_text([reading.Reader(heads="max", layers=(1, 2)), Uncertainty(top_k=5)])
    params = SimpleNamespace(extra_args={reading.READ: {"file": "a", "readers": text}})
    monkeypatch.delenv(reading.FOLDER, raising=False)
    with pytest.raises(FoveateError, match="leave it out"):
        reading.asked_to_read(params)
    monkeypatch.setenv(reading.FOLDER, "/somewhere")
    methods, readers = reading.apart(reading.joined("clvs", reading.asked_to_read(params)))
    assert methods == "clvs"
    assert readers == (reading.Reader(heads="max", layers=(1, 2)), Uncertainty(top_k=5))
    for place in ("os:system", "foveate.base.form:Form", "foveate.core.method:nothing"):
        with pytest.raises(FoveateError, match="no reader of foveate"):
            reading.from_text(json.dumps([[place, {}]]))


def test_readings_come_back_by_token_and_their_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(reading.FOLDER, str(tmp_path))
    params = SimpleNamespace(extra_args={reading.READ: {"file": "../../one", "readers": ""}})
    values = torch.rand(3, 2, 4)  # tokens, layers, columns
    sink, other = reading.Sink(params, writes=True), reading.Sink(params, writes=False)
    for step in (0, 1, 1, 2):  # a token is computed again after preemption
        for one in (sink, other):
            kept = one.notes(step).setdefault(reading._ATTENTION, {})
            kept |= {5 + layer: values[step, layer] for layer in range(2)}
            one.write()
    found = reading.record(reading.collect(tmp_path / "one", 3))
    assert found is not None
    assert found.layers == (5, 6)
    for step in range(3):
        torch.testing.assert_close(found.image(step)[0], values[step], rtol=0, atol=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FoveateError, match="without a reading"):
        reading.collect(tmp_path / "one", 1)


class Fake(Engine):
    """Says "no" to everything, and stops for good after some answers."""

    def __init__(self, most: int) -> None:
        self.model, self.options, self.left = "pocket", {"enforce_eager": True}, most
        self.lock, self.asked, self.closed = threading.Lock(), list[Request](), False

    def submit(self, request: Request) -> Future[Produced]:
        answer: Future[Produced] = Future()
        with self.lock:
            self.asked.append(request)
            self.left -= 1
            if self.left < 0:
                answer.set_exception(Stopped("vLLM has stopped."))
            else:
                logs = [dict.fromkeys(range(985), -1.0), dict.fromkeys(range(985), -0.5)]
                answer.set_result(Produced([], [7, 2], logs, []))
        return answer

    def close(self) -> None:
        self.closed = True


@pytest.mark.slow
def test_a_run_whose_engine_stops_keeps_its_records_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.32.0")
    monkeypatch.setattr(compat, "on_cpus", lambda: True)
    vlm = ServedVLM.load("pocket")
    vlm.engine = first = Fake(20)
    sampled = (Sampled(temperature=1.5),)
    plan = Plan([PocketBench()], ["vanilla", "clvs", sampled], tmp_path, limit=1, batch_size=8)
    with pytest.raises(Stopped):
        evaluate(plan, vlm)
    assert first.closed
    kept = (tmp_path / RECORDS).read_text().splitlines()
    assert 0 < len(kept) <= 20
    vlm.engine = second = Fake(10_000)
    evaluate(plan, vlm)
    rows = [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()]
    assert (tmp_path / RECORDS).read_text().splitlines()[: len(kept)] == kept
    assert all(row["error"] is None for row in rows)
    keys = [(row["split"], row["line"], row["method"]) for row in rows]
    assert len(keys) == len(set(keys))
    texts = {tuple(map(str, request.methods)) for request in second.asked}
    assert texts == {(), ("clvs",)}
    seeds = [request.sampling["seed"] for request in second.asked if "seed" in request.sampling]
    assert len(seeds) == len(set(seeds)) > 0
