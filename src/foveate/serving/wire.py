"""OpenAI's wire format: what a request may say, refusals, and the shapes of the answers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from ..base import __version__
from ..base.errors import FoveateError
from .sampling import End, Piece, Token

FINGERPRINT = f"foveate-{__version__}"


# -- what the server allows ------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a server allows, and how it batches.

    Attributes:
        batch: requests that go through the model at a time.
        queue: requests that may wait. One more gets the status 429.
        tokens: most tokens of an answer, and the default.
        prompt_tokens: most tokens of a request's text, pictures not counted.
        images: most pictures of a request.
        image_bytes: most bytes of one encoded picture.
        pixels: most pixels of all pictures of a request together.
        body_bytes: most bytes of a request.
        memory: most bytes that requests hold together, of bodies and of decoded pictures.
        connections: most that are served at a time.
        seconds: time for a request to arrive, and for its remote pictures.
        remote_images: whether pictures are fetched from public addresses.
        methods: text forms of methods with parameters that the server sets and that may name
            files; a request gives only the name.
        api_key: the bearer token that clients must send; None lets everybody in.
        hosts: names that the server may be asked by; None = any.
        docs: whether the interface is described at ``/openapi.json``.
        log: whether every answer is told in a line on stderr.
    """

    batch: int = 16
    queue: int = 64
    tokens: int = 1024
    prompt_tokens: int = 4096
    images: int = 4
    image_bytes: int = 10_000_000
    pixels: int = 16_000_000
    body_bytes: int = 32_000_000
    memory: int = 1_000_000_000
    connections: int = 512
    seconds: float = 30.0
    remote_images: bool = False
    methods: tuple[str, ...] = ()
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    docs: bool = False
    log: bool = False


# -- what a request may say ------------------------------------------------------------------------


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    """Clients send answers back with all their fields. Only these two are used."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)] = []


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


def _as_stops(stop: Any) -> Any:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


def _neutral(*values: Any) -> Any:
    """A parameter that clients send by default, and that may only say what it says then."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            told = " or ".join(json.dumps(v) for v in values)
            raise PydanticCustomError("neutral", "the server can only do {told}", {"told": told})
        return value

    return Annotated[Any, AfterValidator(check)]


class Completion(Strict):
    """The body of ``POST /v1/chat/completions``.

    Decoding is greedy unless `temperature` says otherwise, as everywhere in foveate. `method` is
    foveate's own.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    method: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_as_stops), Field(max_length=4)] = []
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    n: Literal[1] | None = None
    presence_penalty: _neutral(0) = None  # type: ignore[valid-type]
    frequency_penalty: _neutral(0) = None  # type: ignore[valid-type]
    # what clients send by default, which changes nothing
    top_k: _neutral(-1, 0) = None  # type: ignore[valid-type]
    min_p: _neutral(0) = None  # type: ignore[valid-type]
    repetition_penalty: _neutral(1) = None  # type: ignore[valid-type]
    response_format: _neutral({"type": "text"}) = None  # type: ignore[valid-type]
    tools: _neutral([]) = None  # type: ignore[valid-type]
    tool_choice: _neutral("none", "auto") = None  # type: ignore[valid-type]
    parallel_tool_calls: _neutral(True, False) = None  # type: ignore[valid-type]
    logit_bias: _neutral({}) = None  # type: ignore[valid-type]
    modalities: _neutral(["text"]) = None  # type: ignore[valid-type]
    # accepted and not used
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# -- refusals --------------------------------------------------------------------------------------


class Refusal(FoveateError):
    """A request that cannot be answered.

    Args:
        param: the parameter with the mistake.
        status: of HTTP. code: OpenAI's name of the mistake.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
        self.headers: dict[str, str] = {}


class TooLarge(Refusal):
    def __init__(self, message: str) -> None:
        super().__init__(message, status=413)


class Gone(Refusal):
    """The client hung up: nobody reads this."""

    def __init__(self) -> None:
        super().__init__("The client went away.", status=499)


class Busy(Refusal):
    """The queue is full. seconds: when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(
            "The server is busy: try again in a moment.", status=429, code="queue_full"
        )
        self.seconds = seconds
        self.headers = {"Retry-After": str(seconds)}


class Failed(Refusal):
    """The model failed on a request."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=500)


class Stopping(Refusal):
    """The server takes no new requests."""

    def __init__(self) -> None:
        super().__init__("The server is stopping: ask another one.", status=503)


def error_answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error, as OpenAI writes them."""
    if isinstance(error, Refusal):
        body = error_body(str(error), error.status, error.param, error.code)
        return error.status, body, error.headers
    if isinstance(error, FoveateError):
        return 400, error_body(str(error), 400), {}
    if isinstance(error, HTTPException):  # no such path, and the like
        body = error_body(f"{error.detail}.", error.status_code)
        return error.status_code, body, dict(error.headers or {})
    return 500, error_body("The server failed on this request; its log says why.", 500), {}


def told(error: ValidationError) -> tuple[str, str | None]:
    """The first mistake in a body, as one sentence, and the parameter that it is about."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return f"The server does not know the parameter {where}: leave it out.", where
    if where is None:
        return f"The body is not a JSON object of this format: {first['msg']}.", None
    return f"The parameter {where} cannot be used: {first['msg']}.", where


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Any:
    """The body of an answer with an error `status`."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# -- answers ---------------------------------------------------------------------------------------


def usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


def _logprobs(tokens: tuple[Token, ...]) -> dict[str, Any]:
    content = [_token(t) | {"top_logprobs": [_token(other) for other in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def _token(token: Token) -> dict[str, Any]:
    whole = "\ufffd" not in token.text  # a token may hold a part of a character
    data = list(token.text.encode()) if whole else None
    return {"token": token.text, "logprob": max(token.logprob, -9999.0), "bytes": data}


class Writer:
    """Writes the answer to `asked`. method: the text form of the methods that gave it."""

    def __init__(self, id: str, asked: Completion, method: str) -> None:
        self.head = {
            "id": id,
            "created": int(time.time()),
            "model": asked.model,
            "method": method,
            "system_fingerprint": FINGERPRINT,
        }
        self.logprobs = bool(asked.logprobs)
        self.usage = asked.stream_options is not None and asked.stream_options.include_usage

    def completion(self, events: list[Piece | End]) -> dict[str, Any]:
        """The whole answer: its pieces, then its end."""
        pieces = [event for event in events if isinstance(event, Piece)]
        end = next(event for event in events if isinstance(event, End))
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        text = "".join(piece.text for piece in pieces)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _logprobs(tokens) if self.logprobs else None,
            "finish_reason": end.reason,
        }
        return {"object": "chat.completion", **self.head, "choices": [choice], "usage": usage(end)}

    def begin(self) -> dict[str, Any]:
        """The first chunk of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = _logprobs(piece.tokens) if self.logprobs else None
        return self._chunk({"content": piece.text}, logprobs=logprobs)

    def end(self, end: End) -> list[dict[str, Any]]:
        """The last chunks: why it ended and, if asked for, what was used."""
        last = [self._chunk({}, finish_reason=end.reason)]
        if self.usage:
            last.append(self._chunk(None) | {"usage": usage(end)})
        return last

    def _chunk(self, delta: dict[str, str] | None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} | more
        chunk = {
            "object": "chat.completion.chunk",
            **self.head,
            "choices": [] if delta is None else [choice],
        }
        return chunk | {"usage": None} if self.usage else chunk
