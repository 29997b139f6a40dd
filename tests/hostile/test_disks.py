"""Disks that fail under every command: one sentence, exit code 2, and the same command goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="limits on files are POSIX's")

from foveate import FoveateError
from foveate.base import files
from foveate.base.files import Lines, owned, refusal, replacing, write_text, writing
from foveate.base.journal import Journal
from foveate.evaluation.merge import read_records
from foveate.scenes.export import export
from tests import tiny
from tests.hostile import TRIES
from tests.hostile.faults import REASONS, files_of_at_most, refusing

pytestmark = pytest.mark.long
BENCH = "pocket(questions=2, categories=('attribute',))"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    export(1, folder, size=64)
    path = folder / "conversations.jsonl"
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:4]), "utf-8")
    return path


def commands(model: str, data: Path, out: Path) -> dict[str, list[Any]]:
    """Every command that writes, with its folder."""
    asks = ["--model", model, "--device", "cpu", "--limit", 2]
    return {
        "draw": ["draw", 2, "--out", out, "--size", 64],
        "eval": ["eval", BENCH, "--out", out, "--method", "vanilla", "--method", "vaf", *asks],
        "sweep": ["sweep", "vaf", "--over", "suppress=0.5,0.7", "--bench", BENCH, "--out", out,
                  *asks],
        "trace": ["trace", "demo", "Is there a cup?", "--model", model, "--out", out,
                  "--max-new-tokens", 2, "--method", "vanilla", "--force"],
        "analyze": ["analyze", "decay", "--model", model, "--limit", 2, "--out", out],
        "demo": ["demo", "--out", out],
        "heads": ["heads", "pocket", "--scenes", 4, "--max-new-tokens", 6,
                  "--out", out / "heads"],
        "train": ["train", "cli", "--model", "pocket", "--data", data, "--out", out, "--steps", 2,
                  "--batch-size", 2, "--save-every", 0],
        "report": ["report", out],
    }  # fmt: skip


NAMES = tuple(commands("", Path(), Path()))
Run = Callable[..., tuple[int, str, str]]


def one_sentence(told: tuple[int, str, str]) -> str:
    code, _, err = told
    assert code == 2, told
    lines = [line for line in err.splitlines() if line.startswith("foveate: ")]
    sentence = lines[-1]
    assert "Traceback" not in err
    assert err.rstrip().endswith(sentence)
    assert len(sentence) < 500
    return sentence


class Case:
    """A command, its folder, and what is in the folder before the command runs."""

    def __init__(self, name: str, model: str, data: Path, out: Path, run: Run) -> None:
        self.out, self.run = out, run
        self.given = commands(model, data, out)[name]
        self.before: Path | None = None
        if name == "report":
            assert run(*commands(model, data, out)["eval"])[0] == 0
            self.before = out.with_name("before")
            shutil.copytree(out, self.before)
        if name == "heads":
            out.mkdir()

    def fresh(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before:
            shutil.copytree(self.before, self.out)
        elif self.given[0] == "heads":
            self.out.mkdir()

    def undisturbed(self) -> tuple[int, list[str]]:
        code = self.run(*self.given)[0]
        return code, sorted(p.name for p in self.out.rglob("*"))

    def check(self, want: tuple[int, list[str]], failing: Any) -> bool:
        """Run on a failing disk, then on a good one; whether the fault was met."""
        self.fresh()
        with failing as fault:
            told = self.run(*self.given)
        met = told[0] != want[0] or getattr(fault, "at", "")
        if told[0] != want[0]:
            one_sentence(told)
        assert not list(self.out.rglob("*.part*")), "a part was left"
        again = self.undisturbed()
        assert again == want, (told, again)
        return bool(met)


@pytest.mark.parametrize(
    ("name", "tries"),
    [("draw", 4), ("eval", 4), ("report", 2), ("train", 2)]
    + [pytest.param(name, max(3, TRIES // 250), marks=pytest.mark.slow) for name in NAMES],
)
def test_a_disk_that_fails_somewhere(
    name: str, tries: int, model: str, data: Path, tmp_path: Path, run: Run
) -> None:
    if name == "train":
        pytest.importorskip("accelerate", reason="training needs the extra: train")
    case = Case(name, model, data, tmp_path / "out", run)
    want = case.undisturbed()
    rng = random.Random(f"{name} {tries}")
    for number in range(1, tries + 1):
        reason = rng.choice(REASONS)
        size = rng.choice([0, 10, 200, 2_000, 20_000, rng.randrange(100_000)])
        at = (number + 1) // 2
        case.check(want, refusing(case.out, at, reason) if number % 2 else files_of_at_most(size))


@pytest.mark.parametrize("name", ["draw", "eval", "analyze", "demo", "trace", "sweep", "heads"])
def test_names_that_are_too_long(
    name: str, model: str, data: Path, tmp_path: Path, run: Run
) -> None:
    sentence = one_sentence(run(*commands(model, data, tmp_path / ("a" * 300))[name]))
    assert "File name too long" in sentence
    assert "give a shorter name" in sentence


@pytest.mark.parametrize("name", ["draw", "eval", "analyze", "demo", "trace", "sweep", "train"])
def test_a_file_where_the_folder_should_be(
    name: str, model: str, data: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "give another name" in one_sentence(run(*commands(model, data, out)[name]))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to(
    model: str, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and usual(path, mode))
    for name in ("draw", "eval", "analyze", "demo", "trace", "train"):
        sentence = one_sentence(run(*commands(model, data, tmp_path)[name]))
        assert "Permission denied" in sentence
        assert "give a folder that you may write to" in sentence


def test_what_is_answered_is_kept(model: str, tmp_path: Path, run: Run) -> None:
    given = ["eval", BENCH, "--model", model, "--device", "cpu", "--method", "vanilla"]
    assert run(*given, "--out", tmp_path / "whole")[0] == 0
    whole = read_records(tmp_path / "whole" / "records.jsonl")
    size = (tmp_path / "whole" / "records.jsonl").stat().st_size
    assert len(whole) > 2
    with files_of_at_most(size * 2 // 3):
        sentence = one_sentence(run(*given, "--out", tmp_path / "cut"))
    kept = read_records(tmp_path / "cut" / "records.jsonl")
    assert f"the {len(kept)} rows in it are safe" in sentence
    assert "ulimit" in sentence
    assert 0 < len(kept) < len(whole)
    assert run(*given, "--out", tmp_path / "cut")[0] == 0
    ends = [
        [{**row, "ms": 0} for row in read_records(tmp_path / name / "records.jsonl")]
        for name in ("whole", "cut")
    ]
    assert ends[0] == ends[1]


# -- files -----------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for number in (1, 2, 3):
        write_text(path, "before")
        with refusing(tmp_path, number, errno.ENOSPC) as fault, contextlib.suppress(FoveateError):
            write_text(path, "after" * 1000)
        assert fault.at
        assert path.read_text() == "before"
        assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with files_of_at_most(100), pytest.raises(FoveateError, match="what was there before is"):
        write_text(path, "z" * 1000)
    assert path.read_text() == "before"
    write_text(path, "after" * 1000)
    assert path.read_text() == "after" * 1000


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("before")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "after")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "after"


def test_what_comes_to_the_disk_and_in_which_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file before its name; a folder's names after."""
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def rename(old: Path, new: Path) -> None:
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are Linux's")
    write_text(tmp_path / "a.txt", "text")
    assert done == [".a.part.txt", "rename", tmp_path.name]


def test_lines_are_on_the_disk_within_a_second_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, synced = [100.0], list[float]()
    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(clock[0]))
    lines = Lines(tmp_path / "lines")
    for now in (100.0, 100.4, 100.9, 101.1, 101.5, 160.0):
        clock[0] = now
        lines.append(b"{}\n", "nothing is lost")
        lines.settle()
    assert synced == [100.0, 101.1, 160.0]
    lines.close()
    assert synced == [100.0, 101.1, 160.0, 160.0]


@pytest.mark.parametrize("tries", [60, pytest.param(TRIES, marks=pytest.mark.slow)])
def test_rows_survive_disks_that_fill_up(tries: int, tmp_path: Path) -> None:
    """Whatever fits is there in order; what does not is written once there is room."""
    rng = random.Random(tries)
    for number in range(tries):
        path = tmp_path / f"{number}.jsonl"
        rows = [{"n": n, "text": "é" * rng.randrange(40)} for n in range(rng.randrange(1, 12))]
        limit = rng.randrange(1, 400)
        written = 0
        with files_of_at_most(limit), contextlib.suppress(FoveateError):
            journal = Journal(path, lambda row: row["n"])
            try:
                for row in rows:
                    journal.append(row)
                    written += 1
            finally:
                journal.close()
        assert path.stat().st_size <= limit
        again = Journal(path, lambda row: row["n"])
        assert list(again.rows.values()) == rows[:written]
        for row in rows[written:]:
            again.append(row)
        again.close()
        got = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert got == rows
        path.unlink()


def test_one_process_at_a_time_has_a_folder(tmp_path: Path) -> None:
    again = pytest.raises(FoveateError, match="Another process is writing")
    with owned(tmp_path), again, owned(tmp_path):
        pass
    with owned(tmp_path):
        pass


def test_other_errors_are_no_disks(tmp_path: Path) -> None:
    for error in (ConnectionResetError(104, "reset"), ValueError("os error"), TimeoutError()):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error
    full = RuntimeError("I/O error: No space left on device (os error 28)")
    said = pytest.raises(FoveateError, match=r"No space left .*: safe; make room")
    with said, writing(tmp_path, "safe"):
        raise full


def test_long_paths_are_shortened() -> None:
    error = OSError(errno.ENOSPC, "full")
    assert len(str(refusal("a" * 5000, error))) < 300


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
