"""Lists of attention heads: the JSON files that `foveate heads` writes and AD-HH reads.

A list is ``{"heads": [[layer, head], ...], "model": {...}, ...}``, the most influential head first,
both numbers counted from 0. "model" holds entries of the architecture that the list was made for,
as `Anatomy.shape` gives them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import FoveateError
from .files import UNCHANGED, write_text

Pairs = tuple[tuple[int, int], ...]
"""(layer, head), counted from 0."""


def read(path: str | Path, shape: Mapping[str, Any]) -> Pairs:
    """The heads of one list, sorted. A bare list of pairs serves every model.

    Args:
        shape: of the model that the heads are wanted for.

    Raises:
        FoveateError: the file cannot be read, holds no such list, or was made for another model.
    """
    content = _load(Path(path))
    entry = content if isinstance(content, dict) else {"heads": content}
    pairs, model = entry.get("heads"), entry.get("model", {})
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise FoveateError(
            f"The file {path} holds no list of [layer, head] pairs, counted from 0, such as "
            '{"heads": [[16, 29], [26, 9]]}: make it with `foveate heads MODEL`.'
        )
    if not isinstance(model, dict):
        raise FoveateError(
            f'In {path}, "model" must be an object such as {json.dumps(dict(shape))}.'
        )
    different = [
        f"{key} {model[key]!r} instead of {value!r}"
        for key, value in shape.items()
        if model.get(key, value) != value
    ]
    if different:
        raise FoveateError(
            f"The heads in {path} were found for another model ({', '.join(different)}): "
            "run `foveate heads MODEL` for this one."
        )
    return _sorted(pairs)


def find(paths: Iterable[Path], shape: Mapping[str, Any]) -> Pairs | None:
    """The heads of the first list whose "model" fits, sorted; None where none fits.

    Args:
        paths: files that come with the package, of one list or an array of lists; a file that is
            missing is skipped.
        shape: of the model that the heads are wanted for.
    """
    for path in paths:
        content = _load(path) if path.is_file() else []
        for entry in content if isinstance(content, list) else [content]:
            if entry["model"].items() <= shape.items():
                return _sorted(entry["heads"])
    return None


def write(path: Path, content: Mapping[str, Any], safe: str = UNCHANGED) -> None:
    """Replace a file by a list, whole or not at all: an entry per line, a row of a table per line.

    Args:
        content: "heads", "model" and whatever else describes the list.
        safe: as in `files.writing`.
    """
    lines = [f"{json.dumps(key)}: {_laid_out(value)}" for key, value in content.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n", safe)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError:
        raise FoveateError(
            f"adhh cannot read the file {str(path)!r}: heads must be 'auto', a JSON file made by "
            "`foveate heads MODEL`, or pairs such as ((16, 29), (26, 9))."
        ) from None
    except ValueError as error:
        raise FoveateError(f"The file {path} is not JSON ({error}): make it again.") from None


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int and number >= 0 for number in value)
    )


def _sorted(pairs: Iterable[list[int]]) -> Pairs:
    return tuple(sorted({(layer, head) for layer, head in pairs}))


def _laid_out(value: Any) -> str:
    """JSON; a table of more than two columns has a line per row."""
    if isinstance(value, list) and value and isinstance(value[0], list) and len(value[0]) > 2:
        return "[\n" + ",\n".join(json.dumps(row) for row in value) + "]"
    return json.dumps(value)
