"""What micro-batching brings: requests per second of the server, many clients, in one run.

    python benchmarks/serve.py                                   # pocket and 0.5b
    python benchmarks/serve.py --sizes pocket --method clvs --clients 16 --tokens 32

The same model is served twice, with a batch of 1 and with a batch of so many clients, and both are
asked in turn by clients that all send one request, about a picture each, at the same moment: from
the first request sent to the last answer heard. The clients run in the same process.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import io
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import report
import torch
import uvicorn
from subjects import VLMS

from foveate import VLM
from foveate.scenes import world
from foveate.serving.app import create_app
from foveate.serving.wire import Settings

ASKED = "Please describe this image in detail."
ABOUT = """\
Requests per second that clients get from `foveate serve`, all of them asking at the same moment.

* one at a time: `--batch-size 1`. together: as many as there are clients.
* ratio: of the two, measured in turn in one run; median over these pairs, with its quartiles.
* "same" counts requests that were answered alike both ways.

Reading a picture and a prompt of hundreds of tokens keeps a core busy by itself, so there a batch
gains little on a CPU. A decode step reads all weights, and pays what every call of PyTorch costs,
once for all rows of a batch: there is the gain, and it grows with the length of the answers.
PyTorch has one thread here: where others work on the machine, each operation on several threads
waits for the slowest of them.
"""


@contextlib.contextmanager
def served(vlm: VLM, batch: int) -> Iterator[str]:
    """The model at an address, until the block ends."""
    app = create_app(vlm, Settings(batch=batch, queue=1024))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def picture(number: int) -> str:
    stream = io.BytesIO()
    world.draw(world.sample(number)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def ask(url: str, pictures: list[str], method: str, tokens: int) -> tuple[float, list[str]]:
    """Seconds until all clients have their answers, and the answers."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600)
    id = client.models.list().data[0].id

    def one(uri: str) -> str:
        parts = [{"type": "text", "text": ASKED}, {"type": "image_url", "image_url": {"url": uri}}]
        answer = client.chat.completions.create(
            model=id,
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
            max_tokens=tokens,
            extra_body={"method": method},
        )
        return answer.choices[0].message.content or ""

    with client, ThreadPoolExecutor(len(pictures)) as pool:
        start = time.perf_counter()
        answers = list(pool.map(one, pictures))
        return time.perf_counter() - start, answers


def measured(args: argparse.Namespace, size: str, say: report.Say) -> dict[str, Any]:
    """Pairs of seconds, one at a time and together, and how many answers were the same."""
    vlm = VLMS[size](args.device, torch.float32)
    say(f"{size} ...")
    pairs, same = [], 0
    with served(vlm, 1) as alone, served(vlm, args.clients) as together:
        for url in (alone, together):  # warm up
            ask(url, [picture(0)], args.method, 2)
        for repetition in range(args.repetitions):
            first = 1 + repetition * args.clients
            pictures = [picture(first + i) for i in range(args.clients)]
            one, said = ask(alone, pictures, args.method, args.tokens)
            other, answered = ask(together, pictures, args.method, args.tokens)
            pairs.append((one, other))
            same += sum(a == b for a, b in zip(said, answered, strict=True))
    asked = len(pairs) * args.clients
    note = (
        f"{report.size_of(vlm.model)}, {report.dtype_of(vlm.model)}, {args.clients} clients, "
        f"answers of up to {args.tokens} tokens"
    )
    figures = {
        "alone": asked / sum(one for one, _ in pairs),
        "together": asked / sum(other for _, other in pairs),
        "ratio": report.spread([one / other for one, other in pairs]),
        "same": same / asked,
    }
    return {"note": note, "figures": {args.method: figures}, "samples": {"pairs": pairs}}


def tables(sizes: dict[str, Any]) -> Iterator[report.Table]:
    """A table per size."""
    columns = ["", "one at a time, requests/s", "together, requests/s", "ratio", "same"]
    for size, entry in sizes.items():
        cells = []
        for name, row in entry["figures"].items():
            rates = [f"{row[way]:.3g}" for way in ("alone", "together")]
            cells.append([name, *rates, report.ratio(row["ratio"], 2), f"{row['same']:.0%}"])
        yield f"{size}: {entry['note']}", columns, cells


KIND = report.Kind("serve", ABOUT, tables)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The server with and without micro-batches.")
    parser.add_argument("--sizes", default="pocket,0.5b", help="of speed.py's, by commas")
    parser.add_argument("--method", default="vanilla")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; more need idle cores")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve-cpu"))
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    torch.set_num_threads(args.threads)
    known = functools.partial(measured, args)
    return report.run(KIND, args.sizes.split(","), known, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
