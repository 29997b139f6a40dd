"""What all routes share: the model and its worker, the key, the body of a request.

Routes find the `Service` at ``request.app.state.service``, and ``Depends(authorised)`` asks for
the key.
"""

from __future__ import annotations

import asyncio
import hmac
import time

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect

from ..vlm.vlm import VLM
from . import queue, wire
from .asking import Catalogue


class Service:
    """What the routes share: the model, its worker, what is allowed."""

    def __init__(self, vlm: VLM, settings: wire.Settings) -> None:
        self.vlm, self.settings = vlm, settings
        self.worker = queue.Worker(vlm, settings)
        self.catalogue = Catalogue(vlm, settings.methods)
        self.started = int(time.time())
        # requests whose content is decoded at a time; fetching is waiting, and needs more
        self.reading = anyio.CapacityLimiter(32 if settings.remote_images else 4)


async def authorised(request: Request) -> None:
    """Refuses a request without the key, where there is one."""
    key = request.app.state.service.settings.api_key
    given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that came
    if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise wire.Refusal(
            "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.",
            status=401,
            code="invalid_api_key",
        )


async def read_body(request: Request, settings: wire.Settings) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site can only send other types
        raise wire.Refusal(
            "The body must be JSON, and its content type application/json.", status=415
        )
    body, most = bytearray(), settings.body_bytes
    try:
        async with asyncio.timeout(settings.seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise wire.TooLarge(f"A request may have {most:,} bytes: make it smaller.")
    except TimeoutError:
        reason = f"The body took more than {settings.seconds:g} seconds."
        raise wire.Refusal(reason, status=408) from None
    except ClientDisconnect:
        raise wire.Gone from None
    return bytes(body)
