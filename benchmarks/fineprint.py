"""pocket-bench's questions about print with their pictures as files, and an oracle that crops."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image

from foveate import VLM, Method
from foveate.base.form import Registry
from foveate.benchmarks.pocket import PocketBench
from foveate.core.method import parse
from foveate.evaluation.benchmark import Sample
from foveate.evaluation.data import Data
from foveate.methods.vicrop import square
from foveate.vlm.chat import Chat

Stack = tuple[Method, ...]
# fingerprint of a picture -> prompt -> the asked thing's box; filled as pictures are opened
TRUTH: dict[str, dict[str, tuple[int, ...]]] = {}
# the questions of benchmarks that were read: every part asks for them anew
ASKED: dict[PocketBench, list[Sample]] = {}


@dataclass(frozen=True)
class FinePrint(PocketBench):
    """pocket-bench's questions about print, their pictures kept as files.

    Attributes:
        scenes: folder of the pictures.
    """

    scenes: str = ""
    categories: tuple[Literal["print"], ...] = ("print",)  # type: ignore[assignment]

    def read(self, data: Data) -> Iterator[Sample]:
        if self not in ASKED:
            ASKED[self] = list(self._pictured(list(super().read(data))))
        yield from ASKED[self]

    def _pictured(self, samples: list[Sample]) -> Iterator[Sample]:
        truth: dict[str, dict[str, tuple[int, ...]]] = {}
        for sample in samples:
            (box,) = sample.meta["boxes"]
            truth.setdefault(str(sample.image_name), {})[sample.prompt] = tuple(box)
        for sample in samples:
            name = str(sample.image_name)
            file = functools.partial(opened, self.path(sample), sample.image, truth[name])
            yield replace(sample, image=file)

    def path(self, sample: Sample) -> Path:
        return Path(self.scenes) / f"{sample.image_name}.png"


def opened(path: Path, draw: Any, truth: dict[str, tuple[int, ...]]) -> Image.Image:
    """A scene's picture, drawn where there is no file of it yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")  # several runs may share the pictures
        draw().save(part, "PNG")
        part.replace(path)
    image = Image.open(path).convert("RGB")
    TRUTH[fingerprint(image)] = truth
    return image


def fingerprint(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@dataclass(frozen=True)
class Oracle(Method, register=False):
    """The crop around the asked thing, from the ground truth.

    Attributes:
        window: side of the crop in pixels.
        final_input: as ViCrop's.
        black: everything but the thing's box is black, as CARVE masks.
    """

    window: int = 336
    final_input: Literal["both", "crop"] = "both"
    black: bool = False

    name: ClassVar[str] = "oracle"

    def rewrite(self, vlm: VLM, chats: list[Chat]) -> list[Chat]:
        image = chats[0].images[0]
        truth, shown = TRUTH[fingerprint(image)], list[Chat]()
        for chat in chats:
            left, top, right, bottom = box = truth[chat.text]
            centre = ((left + right) // 2, (top + bottom) // 2)
            crop, source = square(centre, self.window // 2, image.size), image
            if self.black:
                source = Image.new("RGB", image.size)
                source.paste(image.crop(box), (left, top))
            piece = source.crop(crop)
            images = [image, piece] if self.final_input == "both" else [piece]
            shown.append(replace(chat, images=images, notes={"crop": list(crop)}))
        return shown


def stack(given: str) -> Stack:
    """Methods from their text form, the oracle among them."""
    if not given.startswith(Oracle.name):
        return parse(given)
    oracles = Registry("method", "foveate.methods", "oracle(window=336)", ())
    oracles.add(Oracle)
    return oracles.parse(given)
