"""The page at `/`, and what it asks for beside answers: drawn scenes, methods, maps of attention.

An answer's maps come from the same worker as the answer, and under the same limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import random
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse
from pydantic import Field, ValidationError

from ..core.method import get
from ..core.method import text as written
from ..insight.pages.document import FOLDER, data_uri
from ..insight.pages.trace import drawn
from ..insight.target import Target, of_kind, read
from ..insight.trace import Trace, trace
from ..scenes import questions, world
from ..vlm.chat import Chat, unknown_words
from . import asking, wire
from .service import Service, Share, authorised, read_body
from .wire import Gone, Refusal

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": PAGE / "index.html",
    "/page.css": PAGE / "page.css",
    "/page.js": PAGE / "page.js",
    "/server.js": PAGE / "server.js",
    "/style.css": FOLDER / "style.css",  # those of saved traces, too
    "/maps.css": FOLDER / "maps.css",
    "/draw.js": FOLDER / "draw.js",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TOKENS = 128  # of an answer whose attention is shown: all of its maps are held at once
SCENES = 12  # offered with a small picture
LAST = 999_999  # the last scene that has a number
SIDE, SMALL = 768, 96  # pixels of a scene's side, and of such a picture's
PLAIN = "The model as it is."


# -- the page --------------------------------------------------------------------------------------

page = APIRouter()


def _file(path: Path) -> Callable[[], Any]:
    async def send() -> Response:
        return FileResponse(path, headers=HEADERS)

    return send


for url, path in FILES.items():
    page.get(url)(_file(path))


# -- what it offers --------------------------------------------------------------------------------

routes = APIRouter(prefix="/explore", dependencies=[Depends(authorised)])


@routes.get("/start")
async def start(request: Request) -> Response:
    """The model, its methods, some scenes, and what is allowed."""
    service: Service = request.app.state.service
    scenes = await anyio.to_thread.run_sync(_small_scenes, limiter=service.reading)
    names = [id.partition(":")[2] for id in service.catalogue.ids[1:]]
    return _json(
        {
            "model": service.catalogue.name,
            "tokens": _most(service),
            "methods": [{"name": "vanilla", "about": PLAIN}, *map(_about, names)],
            "scenes": scenes,
            "last": LAST,
        }
    )


@routes.get("/method")
async def one_method(request: Request, text: str) -> Response:
    """A method's text form as it will be shown, or why it cannot be asked."""
    service: Service = request.app.state.service
    stack = await anyio.to_thread.run_sync(
        service.catalogue.methods, service.catalogue.name, text, limiter=service.reading
    )
    return _json({"method": written(stack)})


@routes.get("/scenes/{number}")
async def one_scene(request: Request, number: str) -> Response:
    """A drawn scene: its picture, what is on it, and questions whose answers are known."""
    service: Service = request.app.state.service
    if not re.fullmatch("[0-9]{1,6}", number):
        raise Refusal(f"There is no scene {number[:100]!r}: give a number from 0 to {LAST}.")
    return _json(await anyio.to_thread.run_sync(_scene, int(number), limiter=service.reading))


def _most(service: Service) -> int:
    return min(TOKENS, service.settings.tokens)


def _about(name: str) -> dict[str, Any]:
    cls = get(name)
    return {
        "name": name,
        "about": (cls.__doc__ or "").strip().split("\n")[0],
        "details": inspect.cleandoc(cls.__doc__ or "").partition("\n")[2].strip(),
        "paper": cls.paper,
        "parameters": {k: repr(v) for k, v in cls().parameters().items()},
    }


def _drawn_scene(number: int) -> world.Scene:
    return world.sample(questions.FIRST_HELD_OUT + number)


@functools.cache
def _small_scenes() -> list[dict[str, Any]]:
    scenes = []
    for number in range(SCENES):
        scene = _drawn_scene(number)
        kinds = ", ".join(world.counts(scene))
        image = data_uri(world.window(scene, (0, 0, 1, 1), SMALL), "JPEG")
        scenes.append({"number": number, "image": image, "about": f"Scene {number}: {kinds}"})
    return scenes


@functools.lru_cache(64)
def _scene(number: int) -> dict[str, Any]:
    scene, rng = _drawn_scene(number), random.Random(number)
    kinds: dict[tuple[str, str], list[questions.Question]] = {}
    for question in questions.exam(scene, rng):
        kinds.setdefault((question.category, question.topic), []).append(question)
    chosen = [rng.choice(kind) for kind in kinds.values()]
    described = questions.caption(questions.look(scene), rng)
    chosen += [described] if described else []
    things = list(world.counts(scene))
    return {
        "number": number,
        "image": data_uri(world.draw(scene, SIDE), "PNG"),
        "things": things,
        "questions": [
            {"text": q.text, "answer": q.answer, "thing": _named(q.text, things)} for q in chosen
        ],
    }


def _named(text: str, things: list[str]) -> str | None:
    """The first of these things that a text names, be it as a plural."""
    match = re.search(rf"\b({'|'.join(things)})", text)
    return match and match[1]


def _json(content: Any) -> Response:
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})


# -- maps of attention -----------------------------------------------------------------------------


class Asked(wire.Strict):
    """The body of ``POST /explore/trace``: what was asked, and what attention is measured to.

    Attributes:
        image: as in ``image_url`` of a chat completion.
        scene: number of the drawn scene that the image is.
        thing: what on that scene; box: or a part of any image, (left, top, right, bottom) in
            fractions of its sides.
    """

    image: str
    question: str
    method: str = "vanilla"
    max_tokens: int = Field(ge=1)
    scene: int | None = Field(None, ge=0, le=LAST)
    thing: str | None = Field(None, max_length=100)
    box: list[float] | None = Field(None, min_length=4, max_length=4)


@routes.post("/trace")
async def attention(request: Request) -> Response:
    """The greedy answer of one method again, with its attention at every token and layer.

    Maps are written with a byte per cell: 255 times the root of its share of the map's largest
    weight, which is told beside it (`peaks`).
    """
    service: Service = request.app.state.service
    service.worker.admit()  # before the body is read
    with contextlib.closing(Share(service.budget)) as share:
        body = await read_body(request, service.settings, share)
        work = await anyio.to_thread.run_sync(_work, service, body, limiter=service.reading)
        traced = await _result(request, service.worker.run(work))

        def told() -> Response:
            with service.vlm.tokenizing:
                unknown = unknown_words(service.vlm.tokenizer, traced.question)
            return _json(drawn(traced) | {"unknown": unknown})

        return await anyio.to_thread.run_sync(told, limiter=service.reading)


def _work(service: Service, body: bytes) -> Callable[[], Trace]:
    """What the worker has to do, once everything about the request has been found to be right."""
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(*wire.told(error)) from None
    if asked.max_tokens > _most(service):
        raise Refusal(
            f"Attention is shown for {_most(service)} tokens: ask for fewer.", "max_tokens"
        )
    stack = service.catalogue.methods(service.catalogue.name, asked.method)
    chat = _chat(service, asked)
    return functools.partial(
        trace,
        service.vlm,
        chat.images[0],
        chat.text,
        [stack],
        object=_target(asked, chat.images[0].size),
        max_new_tokens=asked.max_tokens,
    )


def _chat(service: Service, asked: Asked) -> Chat:
    parts: list[wire.Part] = [
        wire.ImagePart(type="image_url", image_url=wire.ImageURL(url=asked.image)),
        wire.TextPart(type="text", text=asked.question),
    ]
    message = wire.Message(role="user", content=parts)
    completion = wire.Completion(model=service.catalogue.name, messages=[message])
    return asking.chat(service.vlm, completion, service.settings, service.decoders)


def _target(asked: Asked, size: tuple[int, int]) -> Target | None:
    if asked.box is not None:
        if not all(0 <= edge <= 1 for edge in asked.box):
            raise Refusal("A box is given in fractions of the image's sides, 0 to 1.", "box")
        return read(asked.box, size)
    if asked.thing is None:
        return None
    if asked.scene is None or size != (SIDE, SIDE):
        raise Refusal("Things are known only of drawn scenes: send one, with its number.", "scene")
    scene = _drawn_scene(asked.scene)
    if asked.thing not in world.counts(scene):
        known = ", ".join(world.counts(scene))
        raise Refusal(f"There is no {asked.thing!r} in this scene: it has {known}.", "thing")
    return Target(asked.thing, of_kind(scene, asked.thing, SIDE).astype(np.float32))


async def _result(request: Request, done: Future[Trace]) -> Trace:
    """What the worker returns; a client that hangs up frees its place in the queue."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, leaving = asyncio.wrap_future(done), asyncio.create_task(gone())
    try:
        await asyncio.wait((result, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise Gone
        return result.result()
    finally:
        leaving.cancel()
        result.cancel()
