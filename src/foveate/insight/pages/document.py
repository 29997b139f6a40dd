"""A page as one file: the templates, styles and scripts beside this module are written into it."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parent


def source(*names: str) -> str:
    """The text of files of this folder, one after the other."""
    return "".join((FOLDER / name).read_text("utf-8") for name in names)


def fill(template: str, **values: str) -> str:
    """A template of this folder with values, which are HTML, in the places of their names."""
    return Template(source(template)).substitute(values)


def document(title: str, body: str, *styles: str) -> str:
    """A whole page. `title`: as text. `body`: as HTML. `styles`: files after style.css."""
    return fill(
        "page.html",
        title=html.escape(title),
        styles=source("style.css", *styles),
        body=body,
    )


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture as a data URI. `kind`: "JPEG" or "PNG". `options` go to `Image.save`."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    data = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{data}"
