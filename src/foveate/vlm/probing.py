"""The layout of a model that no file of `foveate.families` describes: found by looking, and kept.

`foveate.families.probe` says how. Here are the model it looks with, and the cache: a picture size
costs some twenty passes of the vision tower once, then a file holds what was found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..backends.transformers import compat
from ..base import __version__
from ..base.errors import FoveateError
from ..base.files import make_folder, write_text
from ..core.visual import visual_mask, visual_token_ids
from ..families.layout import Grid, Picture
from ..families.probe import NEEDED, Found, find
from .chat import Chat


class Looked:
    """A `Layout` of one model, which looks when it is asked about a new size of pictures.

    Args:
        vlm: a `VLM` with weights.
    """

    def __init__(self, vlm: Any) -> None:
        self.vlm = vlm
        self.known: dict[tuple[int, int], Found] = {}

    def __call__(self, picture: Picture) -> tuple[list[Grid], int] | None:
        if picture.size is None:
            return None
        found = self.found(picture.size)
        if found.confidence < NEEDED:
            raise FoveateError(
                f"No layout file describes {picture.config.model_type}'s image tokens, and looking "
                f"did not tell where they lie (confidence {found.confidence:.2f}, and {NEEDED} is "
                "needed): attention is recorded all the same, but it cannot be drawn on the image."
            )
        return list(found.grids), found.count

    def found(self, size: tuple[int, int]) -> Found:
        """Where the tokens of a picture of (width, height) pixels lie; looks at most once."""
        if size not in self.known:
            path = self._path(size)
            found = _read(path)
            if found is None:
                found = find(self._features, size)
                self._keep(path, size, found)
            self.known[size] = found
        return self.known[size]

    def _features(self, picture: Image.Image) -> Tensor:
        """What enters the decoder at a picture's visual tokens, (N_v, D) float32."""
        model, entering = self.vlm.model, []

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(compat.hidden_in(args, kwargs)[0])
            raise _Enough

        inputs = self.vlm.inputs([Chat([picture], "?")])
        mask = visual_mask(
            visual_token_ids(model.config), inputs["input_ids"], inputs.get("mm_token_type_ids")
        )[0]
        first: Any = compat.decoder_of(compat.unwrapped(model))
        with torch.no_grad(), self.vlm.using(()):
            handle = first.layers[0].register_forward_pre_hook(look, with_kwargs=True)
            try:
                model(**inputs)
            except _Enough:
                pass
            finally:
                handle.remove()
        return entering[0][mask.to(entering[0].device)].float()

    def _path(self, size: tuple[int, int]) -> Path:
        """The file of a picture size: named by all that the layout depends on."""
        model, images = self.vlm.model, self.vlm.processor.image_processor
        parts = [
            __version__,
            fingerprint(model),
            model.config.to_dict(),
            type(self.vlm.processor).__name__,
            images.to_dict() if hasattr(images, "to_dict") else vars(images),
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return place(self.vlm.name, self.vlm.commit) / f"{size[0]}x{size[1]}-{key}.json"

    def _keep(self, path: Path, size: tuple[int, int], found: Found) -> None:
        about = {"model": self.vlm.name, "commit": self.vlm.commit, "size": size}
        told = about | {"confidence": round(found.confidence, 3)} | dataclasses.asdict(found)
        told["tokens"] = [None if math.isnan(value) else value for value in found.tokens]
        try:
            make_folder(path.parent)
            write_text(path, json.dumps(told) + "\n", "the layout is looked for again next time")
        except FoveateError as error:
            warnings.warn(str(error), stacklevel=2)


class _Enough(Exception):
    """The decoder need not run."""


def place(name: str, commit: str | None) -> Path:
    """The folder with what was found of a model."""
    plain = re.sub(r"[^\w.-]+", "--", name).strip("-.") or "model"
    return cache() / "layouts" / (plain[-120:] + (f"@{commit}" if commit else ""))


def cache() -> Path:
    """The folder FOVEATE_CACHE, or foveate's folder in XDG_CACHE_HOME, or in ~/.cache."""
    if chosen := os.environ.get("FOVEATE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "foveate"


def kept(name: str, commit: str | None) -> dict[tuple[int, int], Found]:
    """What was found of a model before, by picture size; of several versions the latest."""
    files = sorted(place(name, commit).glob("*.json"), key=lambda path: path.stat().st_mtime)
    out = {}
    for path in files:
        size = re.fullmatch(r"(\d+)x(\d+)-\w+\.json", path.name)
        if size and (found := _read(path)):
            out[int(size[1]), int(size[2])] = found
    return out


def _read(path: Path) -> Found | None:
    """None where nothing was kept, and where a file is not what was written."""
    try:
        told = json.loads(path.read_bytes())
        grids = tuple(Grid(**grid | {"box": tuple(grid["box"])}) for grid in told["grids"])
        tokens = tuple(math.nan if value is None else float(value) for value in told["tokens"])
        return Found(grids, told["count"], tokens, told["pictures"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fingerprint(model: Any) -> str:
    """Of what makes features of pictures: names, kinds and some values of all weights but the
    decoder's."""
    decoder = {id(weight) for weight in compat.decoder_of(compat.unwrapped(model)).parameters()}
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if id(weight) in decoder:
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            some = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64]
            digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()
