"""Run tests on the newest releases, and say in one line which package broke what.

python tools/newest.py "torch==2.13.0" tests/test_engine.py --families 'llava*'

The first argument is the torch that belongs to the lock, the others go to pytest. This runs in an
environment that holds the newest releases. If tests fail, the packages that differ from
constraints.txt go back to its versions, one after the other, and what still fails is run again
after each.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

LOCK = Path(__file__).parent.parent / "constraints.txt"
CACHE = Path(sys.prefix) / "cache"  # pytest's, of this environment


def failing(*arguments: str) -> list[str]:
    """Run pytest; the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={CACHE}", *arguments]
    if subprocess.run(command).returncode == 0:
        return []
    known = CACHE / "v" / "cache" / "lastfailed"
    return list(json.loads(known.read_text())) if known.exists() else ["pytest cannot start"]


def said(tests: list[str]) -> str:
    return f"{len(tests)} {'test' if len(tests) == 1 else 'tests'} (first: {tests[0]})"


def main(torch: str, *tests: str) -> str | None:
    """The line for people, or None if all tests pass."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    requirements = {line.partition("==")[0]: [line] for line in lines}
    requirements = {  # the likeliest first
        "transformers": requirements.pop("transformers"),
        "torch": shlex.split(torch),  # with the index that it comes from
        **requirements,
    }
    newest = {canonicalize_name(p.name): p.version for p in metadata.distributions()}
    shutil.rmtree(CACHE, ignore_errors=True)
    left, found = failing(*tests), []
    for name, requirement in requirements.items():
        if not left:
            break
        new, old = newest.get(name), requirement[0].partition("==")[2]
        if new is None or new.partition("+")[0] == old:
            continue
        pip = [sys.executable, "-m", "pip", "install", "--quiet", *requirement]
        if subprocess.run(pip).returncode:
            continue
        before, left = left, failing("--last-failed", *tests)
        if broken := [test for test in before if test not in left]:
            found.append(f"{name} {new} breaks {said(broken)}, with {old} all of them pass")
    if left:
        found.append(f"{said(left)} fail with the versions of constraints.txt, too")
    return "; ".join(found) or None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
