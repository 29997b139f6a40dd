"""The server in this process, with a stop that finishes what it holds."""

from __future__ import annotations

import socket
import threading
from types import FrameType
from typing import Any

import uvicorn

from ..base.errors import FoveateError
from ..vlm.vlm import VLM
from .app import create_app
from .queue import Worker
from .settings import Settings


class Server(uvicorn.Server):
    """Ends in two steps: the first signal refuses new requests until the worker has finished what
    it holds, then the server exits; a second one exits at once."""

    def __init__(self, vlm: VLM, settings: Settings) -> None:
        app = create_app(vlm, settings)
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False))
        self.worker: Worker = app.state.service.worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.worker.stopping:
            self.should_exit = self.force_exit = True
        else:
            threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        self.worker.stop()
        self.worker.join()
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for sock in sockets:
            host, port = sock.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"foveate: {self.worker.vlm.name} at http://{host}:{port}/v1", flush=True)


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, before anything that takes long.

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
