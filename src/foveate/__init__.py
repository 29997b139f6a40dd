"""Make open vision-language models look where they should.

``with enhance(model, "clvs"): model.generate(**inputs)``
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import enhance, prefill
    from .method import FoveateError, Method
    from .record import Recorder
    from .vlm import VLM

__version__ = "0.1.0"
__all__ = ["VLM", "FoveateError", "Method", "Recorder", "enhance", "prefill"]

_home = {
    "enhance": "engine",
    "prefill": "engine",
    "Method": "method",
    "FoveateError": "method",
    "Recorder": "record",
    "VLM": "vlm",
}


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_home[name]}", __name__), name)
