"""A file of JSON lines that survives being killed: every line is written once and at once.

A run that starts again reads what is there, drops a line that was left half-written, and appends.
A power failure costs the rows of at most a second (`files.Lines`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from .errors import FoveateError
from .files import UNCHANGED, Lines, lock, refusal, sync_folder, write_text

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
            self.lines = Lines(path)
        except OSError as error:
            raise refusal(path, error, "nothing was written", "used") from error
        try:
            lock(self.lines.file, path)
            whole = self._read()
            self.lines.file.truncate(whole)
            if settings is not None and not whole:
                self._write({"settings": settings})
        except BaseException as error:
            self.lines.file.close()
            if isinstance(error, OSError):
                raise refusal(path, error, what="used") from error
            raise
        sync_folder(path.parent)

    def append(self, row: Row) -> None:
        """Write a row; it is in the file when this returns, and on the disk after `settle`.

        Raises:
            FoveateError: the disk refuses it; the rows of before are safe.
        """
        self._write(row)
        self.rows[self.key(row)] = row

    def settle(self) -> None:
        """The group of rows is complete: bring it to the disk, at most once a second."""
        self.lines.settle()

    def close(self) -> None:
        self.lines.close()

    def _write(self, row: Row) -> None:
        safe = f"the {len(self.rows)} rows in it are safe" if self.rows else "nothing is lost"
        self.lines.append(json.dumps(row, ensure_ascii=False).encode() + b"\n", safe)

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


def damage(error: Exception) -> str:
    """Why a line could not be taken in: what a `check` says, or in general."""
    if isinstance(error, json.JSONDecodeError):
        return "it is no JSON"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, ValueError) else "it is no row of this file"


def write_json(path: Path, value: Any, safe: str = UNCHANGED) -> None:
    """Replace a file by a JSON document, whole or not at all; `safe` as in `files.writing`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", safe)


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
