"""Runs the blocks of a Markdown page in the current folder, as a reader would, from the top.

    python tests/pages.py PAGE

Python blocks share their names. Of `sh` blocks each line is a command: `foveate ...`, run in this
process, and `curl ...`. `foveate serve` goes on until the page ends. A block after
``<!-- not run: WHY -->`` is left out; other kinds of blocks are no code.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = ("python", "sh")
SERVED = "http://127.0.0.1:8000/healthz"


def blocks(text: str) -> Iterator[tuple[str, str, bool]]:
    """(kind, content, whether it is run) of every block of code."""
    for found in BLOCK.finditer(text):
        if found[2] in CODE:
            yield found[2], found[3], found[1] is None


def commands(block: str) -> list[list[str]]:
    """The commands of a `sh` block. Quotes may hold line breaks."""
    lines, open_line = [], ""
    for line in block.splitlines():
        open_line += line
        try:
            words = shlex.split(open_line, comments=True)
        except ValueError:  # a quote goes on
            open_line += "\n"
            continue
        if words:
            lines.append([*words, open_line])
        open_line = ""
    assert not open_line, f"a quote is not closed: {open_line}"
    return lines


def run(page: Path) -> None:
    from foveate.commands import main

    module = types.ModuleType("page")
    sys.modules["page"] = module
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for kind, content, runs in blocks(page.read_text("utf-8")):
            if not runs:
                continue
            if kind == "python":
                print(content)
                exec(compile(content, str(page), "exec"), module.__dict__)
                continue
            for *words, line in commands(content):
                print("$", line)
                if words[:2] == ["foveate", "serve"]:
                    servers.append(_serve(words[1:]))
                elif words[0] == "foveate":
                    _finished(main, words[1:])
                elif words[0] == "curl":
                    subprocess.run(["bash", "-c", line], check=True, stdout=subprocess.DEVNULL)
                else:
                    raise AssertionError(f"{page}: mark it as not run, or run it: {line}")
    finally:
        for server in servers:
            server.terminate()
            server.wait(60)


def _finished(main: Callable[[list[str]], None], words: list[str]) -> None:
    code: object = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    assert not code, f"foveate {words}: exit code {code}"


def _serve(words: list[str]) -> subprocess.Popen[bytes]:
    """A server that answers."""
    server = subprocess.Popen([sys.executable, "-m", "foveate.commands", *words])
    for _ in range(300):
        try:
            urllib.request.urlopen(SERVED)
        except OSError:
            assert server.poll() is None, "foveate serve ended"
            time.sleep(0.5)
        else:
            return server
    server.kill()
    raise AssertionError("foveate serve does not answer")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
