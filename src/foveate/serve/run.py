"""The server in this process, with a stop that finishes what it holds."""

from __future__ import annotations

import threading
from types import FrameType
from typing import Any

import uvicorn

from ..vlm import VLM
from .app import create_app
from .queue import Worker
from .settings import Settings


class Server(uvicorn.Server):
    """Ends in two steps: the first signal refuses new requests until the worker has finished what
    it holds, then the server exits; a second one exits at once."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.worker.stopping:
            self.should_exit = self.force_exit = True
            return
        threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        self.worker.stop()
        self.worker.join()
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for sock in server.sockets:
                host, port = sock.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                print(f"foveate: {self.worker.vlm.name} at http://{host}:{port}/v1", flush=True)


def run(vlm: VLM, settings: Settings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM."""
    app = create_app(vlm, settings)
    config = uvicorn.Config(app, host, port, log_level="warning", access_log=False)
    Server(config, app.state.house.worker).run()
