"""Every kind of picture comes out upright, in RGB, with its colours; everything else is refused."""

from __future__ import annotations

import base64
import io
import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.base.errors import FoveateError
from foveate.base.images import MIN_SIDE, RATIO, SCANS, decode, decode_all

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def halves(left=RED, right=BLUE, size=(32, 16)) -> Image.Image:
    """Two colours side by side: left and right, so an orientation can be seen."""
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def refused(source, match: str) -> None:
    with pytest.raises(FoveateError, match=match) as error:
        decode(source)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "bytearray", "uri", "pil", "array"])
def test_every_source_gives_the_same_picture(kind, tmp_path):
    picture = halves()
    data = encode(picture)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    source = {
        "path": path,
        "text": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "uri": "data:image/png;base64," + base64.b64encode(data).decode(),
        "pil": picture,
        "array": np.asarray(picture),
    }[kind]
    found = decode(source)
    assert found.mode == "RGB"
    assert found.tobytes() == picture.tobytes()


def test_none_one_and_several():
    assert decode_all([]) == []
    assert len(decode_all(halves())) == 1
    assert [image.size for image in decode_all([halves(), np.zeros((9, 12))])] == [
        (32, 16),
        (12, 9),
    ]


@pytest.mark.parametrize(
    "array",
    [
        np.full((16, 32, 3), 255, np.uint8),
        np.full((16, 32), 255, np.uint8),
        np.full((16, 32, 1), 255, np.int64),
        np.full((16, 32, 3), 65535, np.uint16),
        np.full((16, 32, 3), 1.0, np.float32),
        np.ones((16, 32), bool),
        np.zeros((16, 32, 4), np.uint8),  # transparent black is white paper
        torch.ones(3, 16, 32),
        torch.ones(3, 16, 32, dtype=torch.bfloat16),
        torch.full((16, 32, 3), 255, dtype=torch.uint8),
    ],
    ids=lambda array: f"{array.dtype}-{tuple(array.shape)}",
)
def test_white_arrays_are_white(array):
    assert decode(array).size == (32, 16)
    assert decode(array).getcolors() == [(32 * 16, WHITE)]


def test_a_wide_three_row_array_keeps_its_axes():
    array = np.zeros((3, 50, 3), np.uint8)
    array[:, 25:] = BLUE
    assert decode(array).getpixel((49, 0)) == BLUE


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"]
)
def test_pil_modes_keep_their_colours(mode):
    if mode in ("I", "F"):
        top = 65535 if mode == "I" else 1.0
        values = np.linspace(0, top, 256, dtype=np.int32 if mode == "I" else np.float32)
        found = decode(Image.fromarray(np.tile(values, (16, 1))))
        assert [found.getpixel((x, 0))[0] for x in (0, 128, 255)] == [0, 128, 255]
        return
    picture = halves((255, 255, 255), (0, 0, 0)) if mode in ("1", "L", "LA") else halves()
    source = picture.convert("L").convert("LA") if mode == "LA" else picture
    if mode == "PA":
        source = picture.convert("P")
    found = decode(source.convert(mode))
    assert found.mode == "RGB"
    difference = np.abs(np.asarray(found, int) - np.asarray(picture, int)).max()
    assert difference <= 3


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form):
    values = np.tile(np.linspace(0, 65535, 256, dtype=np.uint16), (16, 1))
    found = decode(encode(Image.fromarray(values), form))
    assert [found.getpixel((x, 0)) for x in (0, 64, 255)] == [(0,) * 3, (64,) * 3, WHITE]


def test_cmyk_jpeg():
    found = decode(encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = found.getpixel((16, 16))
    assert red > 240
    assert max(green, blue) < 15


def test_transparency_is_laid_on_white():
    glass = halves().convert("RGBA")
    glass.putalpha(Image.new("L", glass.size, 0))
    palette = halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    clear = palette.getpixel((0, 0))
    assert decode(encode(glass)).getcolors() == [(32 * 16, WHITE)]
    found = decode(encode(palette, transparency=clear))
    assert found.getpixel((0, 0)) == WHITE
    assert found.getpixel((31, 0)) == BLUE


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, RED), (2, BLUE), (3, BLUE), (6, RED), (8, BLUE)]
)
def test_exif_orientation_is_honoured(orientation, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encode(halves(), "JPEG", exif=exif, quality=95, subsampling=0))
    assert found.size == ((16, 32) if orientation in (6, 8) else (32, 16))
    assert np.abs(np.subtract(found.getpixel((0, 0)), corner)).max() < 20


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_hide_the_picture():
    data = encode(halves(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert decode(data).size == (32, 16)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_used(form):
    frames = [halves(), halves(GREEN, GREEN)]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.warns(UserWarning, match="several frames: the first is used"):
        found = decode(data)
    assert found.getpixel((0, 0)) == RED


def test_an_open_animation_keeps_the_frame_its_owner_chose():
    data = encode(halves(), "GIF", save_all=True, append_images=[halves(GREEN, GREEN)])
    image = Image.open(io.BytesIO(data))
    image.seek(1)
    assert decode(image).getpixel((0, 0)) == GREEN


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (3, 40), (40, 3)])
def test_tiny_sides_are_enlarged(size):
    found = decode(Image.new("RGB", size, GREEN))
    assert found.size == (max(size[0], MIN_SIDE), max(size[1], MIN_SIDE))
    assert found.getpixel((found.width - 1, found.height - 1)) == GREEN


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_truncated_files(form, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode(noise, form)
    refused(data[: int(len(data) * part)], "damaged or cut short|not a picture")


def png_header(width: int, height: int) -> bytes:
    """A valid PNG that claims a size and holds a single row."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    row = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + header + row + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs(side):
    refused(png_header(side, side), "million: make it smaller")


def test_the_limit_is_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(halves(), "32 x 16 pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(halves()).size == (32, 16)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
        ("nowhere/at/all.png", "no image nowhere/at/all.png"),
        ("x" * 5000, "not the name of a file|no image"),
        ("a\0b.png", "not the name of a file|no image"),
        ("https://example.com/cat.png", "network"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64,", "empty"),
        ("data:text/plain,hello", "not a picture"),
        (42, "int"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((5, 5, 7), np.uint8), "shape"),
        (np.zeros(5), "shape"),
        (np.full((8, 8), 255.0), "float64 values from 255"),
        (np.full((8, 8), np.nan), "nan"),
        (np.full((8, 8), -1), "from -1"),
        (np.full((8, 8), None), "type object"),
        (Image.fromarray(np.full((9, 9), 70_000, np.int32)), "32-bit"),
    ],
    ids=lambda value: repr(value)[:25] if isinstance(value, (str, bytes, int)) else None,
)
def test_what_is_no_picture_is_refused_in_one_sentence(source, match):
    refused(source, match)


def test_files_that_are_no_pictures(tmp_path: Path):
    refused(tmp_path, "not a file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "not a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path):
    path = tmp_path / "secret.png"
    path.write_bytes(encode(halves()))
    path.chmod(0)
    refused(path, "permissions")


def test_a_long_strip_is_refused_before_it_is_enlarged():
    """A side of one pixel becomes `MIN_SIDE`, so that a file of 31 kB became 128 million pixels."""
    strip = encode(Image.new("1", (16_000_000, 1)))
    assert len(strip) < 100_000
    refused(strip, "is 16000000 x 1 pixels, one side 16,000,000 times the other, and the limit")
    tracemalloc.start()
    refused(strip, "times the other")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, RATIO), (RATIO * 9, 9)])
def test_the_ratio_of_the_sides_has_a_limit(size):
    assert decode(Image.new("L", size)).size == tuple(max(side, MIN_SIDE) for side in size)
    longer = (size[0] + (size[0] > 1), size[1] + (size[0] == 1))
    refused(Image.new("L", longer), f"{RATIO + 1} times the other, and the limit is {RATIO} times")
    refused(np.zeros(longer, np.uint8), "times the other")


def test_what_will_be_made_counts(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8 * 100 - 1)
    refused(Image.new("L", (1, 100)), "million: make it smaller")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8 * 100)
    assert decode(Image.new("L", (1, 100))).size == (8, 100)


def two_formats() -> bytes:
    """A TIFF of 16 x 16 pixels that is also an FLI of 9400 x 9400, a format read before it."""
    directory = 0x1AF11  # where the TIFF's begins; its low half says FLI
    data = bytearray(directory)
    struct.pack_into("<4sIHH", data, 0, b"II*\0", directory, 9400, 9400)
    data[128:384] = bytes(range(256))  # the TIFF's pixels
    entries = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 128, 277: 1, 278: 16, 279: 256}
    data += struct.pack("<H", len(entries))
    for tag, value in entries.items():
        data += struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data + bytes(4))


def test_a_file_of_two_formats_is_read_in_the_one_that_was_measured():
    found = decode(two_formats())
    assert found.size == (16, 16)
    assert found.getpixel((1, 1)) == (17, 17, 17)


def many_scans(count: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A progressive JPEG whose last scan is there `count` times more."""
    data = encode(Image.new("L", size, 127), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def test_the_scans_of_a_jpeg_are_counted(tmp_path):
    assert decode(many_scans(10)).size == (64, 64)
    refused(many_scans(SCANS), "JPEG of more than 100 scans or 10,000 segments")
    (tmp_path / "a.jpg").write_bytes(many_scans(SCANS))
    refused(tmp_path / "a.jpg", "save it anew")
    data = encode(Image.new("L", (64, 64)), "JPEG")
    decode(data[:2] + b"\xff\xfe\0\x04\xff\xda" * 200 + data[2:])  # in comments: none of them
    refused(data[:2] + b"\xff\xfe\0\2" * 10_001 + data[2:], "10,000 segments")


def test_what_a_jpeg_may_cost_is_little():
    start = time.process_time()
    decode(many_scans(SCANS - 10, (4000, 4000)))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("form", ["PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "PDF"])
def test_other_formats_are_not_even_tried(form, tmp_path):
    try:
        data = encode(Image.new("RGB", (32, 32)), form)
    except OSError:
        pytest.skip(f"this Pillow writes no {form}")
    refused(data, "not a picture that can be read: give a PNG, JPEG, WebP, GIF, BMP or TIFF")
    (tmp_path / "a.png").write_bytes(data)
    refused(tmp_path / "a.png", "not a picture")


@pytest.mark.parametrize(
    "head",
    [b"\0\0\0\x20ftypisom", b"\0\0\0\x14ftypqt  ", b"\x1aE\xdf\xa3", b"RIFF\0\0\0\0AVI LIST"],
)
def test_a_video_is_refused_as_one(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_bytes(head + bytes(64))
    for source in (path, head + bytes(64)):
        with pytest.raises(FoveateError, match=r"is a video: give some of its frames as a list"):
            decode(source)
    with pytest.raises(FoveateError, match="several pictures or frames as a list"):
        decode(np.zeros((4, 8, 8, 3), np.uint8))


def test_a_phones_still_picture_is_no_video() -> None:
    with pytest.raises(FoveateError, match="not a picture that can be read"):
        decode(b"\0\0\0\x20ftypheic" + bytes(64))
