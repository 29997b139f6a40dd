"""The files of a trained injection, in a folder or on the hub; each is read once."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ...base.errors import FoveateError
from .module import KIND, CrossLayerInjection

NAMES = ("config.json", "model.safetensors")


def read_config(path: str) -> dict[str, Any]:
    """config.json of the injection at `path`."""
    file = _file(path, "config.json")
    try:
        config = _read(file, _stamp(file))
    except (OSError, ValueError) as error:
        raise FoveateError(
            f"cli: {path} has no readable config.json: give the folder that `foveate train cli` "
            "made, or its hub name."
        ) from error
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise FoveateError(f"cli: {path} is no {KIND}: its config.json says otherwise.")
    return config


def read_module(path: str) -> CrossLayerInjection:
    """The injection at `path`, float32 on the CPU."""
    try:
        folder = _file(path, "model.safetensors").parent
        return CrossLayerInjection.from_pretrained(folder)
    except Exception as error:  # damaged files raise nearly anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise FoveateError(f"cli: {path} could not be loaded: {reason}.") from error


def weights_stamp(path: str) -> tuple[int, int]:
    """What changes when the weights at `path` are written again."""
    try:
        return _stamp(_file(path, "model.safetensors"))
    except OSError as error:
        raise FoveateError(
            f"cli: {path} has no model.safetensors: give the folder that `foveate train cli` "
            "made, or its hub name."
        ) from error


def _file(path: str, name: str) -> Path:
    """A file of a folder or of a hub repository."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name
    if path.count("/") != 1 or path[0] in "./~":
        raise FoveateError(f"cli: there is no folder {path!r}: `foveate train cli` makes one.")
    return _fetched(path) / name


@functools.cache  # the hub is asked once per process
def _fetched(path: str) -> Path:
    """The folder with both files of a hub repository, of one commit."""
    try:
        return Path(snapshot_download(path, allow_patterns=list(NAMES)))
    except Exception as error:  # no network, no such repository, ...: kinds vary
        raise FoveateError(
            f"cli: {path!r} is neither a folder nor to be had from the hub: check the name or the "
            "network."
        ) from error


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(32)
def _read(file: Path, stamp: tuple[int, int]) -> Any:
    """A JSON file as it was at `stamp`."""
    return json.loads(file.read_text(encoding="utf-8"))
