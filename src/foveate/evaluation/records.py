"""What a line of a run's files must hold, so that a foreign or damaged one is named."""

from __future__ import annotations

import json
import math
from typing import Any

NEEDED = ("benchmark", "split", "line", "question", "label", "meta", "method", "answer")
"""What a report needs of a record."""

WRITTEN = (*NEEDED, "prompt", "error", "ms")
"""What a run that goes on needs of a record, too."""

_NUMBER = (int, float)
_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("benchmark", "split", "id", "question", "prompt", "method"), (str,)),
    **dict.fromkeys(("answer", "error", "image"), (str, _NONE)),
    **dict.fromkeys(("yes", "probability"), (*_NUMBER, _NONE)),
    **dict.fromkeys(("meta", "notes"), (dict,)),
    "line": (int,),
    "tokens": (int, _NONE),
    "ms": _NUMBER,
}


def check_record(row: Any, needed: tuple[str, ...] = NEEDED) -> None:
    """Raise `ValueError`, which says why, for what is no `EvalRecord` with these fields."""
    _check(row, needed, _TYPES)
    if row["line"] < 0:
        raise ValueError("its line is below 0")


def check_session(row: Any) -> None:
    """Raise `ValueError`, which says why, for what is no session of a run."""
    _check(row, ("started", "seconds"), {"started": (str,), "seconds": _NUMBER})


def check_run(content: Any) -> None:
    """Raise `ValueError`, which says why, for what is no configuration of a run."""
    types = {"root": (str, _NONE), "limit": (int, _NONE), "shard": (list, _NONE)}
    _check(content, (), {**types, "model": (str,), "versions": (list,)})
    match content.get("shard"):
        case None:
            pass
        case [int(number), int(count)] if 0 <= number < count:
            pass
        case _:
            raise ValueError("its shard is none")
    if not all(isinstance(each, dict) for each in content.get("versions", ())):
        raise ValueError("its versions are none")


def check_results(content: Any) -> None:
    """Raise `ValueError`, which says why, for what a run does not write when it ends."""
    parts = ("benchmarks", "environment")
    _check(content, parts, dict.fromkeys(parts, (dict,)))
    for benchmark in content["benchmarks"].values():
        _check(benchmark, (), {"problems": (dict,)})
        if not all(type(count) is int for count in benchmark.get("problems", {}).values()):
            raise ValueError("its problems are no counts")


def _check(row: Any, needed: tuple[str, ...], types: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    for name in needed:
        if name not in row:
            raise ValueError(f"it has no {name}")
    for name, kinds in types.items():
        value = row.get(name)
        if name in row and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ValueError(f"its {name} is of the wrong type")
        if kinds is _NUMBER and isinstance(value, kinds) and not 0 <= value < math.inf:
            raise ValueError(f"its {name} is out of range")
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("it holds half a character or no number") from None
