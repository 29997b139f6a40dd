"""The routes: OpenAI's wire format in front of a model.

    app = create_app(VLM.load("pocket"))        # any ASGI server runs it

More routes lie in `foveate.serving.explore`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from types import FrameType
from typing import Any

import anyio
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from ..base import __version__
from ..base.errors import FoveateError
from ..core.method import text
from ..vlm.vlm import VLM
from . import asking, door, explore, queue, wire
from .sampling import End, Event, Piece
from .service import Service, Share, authorised, bytes_of, read_body
from .wire import Settings


def create_app(vlm: VLM, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application; its worker runs while the application does."""
    service = Service(vlm, settings or Settings())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()
        await asyncio.to_thread(service.worker.join)
        await asyncio.to_thread(service.decoders.close)

    address = "/openapi.json" if service.settings.docs else None
    app = FastAPI(
        title="foveate", lifespan=lifespan, openapi_url=address, docs_url=None, redoc_url=None
    )
    app.openapi = functools.partial(described, app)  # type: ignore[method-assign]
    app.state.service = service
    app.include_router(open_routes)
    app.include_router(routes)
    app.include_router(explore.page)
    app.include_router(explore.routes)
    app.add_middleware(Counted, service=service)
    if service.settings.hosts is not None:
        app.add_middleware(door.Hosts, names=service.settings.hosts)
    for kind in (FoveateError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)
    return app


def described(app: FastAPI) -> dict[str, Any]:
    """The interface as OpenAPI describes it, with the bodies, which routes read by themselves."""
    document = get_openapi(title="foveate", version=__version__, routes=app.routes)
    parts = document.setdefault("components", {}).setdefault("schemas", {})
    bodies: dict[str, type[wire.Strict]] = {
        "/v1/chat/completions": wire.Completion,
        "/explore/trace": explore.Asked,
    }
    for path, body in bodies.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= schema.pop("$defs", {}) | {body.__name__: schema}
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        document["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": reference}},
        }
    return document


async def refused(request: Request, error: Exception) -> Response:
    status, body, headers = wire.error_answer(error)
    return JSONResponse(body, status, headers)


open_routes = APIRouter()
routes = APIRouter(dependencies=[Depends(authorised)])


@open_routes.get("/healthz")
async def health(request: Request) -> Response:
    stopping = request.app.state.service.worker.stopping
    status = "stopping" if stopping else "ok"
    return JSONResponse({"status": status, "pid": os.getpid()}, 503 if stopping else 200)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    registry = request.app.state.service.worker.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/models")
async def models(request: Request) -> Any:
    service: Service = request.app.state.service
    return {"object": "list", "data": [_model(service, id) for id in service.catalogue.ids]}


@routes.get("/v1/models/{id:path}")
async def model(request: Request, id: str) -> Any:
    service: Service = request.app.state.service
    service.catalogue.methods(id, None)
    return _model(service, id)


def _model(service: Service, id: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": service.started, "owned_by": "foveate"}


@routes.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    service.worker.admit()  # before the body is read
    events, loop = asyncio.Queue[Event](), asyncio.get_running_loop()

    def deliver(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(events.put_nowait, event)

    share = Share(service.budget)
    try:
        body = await read_body(request, service.settings, share)
        asked, waiting = await anyio.to_thread.run_sync(
            _question, service, body, limiter=service.reading
        )
        del body
        share.hold(bytes_of(waiting.chat))
        service.worker.submit(waiting, deliver)
        answer = _events(request, service, waiting, events, share)
        first = await anext(answer)  # an error before it becomes the status
    except BaseException:
        share.close()
        raise
    writer = wire.Writer(f"chatcmpl-{uuid.uuid4().hex}", asked, text(waiting.methods))
    if asked.stream:
        return StreamingResponse(
            _stream(writer, first, answer),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    return JSONResponse(writer.completion([first, *[event async for event in answer]]))


def _question(service: Service, body: bytes) -> tuple[wire.Completion, queue.Request]:
    asked = asking.parse(body)
    methods = service.catalogue.methods(asked.model, asked.method)
    sampling = asking.sampling(asked, service.settings, methods)
    chat = asking.chat(service.vlm, asked, service.settings, service.decoders)
    return asked, queue.Request(chat, methods, sampling)


async def _events(
    request: Request,
    service: Service,
    waiting: queue.Request,
    events: asyncio.Queue[Event],
    share: Share,
) -> AsyncGenerator[Piece | End]:
    """The pieces of an answer and its end. A client that hangs up frees its place."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        service.worker.cancel(waiting)
        events.put_nowait(wire.Gone())

    watching, metrics, start = (
        asyncio.create_task(watch()),
        service.worker.metrics,
        time.monotonic(),
    )
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
        service.worker.cancel(waiting)
        share.close()


async def _stream(
    writer: wire.Writer, first: Piece | End, rest: AsyncGenerator[Piece | End]
) -> AsyncIterator[str]:
    """An answer as server-sent events. An error in its middle is an event, too."""

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
            yield line(wire.error_answer(error)[1])
        yield "data: [DONE]\n\n"


class Counted:
    """Counts answers by path and status, and tells of those of the model where that is wanted."""

    PATHS = ("/v1/chat/completions", "/v1/models", "/healthz", "/metrics")

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.requests = app, service.worker.metrics.requests
        self.log = service.settings.log

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = "500", time.monotonic()

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
            if self.log and scope["method"] == "POST":
                took = f"{time.monotonic() - start:.2f} s"
                print(f"foveate: {path}, {status}, {took}", file=sys.stderr, flush=True)


# -- the process -----------------------------------------------------------------------------------


def configuration(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs the application: quietly, and behind our own door."""
    protocol = type("Protocol", (door.Protocol,), {"most": settings.connections})
    return uvicorn.Config(app, http=protocol, ws="none", log_level="warning", access_log=False)


class Server(uvicorn.Server):
    """Stops in two steps. The first signal refuses new requests; the server exits once the worker
    has finished those it holds. A second signal exits at once."""

    def __init__(self, vlm: VLM, settings: Settings) -> None:
        app = create_app(vlm, settings)
        super().__init__(configuration(app, settings))
        self.worker: queue.Worker = app.state.service.worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.worker.stopping:
            self.should_exit = self.force_exit = True
        else:
            told = "foveate: stops when it has answered what it holds; Ctrl-C again ends it at once"
            print(told, file=sys.stderr, flush=True)
            threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        self.worker.stop()
        self.worker.join()
        print("foveate: has stopped", file=sys.stderr, flush=True)
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for sock in sockets:
            host, port = sock.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"foveate: {self.worker.vlm.name} at http://{host}:{port}/v1", flush=True)
            print(f"foveate: a page to try it on: http://{host}:{port}/", flush=True)


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address. Called first, so that a taken port is told at once.

    Raises:
        FoveateError: the address is in use, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise FoveateError(
            f"The server cannot listen at {host}:{port} ({error.strerror}): give another --host "
            "or --port."
        ) from error
    return sock
