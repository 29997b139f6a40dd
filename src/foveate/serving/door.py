"""The door: connections, before and beside what a request says.

uvicorn waits for slow headers, lets in any number of connections, answers what is no HTTP with a
plain text, and takes a client that has sent all it wants to send for one that is gone. `Protocol`
does better. `Hosts` lets a page of another site not talk to a server on this machine by a name of
its own.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import wire

HEADER_SECONDS = 10.0  # for a request's head to arrive, from its first byte or the connection on
STALLED_SECONDS = 30.0  # that a client may take nothing of its answer
PROBE_SECONDS = 0.2  # between signs of life to a client that sends no more
LOCAL = ("localhost", "127.0.0.1", "[::1]")  # names of this machine
JSON = (b"content-type", b"application/json")


class Protocol(H11Protocol):
    """A connection.

    Attributes:
        most: connections that are served; more are told that the server is busy, and from twice as
            many on they are cut.
    """

    most = 512

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.late: asyncio.TimerHandle | None = None
        self.stalled: asyncio.TimerHandle | None = None
        self.probing: asyncio.TimerHandle | None = None
        if len(self.connections) > 2 * self.most:
            transport.abort()
            return
        if len(self.connections) > self.most:
            self.app = busy
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.late, self.stalled, self.probing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # -- a head that does not come -----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def _expect_head(self) -> None:
        """Start the clock while a head is awaited, and stop it once it is there."""
        if self.conn.their_state is not h11.IDLE:
            if self.late is not None:
                self.late.cancel()
                self.late = None
        elif self.late is None:
            self.late = self.loop.call_later(HEADER_SECONDS, self._come_late)

    def _come_late(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and not self.transport.is_closing():
            self._refuse(408, f"The request's head took more than {HEADER_SECONDS:g} seconds.")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.late is not None and self.timeout_keep_alive_task is not None:
            self.late.cancel()  # the next head has not begun: there is a clock for that
            self.late = None

    # -- what is no HTTP ---------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """Answer in OpenAI's words, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(wire.error_body(message, status)).encode()
            headers = [JSON, (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
            response = h11.Response(status_code=status, headers=headers)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    # -- a client that takes nothing ---------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled is not None:
            self.stalled.cancel()

    # -- a client that sends no more ---------------------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]
        """Stay open for the answer if the request is complete.

        A client that is gone altogether looks the same until something is written to it. So until
        the answer begins, it gets "100 Continue" now and then, which clients pass over.
        """
        waits = self.cycle is not None and not self.cycle.response_complete
        if not waits or self.cycle.more_body or self.conn.their_state is not h11.DONE:
            return False
        self.cycle.keep_alive = False
        self._probe()
        return True

    def _probe(self) -> None:
        if self.cycle.response_started or self.transport.is_closing():
            return
        if self.conn.their_http_version == b"1.0":  # which knows no such answers
            return
        sign = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        self.transport.write(self.conn.send(sign) or b"")
        self.probing = self.loop.call_later(PROBE_SECONDS, self._probe)


async def busy(scope: Any, receive: Any, send: Any) -> None:
    """An application that refuses everything."""
    await _send(send, wire.Busy(1))


class Hosts:
    """Refuses requests that name another host than these, in lower case and without a port."""

    def __init__(self, app: Any, names: tuple[str, ...]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name not in self.names:
                error = f"This server is {' or '.join(self.names)}, and not {name[:100]!r}: start "
                error += "it with --allow-host, or with a key."
                await _send(send, wire.Refusal(error, code="wrong_host"))
                return
        await self.app(scope, receive, send)


async def _send(send: Any, error: wire.Refusal) -> None:
    status, body, more = wire.error_answer(error)
    headers = [JSON, (b"connection", b"close")]
    headers += [(name.lower().encode(), value.encode()) for name, value in more.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
