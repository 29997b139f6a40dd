"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a server allows, and how it batches.

    Attributes:
        batch: requests that go through the model at a time.
        queue: requests that may wait; one more is answered 429.
        tokens: most tokens of an answer; what a request that says nothing gets.
        prompt_tokens: most tokens of a request's text, pictures not counted.
        images: most pictures of a request.
        image_bytes: most bytes of one encoded picture.
        pixels: most pixels of all pictures of a request together.
        body_bytes: most bytes of a request.
        seconds: for a request to arrive, and for a remote picture to be fetched.
        remote_images: whether pictures are fetched from public addresses.
        methods: text forms of methods with parameters of the server's own, which may name files;
            a request asks for them by name alone.
        api_key: what clients must send as a bearer token; None lets everybody in.
    """

    batch: int = 16
    queue: int = 64
    tokens: int = 1024
    prompt_tokens: int = 4096
    images: int = 4
    image_bytes: int = 10_000_000
    pixels: int = 16_000_000
    body_bytes: int = 32_000_000
    seconds: float = 30.0
    remote_images: bool = False
    methods: tuple[str, ...] = ()
    api_key: str | None = None
