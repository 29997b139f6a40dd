"""Pictures of a request: data URIs, and, where allowed, public addresses. Never paths."""

from __future__ import annotations

import base64
import binascii
import io
import time

from PIL import Image

from ..base.errors import FoveateError
from ..base.images import decode
from .errors import TooLarge
from .remote import fetch
from .settings import Settings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def read_pictures(urls: list[str], settings: Settings) -> list[Image.Image]:
    """The pictures behind the ``image_url`` parts of a request, decoded.

    Raises:
        TooLarge: over a limit. FoveateError: anything but a picture.
    """
    if len(urls) > settings.images:
        raise FoveateError(
            f"A request may hold {settings.images} images, and this has {len(urls)}."
        )
    deadline = time.monotonic() + settings.seconds
    found = [_content(url, settings, deadline) for url in urls]
    pixels = sum(map(_pixels, found))
    if pixels > settings.pixels:
        raise TooLarge(
            f"The images of a request may have {settings.pixels:,} pixels together, and these have "
            f"{pixels:,}: make them smaller."
        )
    return [decode(data) for data in found]


def _content(url: str, settings: Settings, deadline: float) -> bytes:
    scheme = url[:5].lower()
    if scheme == "data:":
        return _data(url, settings.image_bytes)
    if not scheme.startswith("http"):
        raise FoveateError(
            "An image is a data URI such as data:image/png;base64,...: files are not read from "
            "here, so encode the file's content."
        )
    if not settings.remote_images:
        raise FoveateError(
            "This server fetches no images (--allow-remote-images is off): send a data URI."
        )
    return fetch(url, settings.image_bytes, max(0.0, deadline - time.monotonic()))


def _data(uri: str, limit: int) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise FoveateError("A data URI begins with data:image/png;base64, or the like.")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FoveateError("The data URI does not hold valid base64.") from error
    if len(data) > limit:
        raise TooLarge(f"An image may have {limit:,} bytes: make it smaller.")
    return data


def _pixels(data: bytes) -> int:
    """The size of an encoded picture, which is not decoded for it."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except Image.DecompressionBombError as error:
        raise TooLarge("The image has far too many pixels: make it smaller.") from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise FoveateError(
            "The image is not a picture that can be read: give a PNG, JPEG, WebP, GIF, BMP or TIFF."
        ) from error
