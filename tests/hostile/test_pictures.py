"""Bytes that claim to be a picture: one of bounded size, or one sentence, and nothing else."""

from __future__ import annotations

import functools
import io
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foveate.base.errors import FoveateError
from foveate.base.images import FORMATS, RATIO, decode
from foveate.serving.decoders import Decoders
from tests.hostile import MANY, tries
from tests.test_images import many_scans, png_header, two_formats

PIXELS = 2**20
SECONDS = 5.0  # of the processor, for one picture of so many pixels


@functools.cache
def good() -> list[bytes]:
    """A small picture in every format and some modes, and files that have hurt."""
    files = [png_header(side, side) for side in (100, 10_000, 2**31 - 1)]
    files += [png_header(1, 16_000_000), many_scans(5), many_scans(200), two_formats(), b""]
    for form in FORMATS:
        for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"):
            for options in ({}, {"progressive": True, "compression": "tiff_lzw", "lossless": True}):
                stream = io.BytesIO()
                try:
                    Image.linear_gradient("L").resize((24, 16)).convert(mode).save(
                        stream, form, **options
                    )
                except (OSError, ValueError):  # no such mode in this format
                    continue
                files.append(stream.getvalue())
    return files


MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF", b"BM", b"II*\0", b"MM\0*")


@st.composite
def files(draw: Callable[[Any], Any]) -> bytes:
    """A good file with some bytes changed, cut out, doubled, or another's behind it."""
    data = bytearray(draw(st.sampled_from(good())))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif kind == 1:
            data[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, bytes(4), b"\0\0\xff\xff"]))
        elif kind == 2:
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == 3:
            data[at:at] = data[at : at + 40] * draw(st.integers(1, 50))
        elif kind == 4:
            data += draw(st.sampled_from(good()))
        else:
            data = bytearray(draw(st.sampled_from(MAGIC))) + data[at:]
    return bytes(data)


def read(pool: Decoders, data: bytes) -> None:
    """A picture within all bounds, the same here and in a process, or a sentence."""
    start = time.process_time()
    found, said = None, "."
    with warnings.catch_warnings(action="ignore"):
        try:
            found = decode(data)
        except FoveateError as error:
            said = str(error)
    assert time.process_time() - start < SECONDS
    assert "\n" not in said
    assert said.endswith("."), said
    if found is not None:
        assert found.mode == "RGB"
        assert found.width * found.height <= PIXELS
        assert max(found.size) <= RATIO * min(found.size)
    try:
        other = pool.decode(data, PIXELS)
    except FoveateError:
        assert found is None
    else:
        assert found is not None
        assert other.tobytes() == found.tobytes()


@pytest.fixture(scope="module")
def pool() -> Iterator[Decoders]:
    pool = Decoders(PIXELS, 1)
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, PIXELS
    yield pool
    Image.MAX_IMAGE_PIXELS = before
    pool.close()


@pytest.mark.long
@tries(150)
@given(files())
def test_files(pool: Decoders, data: bytes) -> None:
    read(pool, data)


@pytest.mark.slow
@MANY
@given(files())
def test_many_files(pool: Decoders, data: bytes) -> None:
    read(pool, data)
