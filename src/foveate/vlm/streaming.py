"""An answer piece by piece, while a thread of its own writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from transformers import StoppingCriteriaList, TextIteratorStreamer

from .watch import Stop


def pieces(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    options: dict[str, Any],
    using: Callable[[], AbstractContextManager[Any]],
) -> Iterator[str]:
    """The text that `model.generate(**inputs, **options)` writes inside `using()`.

    An error of the model is raised here. Leaving early stops the model and waits for its end.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = Stop()
    criteria = StoppingCriteriaList([*options.get("stopping_criteria", []), stop])
    options = {**options, "streamer": streamer, "stopping_criteria": criteria}
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with using():
                model.generate(**inputs, **options)
        except BaseException as error:  # handed to whoever iterates
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, name="foveate-stream", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.now = True
        thread.join()
    if failures:
        raise failures[0]
