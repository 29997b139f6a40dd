"""What looking again costs: seconds per question, beside the plain answer and the published way.

`benchmarks/speed.py --look` measures with this.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from report import Kind, Table, ratio, spread, timed  # beside this file

from foveate import VLM
from foveate.core.method import Method, parse
from foveate.scenes import world
from foveate.vlm.chat import Chat
from foveate.vlm.look import GENERAL, SHORT

ABOUT = """\
Seconds for one question about a new picture, 16 answer tokens, by methods that look before they
answer. Everything is measured in turn on the same picture; ratios are medians over these turns,
with their quartiles.

* plain: the answer alone.
* method: its reading passes (question and general instruction or empty question on one prefix,
  with a KV cache, only the last row's attention kept), its picture, and the answer about that.
* published: the same reading done as published code does, with full attention maps
  (`output_attentions`, eager) and without a cache, so that the whole sequence, picture included,
  is run again for every token that is read; then the answer about the method's picture, as above.
  RITUAL reads nothing: there the two differ by the change of the picture alone.
* tokens read: per reading pass.
"""
COLUMNS = [
    *("", "passes", "tokens read", "plain, s", "method, s", "published, s"),
    *("method / plain", "published / method"),
]
METHODS = ("vicrop", "carve(steps=16)", "laser(vat=never)", "laser", "agla", "ritual")
TOKENS = 16
QUESTION = "is there a red car left of the large house?"


def measure(vlm: VLM, names: list[str], repetitions: int) -> dict[str, Any]:
    """Seconds of the plain answer, the method's and the published way's, per repetition."""
    rows: dict[str, Any] = {name: {"turns": [], "read": steps(parse(name)[0])} for name in names}
    for repetition in range(-1, repetitions):  # the first one warms up
        for number, name in enumerate(names):
            stack, tokens = parse(name), TOKENS if repetition >= 0 else 2
            seed = max(0, repetition) * len(names) + number
            chat = vlm.chat([world.draw(world.sample(seed))], QUESTION, None)
            alone, _ = timed(vlm.model, partial(vlm.answer, [chat], (), tokens))
            ours, chats = timed(vlm.model, partial(method, vlm, chat, stack, tokens))
            way = partial(published, vlm, chat, chats, stack, tokens)
            theirs, _ = timed(vlm.model, way)
            if repetition >= 0:
                rows[name]["turns"].append((alone, ours, theirs))
    return rows


def method(vlm: VLM, chat: Chat, stack: tuple[Method, ...], tokens: int) -> list[Chat]:
    """Look, then answer; the chats that were answered."""
    chats = vlm.rewrite([chat], stack)
    vlm.answer(chats, stack, tokens)
    return chats


def published(
    vlm: VLM, chat: Chat, chats: list[Chat], stack: tuple[Method, ...], tokens: int
) -> None:
    """Read as published code does, then answer about the method's picture."""
    for text in (chat.text + SHORT, GENERAL + SHORT) * stack[0].looks_again:
        read_again(vlm, Chat(chat.images, text), min(tokens, steps(stack[0])))
    vlm.answer(chats, stack, tokens)


def steps(method: Method) -> int:
    """Tokens that a reading pass of the method writes."""
    return getattr(method, "steps", 1)


def read_again(vlm: VLM, chat: Chat, tokens: int) -> list[torch.Tensor]:
    """Full attention maps of every layer for every token, each from the whole sequence again."""
    inputs, kept = dict(vlm.inputs([chat])), []
    before = vlm.model.get_decoder().config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    try:
        for _ in range(tokens):
            with torch.no_grad():
                out = vlm.model(**inputs, use_cache=False, output_attentions=True)
            kept.append(torch.stack([maps[0, :, -1].mean(0) for maps in out.attentions]))
            token = out.logits[:, -1:].argmax(-1)
            for name, value in (("input_ids", token), ("attention_mask", torch.ones_like(token))):
                inputs[name] = torch.cat([inputs[name], value], 1)
    finally:
        vlm.model.set_attn_implementation(before)
    return kept


def figures(rows: dict[str, Any]) -> dict[str, Any]:
    """Median seconds, and the ratios within turns."""
    costs = {}
    for name, samples in rows.items():
        turns = samples["turns"]
        columns = zip(("plain", "method", "published"), zip(*turns, strict=True), strict=True)
        costs[name] = {
            **{way: spread(list(seconds))["median"] for way, seconds in columns},
            "over plain": spread([b / a for a, b, _ in turns]),
            "published over method": spread([c / b for _, b, c in turns]),
            "read": samples["read"],
            "passes": type(parse(name)[0]).passes,
        }
    return costs


def tables(sizes: dict[str, Any]) -> Iterator[Table]:
    """A table per size."""
    for size, entry in sizes.items():
        cells = []
        for name, row in entry["figures"].items():
            seconds = [f"{row[way]:.3g}" for way in ("plain", "method", "published")]
            ratios = [ratio(row[key]) for key in ("over plain", "published over method")]
            cells.append([name, row["passes"], str(row["read"]), *seconds, *ratios])
        yield f"{size}: {entry['note']}", COLUMNS, cells


KIND = Kind("looks", ABOUT, tables)
