"""Writing that survives: whole files or none, lines that reach the disk, a sentence for failures.

    with replacing(path) as part: image.save(part)   # takes the place of `path` when all is written
    write_text(path, text)
    with writing(folder, safe): model.save_pretrained(folder)   # foreign code that writes

A file is written beside its place, brought to the disk (fsync) and renamed, so that a reader, a
kill and a power failure find the old one or the new one. Whatever the disk refuses becomes a
`FoveateError` that says what is safe and how to go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import FoveateError

UNCHANGED = "what was there before is unchanged"
EVERY = 1.0  # seconds of appended lines that a power failure may cost
LONG = 120  # letters of a path in a sentence

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISPLACED = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
_OTHERS = {
    *(errno.ENOENT, errno.EFBIG, errno.ENAMETOOLONG, errno.EIO, errno.ELOOP, errno.EMFILE),
    *(errno.ENFILE, errno.EBUSY, errno.ESTALE, errno.EINVAL, errno.ENODEV, errno.ENXIO),
    *(errno.ETXTBSY, errno.EXDEV, errno.EMLINK),
}


def disk_error(error: BaseException) -> int | None:
    """The number of the system's error behind an exception; None where no file is behind it.

    Files written in Rust (safetensors, tokenizers) fail with exceptions of their own, which end in
    ``(os error 28)``.
    """
    if isinstance(error, OSError):
        number = error.errno
    else:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told.group(1)) if told else None
    return number if number in _FULL | _FORBIDDEN | _MISPLACED | _OTHERS else None


def refusal(
    path: Path | str, error: BaseException, safe: str = UNCHANGED, what: str = "written"
) -> FoveateError:
    """The sentence for a file that the disk refused: the reason, what is safe, what to do."""
    number = disk_error(error)
    told = str(path)
    if len(told) > LONG:
        told = f"{told[: LONG // 2]}...{told[-LONG // 3 :]}"
    reason = os.strerror(number) if number else " ".join(str(error).split()) or type(error).__name__
    return FoveateError(f"{told} cannot be {what} ({reason}): {safe}; {_advice(number)}.")


def _advice(number: int | None) -> str:
    if number in _FULL:
        return "make room and give the same command again"
    if number == errno.EFBIG:
        return "lift the limit on the size of files (ulimit -f) and give the same command again"
    if number in _FORBIDDEN:
        return "give a folder that you may write to"
    if number == errno.ENAMETOOLONG:
        return "give a shorter name"
    if number in _MISPLACED:
        return "a file stands where a folder should be, or the reverse: give another name"
    if number == errno.ENOENT:
        return "make its folder first, or give another"
    return "check the disk and give the same command again"


@contextlib.contextmanager
def writing(path: Path | str, safe: str = UNCHANGED) -> Iterator[None]:
    """Turn what the disk refuses inside the block into one sentence about `path`.

    Args:
        safe: what is not lost, as a part of a sentence.

    Raises:
        FoveateError: for errors of files; others pass.
    """
    try:
        yield
    except FoveateError:
        raise
    except Exception as error:
        if disk_error(error) is None:
            raise
        raise refusal(path, error, safe) from error


def make_folder(path: Path) -> Path:
    """The folder, made where it is missing. Raises `FoveateError` unless it can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(path, error, "nothing was written", "made a folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        raise refusal(path, denied, "nothing was written")
    return path


@contextlib.contextmanager
def replacing(path: Path, safe: str = UNCHANGED) -> Iterator[Path]:
    """A path beside `path`, of the same kind; the file written to it takes the place of `path`.

    Where the block or the disk fails, `path` stays as it is and the part is removed.

    Raises:
        FoveateError: as `writing`.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    part = path.with_name(f".{path.stem[:50]}.part{path.suffix}")
    with writing(path, safe):
        try:
            yield part
            sync(part)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str, safe: str = UNCHANGED) -> None:
    """Replace a file by a UTF-8 text, whole or not at all."""
    with replacing(path, safe) as part:
        part.write_bytes(text.encode())


def sync(path: Path) -> None:
    """Bring a file's content to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, on systems that can."""
    with contextlib.suppress(OSError):  # Windows, and some network disks
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def install(part: Path, target: Path) -> None:
    """A folder that has been written takes its place, with all its files on the disk."""
    for file in part.iterdir():
        sync(file)
    sync_folder(part)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
    sync_folder(target.parent)


def keep_room(path: Path) -> None:
    """Keep the disk's room for a file that will be written as memory (mmap).

    Without that a full disk kills the process (SIGBUS) in the middle of an assignment.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


# -- lines -----------------------------------------------------------------------------------------


class Lines:
    """The open end of a file of lines: a line is in the file whole or not at all.

    A line is safe from a kill when `append` returns. From a power failure it is safe after
    `settle`, which brings lines to the disk (fsync) in groups: at most once a second, so that what
    a power failure costs was made within one second.

    Args:
        path: the file; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a+b", buffering=0)
        self.synced = -EVERY  # the first group goes to the disk at once

    def append(self, lines: bytes, safe: str) -> None:
        """Write whole lines; where the disk refuses, those that fit are kept.

        Args:
            safe: what is not lost then, as a part of a sentence.
        """
        start, left = os.fstat(self.file.fileno()).st_size, memoryview(lines)
        try:
            while left:
                left = left[self.file.write(left) :]
        except BaseException as error:
            whole = lines[: len(lines) - len(left)].rfind(b"\n") + 1
            with contextlib.suppress(OSError):
                self.file.truncate(start + whole)
            if isinstance(error, OSError):
                raise refusal(self.path, error, safe) from error
            raise

    def settle(self) -> None:
        """Bring what was appended to the disk, unless that was done less than a second ago."""
        if time.monotonic() - self.synced >= EVERY:
            with writing(self.path, "at most the lines of the last second are lost"):
                os.fsync(self.file.fileno())
            self.synced = time.monotonic()

    def close(self) -> None:
        if not self.file.closed:
            self.synced = -EVERY
            try:
                self.settle()
            finally:
                self.file.close()


def lock(file: Any, path: Path) -> None:
    """Keep other processes from writing to what `file`, an open file, stands for, until it closes.

    Raises:
        FoveateError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise FoveateError(
                f"Another process is writing to {path}: wait for it, or give another --out."
            ) from None  # other errors: this disk has no locks


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """No other process that asks for it has the folder during the block.

    Raises:
        FoveateError: another process has it.
    """
    path = folder / ".lock"
    with contextlib.ExitStack() as leaving:
        with writing(path, "nothing was written"):
            file = leaving.enter_context(path.open("ab"))
        lock(file, folder)
        yield
