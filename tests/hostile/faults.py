"""Disks that fail: the n-th thing that Python asks of files under a folder is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REASONS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ENAMETOOLONG),
    *(errno.EFBIG, errno.ENOTDIR, errno.EISDIR),
)
ASKED = {"open", "os.mkdir", "os.rename", "os.truncate"}


class Fault:
    """What is refused, and whether it was reached.

    Attributes:
        left: questions until the refusal.
    """

    def __init__(self, folder: Path, number: int, reason: int) -> None:
        self.folder, self.left, self.reason, self.at = str(folder), number, reason, ""

    def asked(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if arguments else None
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(path)
        writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not path.startswith(self.folder) or not writes:
            return
        self.left -= 1
        if self.left == 0:
            self.at = f"{event} {path}"
            raise OSError(self.reason, os.strerror(self.reason), path)


_now: list[Fault] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _now and event in ASKED:
        _now[-1].asked(event, arguments)


sys.addaudithook(_hook)


@contextlib.contextmanager
def refusing(folder: Path, number: int, reason: int) -> Iterator[Fault]:
    """The `number`-th opening for writing, making of a folder or renaming under `folder` fails."""
    _now.append(Fault(folder, number, reason))
    try:
        yield _now[-1]
    finally:
        _now.pop()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of any file fails, as on a full disk: in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
