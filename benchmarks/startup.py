"""How long `import foveate` and `foveate --help` take beyond the interpreter's own start.

    python benchmarks/startup.py

Prints medians in milliseconds of CPU time (user and system, which other programs on the machine do
not lengthen) and of the wall clock.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

RUNS = 15
COMMANDS = {
    "python": ["-c", "pass"],
    "import foveate": ["-c", "import foveate"],
    "foveate --help": ["-m", "foveate.commands", "--help"],
}


def measured(arguments: list[str]) -> tuple[float, float]:
    """CPU and wall-clock milliseconds of one start."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1000 * cpu, 1000 * wall


def main() -> None:
    medians: dict[str, tuple[float, ...]] = {}
    for name, arguments in COMMANDS.items():
        measured(arguments)  # files come from the disk once
        runs = [measured(arguments) for _ in range(RUNS)]
        medians[name] = tuple(map(statistics.median, zip(*runs, strict=True)))
    plain = medians.pop("python")
    print(f"python itself: {plain[0]:.0f} ms of CPU, {plain[1]:.0f} ms")
    for name, (cpu, wall) in medians.items():
        print(f"{name}: {cpu - plain[0]:.0f} ms of CPU more, {wall - plain[1]:.0f} ms more")


if __name__ == "__main__":
    main()
