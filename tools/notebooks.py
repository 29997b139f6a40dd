"""Runs the notebooks of the site, and turns them into Markdown.

    python tools/notebooks.py                      # runs all and writes their outputs into them
    python tools/notebooks.py --check NOTEBOOK     # runs one and says what has changed

Cells run as in Jupyter, from the top, in one module and an empty folder: what a cell prints, and
the value of its last line, are its output. That needs no kernel and no package of Jupyter.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
LARGEST = 150_000  # bytes of a picture; a larger one is stored with fewer colours
COLOURS = (256, 64, 24)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
CLOSE = 0.02  # numbers that differ by less are equal: machines round differently

Notebook = dict[str, Any]
Output = dict[str, Any]


def read(path: Path) -> Notebook:
    return json.loads(path.read_text("utf-8"))


def text_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def run(notebook: Notebook) -> list[list[Output]]:
    """The outputs of every code cell, run in the current folder.

    Raises whatever a cell raises.
    """
    module = types.ModuleType("notebook")  # where dataclasses look for the names in annotations
    sys.modules["notebook"] = module
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [_run(text_of(cell), number, module) for number, cell in enumerate(cells, 1)]


def _run(source: str, number: int, module: types.ModuleType) -> list[Output]:
    body = ast.parse(source, f"cell {number}").body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), module.__dict__)
        if last is not None:
            end = compile(ast.Expression(last.value), f"cell {number}", "eval")
            value = eval(end, module.__dict__)
    outputs: list[Output] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if value is not None:
        kind = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        outputs.append({**kind, "data": _shown(value)})
    return outputs


def _shown(value: Any) -> dict[str, str]:
    """A picture, or the value's text."""
    if not hasattr(value, "_repr_png_"):
        return {"text/plain": repr(value)}
    return {"image/png": base64.b64encode(_small(value)).decode(), "text/plain": "a picture"}


def _small(picture: Any) -> bytes:
    content: bytes = picture._repr_png_()
    for colours in COLOURS:
        if len(content) <= LARGEST:
            break
        content = picture.convert("RGB").quantize(colours)._repr_png_()
    return content


def write(path: Path) -> None:
    """Run a notebook and store its outputs."""
    notebook = read(path)
    with _empty_folder():
        found = iter(run(notebook))
    counted = 0
    for place, cell in enumerate(notebook["cells"], 1):
        cell["id"] = f"cell-{place}"
        cell["source"] = text_of(cell).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            counted += 1
            cell["execution_count"] = counted
            cell["outputs"] = next(found)
            for output in cell["outputs"]:
                if "text" in output:
                    output["text"] = output["text"].splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


def changes(path: Path) -> Iterator[str]:
    """Run a notebook, and tell where its outputs are not those that it holds."""
    notebook = read(path)
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with _empty_folder():
        found = run(notebook)
    for number, (before, now) in enumerate(zip(stored, found, strict=True), 1):
        old, new = (list(map(_comparable, outputs)) for outputs in (before, now))
        if len(old) != len(new) or not all(map(_same, old, new)):
            yield f"{path.name}, code cell {number}:\n{old}\nis now\n{new}"


def _comparable(output: Output) -> str:
    """What is printed; of a picture its size in pixels, which stands in bytes 16 to 23."""
    if "text" in output:
        return "".join(output["text"])
    if picture := output["data"].get("image/png"):
        head = base64.b64decode(picture)[16:24]
        return f"{int.from_bytes(head[:4])} x {int.from_bytes(head[4:])} pixels"
    return output["data"]["text/plain"]


def _same(old: str, new: str) -> bool:
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=False)
    words = NUMBER.sub("0", old).split() == NUMBER.sub("0", new).split()
    return words and all(abs(float(a) - float(b)) <= CLOSE for a, b in pairs)


@contextlib.contextmanager
def _empty_folder() -> Iterator[None]:
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(home)


def markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, and its pictures by name.

    What a picture shows stands in its cell's metadata, under "alt".
    """
    notebook, pictures = read(path), dict[str, bytes]()
    parts: list[str] = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(text_of(cell))
            continue
        parts.append(f"```python\n{text_of(cell)}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(_block("".join(output["text"])))
            elif picture := output["data"].get("image/png"):
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(picture)
                parts.append(f"![{cell['metadata']['alt']}]({name})")
            else:
                parts.append(_block(output["data"]["text/plain"]))
    title, *rest = parts
    link = f'<a href="../{path.name}" download>Download this notebook</a>'
    return "\n\n".join([title, link, *rest]) + "\n", pictures


def _block(text: str) -> str:
    return "```{ .text .output }\n" + text.rstrip("\n") + "\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Compare, and write nothing.")
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    given = parser.parse_args()
    for path in given.notebooks:
        if not given.check:
            write(path)
        elif told := "\n".join(changes(path)):
            sys.exit(told)
        print(path.name, flush=True)


if __name__ == "__main__":
    main()
