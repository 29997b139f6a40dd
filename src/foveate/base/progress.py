"""How far a long run is, told on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """How far a run is, on stderr: a bar for who watches, else a line now and then.

    Args:
        unit: what is counted.
    """

    EVERY = 30.0  # seconds between lines

    def __init__(self, unit: str = "questions") -> None:
        self.unit = unit

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True, highlight=False, markup=False)
        self.bar = Bar(
            BarColumn(), TextColumn("{task.description}", markup=False), console=self.console
        )
        self.task = self.bar.add_task("looking at the data")
        if self.console.is_terminal:
            self.bar.start()
        self.start, self.told, self.before = time.monotonic(), time.monotonic(), -1
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if self.before < 0:  # what an earlier start has answered
            self.before, self.start = done - 1, now
        rate = (done - self.before) / max(now - self.start, 1e-3)
        line = f"{done:,} of {total:,} {self.unit}, {rate:.1f}/s, {what}"
        self.bar.update(self.task, completed=done, total=total, description=line)
        if not self.console.is_terminal and now - self.told > self.EVERY:
            self.told = now
            print(f"foveate: {line}", file=sys.stderr, flush=True)
