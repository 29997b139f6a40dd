"""Many questions about one image: the image is read once, and its KV cache is shared.

    answers = ask_together(vlm, prepare(vlm, chats), methods, max_new_tokens=16)

`prefill` fills what the prompts have in common: the system text and the image. The cache is forked,
and the rest of every prompt goes through the model as one row of a left-padded batch. In a causal
model this changes nothing: the answers are those of asking one by one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from ..backends.transformers.anatomy import anatomy
from ..backends.transformers.cache import repeat_rows
from ..backends.transformers.compat import kept_positions, passing, reads_both_ways
from ..backends.transformers.enhance import prefill
from ..backends.transformers.record import Recorder
from ..core.method import Method
from ..core.visual import visual_token_ids
from .chat import Answer, Chat
from .vlm import VLM
from .watch import Probabilities

# settings of a checkpoint that only `generate` applies, and their idle values
PROCESSORS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("no_repeat_ngram_size", (None, 0)),
    ("encoder_repetition_penalty", (None, 1.0)),
    ("bad_words_ids", (None,)),
    ("min_length", (None, 0)),
    ("min_new_tokens", (None, 0)),
    ("forced_bos_token_id", (None,)),
    ("forced_eos_token_id", (None,)),
    ("suppress_tokens", (None, [])),
    ("begin_suppress_tokens", (None, [])),
    ("sequence_bias", (None,)),
    ("guidance_scale", (None, 1.0)),
    ("num_beams", (None, 1)),
)


@dataclass
class Prompts:
    """Questions about the same images, ready for the model.

    Attributes:
        prefix: model inputs (1, P) of what the prompts share, pixels included.
        suffixes: token ids of the rest of each prompt, none empty.
        seconds: how long preparing took.
    """

    chats: list[Chat]
    prefix: dict[str, Any]
    suffixes: list[list[int]]
    seconds: float


def prepare(vlm: VLM, chats: list[Chat], methods: tuple[Method, ...] = ()) -> Prompts | None:
    """Chats about the same images as a shared prefix and suffixes.

    None where each needs a prompt of its own: a lone chat, chats without images or about several,
    a model that reads prompts in both directions, methods or settings of the checkpoint that rule
    it out (`shares_prefix`, `PROCESSORS`) or that need `generate` (a search), prompts that differ
    before the image, second streams of other pictures each or of other text, a processor whose
    tokens cannot be told apart.
    """
    if len(chats) < 2 or not same_images(chats) or reads_both_ways(vlm.model):
        return None
    if any(isinstance(chat.contrast, Chat) for chat in chats):
        return None
    if len({tuple(map(id, cast(Any, chat.contrast) or ())) for chat in chats}) > 1:
        return None
    config = vlm.model.generation_config
    if any(method.wants("search") for method in methods):
        return None
    if not all(method.shares_prefix for method in methods) or not all(
        getattr(config, name, None) in idle for name, idle in PROCESSORS
    ):
        return None
    start = time.perf_counter()
    inputs: dict[str, Any] = dict(vlm.processed(chats[0]))
    whole = inputs["input_ids"][0].tolist()
    texts = [vlm.prompt(chat) for chat in chats]
    bos = vlm.tokenizer.bos_token
    special = not (bos and texts[0].startswith(bos))
    with vlm.tokenizing:
        written = vlm.tokenizer(texts, add_special_tokens=special)["input_ids"]
    marks = _marks(vlm)
    ends = [max((i for i, t in enumerate(ids) if t in marks), default=-1) + 1 for ids in written]
    heads = [ids[:end] for ids, end in zip(written, ends, strict=True)]
    tails = [ids[end:] for ids, end in zip(written, ends, strict=True)]
    if not ends[0] or any(head != heads[0] for head in heads):
        return None
    if min(map(len, tails)) < 1 or whole[-len(tails[0]) :] != tails[0]:
        return None
    border = whole[-len(tails[0]) - 1]  # behind it text is cut into tokens as behind the mark
    if border not in marks and border not in vlm.tokenizer.added_tokens_decoder:
        return None
    common = 0
    while common < min(map(len, tails)) - 1 and len({tail[common] for tail in tails}) == 1:
        common += 1
    length = len(whole) - len(tails[0]) + common
    shape = inputs["input_ids"].shape
    per_token = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.shape == shape]
    prefix = {k: v[:, :length] if k in per_token else v for k, v in inputs.items()}
    seconds = time.perf_counter() - start
    return Prompts(chats, prefix, [tail[common:] for tail in tails], seconds)


def _marks(vlm: VLM) -> set[int]:
    """Tokens that stand for an image in a prompt's text: visual ones, or Gemma's start of image."""
    marks = set(visual_token_ids(vlm.model.config))
    mark = vlm.tokenizer.get_vocab().get(getattr(vlm.processor, "image_token", None))
    return marks if mark is None else marks | {mark}


def same_images(chats: Sequence[Chat]) -> bool:
    """Whether all chats are about the same images, and there are some."""
    images = list(map(id, chats[0].images))
    return bool(images) and all(list(map(id, chat.images)) == images for chat in chats)


def ask_together(
    vlm: VLM,
    prompts: Prompts,
    methods: tuple[Method, ...] = (),
    max_new_tokens: int = 16,
    batch_size: int = 64,
) -> list[Answer]:
    """Greedy answers to all prompts, in their order.

    Args:
        batch_size: how many questions go through the model at a time.
    """
    start = time.perf_counter()
    answers: dict[int, Answer] = {}
    recorded = any(isinstance(method, Recorder) for method in methods)
    shared = replace(prompts.chats[0], notes={})
    with torch.no_grad(), vlm.using(methods, [shared] if shared.contrast else ()):
        cache = prefill(vlm.model, prompts.prefix)
        first = next_position(vlm.model, cache)
        batches = list(_batches(vlm, prompts, batch_size))
        for number, rows in enumerate(batches):
            fork = cache if number == len(batches) - 1 else copy.deepcopy(cache)
            repeat_rows(fork, len(rows))
            began = start if number == 0 else time.perf_counter()
            written, watch, ends = _generate(vlm, prompts, rows, fork, first, max_new_tokens)
            timings = {
                "prepare": prompts.seconds * len(rows) / len(prompts.chats),
                "generate": time.perf_counter() - began,
            }
            chats = [prompts.chats[row] for row in rows]
            record = Recorder.read(fork) if recorded else None
            batch = vlm.answers(chats, written, watch, ends, timings, record)
            answers |= dict(zip(rows, batch, strict=True))
    return [answers[row] for row in range(len(prompts.chats))]


def next_position(model: Any, cache: Any) -> Tensor:
    """The position (1, 1) or, under M-RoPE, (3, 1, 1) after the prefix just filled."""
    position = torch.tensor([[cache.get_seq_length()]], device=model.device)
    deltas = kept_positions(model)
    if deltas is None:
        return position
    return (position + deltas[:1]).expand(3, 1, 1)  # an image counts as its longer side


def suffix_batch(
    prefix: dict[str, Any], suffixes: list[list[int]], first: Tensor, filler: int = 0
) -> dict[str, Tensor]:
    """Model inputs of suffixes on the forked cache of a prefix.

    Padding lies between prefix and suffix, and the mask says so.

    Args:
        prefix: the prefix's own model inputs, one row.
        suffixes: token ids, none empty. first: from `next_position`. filler: the padding token.
    """
    ids = prefix["input_ids"]
    width = max(map(len, suffixes))
    rows = [[filler] * (width - len(s)) + s for s in suffixes]
    real = [[0] * (width - len(s)) + [1] * len(s) for s in suffixes]
    tokens, mask = torch.tensor(rows, device=ids.device), torch.tensor(real, device=ids.device)
    before = prefix["attention_mask"].expand(len(suffixes), -1)
    extras = {
        name: torch.zeros_like(tokens)
        for name, value in prefix.items()
        if isinstance(value, Tensor) and value.shape == ids.shape
    }
    return extras | {
        "input_ids": tokens,
        "attention_mask": torch.cat([before, mask], 1),
        "position_ids": first + (mask.cumsum(1) - 1).clamp(min=0),
    }


def _batches(vlm: VLM, prompts: Prompts, size: int) -> Iterator[list[int]]:
    """Rows that go through the model together, in parts of equal size.

    A sliding window counts the padding between prefix and question, so a model with such layers
    gets questions of equal length only.
    """
    depth = vlm.model.get_decoder().config.num_hidden_layers
    sliding = len(anatomy(vlm.model).full_layers) < depth
    groups: dict[int, list[int]] = {}
    for row, suffix in enumerate(prompts.suffixes):
        groups.setdefault(len(suffix) if sliding else 0, []).append(row)
    for group in groups.values():
        parts = -(-len(group) // size)
        yield from (group[part::parts] for part in range(parts))


def _generate(
    vlm: VLM, prompts: Prompts, rows: list[int], cache: Any, first: Tensor, limit: int
) -> tuple[Tensor, Probabilities, list[int]]:
    """Greedy decoding of some suffixes on a forked cache: ids (B, tokens), scores, end tokens."""
    config, filler = vlm.model.generation_config, int(vlm.tokenizer.pad_token_id)
    ends = config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    inputs = suffix_batch(prompts.prefix, [prompts.suffixes[r] for r in rows], first, filler)
    seen: Any = torch.cat(
        [prompts.prefix["input_ids"].expand(len(rows), -1), inputs["input_ids"]], 1
    )
    stop = torch.tensor([e for e in ends if e is not None], device=seen.device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=seen.device)
    watch = Probabilities()
    processors = LogitsProcessorList([watch])
    if config.repetition_penalty not in (None, 1.0):
        processors.insert(0, RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    written: list[Tensor] = []
    while True:
        given = inputs | passing(vlm.model, cache)
        out = vlm.model(**given, use_cache=True, logits_to_keep=1)
        scores: Any = out.logits[:, -1].float()
        token = torch.where(done, filler, processors(seen, scores).argmax(-1))
        written.append(token)
        done = done | torch.isin(token, stop)
        if len(written) == limit or bool(done.all()):
            return torch.stack(written, 1), watch, ends
        step = {k: torch.zeros_like(token[:, None]) for k in inputs}
        step["input_ids"] = token[:, None]
        step["attention_mask"] = pad(inputs["attention_mask"], (0, 1), value=1)
        step["position_ids"] = inputs["position_ids"][..., -1:] + 1
        inputs, seen = step, torch.cat([seen, token[:, None]], 1)
