"""`foveate serve`: a model behind OpenAI's wire format."""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import Annotated

import typer

from ..base.errors import FoveateError
from . import app
from .common import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    PluginOption,
    RevisionOption,
    load,
    load_plugins,
    note,
)


class Engine(StrEnum):
    """Who runs the server: this process, or replicas in Ray Serve."""

    PLAIN, RAY = "plain", "ray"


@app.command()
def serve(
    model: ModelOption = "pocket",
    host: Annotated[
        str, typer.Option(help="Listen at this address. 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Listen at this port. 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FOVEATE_API_KEY",
            help="Let in only clients that send this key. Prefer the environment variable: "
            "other users of the machine can see options.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Answer up to this many requests at a time.")
    ] = 16,
    queue: Annotated[
        int, typer.Option(min=1, help="Let this many requests wait, and refuse more.")
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Allow answers of at most this many tokens.")
    ] = 1024,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Allow at most this many tokens of text in a request.")
    ] = 4096,
    max_images: Annotated[
        int, typer.Option(min=0, help="Allow at most this many images in a request.")
    ] = 4,
    max_image_bytes: Annotated[
        int, typer.Option(min=1, help="Allow encoded images of at most this many bytes.")
    ] = 10_000_000,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Allow at most this many pixels in all images of a request.")
    ] = 16_000_000,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Allow requests of at most this many bytes.")
    ] = 32_000_000,
    max_memory: Annotated[
        int,
        typer.Option(min=1, help="Hold at most this many bytes of requests and their images."),
    ] = 1_000_000_000,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Serve at most this many connections at a time.")
    ] = 512,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer to this name, too, where only this machine is served and no key is "
            "needed. Repeat it for more."
        ),
    ] = None,
    allow_remote_images: Annotated[
        bool,
        typer.Option("--allow-remote-images", help="Fetch images from public addresses, too."),
    ] = False,
    docs: Annotated[
        bool, typer.Option("--docs", help="Describe the interface at /openapi.json.")
    ] = False,
    log: Annotated[bool, typer.Option(help="Write a line on stderr for every answer.")] = True,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Offer a method with these parameters, which may name files, by its name alone: "
            "\"cli(path='runs/cli/injection')\" as MODEL:cli. Repeat it for more."
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            case_sensitive=False,
            help="Run the server in this process (plain), or as replicas in Ray Serve (ray).",
        ),
    ] = Engine.PLAIN,
    replicas: Annotated[
        int,
        typer.Option(min=1, help="Run this many replicas, each with a model. Needs --engine ray."),
    ] = 1,
    plugin: PluginOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread the model over devices: auto, balanced, ... Needs accelerate."),
    ] = None,
    attn: Annotated[
        str | None,
        typer.Option(help="Use this attention of transformers: sdpa, flash_attention_2, ..."),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="Load weights of 4 or 8 bits: 4bit or 8bit. Needs bitsandbytes."),
    ] = None,
) -> None:
    """Serve a model to OpenAI clients, plain and with methods (`model:method`).

    The first Ctrl-C (or SIGTERM) refuses new requests and finishes those that are there; a second
    one ends at once.
    """
    load_plugins(plugin)
    try:
        from ..serving.app import Server, bind
        from ..serving.door import LOCAL
        from ..serving.wire import Settings
    except ModuleNotFoundError as error:
        raise FoveateError(
            f"The server needs {error.name}: pip install 'foveate[serve]'."
        ) from error
    local = host in ("127.0.0.1", "::1", "localhost")
    if api_key is None and not local:
        note(f"whoever reaches {host} may ask: set FOVEATE_API_KEY to let in fewer.")
    names = tuple(name.lower() for name in allow_host or ())
    settings = Settings(
        batch=batch_size,
        queue=queue,
        tokens=max_tokens,
        prompt_tokens=max_prompt_tokens,
        images=max_images,
        image_bytes=max_image_bytes,
        pixels=max_pixels,
        body_bytes=max_body_bytes,
        memory=max_memory,
        connections=max_connections,
        remote_images=allow_remote_images,
        methods=tuple(method or ()),
        api_key=api_key,
        # a page of another site may have its name lead here, and then read the answers
        hosts=(*LOCAL, *names) if local and api_key is None else None,
        docs=docs,
        log=log,
    )
    opened = functools.partial(
        load, model, revision=revision, device=device, dtype=dtype, device_map=device_map,
        attn=attn, quantization=quantization,
    )  # fmt: skip
    if engine is Engine.RAY:
        if plugin:
            raise FoveateError(
                "Replicas do not see the file of --plugin: install it as a package with an entry "
                "point (foveate.methods), or leave out --engine ray."
            )
        from ..bridges.replicas import run_replicas

        run_replicas(opened, settings, host, port, replicas)
        return
    if replicas > 1:
        raise FoveateError("--replicas goes with --engine ray.")
    sock = bind(host, port)
    Server(opened(), settings).run(sockets=[sock])
