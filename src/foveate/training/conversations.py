"""Conversations about images, in LLaVA's format.

    rows = read("conversations.jsonl", images=None)            # JSON lines, or one JSON list
    writer = Writer(processor, model.config)
    checked = check(rows, writer, max_length=2048)             # every row, before the first step
    batch = writer.batch(examples) or writer.packed(groups)    # model(**batch), labels included

A row is ``{"id", "image": path or list of paths, "conversations": [{"from": "human", "value":
"<image>\\nQuestion"}, {"from": "gpt", "value": "Answer"}, ...]}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import FoveateError

MARK = "<image>"  # where a picture stands in a question, for every model
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """A row: the pictures' paths, and the turns as chat templates want them."""

    line: int  # of the file, or the number of the entry in a JSON list; from 1
    id: str
    images: tuple[Path, ...]
    turns: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Broken:
    """A row that cannot be trained on, and why."""

    line: int
    id: str
    kind: str
    detail: str = ""


def read(path: Path | str, images: Path | str | None = None) -> list[Conversation | Broken]:
    """The rows of a file in order; those that are no conversation as `Broken`.

    Args:
        images: folder that pictures' paths are relative to; default: the file's.

    Raises:
        FoveateError: if the file cannot be read, is cut short, or has no rows.
    """
    path = Path(path)
    folder = Path(images) if images is not None else path.parent
    if not folder.is_dir():
        raise FoveateError(f"There is no folder of images {folder}: check --images.")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise FoveateError(f"The data {path} cannot be read: {reason}.") from error
    rows = [_row(line, value, folder) for line, value in _values(text, path)]
    if not rows:
        raise FoveateError(f"The data {path} has no rows: one conversation per line is expected.")
    return rows


def _values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except json.JSONDecodeError as error:
            raise FoveateError(f"{path} is not valid JSON ({error}): write it again.") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, None


def _row(line: int, value: Any, folder: Path) -> Conversation | Broken:
    """A row's pictures and turns, or the first thing that is wrong with them."""
    if not isinstance(value, dict):
        return Broken(line, "", "not a JSON object")
    name = str(value.get("id", ""))

    def broken(kind: str, detail: str = "") -> Broken:
        return Broken(line, name, kind, detail)

    given = value.get("image", value.get("images"))
    images = [given] if isinstance(given, str) else [] if given is None else given
    said = value.get("conversations")
    if not (isinstance(images, list) and all(isinstance(i, str) and i for i in images)):
        return broken("image is neither a path nor a list of paths")
    if not (isinstance(said, list) and said and all(isinstance(turn, dict) for turn in said)):
        return broken("without conversations")
    turns: list[dict[str, Any]] = []
    if said[0].get("from") == "system":
        if not str(said[0].get("value", "")).strip():
            return broken("empty system prompt")
        turns.append({"role": "system", "content": _content(str(said[0]["value"]))})
        said = said[1:]
    roles = [ROLES.get(turn.get("from", "")) for turn in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return broken("roles that do not alternate between human and gpt")
    for role, turn in zip(roles, said, strict=True):
        if not isinstance(turn.get("value"), str) or not turn["value"].strip():
            return broken("empty answer" if role == "assistant" else "empty question")
        turns.append({"role": role, "content": _content(turn["value"])})
    parts = [(turn["role"], part["type"]) for turn in turns for part in turn["content"]]
    if any(role != "user" and kind == "image" for role, kind in parts):
        return broken(f"{MARK} outside a question")
    marks = sum(kind == "image" for _, kind in parts)
    if marks != len(images):
        return broken(f"{MARK} marks unlike images", f"{marks} marks, {len(images)} images")
    return Conversation(line, name, tuple(folder / i for i in images), tuple(turns))


def _content(value: str) -> list[dict[str, str]]:
    """Text and pictures of a turn in order, as chat templates want them."""
    content: list[dict[str, str]] = []
    for number, text in enumerate(value.split(MARK)):
        if number:
            content.append({"type": "image"})
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
    return content
