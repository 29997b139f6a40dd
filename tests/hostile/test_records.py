"""Runs of other programs, of other versions, or damaged: read, or refused in one sentence."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.backends.transformers import compat
from foveate.base import __version__, stats
from foveate.base.errors import FoveateError
from foveate.benchmarks.pope import POPE
from foveate.evaluation import run
from foveate.evaluation.benchmark import Sample
from foveate.evaluation.data import Data
from foveate.evaluation.results import report
from foveate.evaluation.run import RECORDS, RESULTS, RUN, SESSIONS, Plan, Run, read_run
from tests.hostile import MANY, tries

METHODS = ("vanilla", "clvs")
LINES = range(4)
DEEP = "[" * 10_000


@dataclass(frozen=True)
class Asked(POPE):
    """POPE with questions of its own."""

    def read(self, data: Data) -> Iterator[Sample]:
        for n in LINES:
            yield Sample("popular", n, str(n), "Is it?", "Is it?", "yes", image_name=str(n // 2))


Asked.name = "pope"  # after the class: in no registry


def record(line: int, method: str) -> dict[str, Any]:
    return {
        "benchmark": "pope", "split": "popular", "line": line, "id": str(line),
        "image": str(line // 2), "question": "Is it?", "prompt": "Is it?", "label": "yes",
        "meta": {}, "method": method, "answer": "yes" if line % 2 else "no", "error": None,
        "yes": 0.5, "probability": 0.5, "tokens": 1, "ms": 1.0, "notes": {},
    }  # fmt: skip


def opened(folder: Path) -> Run:
    source = {"model": "pocket", "revision": None}
    return Run(Plan([Asked()], METHODS, folder), source, "float32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has answered everything."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with opened(folder) as one:
        one.keep(record(line, method) for line, method in itertools.product(LINES, METHODS))  # type: ignore[misc]
        one.finish({"foveate": "0"})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def use(folder: Path) -> None:
    """Go on with the run, and report it; each works, or says one sentence that can be printed."""
    for work in (go_on, tell):
        said = "."
        try:
            with warnings.catch_warnings(action="ignore"):
                work(folder)
        except FoveateError as error:
            said = str(error)
        assert "\n" not in said
        assert said.endswith("."), said
        assert said.encode()


def go_on(folder: Path) -> None:
    with opened(folder) as one:
        one.finish({})


def tell(folder: Path) -> None:
    report([folder], folder / "report", images=False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "interval", functools.partial(stats.interval, resamples=50))
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # statsmodels does, at every report


# -- generated -------------------------------------------------------------------------------------

values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from([10**40, -1, "\ud800", "yes", "pope", "a+b", "clvs", "popular", ""]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
RAW = (b"", b"{", b"[]", b"7", b"null", b'"text"', b"\xff\xfe", DEEP.encode(), b"9" * 5000, b"NaN")
MISSING = object()


@st.composite
def damages(draw: Callable[[Any], Any]) -> tuple[str, int, Any, Any]:
    """A file, a line of it, a field there (None: the whole line), and what becomes of it."""
    name = draw(st.sampled_from([RECORDS, RECORDS, RECORDS, SESSIONS, RUN, RESULTS]))
    line = draw(st.integers(0, 7))
    if draw(st.integers(0, 4)) == 0:
        return name, line, None, draw(st.sampled_from(RAW))
    return name, line, draw(st.integers(0, 20)), draw(st.one_of(st.just(MISSING), values))


def hurt(folder: Path, damage: tuple[str, int, Any, Any]) -> None:
    name, number, field, value = damage
    path = folder / name
    lines = path.read_bytes().splitlines() if name in (RECORDS, SESSIONS) else [path.read_bytes()]
    number %= len(lines)
    if field is None:
        lines[number] = value
    else:
        row = json.loads(lines[number])
        key = list(row)[field % len(row)]
        row[key] = value
        if value is MISSING:
            del row[key]
        lines[number] = json.dumps(row).encode()
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def use_hurt(whole: Path, folder: Path, found: list[tuple[str, int, Any, Any]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for damage in found:
        try:
            hurt(folder, damage)
        except (ValueError, TypeError, RecursionError, AttributeError, ZeroDivisionError):
            return  # it is damaged already
    use(folder)


@pytest.mark.long
@tries(40)
@given(found=st.lists(damages(), min_size=1, max_size=2))
def test_damage(whole: Path, tmp_path: Path, found: Any) -> None:
    use_hurt(whole, tmp_path / "run", found)


@pytest.mark.slow
@MANY
@given(found=st.lists(damages(), min_size=1, max_size=3))
def test_much_damage(whole: Path, tmp_path: Path, found: Any) -> None:
    use_hurt(whole, tmp_path / "run", found)


# -- by name ---------------------------------------------------------------------------------------


def replaced(folder: Path, name: str, number: int, line: bytes) -> None:
    lines = (folder / name).read_bytes().splitlines()
    lines[number] = line
    (folder / name).write_bytes(b"".join(each + b"\n" for each in lines))


@pytest.mark.parametrize("field", ["prompt", "ms", "error", "meta", "answer", "label", "method"])
def test_a_record_without_a_field_is_named(folder: Path, field: str) -> None:
    row = record(1, "vanilla")
    del row[field]
    replaced(folder, RECORDS, 2, json.dumps(row).encode())
    says = rf"Line 3 of .*records.jsonl is damaged \(it has no {field}\): delete that line"
    with pytest.raises(FoveateError, match=says):
        go_on(folder)
    if field in ("ms", "error"):  # a report needs fewer
        tell(folder)
        return
    with pytest.raises(FoveateError, match="another prompt" if field == "prompt" else says):
        tell(folder)


@pytest.mark.parametrize(("changed", "says"), [
    ({"answer": 7}, "its answer is of the wrong type"),
    ({"line": "1"}, "its line is of the wrong type"),
    ({"line": True}, "its line is of the wrong type"),
    ({"line": -1}, "its line is below 0"),
    ({"meta": []}, "its meta is of the wrong type"),
    ({"ms": float("nan")}, "its ms is out of range"),
    ({"label": float("inf")}, "it holds half a character or no number"),
    ({"question": "\ud800"}, "it holds half a character or no number"),
])  # fmt: skip
def test_a_record_with_a_strange_value_is_named(folder: Path, changed: Any, says: str) -> None:
    replaced(folder, RECORDS, 0, json.dumps(record(0, "vanilla") | changed).encode())
    for work in (go_on, tell):
        with pytest.raises(FoveateError, match=rf"Line 1 of .* is damaged \({says}\)"):
            work(folder)


def test_ten_thousand_brackets_are_named(folder: Path) -> None:
    replaced(folder, RECORDS, 5, DEEP.encode())
    for work in (go_on, tell):
        with pytest.raises(FoveateError, match=r"Line 6 of .*\(it is nested too deeply\)"):
            work(folder)


def test_a_session_without_its_seconds_is_named(folder: Path) -> None:
    replaced(folder, SESSIONS, 0, b'{"started": "now"}')
    with pytest.raises(FoveateError, match=r"Line 1 of .*sessions.jsonl .*it has no seconds"):
        go_on(folder)
    tell(folder)


def test_a_meta_of_another_benchmark_is_said_and_stops_nothing(folder: Path) -> None:
    row = record(0, "vanilla") | {"benchmark": "mme", "split": "count"}
    with (folder / RECORDS).open("ab") as file:
        file.write(json.dumps(row | {"label": 3}).encode() + b"\n")
    tell(folder)
    assert "Several versions" not in (folder / "report" / "report.md").read_text()


def test_another_version_that_goes_on_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"foveate": __version__, "transformers": compat.VERSION}
    second = first | {"transformers": "6.0.0"}
    assert read_run(folder)["versions"] == [first]
    monkeypatch.setattr(compat, "VERSION", "6.0.0")
    says = f"was begun by foveate .* with transformers {first['transformers']}"
    with pytest.warns(UserWarning, match=f"{says} and goes on with .* 6.0.0: answers may differ"):
        go_on(folder)
    assert read_run(folder)["versions"] == [first, second]
    with warnings.catch_warnings(action="error"):  # it has been said
        go_on(folder)
    tell(folder)
    told = (folder / "report" / "report.md").read_text()
    assert "Several versions answered" in told
    assert f"transformers {first['transformers']}" in told
    assert "transformers 6.0.0" in told


def test_a_run_that_names_no_version_says_so(folder: Path) -> None:
    content = read_run(folder)
    del content["versions"]
    (folder / RUN).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="begun by foveate unknown with transformers unknown"):
        go_on(folder)


def test_two_sessions_of_the_same_moment_are_two(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        @staticmethod
        def now() -> datetime:
            return datetime(2026, 1, 1)

    monkeypatch.setattr(run, "datetime", Clock)
    for _ in range(2):
        go_on(folder)
    found = json.loads((folder / RESULTS).read_text())["environment"]["sessions"]
    assert found == 3
