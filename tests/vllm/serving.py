"""vLLM's OpenAI server in a process of its own, and clients of it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vllm import answers


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: its address. process: its front end. log: what all its processes print.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def processes(self, title: str) -> list[int]:
        """The ids of those among it and its children whose title begins so."""
        found, todo = [], [self.process.pid]
        while todo:
            pid = todo.pop()
            with contextlib.suppress(OSError):  # it has ended
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                    found.append(pid)
                for task in Path(f"/proc/{pid}/task").iterdir():
                    todo += map(int, (task / "children").read_text().split())
        return found


@contextlib.contextmanager
def serving(model: str, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """A server of a model, ready to answer; ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--served-model-name", "pocket", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--max-num-seqs", "16", "--kv-cache-memory-bytes", str(2**28), *options]
    given = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    with log.open("w") as out:
        process = subprocess.Popen(command, env=given, stdout=out, stderr=out)
        try:
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            yield Server(f"http://127.0.0.1:{port}", process, log)
        finally:
            process.terminate()
            process.wait(60)


def body_of(request: dict[str, Any], **changed: Any) -> bytes:
    """The body of a chat completion."""
    picture = base64.b64encode(Path(request["images"][0]).read_bytes()).decode()
    question = request["prompt"].split("\n", 1)[1].removesuffix(" ASSISTANT:")
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": "pocket",
        "temperature": 0,
        "max_tokens": answers.STEPS,
        "logprobs": True,
        "ignore_eos": True,
        "return_token_ids": True,
        "add_special_tokens": True,
        "messages": [{"role": "user", "content": content}],
    }
    if request["method"]:
        body["vllm_xargs"] = {"foveate": request["method"]}
    return json.dumps(body | changed).encode()


def asking(url: str, body: bytes) -> urllib.request.Request:
    return urllib.request.Request(
        f"{url}/v1/chat/completions", body, {"content-type": "application/json"}
    )


def post(url: str, request: dict[str, Any], **changed: Any) -> tuple[int, dict[str, Any]]:
    """Status and body of a chat completion."""
    try:
        with urllib.request.urlopen(asking(url, body_of(request, **changed)), timeout=300) as got:
            return got.status, json.load(got)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def stream(
    url: str,
    request: dict[str, Any],
    leave_after: float = float("inf"),
    heard: list[int] | None = None,
    **changed: Any,
) -> tuple[list[int], bool]:
    """Tokens of a streamed answer, and whether it came to its end.

    Args:
        leave_after: the client hangs up after so many tokens. heard: gets every token as it comes.
    """
    body = body_of(request, stream=True, **changed)
    tokens: list[int] = []
    with urllib.request.urlopen(asking(url, body), timeout=300) as lines:
        for line in lines:
            text = line.removeprefix(b"data: ").strip()
            if text == b"[DONE]":
                return tokens, True
            if not text:
                continue
            chunk = json.loads(text)
            for choice in chunk.get("choices", ()):
                tokens += choice.get("token_ids") or ()
                if heard is not None:
                    heard += choice.get("token_ids") or ()
            if "error" in chunk or len(tokens) >= leave_after:
                return tokens, False
    return tokens, False
