"""The order of the rooms: methods know no engine, and a room imports lower rooms only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHODS = ROOT / "src" / "foveate" / "methods"
HIDDEN = {"__init__", "__pycache__"}

WITHOUT_ENGINES = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        for engine in ("transformers", "vllm", "foveate.backends"):
            if name == engine or name.startswith(engine + "."):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
sys.modules["transformers"] = sys.modules["vllm"] = None
from foveate.core.method import methods
for name, cls in methods().items():
    if cls.__module__.startswith("foveate."):
        cls(**cls.example)
        print(name)
"""


def test_every_method_imports_and_is_built_without_an_engine() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_ENGINES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {path.stem for path in METHODS.iterdir() if path.suffix in ("", ".py")} - HIDDEN
    assert set(done.stdout.split()) == files


def test_rooms_import_lower_rooms_only() -> None:
    pytest.importorskip("importlinter")
    run = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
