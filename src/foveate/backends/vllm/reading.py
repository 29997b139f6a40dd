"""Requests that read: the last row's attention to the image, by layer and token.

A request may ask for readers beside its methods. They change nothing, and act after the methods.
What they find lies in notes, one per token. The worker of rank 0 writes the notes of a token into a
file, and the front end that started the engine collects the files of its requests. So only a front
end on the same machine can ask: it names their folder in the environment before the engine starts.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...base.errors import FoveateError
from ...core.method import Method
from ...core.rows import Rows
from ..transformers.record import Record, Recorder

READ = "foveate read"  # of a request's extra arguments: {"file": name, "readers": text}
FOLDER = "FOVEATE_VLLM_READINGS"  # the folder's name in the environment
_MARK = "\n"  # between methods and readers in a stack's text
_ATTENTION = "foveate attention"  # in the notes: layer -> a `Recorder`'s values on the image


class Reader(Recorder, register=False):
    """A `Recorder` of the image's columns, for many requests at once."""

    columns: ClassVar[Literal["visual", "through", "all"]] = "visual"
    remembers: ClassVar[bool] = False
    needs_image: ClassVar[bool] = True

    def weights(self, rows: Rows) -> Tensor:
        values, visual = self._reduce(rows), rows.visual
        for row, notes in enumerate(rows.seq.notes):
            kept = notes.setdefault(_ATTENTION, {})
            kept[rows.layer] = values[row][..., visual[row]].float().cpu()
        return rows.x


# -- what a request asks for -----------------------------------------------------------------------


def as_text(readers: Sequence[Method]) -> str:
    """Readers as a worker finds them again: the place of each class, and its parameters."""
    return json.dumps(
        [[f"{type(r).__module__}:{type(r).__name__}", r.parameters()] for r in readers]
    )


@functools.lru_cache(256)
def from_text(text: str) -> tuple[Method, ...]:
    """The readers of `as_text`.

    Raises:
        FoveateError: it names something else.
    """
    readers = []
    for place, values in json.loads(text) if text else ():
        module, _, name = place.partition(":")
        cls = None
        if module.startswith("foveate."):
            cls = getattr(importlib.import_module(module), name, None)
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise FoveateError(f"{place} is no reader of foveate.")
        readers.append(cls(**values))
    return tuple(readers)


def asked_to_read(params: Any) -> str:
    """The text of the readers that a request asks for; "" for none.

    Raises:
        FoveateError: this engine was not started by a front end that collects readings.
    """
    asked = (getattr(params, "extra_args", None) or {}).get(READ)
    if asked is None:
        return ""
    if not os.environ.get(FOLDER):
        raise FoveateError(f"{READ} is for the program that started the engine: leave it out.")
    return asked["readers"]


def joined(methods: str, readers: str) -> str:
    """One text for a stack of methods and readers."""
    return f"{methods}{_MARK}{readers}" if readers else methods


def apart(text: str) -> tuple[str, tuple[Method, ...]]:
    """The methods' text, and the readers, of `joined`."""
    methods, _, readers = text.partition(_MARK)
    return methods, from_text(readers)


# -- what was read ---------------------------------------------------------------------------------


class Sink:
    """The notes of one request in a worker, and the files that they go to.

    Args:
        params: the request's. writes: whether this process is the one that writes.
    """

    def __init__(self, params: Any, writes: bool) -> None:
        self.path = Path(os.environ[FOLDER]) / Path(params.extra_args[READ]["file"]).name
        self.writes = writes
        self.steps: dict[int, dict[str, Any]] = {}

    def notes(self, step: int) -> dict[str, Any]:
        """Where readers leave what they find at a token; 0 is the prompt's last row."""
        return self.steps.setdefault(step, {})

    def write(self) -> None:
        """The step is over."""
        for step, notes in self.steps.items():
            if self.writes and notes:
                tensors: dict[str, Tensor] = {}
                told = json.dumps(_written(notes, tensors))
                save_file(tensors, f"{self.path}-{step}", {"notes": told})
        self.steps.clear()


def collect(path: Path, steps: int) -> list[dict[str, Any]]:
    """The notes of the first `steps` tokens of a finished request, which are deleted.

    Raises:
        FoveateError: some were not written.
    """
    notes = []
    for step in range(steps):
        file = Path(f"{path}-{step}")
        if not file.exists():
            raise FoveateError(
                "vLLM has answered without a reading of its attention: it runs attention in a way "
                "that foveate does not know; use a version that foveate's documentation names."
            )
        with safe_open(file, "pt") as found:
            notes.append(_read(json.loads(found.metadata()["notes"]), found.get_tensor))
    for file in path.parent.glob(f"{path.name}-*"):
        file.unlink(missing_ok=True)
    return notes


def _written(x: Any, tensors: dict[str, Tensor]) -> list[Any]:
    """Nested dictionaries, lists and tuples for JSON; the tensors go into `tensors`."""
    if isinstance(x, Tensor):
        name = str(len(tensors))
        tensors[name] = x.contiguous()
        return ["tensor", name]
    if isinstance(x, dict):
        return ["dict", [[key, _written(value, tensors)] for key, value in x.items()]]
    if isinstance(x, list | tuple):
        return [type(x).__name__, [_written(value, tensors) for value in x]]
    return ["value", x]


def _read(told: list[Any], tensor: Callable[[str], Tensor]) -> Any:
    """What `_written` wrote."""
    kind, x = told
    if kind == "tensor":
        return tensor(x)
    if kind == "dict":
        return {key: _read(value, tensor) for key, value in x}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_read(value, tensor) for value in x)
    return x


def record(notes: list[dict[str, Any]]) -> Record | None:
    """What a `Reader` left in the notes, as a `Recorder` keeps it; its columns are the image's."""
    steps = [note.pop(_ATTENTION, None) for note in notes]
    found = [layers for layers in steps if layers]
    if not found:
        return None
    values = {n: torch.stack(list(layers.values()))[None] for n, layers in enumerate(found)}
    visual = torch.ones(1, values[0].shape[-1], dtype=torch.bool)
    return Record(tuple(found[0]), values, visual)
