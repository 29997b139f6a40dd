"""Make open vision-language models look where they should.

``with enhance(model, "clvs"): model.generate(**inputs)``
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import __version__

if TYPE_CHECKING:
    from .backends.transformers.enhance import enhance, prefill
    from .backends.transformers.record import Recorder
    from .base.errors import FoveateError
    from .core.method import Method
    from .core.method import methods as list_methods
    from .insight.trace import trace
    from .vlm.vlm import VLM

__all__ = [
    "VLM",
    "FoveateError",
    "Method",
    "Recorder",
    "__version__",
    "enhance",
    "list_methods",
    "prefill",
    "trace",
]

_home = {  # imported when first asked for
    "enhance": ("backends.transformers.enhance", "enhance"),
    "prefill": ("backends.transformers.enhance", "prefill"),
    "Method": ("core.method", "Method"),
    "list_methods": ("core.method", "methods"),
    "FoveateError": ("base.errors", "FoveateError"),
    "Recorder": ("backends.transformers.record", "Recorder"),
    "VLM": ("vlm.vlm", "VLM"),
    "trace": ("insight.trace", "trace"),
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, found = _home[name]
    return getattr(import_module(f".{module}", __name__), found)
