"""Any picture that a user gives, as an upright 8-bit RGB `PIL.Image`, or one clear sentence."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import FoveateError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow is asked to open, here and everywhere: a file is never read in another format than it
was measured in."""

MIN_SIDE = 8
"""Shorter sides (in pixels) are enlarged to this by repeating pixels: image processors guess which
axis holds the colours, and take a side of 1 or 3 pixels for it."""

RATIO = 200
"""The long side is at most so many short ones: as many as Qwen's image processors take."""

SCANS, SEGMENTS = 100, 10_000
"""Passes over a JPEG's pixels, and parts of its file. Progressive ones have some ten passes; a pass
may take 53 bytes, and the time of all of the picture's pixels."""


class TooManyPixels(FoveateError):
    """A picture over `PIL.Image.MAX_IMAGE_PIXELS`."""


if TYPE_CHECKING:
    import torch

ImageLike = Any
"""A path, bytes, a `data:` URI, a `PIL.Image`, a numpy array or a torch tensor; see `decode`."""


def decode(source: ImageLike) -> Image.Image:
    """`source` as an upright RGB image of 8 bits per channel.

    * `str` or `Path`: a file; a string that starts with `data:` is a data URI. Nothing is fetched.
    * `bytes`: an encoded file, PNG, JPEG, WebP, GIF, BMP or TIFF.
    * `PIL.Image.Image` of any mode.
    * numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): bool, uint8, uint16 (65535 is white),
      other integers in 0..255, or floats in 0..1. A torch tensor is also read as (C, H, W).

    The EXIF orientation is applied, transparency is laid on white, 16-bit values are scaled to
    8 bits. Of an animated file the first frame is used, with a warning (to ask about another, open
    it with Pillow, `seek` to it, and pass the image). The limit on size is Pillow's own,
    `PIL.Image.MAX_IMAGE_PIXELS`; where Pillow would warn, this refuses. One side may be `RATIO`
    times as long as the other. All of this is checked before any pixel is made.

    Raises `FoveateError` for everything that is not a whole picture.
    """
    if isinstance(source, Image.Image):
        with _one_sentence("The image"):
            return _upright_rgb(source, "The image")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _read(_data_uri(source), "The image in the data URI")
    if isinstance(source, (str, os.PathLike)):
        return _read(*_file(os.fspath(source)))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(bytes(source), "The image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    import torch  # slow, and only needed here

    if isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source.detach().cpu()))
    raise FoveateError(
        f"An image cannot be read from {type(source).__name__}: give a path, bytes, a data URI, "
        "a PIL image or an array."
    )


def decode_all(sources: ImageLike | list[ImageLike]) -> list[Image.Image]:
    """One image or a list of images, decoded; an empty list is no image at all.

    Raises `FoveateError` as `decode` does, and for None, which is more often a mistake than a wish.
    """
    if sources is None:
        raise FoveateError("There is no image, but None: give one, or [] to ask without any.")
    return [decode(s) for s in (sources if isinstance(sources, (list, tuple)) else [sources])]


def _file(name: str | bytes) -> tuple[Path, str]:
    text = os.fsdecode(name)
    if text[:7].lower() == "http://" or text[:8].lower() == "https://":
        raise FoveateError(f"Images are not fetched from the network: download {text} first.")
    path = Path(text).expanduser()
    try:
        exists, regular = path.exists(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or one with a null character
        raise FoveateError(f"{text[:80]!r} is not the name of a file: {error}.") from error
    if not exists:
        raise FoveateError(f"There is no image {text}: check the path.")
    if not regular:
        raise FoveateError(f"{text} is not a file: give the path of one image.")
    return path, text


def _data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise FoveateError("The data URI has no comma between its type and its data.")
    data = urllib.parse.unquote_to_bytes(body)
    if not head.lower().rstrip().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise FoveateError("The data URI does not hold valid base64.") from error


def _read(source: Path | bytes, name: str) -> Image.Image:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size == 0:
        raise FoveateError(f"{name} is empty (0 bytes).")
    if _is_video(source):
        raise FoveateError(
            f"{name} is a video: give some of its frames as a list of pictures, or give it to the "
            "model's own processor and call the model inside enhance()."
        )
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    with _one_sentence(name), Image.open(stream, formats=FORMATS) as image:
        check_size(image.size, name)
        # a camera's MPO is a JPEG with a second, hidden picture
        if image.format in ("JPEG", "MPO"):
            _check_scans(source if isinstance(source, bytes) else source.read_bytes(), name)
        if getattr(image, "is_animated", False) and image.format != "MPO":
            warnings.warn(f"{name} has several frames: the first is used.", stacklevel=3)
        return _upright_rgb(image, name)


def _is_video(source: Path | bytes) -> bool:
    """Whether a file begins as MP4 and QuickTime, Matroska and WebM, or AVI do."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        try:
            with source.open("rb") as file:
                head = file.read(12)
        except OSError:  # Pillow's reader says why
            return False
    still = (b"heic", b"heix", b"heif", b"mif1", b"msf1", b"avif", b"avis")
    if head[4:8] == b"ftyp":
        return head[8:12] not in still
    return head[:4] == b"\x1aE\xdf\xa3" or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn an exception of Pillow into one sentence about `name`."""
    try:
        yield
    except (FoveateError, Warning):
        raise
    except PermissionError as error:
        raise FoveateError(f"{name} may not be read: check its permissions.") from error
    except UnidentifiedImageError as error:
        raise FoveateError(
            f"{name} is not a picture that can be read: give a PNG, JPEG, WebP, GIF, BMP or TIFF."
        ) from error
    except Image.DecompressionBombError as error:
        raise TooManyPixels(_too_large(name)) from error
    except MemoryError as error:
        raise FoveateError(f"{name} takes too much memory: make it smaller.") from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        reason = str(error).rstrip(".") or type(error).__name__
        raise FoveateError(f"{name} is damaged or cut short ({reason}).") from error


def _too_large(name: str, size: tuple[int, int] | None = None) -> str:
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    pixels = f"{size[0]} x {size[1]} pixels" if size else "far too many pixels"
    return f"{name} has {pixels}, and the limit is {limit:.0f} million: make it smaller first."


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse a picture of this (width, height) that `decode` would not make."""
    short, long = sorted(size)
    if short == 0:
        raise FoveateError(f"{name} has no pixels ({size[0]} x {size[1]}).")
    if long > RATIO * short:
        raise FoveateError(
            f"{name} is {size[0]} x {size[1]} pixels, one side {-(-long // short):,} times the "
            f"other, and the limit is {RATIO} times: cut out the part that matters."
        )
    if Image.MAX_IMAGE_PIXELS and pixels(size) > Image.MAX_IMAGE_PIXELS:
        raise TooManyPixels(_too_large(name, size))


def pixels(size: tuple[int, int]) -> int:
    """How many `decode` makes of a picture of this (width, height)."""
    return max(size[0], MIN_SIDE) * max(size[1], MIN_SIDE)


_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG, with something behind it


def _check_scans(data: bytes, name: str) -> None:
    """Refuse a JPEG with more than `SCANS` passes, without decoding it."""
    at, scans, segments = 0, 0, 0
    while found := _MARKER.search(data, at):
        at, kind = found.end(), found[0][1]
        if kind == 0xD9:  # the end; a second picture may follow
            return
        scans, segments = scans + (kind == 0xDA), segments + 1
        if scans > SCANS or segments > SEGMENTS:
            raise FoveateError(
                f"{name} is a JPEG of more than {SCANS} scans or {SEGMENTS:,} segments, which "
                "would take too long: save it anew."
            )
        at += int.from_bytes(data[at : at + 2], "big")  # its header; coded pixels may follow


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    check_size(image.size, name)
    return _enlarge(_rgb(ImageOps.exif_transpose(image), name))


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.uint16), name)
    if image.mode == "I":  # what Pillow calls 32 bits is a 16-bit file in all but a few TIFFs
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise FoveateError(f"{name} has 32-bit values beyond 0..65535: save it as 8 or 16 bit.")
        return _from_array(values.astype(np.uint16), name)
    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _enlarge(image: Image.Image) -> Image.Image:
    width, height = image.size
    size = (max(width, MIN_SIDE), max(height, MIN_SIDE))
    return image if size == image.size else image.resize(size, Image.Resampling.NEAREST)


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    """A torch image is (C, H, W) where its first axis can be channels and its last cannot."""
    if str(tensor.dtype) in ("torch.bfloat16", "torch.float16"):
        tensor = tensor.float()
    array = tensor.numpy()
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        return np.moveaxis(array, 0, -1)
    return array


def _from_array(array: np.ndarray, name: str = "The image array") -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise FoveateError(
            f"{name} has the shape {array.shape}: give (height, width), (height, width, 3) "
            "or (height, width, 4), and several pictures or frames as a list."
        )
    if 0 in array.shape:
        raise FoveateError(f"{name} has no pixels (shape {array.shape}).")
    return _upright_rgb(Image.fromarray(_bytes(array, name)), name)


def _bytes(array: np.ndarray, name: str) -> np.ndarray:
    """Values scaled to uint8 by their type; refused where type and range do not fit."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise FoveateError(f"{name} has values of type {array.dtype}: give numbers.")
    low, high = array.min(), array.max()  # NaN fails both comparisons below
    if np.issubdtype(array.dtype, np.integer) and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating) and low >= 0 and high <= 1:
        return (array * 255).round().astype(np.uint8)
    raise FoveateError(
        f"{name} has {array.dtype} values from {low} to {high}: give integers in 0..255, "
        "floats in 0..1, or uint16."
    )
