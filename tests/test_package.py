"""What a package says about itself, in every place that says it."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from foveate.base import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_one_version_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited is not None
    assert PROJECT["version"] == __version__ == cited[1]


def test_types_and_supported_pythons_are_declared() -> None:
    assert (ROOT / "src" / "foveate" / "py.typed").is_file()
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: Python :: 3." in c}
    assert PROJECT["requires-python"] == f">={min(named, key=lambda v: int(v.split('.')[1]))}"
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8")
    assert all(f'"{version}"' in tests for version in named)


def test_workflows_run_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    run = [t for w in WORKFLOWS for t in re.findall(r"run: make ([\w-]+)", w.read_text("utf-8"))]
    assert len(run) >= 4
    assert set(run) <= targets


def test_the_package_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["foveate", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("foveate", run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"foveate {__version__}\n")
