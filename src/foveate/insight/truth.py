"""Pictures of which it is known where everything is: drawn scenes, or COCO with instance masks.

pocket_pictures(200)[0].mask("cup")            # (H, W) bool: all cups of a drawn scene
coco_pictures(Path("coco"), 200)               # annotations/instances_val2014.json and the images
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..base.errors import FoveateError
from ..base.images import FORMATS, decode
from ..evaluation.vqa import normalise
from ..evaluation.yesno import vlmevalkit
from ..scenes import questions, world
from .target import Target

SPLIT = "val2014"
FEWEST, MOST = 3, 3
"""POPE takes pictures of three or more categories and asks about three of them."""


@dataclass(frozen=True)
class Asked:
    """A question with its right answer, and what it is about ("existence", "relation", ...)."""

    text: str
    answer: str
    group: str

    def right(self, said: str) -> bool:
        """Whether an answer says so: one of yes and no, or the same words after VQA's rules."""
        if self.answer in ("yes", "no"):
            return vlmevalkit(said) == self.answer
        return normalise(said) == normalise(self.answer)


@dataclass(frozen=True)
class AnnotatedImage:
    """A picture and its ground truth, read only when asked for.

    Attributes:
        name: tells pictures of one source apart.
        objects: the kinds of things that are looked for on it.
        load: the picture; raises `FoveateError`.
        mask: (H, W) bool, where the things of a kind are, all of them.
        asked: questions with answers, half of the yes/no ones answered yes.
    """

    name: str
    objects: tuple[str, ...]
    load: Callable[[], Image.Image]
    mask: Callable[[str], np.ndarray]
    asked: Callable[[], list[Asked]]

    def target(self, kind: str) -> Target:
        """Where the things of a kind are."""
        return Target(kind, self.mask(kind).astype(np.float32))


def exists(kind: str) -> str:
    """POPE's question about a kind of thing."""
    return f"Is there {questions.a(kind)} in the image?"


def pocket_pictures(count: int) -> list[AnnotatedImage]:
    """Drawn scenes held out from training, every other one against the pocket model's habits."""
    first, habits = questions.FIRST_HELD_OUT, ("with", "against")
    return [drawn(world.sample(first + number, habits[number % 2])) for number in range(count)]


def drawn(scene: world.Scene) -> AnnotatedImage:
    """A scene's picture with its ground truth."""

    def mask(kind: str) -> np.ndarray:
        things = zip(scene.things, world.masks(scene, 192), strict=True)
        return np.asarray([mask for thing, mask in things if thing.kind == kind]).max(0)

    def asked() -> list[Asked]:
        exam = questions.exam(scene, random.Random(scene.seed))
        return [Asked(q.text, q.answer, q.category if q.label else "open") for q in exam]

    name = f"{scene.habit}-{scene.seed}"
    return AnnotatedImage(name, tuple(world.counts(scene)), lambda: world.draw(scene), mask, asked)


# ------------------------------------------------------------------------------------------ COCO


def coco_pictures(root: Path, count: int) -> list[AnnotatedImage]:
    """Pictures of COCO val2014 with at least three categories, drawn at random, always the same.

    Up to three categories of each are looked for; as many that are not there are asked about, too.

    Args:
        root: a folder with annotations/instances_val2014.json, and the pictures in val2014/ (also
            images/val2014/ or images/).

    Raises:
        FoveateError: the file or every picture is missing, or the file is not COCO's.
    """
    file = root / "annotations" / f"instances_{SPLIT}.json"
    try:
        data = json.loads(file.read_bytes())
        kinds = {row["id"]: str(row["name"]) for row in data["categories"]}
        files = {row["id"]: str(row["file_name"]) for row in data["images"]}
        segments: dict[Any, dict[str, list[Any]]] = {}
        for row in data["annotations"]:
            of_image = segments.setdefault(row["image_id"], {})
            of_image.setdefault(kinds[row["category_id"]], []).append(row["segmentation"])
    except OSError as error:
        raise FoveateError(
            f"{file} cannot be read ({error.strerror}): give the folder of COCO that has "
            f"annotations/instances_{SPLIT}.json and {SPLIT}/, or --data none for drawn scenes."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise FoveateError(
            f"{file} is not a file of COCO's instances: categories, images and annotations with "
            "segmentation are expected."
        ) from error
    places = [root / SPLIT, root / "images" / SPLIT, root / "images"]
    many = [image for image in segments if len(segments[image]) >= FEWEST and image in files]
    pictured = {
        image: path
        for image in many
        for path in [place / files[image] for place in reversed(places)]
        if path.is_file()
    }
    if not pictured:
        raise FoveateError(
            f"No picture with {FEWEST} or more categories of {file} is there: they are expected in "
            f"{places[0]}."
        )
    order = sorted(pictured)
    random.Random(0).shuffle(order)
    return [
        _photographed(pictured[image], segments[image], sorted(kinds.values()), image)
        for image in order[:count]
    ]


def _photographed(
    path: Path, segments: dict[str, list[Any]], kinds: Sequence[str], image: Any
) -> AnnotatedImage:
    rng = random.Random(f"picture-{image}")
    present = rng.sample(sorted(segments), min(MOST, len(segments)))
    away = [kind for kind in kinds if kind not in segments]
    absent = rng.sample(away, min(len(present), len(away)))

    def mask(kind: str) -> np.ndarray:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
        return union(segments[kind], width, height)

    def asked() -> list[Asked]:
        pairs = [(kind, "yes") for kind in present] + [(kind, "no") for kind in absent]
        return [Asked(exists(kind), answer, "existence") for kind, answer in pairs]

    return AnnotatedImage(path.name, tuple(present), lambda: decode(path), mask, asked)


def union(segmentations: Sequence[Any], width: int, height: int) -> np.ndarray:
    """What any of COCO's segmentations covers, (height, width) bool.

    A segmentation is a list of polygons [x, y, x, y, ...] in pixels, or run lengths
    {"size": [height, width], "counts": numbers or COCO's text form}, read column by column.

    Raises:
        FoveateError: for anything else.
    """
    canvas = Image.new("1", (width, height))
    pen, runs = ImageDraw.Draw(canvas), np.zeros((height, width), bool)
    for segmentation in segmentations:
        try:
            if isinstance(segmentation, dict):
                runs |= _run_lengths(segmentation, width, height)
                continue
            for polygon in segmentation:
                pen.polygon([float(value) for value in polygon], fill=1)
        except (TypeError, ValueError, KeyError) as error:
            raise FoveateError(
                f"A segmentation cannot be read ({error}): polygons or run lengths are expected."
            ) from error
    return np.asarray(canvas) | runs


def _run_lengths(segmentation: dict[str, Any], width: int, height: int) -> np.ndarray:
    counts, size = segmentation["counts"], list(segmentation["size"])
    lengths = _spelled(counts) if isinstance(counts, str) else counts
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    if size != [height, width] or len(values) != width * height:
        raise ValueError(f"its size is {size}, the picture's {[height, width]}")
    return values.reshape(width, height).T


def _spelled(text: str) -> list[int]:
    """Run lengths of COCO's text form.

    Six bits per letter from "0" on, the lowest five of them digits of a number and the sixth
    saying that more follow, lowest digits first, signed; from the fourth number on each is the
    difference from the one two places before.
    """
    lengths: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths
