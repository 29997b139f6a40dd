"""A trace as one HTML page that needs nothing else: pictures and numbers are inside it."""

from __future__ import annotations

import base64
import json
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ...families.layout import WHOLE
from ..plots.style import small
from ..seen import HeatMap, MethodTrace, Seen, short
from .document import data_uri, document, fill, source

SIDE = 480  # pixels of a picture's longer side
OUTLINE = (127, 224, 255, 255)


def page(trace: Seen) -> str:
    """The whole page: no outside resource, usable from a file."""
    looked = f"Attention to {trace.target.name if trace.target else 'the image'}"
    body = fill(
        "trace.html",
        question=escape(trace.question),
        about=_about(trace),
        looked=escape(looked),
        hidden="" if trace.measure == "on_object" else " hidden",
        data=json.dumps(drawn(trace), separators=(",", ":")).replace("<", "\\u003c"),
        script=source("draw.js", "trace.js"),
    )
    return document(f"Trace: {trace.question}", body, "maps.css", "trace.css")


def _about(trace: Seen) -> str:
    """Model, heads, object, in a sentence each."""
    if isinstance(trace.heads, str):
        heads = {"mean": "Mean over heads.", "max": "Largest of all heads."}[trace.heads]
    else:
        heads = f"Mean over heads {', '.join(map(str, trace.heads))}."
    told = f"Model {trace.model}. {heads}"
    if trace.target is not None:
        told += f" Outlined: {trace.target.name}, {trace.target.area:.1%} of the image."
    return escape(told)


def drawn(trace: Seen) -> dict[str, Any]:
    """What the script draws."""
    first = trace.runs[0]
    watched = getattr(first, trace.measure)
    watched = first.on_image if watched is None else watched
    images = [data_uri(small(trace.image, SIDE), "JPEG", quality=85)]
    runs = [_run(trace, run, images) for run in trace.runs]
    return {
        "object": None if trace.target is None else trace.target.name,
        "measure": trace.measure,
        "largest": trace.heads == "max",
        "layers": first.layers,
        "depth": first.uncertainty.shape[1],
        "start": int(watched[: first.said].mean(0).argmax()),
        "images": images,
        "runs": runs,
    }


def _run(trace: Seen, run: MethodTrace, images: list[str]) -> dict[str, Any]:
    return {
        **run.curves(4),
        "said": run.said,
        "probability": run.answer.probability,
        "pictures": [_picture(trace, picture, images) for picture in run.pictures],
    }


def _picture(trace: Seen, picture: HeatMap, images: list[str]) -> dict[str, Any]:
    """One picture, its maps in one byte per cell: the root of the share of the map's maximum."""
    image = small(picture.image, SIDE)
    uri = data_uri(image, "JPEG", quality=85)
    if uri not in images:
        images.append(uri)
    heat = picture.heat.astype(np.float32)
    peaks = heat.max((-2, -1))
    shares = np.sqrt(heat / np.maximum(peaks, 1e-12)[..., None, None])
    part, whole = picture.part, picture.part == WHOLE
    caption = ""
    if part is None:
        caption = "A picture that the method made."
    elif not whole:
        wide, high = trace.image.size
        left, top, right, bottom = (
            round(edge * side) for edge, side in zip(part, (wide, high, wide, high), strict=True)
        )
        caption = (
            "The part of the image that the method asked about: "
            f"pixels {left} to {right} across, {top} to {bottom} down."
        )
    return {
        "image": images.index(uri),
        "outline": _outline(trace, picture, image.size),
        "rows": heat.shape[-2],
        "cols": heat.shape[-1],
        "box": picture.box,
        "caption": caption,
        "frame": None if whole else part,
        "peaks": short(peaks, 4),
        "heat": base64.b64encode((255 * shares).round().astype(np.uint8).tobytes()).decode(),
    }


def _outline(trace: Seen, picture: HeatMap, size: tuple[int, int]) -> str | None:
    """The edge of the object on a picture, two pixels wide, else transparent; None without it."""
    if trace.target is None or picture.part is None:
        return None
    seen = trace.target.seen(picture.part, size)
    inner = np.pad(seen, 2, mode="edge")
    around = [
        inner[2 + y : inner.shape[0] - 2 + y, 2 + x : inner.shape[1] - 2 + x]
        for y, x in ((-2, 0), (2, 0), (0, -2), (0, 2))
    ]
    edge = seen & ~np.logical_and.reduce(around)
    if not edge.any():
        return None
    drawn = np.zeros((*seen.shape, 4), np.uint8)
    drawn[edge] = OUTLINE
    return data_uri(Image.fromarray(drawn), "PNG")
