"""One file here is one method; `foveate.core.method` finds them by walking this folder.

``from foveate.methods import CLVS`` gives the class of a method.
"""

from typing import Any

from ..core.method import methods


def _classes() -> dict[str, type]:
    """The classes of this folder by their own names."""
    return {c.__name__: c for c in methods().values() if c.__module__.startswith(f"{__name__}.")}


def __dir__() -> list[str]:
    return sorted(_classes())


def __getattr__(name: str) -> Any:
    if name[:1].isupper() and (found := _classes().get(name)):  # the files' names are in lower case
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
