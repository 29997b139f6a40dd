"""vLLM's processes end with the program that started them, also where that was killed."""

from __future__ import annotations

import os
import shutil
import threading
import time

from .reading import FOLDER

FRONT = "FOVEATE_VLLM_FRONT"  # in the environment: the program's process id
_EVERY = 1.0  # seconds between looks at the parent


def follow() -> None:
    """In a process of an engine that `Engine` started: end when its parent has ended."""
    front = os.environ.get(FRONT)
    if front and int(front) != os.getpid():
        threading.Thread(target=_wait, args=(os.getppid(),), daemon=True).start()


def _wait(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_EVERY)
    shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    os._exit(1)
