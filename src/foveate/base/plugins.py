"""A method (or a benchmark, or an analysis) of one's own in a file, for one run.

Packages name theirs by entry points, which `foveate.base.form` loads.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from .errors import FoveateError
from .form import Form


def load_file(path: Path) -> ModuleType:
    """Import a Python file, so that the classes in it are known by their names.

    Raises:
        FoveateError: there is no such file, it raises an error, or it defines nothing that has a
            name.
    """
    path = path.expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise FoveateError(f"There is no plug-in {path}: give a Python file, such as my_method.py.")
    name = f"foveate_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names in annotations
    sys.path.insert(0, str(path.parent))  # what lies beside it can be imported
    try:
        spec.loader.exec_module(module)
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == name]
        named = [c for c in own if issubclass(c, Form) and c.__dict__.get("name")]
        for cls in named:
            cls()  # an annotation that cannot be read is told here, and not at the first use
    except Exception as error:  # it is somebody else's code
        del sys.modules[name]
        raise FoveateError(
            f"The plug-in {path}{_line(error, path)} raises {type(error).__name__}: "
            f"{' '.join(str(error).split()).rstrip('.')}."
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    if not named:
        raise FoveateError(
            f"The plug-in {path} defines nothing that has a name: write a frozen dataclass that "
            'inherits from foveate.Method, with name: ClassVar[str] = "my_method".'
        )
    return module


def _line(error: Exception, path: Path) -> str:
    """Where in the file an error arose, the innermost place of it."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}," if error.filename == str(path) else ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f", line {lines[-1]}," if lines else ""
