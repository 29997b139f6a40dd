"""The wheel, installed alone, works in an empty folder; `make test-wheel` builds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import foveate

ROOT = Path(__file__).parents[2]
INSTALLED = Path(foveate.__file__).parent
if INSTALLED.is_relative_to(ROOT / "src"):
    pytest.skip("foveate is not installed from its wheel here", allow_module_level=True)

LARGEST = 16e6  # bytes of the wheel
COMMAND = [sys.executable, "-I", "-m", "foveate"]  # -I: nothing of the environment or the folder

LINES = """
from pathlib import Path
from foveate import VLM, enhance, list_methods
from foveate.scenes import world
scene = world.draw(world.sample(0))
vlm = VLM.load("pocket")
answers = {name: vlm.ask(scene, "Is there a car?", name).text for name in ("vanilla", "clvs")}
with enhance(vlm.model, "clvs"):
    pass
print(len(list_methods()), sorted(set(answers.values()) - {"yes", "no"}))
"""


def run(folder: Path, *given: str) -> str:
    """What the command prints in `folder`, without a terminal or what the caller has set."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    done = subprocess.run(
        given, cwd=folder, env=kept, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def test_it_holds_the_package_and_nothing_beside_it() -> None:
    installed = distribution("foveate")
    files = [str(file) for file in installed.files or () if "__pycache__" not in str(file)]
    for file in (ROOT / "src" / "foveate").rglob("*"):
        name = f"foveate/{file.relative_to(ROOT / 'src' / 'foveate').as_posix()}"
        assert "__pycache__" in name or file.is_dir() or name in files, f"{name} is missing"
    beside = {name.split("/")[0] for name in files if not name.startswith("..")}
    assert beside == {"foveate", f"foveate-{installed.version}.dist-info"}


def test_it_is_small() -> None:
    [wheel] = Path(sys.prefix, "dist").glob("foveate-*.whl")
    assert wheel.stat().st_size < LARGEST


def test_what_it_says_of_itself() -> None:
    about = distribution("foveate").metadata
    assert about["Description-Content-Type"] == "text/markdown"
    named = [c.rpartition(" ")[2] for c in about.get_all("Classifier") if ":: Python :: 3." in c]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named


@pytest.mark.parametrize("command", [
    ("--version",), ("--help",), ("doctor",), ("methods",), ("methods", "laser"),
    ("ask", "demo", "Is there a car?", "--method", "vanilla", "--method", "laser"),
    ("eval", "pocket(questions=2)", "--method", "clvs", "--out", "run"),
    ("draw", "2", "--out", "scenes"),
    ("heads", "--help"), ("serve", "--help"),
], ids=" ".join)  # fmt: skip
def test_a_command_in_an_empty_folder(command: tuple[str, ...], tmp_path: Path) -> None:
    assert run(tmp_path, *COMMAND, *command).strip()
    if "--out" in command:
        assert any((tmp_path / command[-1]).iterdir())


def test_what_needs_an_extra_names_it(tmp_path: Path) -> None:
    command = [*COMMAND, "trace", "demo", "Is there a car?"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'foveate[plot]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_script_is_installed_beside_the_interpreter(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("foveate")
    assert run(tmp_path, str(script), "--version") == f"foveate {foveate.__version__}\n"


def test_all_methods_answer_or_say_why_not(tmp_path: Path) -> None:
    told = run(tmp_path, *COMMAND, "ask", "demo", "Is there a car?", "--method", "all", "--json")
    assert len(json.loads(told)) >= 1


def test_a_few_lines_of_python(tmp_path: Path) -> None:
    told = run(tmp_path, sys.executable, "-Ic", LINES)
    assert told == f"{len(foveate.list_methods())} []\n"
