"""`foveate serve`: a model behind OpenAI's wire format."""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import Annotated

import typer

from ..base.errors import FoveateError
from . import app
from .common import DeviceOption, DtypeOption, ModelOption, RevisionOption, load, note


class Engine(StrEnum):
    """Who runs the server: this process, or replicas in Ray Serve."""

    PLAIN, RAY = "plain", "ray"


@app.command()
def serve(
    model: ModelOption = "pocket",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FOVEATE_API_KEY", help="What clients must send; better as the variable."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Requests that go through the model at a time.")
    ] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Longest text of a request, in tokens.")
    ] = 4096,
    max_images: Annotated[int, typer.Option(min=0, help="Images of a request.")] = 4,
    max_image_bytes: Annotated[
        int, typer.Option(min=1, help="Largest encoded image, in bytes.")
    ] = 10_000_000,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Of all images of a request together.")
    ] = 16_000_000,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 32_000_000,
    allow_remote_images: Annotated[
        bool,
        typer.Option("--allow-remote-images", help="Fetch images from public addresses."),
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Offer a method with these parameters, which may name files, by its name alone: "
            "\"cli(path='runs/cli/injection')\" as MODEL:cli. Repeat it for more."
        ),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="plain: this process; ray: replicas in Ray Serve.")
    ] = Engine.PLAIN,
    replicas: Annotated[int, typer.Option(min=1, help="With --engine ray: models to load.")] = 1,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve a model to OpenAI clients, plain and with methods (`model:method`).

    The first Ctrl-C (or SIGTERM) refuses new requests and finishes those that are there; a second
    one ends at once.
    """
    try:
        from ..serving.run import Server, bind
        from ..serving.settings import Settings
    except ModuleNotFoundError as error:
        raise FoveateError(
            f"The server needs {error.name}: pip install 'foveate[serve]'."
        ) from error
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        note(f"whoever reaches {host} may ask: set FOVEATE_API_KEY to let in fewer.")
    settings = Settings(
        batch=batch_size,
        queue=queue,
        tokens=max_tokens,
        prompt_tokens=max_prompt_tokens,
        images=max_images,
        image_bytes=max_image_bytes,
        pixels=max_pixels,
        body_bytes=max_body_bytes,
        remote_images=allow_remote_images,
        methods=tuple(method or ()),
        api_key=api_key,
    )
    if engine is Engine.RAY:
        from ..bridges.replicas import run_replicas

        opened = functools.partial(load, model, revision=revision, device=device, dtype=dtype)
        run_replicas(opened, settings, host, port, replicas)
        return
    if replicas > 1:
        raise FoveateError("--replicas goes with --engine ray.")
    sock = bind(host, port)
    vlm = load(model, revision=revision, device=device, dtype=dtype)
    Server(vlm, settings).run(sockets=[sock])
