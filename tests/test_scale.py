"""Workers of a real local Ray: the records of the plain engine, also when workers die."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import VLM, FoveateError, commands
from foveate.bridges import ray as scale
from foveate.evaluation import ask as evaluation
from foveate.evaluation.benchmark import Benchmark, EvalRecord, Sample, answered, parse
from foveate.evaluation.data import Data
from foveate.evaluation.run import RECORDS, RESULTS, Plan
from foveate.scenes import world
from tests import tiny

ROOT = Path(__file__).parent.parent
BENCH = "pocket(questions=8, max_new_tokens=12)"
METHODS = ("vanilla", "clvs")

slow = pytest.mark.slow
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: pip install 'foveate[ray]' (half a gigabyte)",
)


@dataclasses.dataclass(frozen=True)
class Scenes(Benchmark):
    """Two questions about each of some scenes; to open a deadly one ends the process."""

    images: int = 6
    deadly: tuple[int, ...] = ()

    def read(self, data: Data) -> Iterator[Sample]:
        for number in range(self.images):
            image = functools.partial(drawn, number, number in self.deadly)
            for i, thing in enumerate(("car", "tree")):
                text = f"Is there a {thing}?"
                line = 2 * number + i
                yield Sample("test", line, str(line), text, text, "yes", image, str(number))

    def score(self, records: Iterable[EvalRecord]) -> dict[str, float]:
        return {"answered": len(answered(records))}

    def table(self, scores: dict[str, float]) -> Any:
        return ["", "answered"], [["all", scores["answered"]]]


Scenes.name = "scenes"  # after the class: in no registry


def drawn(number: int, deadly: bool) -> Image.Image:
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return world.draw(world.sample(number), 64)


def answers(folder: Path) -> dict[tuple[Any, ...], EvalRecord]:
    """Records by key, none twice, without what depends on the clock."""
    records = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    for record in records:
        assert record.pop("ms") >= 0
    found = {(r["benchmark"], r["split"], r["line"], r["method"]): r for r in records}
    assert len(found) == len(records)
    return found


# -- without Ray -----------------------------------------------------------------------------------


def test_a_missing_package_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        commands.main(["eval", "pocket", "--out", str(tmp_path / "run"), "--engine", "ray"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told == "foveate: This needs the package ray: pip install 'foveate[ray]'.\n"
    assert not (tmp_path / "run").exists()


def test_workers_need_the_engine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for option in ("--workers", "--cpus", "--gpus"):
        with pytest.raises(SystemExit) as stop:
            commands.main(["eval", "pocket", "--out", str(tmp_path), option, "2"])
        assert stop.value.code == 2
        assert "--engine ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("have", "wanted", "found"),
    [  # CPUs and GPUs that Ray has; workers and what each shall have; what they get
        ((16, 0), (4, None, None), (4, 4, 0)),
        ((16, 0), (None, None, None), (1, 16, 0)),
        ((2, 0), (2, 0.5, None), (2, 0.5, 0)),
        ((16, 8), (None, None, None), (8, 1, 1)),
        ((16, 8), (2, None, None), (2, 1, 1)),
        ((16, 8), (None, None, 0.5), (16, 1, 0.5)),
        ((16, 8), (4, None, 0), (4, 4, 0)),
        ((2, 0), (3, None, None), None),
        ((16, 2), (3, None, None), None),
        ((16, 2), (1, None, 4), None),
        ((16, 0), (0, None, None), None),
    ],
)
def test_what_every_worker_gets(have: Any, wanted: Any, found: Any) -> None:
    resources = {name: float(n) for name, n in zip(("CPU", "GPU"), have, strict=True) if n}
    if found is None:
        with pytest.raises(FoveateError, match=r"do not fit|must be 1 or more"):
            scale._divide(resources, *wanted)
        return
    workers, needs = scale._divide(resources, *wanted)
    assert (workers, needs["num_cpus"], needs["num_gpus"]) == found


# -- the command, its workers killed ---------------------------------------------------------------


class Command:
    """`foveate eval --engine ray` on two workers, in a process of its own.

    Every wait has an end, and no process outlives the block.
    """

    def __init__(self, out: Path, temporary: Path, seconds: float = 240) -> None:
        self.out, self.end, self.seen = out, time.monotonic() + seconds, dict[int, str]()
        asked = [BENCH, *(word for method in METHODS for word in ("--method", method))]
        spread = ["--device", "cpu", "--engine", "ray", "--workers", "2", "--cpus", "0.5"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "foveate.commands", "eval", *asked, "--out", out, *spread],
            env=os.environ | {"RAY_TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.family()
        self.process.kill()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=10)

    def family(self) -> dict[int, str]:
        """Processes that this one has started, directly or not, by what they call themselves."""
        parents, names, started = dict[int, int](), dict[int, str](), dict[int, str]()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                stat, line = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            pid, fields = int(folder.name), stat.rpartition(")")[2].split()
            parents[pid], started[pid] = int(fields[1]), fields[19]
            names[pid] = line.replace(b"\0", b" ").decode(errors="replace")
        found, new = dict[int, str](), {self.process.pid}
        while new := {pid for pid, parent in parents.items() if parent in new}:
            found |= {pid: names[pid] for pid in new}
        self.seen |= {pid: started[pid] for pid in found}
        return found

    def left(self) -> list[int]:
        """Those of all processes seen that still run; numbers of ended ones are used again."""
        found = []
        for pid, started in self.seen.items():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z" and fields[19] == started:
                    found.append(pid)
        return found

    def workers(self) -> set[int]:
        return {pid for pid, name in self.family().items() if name.startswith("ray::MapWorker")}

    def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            assert self.process.poll() is None, self.process.communicate(timeout=10)
            assert time.monotonic() < self.end, "it takes too long"
            time.sleep(0.02)

    def records(self) -> int:
        path = self.out / RECORDS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def finish(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; nothing is left running."""
        printed, told = self.process.communicate(timeout=max(1, self.end - time.monotonic()))
        while self.left():
            assert time.monotonic() < self.end, "processes are left"
            time.sleep(0.02)
        return self.process.returncode, printed, told


@slow
@needs_ray
def test_stopped_and_killed_it_finds_the_records_of_the_plain_engine(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "ray"
    vlm = VLM.load("pocket", device="cpu")
    results = evaluation.evaluate(Plan(parse(BENCH), METHODS, plain), vlm)
    expected = answers(plain)
    temporary = tmp_path_factory.mktemp("r")  # short: sockets are made below it

    with Command(out, temporary) as command:
        command.until(lambda: command.records() > 0)
        command.process.send_signal(signal.SIGINT)
        code, _, told = command.finish()
    assert code == 130
    assert told.endswith("foveate: stopped; the same command goes on from here\n")
    assert "Traceback" not in told
    stopped = answers(out)
    assert 0 < len(stopped) < len(expected)
    assert not (out / RESULTS).exists()

    with Command(out, temporary) as command:
        command.until(lambda: command.records() > len(stopped))
        victim, *_ = sorted(command.workers())
        os.kill(victim, signal.SIGKILL)
        killed = command.records()
        before = command.workers() - {victim}
        assert before, "the other one lives"
        command.until(lambda: command.workers() - before - {victim})
        code, printed, told = command.finish()
    assert code == 0, told
    assert len(stopped) < killed < len(expected)
    assert printed.startswith("pocket("), "tables and nothing else"
    assert printed.endswith(f"results: {out / RESULTS}; more: foveate report {out}\n")
    assert answers(out) == expected
    assert any(len(r["answer"].split()) > 5 for r in expected.values()), "there are captions"
    found = json.loads((out / RESULTS).read_text())
    for name in METHODS:
        one, other = (r["benchmarks"][str(parse(BENCH)[0])]["methods"] for r in (found, results))
        assert one[name] | {"ms": 0} == other[name] | {"ms": 0}
    assert found["run"] == results["run"]
    assert found["environment"]["workers"] == 2
    assert found["environment"]["sessions"] == 2


# -- in this process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray = pytest.importorskip("ray")
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(tmp_path_factory.mktemp("r")),
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        yield ray
        ray.shutdown()


@needs_ray
def test_a_cluster_that_is_not_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "no address")
    with pytest.raises(FoveateError, match="Ray cannot be had at 'no address'"):
        scale.evaluate(Plan([Scenes()], METHODS, tmp_path / "run"), tiny.vlm)
    assert not (tmp_path / "run").exists()


@slow
@needs_ray
def test_questions_that_kill_workers_are_recorded_errors(ray: Any, tmp_path: Path) -> None:
    deadly, plain, out = Scenes(deadly=(2,)), tmp_path / "plain", tmp_path / "ray"
    found = scale.evaluate(
        Plan([deadly], METHODS, out, batch_size=4), tiny.vlm, workers=2, cpus=0.5, patience=90
    )
    assert ray.is_initialized(), "it was not ours to stop"
    evaluation.evaluate(Plan([Scenes()], METHODS, plain, batch_size=4), tiny.vlm())
    expected = {key[1:]: record for key, record in answers(plain).items()}
    records = {key[1:]: record for key, record in answers(out).items()}
    assert records.keys() == expected.keys()
    for key, record in records.items():
        if record["image"] == "2":
            assert record["answer"] is None
            assert record["error"] == "every worker asked has died"
        else:
            assert record | {"benchmark": ""} == expected[key] | {"benchmark": ""}
    assert found["benchmarks"][str(deadly)]["methods"]["clvs"]["errors"] == 2


@slow
@needs_ray
def test_what_workers_refuse_is_one_sentence(ray: Any, tmp_path: Path) -> None:
    def refused(load: Any, **options: Any) -> str:
        with pytest.raises(FoveateError) as error:
            scale.evaluate(Plan([Scenes()], METHODS, tmp_path / "run", **options), load)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    load = functools.partial(VLM.load, str(tmp_path / "nothing"))
    assert "There is no model or folder" in refused(load, workers=1)
    assert "ZeroDivisionError" in refused(lambda: 1 // 0, workers=1)
    assert "5 workers of 1 CPUs" in refused(tiny.vlm, workers=5)
    assert "GetTimeoutError" in refused(lambda: time.sleep(60), workers=1, patience=5)
