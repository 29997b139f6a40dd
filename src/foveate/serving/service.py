"""What all routes share: the model and its worker, the key, the body of a request.

Routes find the `Service` at ``request.app.state.service``, and ``Depends(authorised)`` asks for
the key.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import threading
import time

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect

from ..vlm.chat import Chat
from ..vlm.vlm import VLM
from . import queue, wire
from .asking import Catalogue
from .decoders import Decoders


class Service:
    """What the routes share: the model, its worker, what is allowed."""

    def __init__(self, vlm: VLM, settings: wire.Settings) -> None:
        self.vlm, self.settings = vlm, settings
        self.worker = queue.Worker(vlm, settings)
        self.catalogue = Catalogue(vlm, settings.methods)
        self.started = int(time.time())
        self.decoders = Decoders(settings.pixels, size=min(4, os.cpu_count() or 1))
        self.budget = Budget(settings.memory)
        # requests whose content is read at a time; fetching is waiting, and needs more
        self.reading = anyio.CapacityLimiter(32 if settings.remote_images else 8)


class Budget:
    """Bytes that requests may hold together."""

    def __init__(self, most: int) -> None:
        self.most, self.held, self.changing = most, 0, threading.Lock()


class Share:
    """What one request holds of a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.held = budget, 0

    def hold(self, held: int) -> None:
        """Hold so many bytes from now on.

        Raises:
            Busy: the budget has no room for them.
        """
        budget = self.budget
        with budget.changing:
            more = held - self.held
            if more > 0 and budget.held + more > budget.most:
                raise wire.Busy(1)
            budget.held += more
            self.held = held

    def close(self) -> None:
        self.hold(0)


def bytes_of(chat: Chat) -> int:
    """What the pictures of a chat take."""
    return sum(3 * image.width * image.height for image in chat.images)


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


async def read_body(request: Request, settings: wire.Settings, share: Share) -> bytes:
    """The body as it comes in, counted in `share`.

    Raises:
        Refusal: not JSON, too large, too slow, or there is no room for it.
    """
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
                share.hold(len(body))
    except TimeoutError:
        reason = f"The body took more than {settings.seconds:g} seconds."
        raise wire.Refusal(reason, status=408) from None
    except ClientDisconnect:
        raise wire.Gone from None
    values, most = sum(map(body.count, (b",", b"[", b"{"))), 64 * settings.prompt_tokens
    if values > most:  # each may take a hundred times its bytes once it is read
        raise wire.TooLarge(f"A request may have {most:,} values: make it smaller.")
    return bytes(body)
