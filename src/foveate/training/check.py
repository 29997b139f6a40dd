"""Every row and every picture of the data is looked at before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import FoveateError
from ..base.images import decode
from ..evaluation.data import Problems
from .conversations import Broken, Conversation
from .writer import Example, Writer

THREADS, MANY = 8, 256  # threads that decode pictures, and pictures at a time
EVERY = 10.0  # seconds between two reports


@dataclass
class Checked:
    """What a look at all the data checked.

    Attributes:
        units: the sequences that steps draw from, each as the indices of its rows.
        tokens: of the longest sequence.
    """

    units: list[list[int]] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    tokens: int = 0

    @property
    def problems(self) -> Problems:
        """Counts by kind, with the first few cases."""
        problems = Problems()
        for row in self.broken:
            problems.add(row.kind, f"line {row.line}{row.detail and f' ({row.detail})'}")
        return problems


def check(
    rows: Sequence[Conversation | Broken],
    writer: Writer,
    max_length: int,
    pack: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Checked:
    """Read every row and every picture once, and group the good rows into sequences.

    Args:
        max_length: tokens of a sequence, visual ones included; longer rows are broken.
        pack: put conversations about one picture into one sequence, as many as `max_length` takes.
        say: told now and then how much is done.
    """
    checked = Checked()
    paths = list(
        dict.fromkeys(i for row in rows if isinstance(row, Conversation) for i in row.images)
    )
    total, said = len(paths) + len(rows), time.monotonic()

    def tell(done: int, what: str) -> None:
        nonlocal said
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            say(f"looking at the data: {what}, {100 * done // total} %")

    sizes: dict[Path, tuple[int, int] | str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(paths), MANY):
            some = paths[at : at + MANY]
            sizes |= zip(some, pool.map(_size, some), strict=True)
            tell(len(sizes), "pictures")
    open_groups: dict[Any, tuple[list[int], int]] = {}  # the unit that still takes rows, its tokens
    for index, row in enumerate(rows):
        tell(len(paths) + index + 1, "conversations")
        result = row if isinstance(row, Broken) else _looked(row, writer, sizes)
        if isinstance(result, Broken):
            checked.broken.append(result)
            continue
        example, more = result
        length = len(example.ids) + more
        start = example.start and example.start + more
        if length > max_length:
            kind = f"longer than {max_length} tokens"
            checked.broken.append(Broken(row.line, row.id, kind, f"{length} tokens"))
            continue
        shared = pack and len(example.images) == 1 and not example.learnt[example.start]
        key = (example.images, example.ids[: example.start]) if shared else index
        unit, tokens = open_groups.get(key, ([], 0))
        if not unit or tokens + length - start > max_length:
            unit, tokens = [], start
            checked.units.append(unit)
        unit.append(index)
        open_groups[key] = (unit, tokens + length - start)
        checked.tokens = max(checked.tokens, tokens + length - start)
    return checked


def _looked(
    row: Conversation, writer: Writer, sizes: dict[Path, tuple[int, int] | str]
) -> tuple[Example, int] | Broken:
    """A row as it will be written, and how many tokens its pictures add to it."""
    seen = [sizes[image] for image in row.images]
    bad = next((size for size in seen if isinstance(size, str)), None)
    if bad is not None:
        return Broken(row.line, row.id, "images that cannot be read", bad)
    if special := writer.special(row):
        return Broken(row.line, row.id, "texts with a special token of the model", special)
    try:
        written = writer.written(tuple(s for s in seen if not isinstance(s, str)))
        return writer.example(row), sum(map(len, written)) - len(written)
    except (FoveateError, ValueError) as error:
        return Broken(row.line, row.id, "refused by the model's processor", str(error))


def _size(path: Path) -> tuple[int, int] | str:
    """A picture's width and height once it has been decoded whole, or what is wrong with it."""
    try:
        return decode(path).size
    except FoveateError as error:
        return str(error).rstrip(".")
