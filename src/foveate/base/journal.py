"""A file of JSON lines that survives being killed: every line is written once and at once.

A run that starts again reads what is there, drops a line that was left half-written, and appends.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from .errors import FoveateError

Row = Any  # a JSON object


class Journal:
    """Rows by key, in the order of the file, and an open end to append to.

    Args:
        path: the file; made where it is missing.
        key: what tells rows apart. Of several rows with one key the last counts.
        settings: what the rows depend on, kept in the file's first line; None = no such line.
        check: raises `ValueError`, which says why, for what is no row.

    Raises:
        FoveateError: if the file cannot be used, a whole line is damaged, another process writes to
            it, or it was begun with other settings.
    """

    def __init__(
        self,
        path: Path,
        key: Callable[[Row], Hashable],
        settings: Row | None = None,
        check: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.path, self.key, self.settings, self.check = path, key, settings, check
        self.rows: dict[Hashable, Row] = {}
        try:
            self.file = path.open("a+b")
            self._lock()
            whole = self._read()
            self.file.truncate(whole)
        except OSError as error:
            raise FoveateError(f"{path} cannot be used: {error.strerror or error}.") from error
        if settings is not None and not whole:
            self._write({"settings": settings})

    def append(self, row: Row) -> None:
        """Write a row; it is in the file when this returns."""
        self._write(row)
        self.rows[self.key(row)] = row

    def close(self) -> None:
        self.file.close()

    def _write(self, row: Row) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def _read(self) -> int:
        """Take in the whole lines; how many bytes they are."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines()):
            try:
                row = json.loads(line)
                if number or self.settings is None:
                    self.check(row)
                    self.rows[self.key(row)] = row
                    continue
                begun = row["settings"]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise FoveateError(
                    f"Line {number + 1} of {self.path} is damaged ({damage(error)}): delete that "
                    "line, or give another --out."
                ) from error
            if not alike(begun, self.settings):
                raise FoveateError(f"{self.path} {difference(begun, self.settings)}.")
        return whole

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise FoveateError(
                f"Another process is writing to {self.path}: wait for it, or give another --out."
            ) from None


def damage(error: Exception) -> str:
    """Why a line could not be taken in: what a `check` says, or in general."""
    if isinstance(error, json.JSONDecodeError):
        return "it is no JSON"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, ValueError) else "it is no row of this file"


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON document, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(part, path)


def finite(value: Any) -> Any:
    """The same value as JSON knows it: lists, and None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def alike(begun: Any, settings: Row) -> bool:
    """Whether these are the settings that a file was begun with; what is missing is None."""
    old = begun if isinstance(begun, dict) else {}
    return all(old.get(k) == settings.get(k) for k in {**settings, **old})


def difference(begun: Any, settings: Row) -> str:
    """What to tell a user whose settings are not those that a file was begun with."""
    old = begun if isinstance(begun, dict) else {}
    other = next(k for k in {**settings, **old} if old.get(k) != settings.get(k))
    return (
        f"was begun with other settings ({other}: {old.get(other)!r}, now "
        f"{settings.get(other)!r}): give another --out, or delete it"
    )
