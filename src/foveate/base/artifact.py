"""What is found once per model and kept: lists of heads, directions, trained injections.

    Artifact("directions", model=shape, tensors={"text": ...}, made={...}).save_pretrained("folder")
    Artifact.from_pretrained("folder", "directions"); .push_to_hub("somebody/directions")

An artifact is a folder, or a repository on the hub, with config.json and model.safetensors. The
first says what it is ("type"), for which model ("model", see `Anatomy.shape`), what it is used with
("settings"), how it was made ("made", "versions") and which bytes belong to it ("checksum" of the
second). It is refused in one sentence where it is damaged or belongs to another model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load, save
from torch import Tensor

from . import __version__
from .errors import FoveateError
from .files import make_folder, replacing
from .journal import write_json

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

# type -> what makes one, and a method that uses it
HEADS, DIRECTIONS = "attention heads", "directions"
INJECTION, VECTOR = "cross-layer injection", "steering vector"
TYPES = {
    HEADS: ("foveate heads MODEL", "adhh(heads='FOLDER')"),
    DIRECTIONS: ("foveate directions MODEL", "vti(path='FOLDER')"),
    INJECTION: ("foveate train cli", "cli(path='FOLDER')"),
    VECTOR: ("Artifact.save_pretrained", ""),
}


@dataclass(frozen=True, eq=False)
class Artifact:
    """One of `TYPES`.

    Attributes:
        type: what it is. model: entries of the architecture that it belongs to.
        tensors: by name; a steering vector, of a linear probe or a difference of means, is
            ``vector`` (L, D). settings: what it is used with. made: how it was made; both ready
            for JSON.
    """

    type: str
    model: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the folder; one that was there is replaced, its weights before its config.json."""
        folder = Path(folder)
        data = save({name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()})
        config = {
            "type": self.type,
            "model": dict(self.model),
            "settings": dict(self.settings),
            "made": dict(self.made),
            "versions": _versions(),
            "checksum": _checksum(data),
        }
        make_folder(folder)
        for name, content in ((WEIGHTS, data), (CARD, self.card().encode())):
            with replacing(folder / name) as part:
                part.write_bytes(content)
        write_json(folder / CONFIG, config)

    @classmethod
    def from_pretrained(cls, path: Path | str, type: str) -> Artifact:
        """The artifact of a folder or a hub repository, on the CPU.

        Raises:
            FoveateError: there is none, it is of another type, or it is damaged.
        """
        config = read_config(path, type)
        data = _bytes(_file(path, WEIGHTS, type), path, type)
        if config["checksum"] not in (None, _checksum(data)):
            raise FoveateError(
                f"{path} is damaged: its {WEIGHTS} is not the one that its {CONFIG} was written "
                f"with. Fetch it again, or make it again with `{TYPES[type][0]}`."
            )
        try:
            tensors = load(data)
        except Exception as error:  # damaged files raise nearly anything
            raise FoveateError(f"{path} could not be loaded: {_sentence(error)}.") from error
        return cls(type, config["model"], tensors, config["settings"], config["made"])

    def push_to_hub(self, repo_id: str, *, token: str | None = None, **options: Any) -> Any:
        """Put it on the hub; `options` are those of `HfApi.create_repo`, such as ``private``."""
        api = HfApi(token=token)
        name = api.create_repo(repo_id, exist_ok=True, **options).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=name, folder_path=folder)

    def card(self) -> str:
        """README.md: what stands on its page on the hub."""
        use = TYPES[self.type][1]
        tag, article = self.type.replace(" ", "-"), "A " if not self.type.endswith("s") else ""
        title = (article + self.type).capitalize()
        text = f"---\nlibrary_name: foveate\ntags: [{tag}]\n---\n\n# {title}\n\n"
        text += (
            "Made with foveate, for models of the shape that stands under `model` in "
            f"`{CONFIG}`. How they were made stands under `made`.\n"
        )
        return text + f'\n```python\nwith enhance(model, "{use}"):\n    ...\n```\n' * bool(use)


def read_config(path: Path | str, type: str) -> dict[str, Any]:
    """What config.json of an artifact says, with all its entries; read once as long as it stands.

    Raises:
        FoveateError: see `Artifact.from_pretrained`.
    """
    file = _file(path, CONFIG, type)
    try:
        config = _read(file, _stamp(file))
    except (OSError, ValueError) as error:
        raise FoveateError(
            f"{path} has no readable {CONFIG}: give a folder that `{TYPES[type][0]}` made, or its "
            "hub name."
        ) from error
    found = _normal(config) if isinstance(config, dict) else {}
    if found.get("type") != type:
        raise FoveateError(f"{path} is no {type}: its {CONFIG} says otherwise.")
    tables = (found["model"], found["settings"], found["made"])
    if not all(isinstance(table, dict) for table in tables):
        raise FoveateError(
            f"{path} is damaged: its {CONFIG} lacks what `{TYPES[type][0]}` writes. Make it again."
        )
    return found


def check_model(path: Path | str, type: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """`read_config` of an artifact that is to serve a model of this shape.

    Raises:
        FoveateError: also where it belongs to another model.
    """
    config = read_config(path, type)
    for name, value in shape.items():
        if (other := config["model"].get(name)) != value:
            raise FoveateError(
                f"{path} belongs to another model: its {name} is {other}, this model's is {value}. "
                f"Make one for this model with `{TYPES[type][0]}`."
            )
    return config


def weights_stamp(path: Path | str, type: str) -> tuple[int, int]:
    """What changes when the tensors at `path` are written again."""
    try:
        return _stamp(_file(path, WEIGHTS, type))
    except OSError as error:
        raise _weightless(path, type) from error


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with all entries; injections of foveate 0.1 have their settings at the top."""
    if "kind" in config:
        settings = {k: v for k, v in config.items() if k not in ("kind", "base")}
        config = {"type": config["kind"], "model": config.get("base"), "settings": settings}
    return {"model": None, "settings": {}, "made": {}, "versions": {}, "checksum": None} | config


def _file(path: Path | str, name: str, type: str) -> Path:
    """A file of a folder or of a hub repository."""
    text, folder = str(path), Path(path).expanduser()
    if folder.is_dir():
        return folder / name
    if text.count("/") != 1 or text[0] in "./~":
        raise FoveateError(f"There is no folder {text!r}: `{TYPES[type][0]}` makes one.")
    return _fetched(text) / name


@functools.cache  # the hub is asked once per process
def _fetched(path: str) -> Path:
    """The folder with the files of a hub repository, of one commit."""
    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # no network, no such repository, ...: kinds vary
        raise FoveateError(
            f"{path!r} is neither a folder nor to be had from the hub: check the name or the "
            "network."
        ) from error


def _bytes(file: Path, path: Path | str, type: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _weightless(path, type) from error


def _weightless(path: Path | str, type: str) -> FoveateError:
    return FoveateError(
        f"{path} has no {WEIGHTS}: give a folder that `{TYPES[type][0]}` made, or its hub name."
    )


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(32)
def _read(file: Path, stamp: tuple[int, int]) -> Any:
    """A JSON file as it was at `stamp`."""
    return json.loads(file.read_text(encoding="utf-8"))


def _checksum(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _versions() -> dict[str, str]:
    found = {"foveate": __version__}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an engine that is not installed made nothing
            continue
    return found
