"""Read images one by one into a journal, so that a run may stop at any moment and go on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..base.errors import FoveateError
from ..base.journal import Journal

T = TypeVar("T")
Watch = Callable[[int, int, dict[str, Any] | None], None]
"""Is told after every image how many are done, of how many, and its row if it has one."""


def read_all(
    journal: Journal,
    images: Mapping[str, T],
    measure: Callable[[T], dict[str, Any]],
    current: Callable[[T, dict[str, Any]], bool] = lambda image, row: True,
    watch: Watch | None = None,
) -> list[dict[str, Any]]:
    """The row of every image that can be used, in the order of `images`; the journal is closed.

    Args:
        images: by the key of their rows.
        measure: makes a row; raises `FoveateError` where the image cannot be used.
        current: whether the journal's row of an image still holds; other images are measured.

    Raises:
        FoveateError: no image can be used. Some that cannot are left out with a warning.
    """
    failures: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    with contextlib.closing(journal):
        for done, (name, image) in enumerate(images.items(), 1):
            row = journal.rows.get(name)
            if row is None or not current(image, row):
                try:
                    row = measure(image)
                except FoveateError as error:
                    failures[name], row = str(error), None
                else:
                    journal.append(row)
                    journal.settle()
            rows += [row] if row else []
            if watch:
                watch(done, len(images), row)
    first = next(iter(failures.values()), "There is none.")
    if not rows:
        raise FoveateError(f"No image could be used ({first.rstrip('.')}): check the images.")
    if failures:
        warnings.warn(
            f"{len(failures)} of {len(images)} images were left out; the first: {first}",
            stacklevel=3,
        )
    return rows
