"""Make open vision-language models look where they should.

``with enhance(model, "clvs"): model.generate(**inputs)``
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import enhance, prefill
    from .method import FoveateError, Method
    from .method import methods as list_methods
    from .record import Recorder
    from .tracing import trace
    from .vlm import VLM

__version__ = "0.1.0"
__all__ = [
    "VLM",
    "FoveateError",
    "Method",
    "Recorder",
    "enhance",
    "list_methods",
    "prefill",
    "trace",
]

_home = {  # imported when first asked for
    "enhance": ("engine", "enhance"),
    "prefill": ("engine", "prefill"),
    "Method": ("method", "Method"),
    "list_methods": ("method", "methods"),
    "FoveateError": ("method", "FoveateError"),
    "Recorder": ("record", "Recorder"),
    "VLM": ("vlm", "VLM"),
    "trace": ("tracing", "trace"),
}


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, found = _home[name]
    return getattr(import_module(f".{module}", __name__), found)
