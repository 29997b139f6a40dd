"""How many rows of an answer went through its methods: from the workers to the client.

`watch` counts in a worker, per step. The scheduler adds up, per request. The front end looks at the
sum of every answer: one without an edited row fails, the others carry it in `kv_transfer_params`,
and Prometheus counts it by the methods' names.

A row counts once, also where it was computed again. Rows of blocks that the prefix cache had are
not computed, and not counted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from .asked import KEY, acting
from .watch import Ranges

# -- in the engine's process -----------------------------------------------------------------------


def take_in(requests: dict[str, Any], step: dict[str, Ranges]) -> dict[str, dict[str, int]]:
    """Add what a step edited to its requests.

    Args:
        requests: of the scheduler, by id. step: request id -> what it edited.

    Returns:
        Request id -> method's name -> rows so far, for the requests of the step.
    """
    sums: dict[str, dict[str, int]] = {}
    for name, ranges in step.items():
        request = requests.get(name)
        if request is None:  # its client has gone
            continue
        kept = request.__dict__.setdefault("foveate", {})  # method -> rows, end of those counted
        for method, (first, end) in ranges.items():
            rows, counted = kept.get(method, (0, 0))
            kept[method] = rows + max(0, end - max(first, counted)), max(counted, end)
        sums[name] = {method: rows for method, (rows, _) in kept.items()}
    return sums


def attach(outputs: dict[int, Any], sums: dict[str, dict[str, int]]) -> None:
    """Send the rows of requests with what the step gave.

    Args:
        outputs: client -> `EngineCoreOutputs`. sums: what `take_in` returned.
    """
    for group in outputs.values():
        for one in group.outputs:
            if one.request_id in sums:
                one.kv_transfer_params = (one.kv_transfer_params or {}) | {
                    KEY: sums[one.request_id]
                }


# -- in the front end ------------------------------------------------------------------------------


@dataclass
class Answer:
    """An answer in the making.

    Attributes:
        methods: names. rows: of each, so far. several: those of all answers to the prompt, by
            their index.
    """

    methods: tuple[str, ...]
    several: dict[int, dict[str, int]]
    rows: dict[str, int] = field(default_factory=dict)

    def silent(self, over: bool) -> str:
        """Why the answer must not be given; "" where it may.

        Args:
            over: whether the answer is complete.
        """
        missing = [name for name in self.methods if name not in self.rows]
        if missing:
            return (
                f"{' and '.join(missing)} did not reach this answer, so it would be the plain "
                "model's: this vLLM runs in a way that foveate does not know. Use a version that "
                "foveate's documentation names."
            )
        idle = [name for name in self.methods if not self.rows[name]]
        if over and idle:
            return (
                f"{' and '.join(idle)} edited no row of this answer, so it would be the plain "
                f"model's: choose other parameters, or leave out {KEY}."
            )
        return ""


def begin(state: Any, text: str) -> None:
    """A request of methods begins; its front end's state remembers them."""
    names = tuple(method.name for method in acting(text))
    holder = state.parent_req or state
    state.foveate = Answer(names, holder.__dict__.setdefault("foveate_rows", {}))


def show(processor: Any, outputs: list[Any]) -> list[tuple[Any, Any]]:
    """Note the rows of every output, and put them where the client finds them.

    Returns:
        Outputs of requests with methods, and the states of their requests.
    """
    found = []
    for output in outputs:
        state = processor.request_states.get(output.request_id)
        answer = getattr(state, "foveate", None)
        if answer is None:
            continue
        found.append((output, state))
        params = output.kv_transfer_params or {}
        for name, rows in params.get(KEY, {}).items():
            _rows().labels(name).inc(rows - answer.rows.get(name, 0))
            answer.rows[name] = rows
        answer.several[state.request_index] = dict(answer.rows)
        count = state.parent_req.n if state.parent_req else 1
        rows = [answer.several.get(n, {}) for n in range(count)]
        output.kv_transfer_params = params | {KEY: rows}
    return found


def refuse_silent(processor: Any, found: list[tuple[Any, Any]], done: Any) -> None:
    """Fail every request whose methods edited nothing; after the outputs were processed.

    Args:
        found: see `show`. done: what became of the outputs; gets the requests to abort.

    Raises:
        RuntimeError: for a request of `LLM.generate`, which has no way to fail alone.
    """
    for output, state in found:
        if not output.new_token_ids:
            continue
        over = output.request_id not in processor.request_states
        sentence = state.foveate.silent(over)
        if not sentence:
            for name in state.foveate.methods if over else ():
                _answers().labels(name).inc()
            continue
        if state.queue is None:
            processor.abort_requests(list(processor.request_states), internal=True)
            raise RuntimeError(sentence)
        whole = state.parent_req.request_id if state.parent_req else output.request_id
        done.reqs_to_abort += processor.abort_requests([whole], internal=True)
        state.queue.put(_failure(sentence))


def _failure(sentence: str) -> Exception:
    from vllm.exceptions import GracefulHTTPError

    return GracefulHTTPError(sentence, HTTPStatus.INTERNAL_SERVER_ERROR)


async def told(stream: Any, seen: dict[int, Any], answers: int) -> AsyncIterator[str]:
    """The lines of a streamed response, those that end an answer with the rows of it.

    Args:
        seen: prompt -> the `kv_transfer_params` that came with its last output.
        answers: to each prompt.
    """
    async with aclosing(stream):
        async for line in stream:
            # quotes inside of a JSON text are escaped
            yield _with_rows(line, seen, answers) if '"finish_reason":"' in line else line


def _with_rows(line: str, seen: dict[int, Any], answers: int) -> str:
    chunk = json.loads(line.removeprefix("data: "))
    chunk["kv_transfer_params"] = seen.get(chunk["choices"][0]["index"] // answers)
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


async def seeing(results: Any, seen: dict[int, Any]) -> AsyncIterator[Any]:
    """The outputs of a request, or pairs of a prompt's number and its output; noted in `seen`."""
    async with aclosing(results):
        async for result in results:
            prompt, out = result if isinstance(result, tuple) else (0, result)
            seen[prompt] = out.kv_transfer_params
            yield result


@functools.cache
def _rows() -> Any:
    import prometheus_client

    what = "Rows of attention or logits that a method edited."
    return prometheus_client.Counter("foveate_rows_edited", what, ["method"])


@functools.cache
def _answers() -> Any:
    import prometheus_client

    what = "Answers that were given with a method."
    return prometheus_client.Counter("foveate_answers", what, ["method"])
