"""The routes: OpenAI's wire format in front of a model.

    app = create_app(VLM.load("pocket"))        # any ASGI server runs it

Whoever adds routes finds the model, the worker and the rest as ``request.app.state.house``, and
guards them with ``Depends(authorised)``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..base.errors import FoveateError
from ..core.method import text
from ..vlm.vlm import VLM
from . import asking, errors, queue, wire
from .naming import Catalogue
from .sampling import End, Event, Piece
from .settings import Settings


class House:
    """What the routes share: the model, its worker, what is allowed."""

    def __init__(self, vlm: VLM, settings: Settings) -> None:
        self.vlm, self.settings = vlm, settings
        self.worker = queue.Worker(vlm, settings)
        self.catalogue = Catalogue(vlm, settings.methods)
        self.started = int(time.time())
        # requests whose content is decoded at a time; fetching is waiting, and needs more
        self.reading = anyio.CapacityLimiter(32 if settings.remote_images else 4)


def create_app(vlm: VLM, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application; its worker runs while the application does."""
    from . import explore  # which stands on this module

    house = House(vlm, settings or Settings())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        house.worker.start()
        yield
        house.worker.stop()
        await asyncio.to_thread(house.worker.join)

    app = FastAPI(title="foveate", lifespan=lifespan, openapi_url=None)
    app.state.house = house
    app.include_router(open_routes)
    app.include_router(routes)
    app.include_router(explore.page)
    app.include_router(explore.routes)
    app.add_middleware(Counted, house=house)
    for kind in (FoveateError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)
    return app


async def refused(request: Request, error: Exception) -> Response:
    status, body, headers = errors.answer(error)
    return JSONResponse(body, status, headers)


async def authorised(request: Request) -> None:
    """Refuses a request without the key, where there is one."""
    key = request.app.state.house.settings.api_key
    given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that came
    if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise errors.Unauthorised(
            "The API key is missing or wrong: send it as `Authorization: Bearer KEY`."
        )


open_routes = APIRouter()
routes = APIRouter(dependencies=[Depends(authorised)])


@open_routes.get("/healthz")
async def health(request: Request) -> Response:
    stopping = request.app.state.house.worker.stopping
    status = "stopping" if stopping else "ok"
    return JSONResponse({"status": status, "pid": os.getpid()}, 503 if stopping else 200)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    registry = request.app.state.house.worker.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/models")
async def models(request: Request) -> Any:
    house: House = request.app.state.house
    return {"object": "list", "data": [_model(house, id) for id in house.catalogue.ids]}


@routes.get("/v1/models/{id:path}")
async def model(request: Request, id: str) -> Any:
    house: House = request.app.state.house
    house.catalogue.methods(id, None)
    return _model(house, id)


def _model(house: House, id: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": house.started, "owned_by": "foveate"}


@routes.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    house: House = request.app.state.house
    house.worker.admit()  # before the body is read
    body = await read_body(request, house.settings)
    asked, waiting = await anyio.to_thread.run_sync(_question, house, body, limiter=house.reading)
    events, loop = asyncio.Queue[Event](), asyncio.get_running_loop()

    def deliver(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to hear it
            loop.call_soon_threadsafe(events.put_nowait, event)

    house.worker.submit(waiting, deliver)
    answer = _events(request, house, waiting, events)
    first = await anext(answer)  # what fails before it is answered with a status of its own
    writer = wire.Writer(f"chatcmpl-{uuid.uuid4().hex}", asked, text(waiting.methods))
    if asked.stream:
        return StreamingResponse(
            _stream(writer, first, answer),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    return JSONResponse(writer.completion([first, *[event async for event in answer]]))


async def read_body(request: Request, settings: Settings) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # what a web page may send elsewhere unasked is of another type
        raise errors.WrongType("The body must be JSON, and its content type application/json.")
    body, most = bytearray(), settings.body_bytes
    try:
        async with asyncio.timeout(settings.seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise errors.TooLarge(f"A request may have {most:,} bytes: make it smaller.")
    except TimeoutError:
        raise errors.TooSlow(f"The body took more than {settings.seconds:g} seconds.") from None
    except ClientDisconnect:
        raise errors.Gone from None
    return bytes(body)


def _question(house: House, body: bytes) -> tuple[wire.Completion, queue.Request]:
    asked = asking.parse(body)
    methods = house.catalogue.methods(asked.model, asked.method)
    sampling = asking.sampling(asked, house.settings)
    chat = asking.chat(house.vlm, asked, house.settings)
    return asked, queue.Request(chat, methods, sampling)


async def _events(
    request: Request, house: House, waiting: queue.Request, events: asyncio.Queue[Event]
) -> AsyncGenerator[Piece | End]:
    """The pieces of an answer and its end; a client that hangs up frees its place."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        house.worker.cancel(waiting)
        events.put_nowait(errors.Gone())

    watching, metrics, start = asyncio.create_task(watch()), house.worker.metrics, time.monotonic()
    try:
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, End):
                metrics.tokens.labels("prompt").inc(event.prompt_tokens)
                metrics.tokens.labels("completion").inc(event.completion_tokens)
                metrics.seconds.observe(time.monotonic() - start)
            yield event
            if isinstance(event, End):
                return
    finally:
        watching.cancel()
        house.worker.cancel(waiting)


async def _stream(
    writer: wire.Writer, first: Piece | End, rest: AsyncGenerator[Piece | End]
) -> AsyncIterator[str]:
    """An answer as server-sent events; an error in its middle is one, too."""

    def line(data: Any) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    async with contextlib.aclosing(rest):
        yield line(writer.begin())
        event = first
        try:
            while isinstance(event, Piece):
                yield line(writer.piece(event))
                event = await anext(rest)
            for chunk in writer.end(event):
                yield line(chunk)
        except FoveateError as error:
            yield line(errors.answer(error)[1])
        yield "data: [DONE]\n\n"


class Counted:
    """Counts what was answered, by path and status."""

    PATHS = ("/v1/chat/completions", "/v1/models", "/healthz", "/metrics")

    def __init__(self, app: Any, house: House) -> None:
        self.app, self.requests = app, house.worker.metrics.requests

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = "500"

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self.PATHS else "other"
            self.requests.labels(path, status).inc()
