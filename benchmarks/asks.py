"""Questions per second on a shared prefix, beside the loop of published code.

`benchmarks/speed.py --eval` measures with this.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from report import Kind, Table, ratio, spread, timed  # beside this file

from foveate import VLM
from foveate.core.method import parse
from foveate.scenes import world
from foveate.vlm.prefix import ask_together, prepare

ABOUT = """\
Questions per second of an evaluation: 14 questions of 20 tokens per image, one answer token.

* loop: what published code does, question by question: processor, `generate`, decoding.
* shared: the image's processor, vision tower and prefix once, the questions as one batch on forks
  of its KV cache (`foveate.vlm.prefix`), as `foveate eval` asks.

Both are measured in turn on the same new picture, with the method active in both; the ratio is the
median over these pairs, with its quartiles. "same" counts equal answers. Nothing is prepared in the
background here, which `foveate eval` does.
"""
METHODS = ("vanilla", "clvs", "vcd", "pai")
QUESTIONS, LENGTH = 14, 20
WORDS = (
    "is there a red blue green yellow car tree house left right above below the small large cat dog"
)


def measure(vlm: VLM, names: list[str], repetitions: int) -> dict[str, Any]:
    """Seconds per image of the loop and of the shared prefix, per method and repetition."""
    rows: dict[str, Any] = {name: {"pairs": [], "same": 0} for name in names}
    words = WORDS.split()[: LENGTH - 2]  # the mark and the answer's opening are tokens, too
    texts = [" ".join(words[i:] + words[:i]) + "?" for i in range(QUESTIONS)]
    for repetition in range(-1, repetitions):  # the first one warms up
        for name in names:
            images = [world.draw(world.sample(max(0, repetition)))]
            asked = texts if repetition >= 0 else texts[:2]
            chats = [vlm.chat(images, text, None) for text in asked]
            for chat in chats:
                chat.images = images
            stack = parse(name)
            loop, apart = timed(vlm.model, lambda: one_by_one(vlm, chats, stack))  # noqa: B023
            shared, batched = timed(vlm.model, lambda: together(vlm, chats, stack))  # noqa: B023
            if repetition >= 0:
                rows[name]["pairs"].append((loop, shared))
                rows[name]["same"] += sum(a == b for a, b in zip(apart, batched, strict=True))
    return rows


def one_by_one(vlm: VLM, chats: list[Any], stack: Any) -> list[str]:
    """The loop of published code: one question, one generate."""
    answers = []
    with vlm.using(stack):
        for chat in chats:
            inputs = vlm.inputs([chat])
            ids = vlm.model.generate(
                **inputs, do_sample=False, max_new_tokens=1, pad_token_id=vlm.tokenizer.pad_token_id
            )
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers += vlm.tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def together(vlm: VLM, chats: list[Any], stack: Any) -> list[str]:
    """The same questions on a shared prefix."""
    prompts = prepare(vlm, chats)
    assert prompts is not None
    assert {len(suffix) for suffix in prompts.suffixes} == {LENGTH}
    return [answer.text for answer in ask_together(vlm, prompts, stack, 1)]


def figures(rows: dict[str, Any]) -> dict[str, Any]:
    """Questions per second of both ways, and the ratio within pairs."""
    rates = {}
    for name, samples in rows.items():
        loop, shared = zip(*samples["pairs"], strict=True)
        rates[name] = {
            "loop": QUESTIONS / statistics.median(loop),
            "shared": QUESTIONS / statistics.median(shared),
            "ratio": spread([a / b for a, b in samples["pairs"]]),
            "same": samples["same"] / (QUESTIONS * len(loop)),
        }
    return rates


def tables(sizes: dict[str, Any]) -> Iterator[Table]:
    """A table per size."""
    columns = ["", "loop, questions/s", "shared, questions/s", "shared / loop", "same"]
    for size, entry in sizes.items():
        cells = []
        for name, row in entry["figures"].items():
            rates = [f"{row[way]:.3g}" for way in ("loop", "shared")]
            cells.append([name, *rates, ratio(row["ratio"]), f"{row['same']:.0%}"])
        yield f"{size}: {entry['note']}", columns, cells


KIND = Kind("questions", ABOUT, tables)
