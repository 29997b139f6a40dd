"""What a client is refused with: a status and one sentence."""

from __future__ import annotations

from typing import Any, ClassVar

from starlette.exceptions import HTTPException

from ..base.errors import FoveateError
from . import wire


class Refusal(FoveateError):
    """A request that cannot be answered. param: the parameter that is to blame."""

    status: ClassVar[int] = 400
    code: ClassVar[str | None] = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        return {}


class Unauthorised(Refusal):
    status, code = 401, "invalid_api_key"


class UnknownModel(Refusal):
    status, code = 404, "model_not_found"


class TooSlow(Refusal):
    status = 408


class TooLarge(Refusal):
    status = 413


class WrongType(Refusal):
    status = 415


class Gone(Refusal):
    """The client hung up; nobody reads this."""

    status = 499

    def __init__(self) -> None:
        super().__init__("The client went away.")


class Busy(Refusal):
    """The queue is full. seconds: after which to try again."""

    status, code = 429, "queue_full"

    def __init__(self, seconds: int) -> None:
        super().__init__("The server is busy: try again in a moment.")
        self.seconds = seconds

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.seconds)}


class Failed(Refusal):
    """The model failed on a request."""

    status = 500


class Stopping(Refusal):
    """The server takes no new requests."""

    status = 503

    def __init__(self) -> None:
        super().__init__("The server is stopping: ask another one.")


def answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error, as OpenAI writes it."""
    if isinstance(error, Refusal):
        body = wire.error(str(error), error.status, error.param, error.code)
        return error.status, body, error.headers
    if isinstance(error, FoveateError):
        return 400, wire.error(str(error), 400), {}
    if isinstance(error, HTTPException):  # no such path, and the like
        body = wire.error(f"{error.detail}.", error.status_code)
        return error.status_code, body, dict(error.headers or {})
    return 500, wire.error("The server failed on this request; its log says why.", 500), {}
