"""Every sentence with which foveate refuses something, read from the source.

    python tools/errors.py            # prints them as Markdown, by the part that says them

A value that a sentence names stands in it as <name>. `tools/site.py` puts the list on the page
"Troubleshooting".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "foveate"
PARTS = {  # a room of the source, and what its sentences are about
    "base": "Files, folders and pictures",
    "core": "Method texts and parameters",
    "methods": "Methods",
    "families": "Where visual tokens lie on the picture",
    "backends": "Models and engines",
    "vlm": "Loading a model and asking it",
    "evaluation": "Evaluations, reports and sweeps",
    "benchmarks": "Data of benchmarks",
    "insight": "Traces, analyses and figures",
    "training": "Training",
    "pocket": "The pocket model",
    "scenes": "Drawn scenes",
    "serving": "The server and its page",
    "bridges": "Ray, lmms-eval and others",
    "commands": "The command line",
}


@dataclass(frozen=True)
class Sentence:
    """A sentence, and the file under `src/foveate` that says it."""

    text: str
    file: str


def sentences(source: Path = SOURCE) -> list[Sentence]:
    """All of them, each once, in the order of the source."""
    found: dict[str, Sentence] = {}
    for path in sorted(source.rglob("*.py")):
        file = path.relative_to(source).as_posix()
        for text in _told(ast.parse(path.read_text("utf-8"))):
            found.setdefault(text, Sentence(text, file))
    return list(found.values())


def markdown(source: Path = SOURCE) -> str:
    """The sentences as lists under the parts of foveate that say them."""
    parts: dict[str, list[str]] = {}
    for sentence in sentences(source):
        room = sentence.file.split("/")[0].removesuffix(".py")
        parts.setdefault(PARTS[room], []).append(sentence.text)
    lines = []
    for title in PARTS.values():
        if title in parts:
            lines += [f"### {title}", "", *(f"- `{text}`" for text in sorted(parts[title])), ""]
    return "\n".join(lines)


def _told(tree: ast.AST) -> Iterator[str]:
    """The texts of all `FoveateError(...)` in a file; those that only pass a text on have none."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and _name(call.func) == "FoveateError" and call.args:
            for text in _texts(call.args[0]):
                if re.search(r"\w{2}", re.sub(r"<.*?>", "", text)):
                    yield " ".join(text.replace("`", "'").split())


def _texts(node: ast.expr) -> list[str]:
    """What an expression may read, with names for its values."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            texts = [""]
            for part in parts:
                texts = [text + more for text in texts for more in _texts(part)]
            return texts
        case ast.FormattedValue(value=ast.IfExp() as choice):
            return _texts(choice)
        case ast.FormattedValue(value=value):
            return [f"<{_name(value)}>"]
        case ast.IfExp(body=one, orelse=other):
            return [*_texts(one), *_texts(other)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [a + b for a in _texts(left) for b in _texts(right)]
        case _:
            return [f"<{_name(node)}>"]


def _name(node: ast.AST) -> str:
    """The last name in an expression: `self.path.name` is path, `", ".join(unknown)` unknown."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return _name(value) if name in ("name", "__name__", "__qualname__", "text") else name
        case ast.Call(func=ast.Attribute(attr="join"), args=[first]):
            return _name(first)
        case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in _WRAPS:
            return _name(first)
        case ast.Call(func=function):
            return _name(function)
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return _name(value)
        case ast.BinOp(left=left):
            return _name(left)
        case ast.ListComp(elt=value) | ast.GeneratorExp(elt=value):
            return _name(value)
        case ast.Constant(value=str(text)):
            return text
        case _:
            return "..."


_WRAPS = ("sorted", "list", "len", "str", "repr", "type", "map", "tuple", "min", "max")

if __name__ == "__main__":
    print(markdown())
