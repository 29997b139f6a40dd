"""Many questions about one picture in one sequence: their attention, and the loss of the answers.

A mask over all pairs of tokens would do. But a question sees only the shared start and itself, so
questions are cut into chunks that see the start, the chunk before and their own. Plain products,
because the CPU's fused kernel takes longer to differentiate when heads are this small.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.transformers import compat, compat_parts
from ..scenes import lessons
from ..scenes.questions import Question
from .tower import autocast

PACKED = "pocket_packed"  # "foveate_..." are stacks of methods
CHUNK = lessons.CHUNK


def chunk_mask(segments: Tensor, prefix: int) -> Tensor:
    """bool (B, chunks, CHUNK, prefix + 2 CHUNK), True = attend."""
    own = segments[:, prefix:].unflatten(1, (-1, CHUNK))
    before = F.pad(own[:, :-1], (0, 0, 1, 0), value=-2)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=segments.device).tril()
    return torch.cat(
        [
            own.new_ones(*own.shape, prefix, dtype=torch.bool),
            own[..., None] == before[:, :, None],
            (own[..., None] == own[:, :, None]) & causal,
        ],
        dim=-1,
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    packed: tuple[int, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact attention for `Packer` sequences; query (B, H, S, D), key and value (B, Hkv, S, D)."""
    assert packed is not None
    prefix, bias = packed
    query, key = query.to(value.dtype) * scaling, key.to(value.dtype)
    group = query.shape[1] // key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q (N, H, R, D), k and v (N, Hkv, K, D), bias (N | 1, R, K): one product per group."""
        rows = q.unflatten(1, (-1, group)).flatten(2, 3)
        scores = (rows @ k.transpose(-1, -2)).unflatten(2, (group, -1)) + bias[:, None, None]
        return (scores.flatten(2, 3).softmax(-1) @ v).unflatten(2, (group, -1)).flatten(1, 2)

    def chunks(x: Tensor) -> Tensor:
        return x[:, :, prefix:].unflatten(2, (-1, CHUNK)).transpose(1, 2)  # (B, n, H, CHUNK, D)

    def context(x: Tensor) -> Tensor:
        own = chunks(x)
        shared = x[:, None, :, :prefix].expand(-1, own.shape[1], -1, -1, -1)
        before = F.pad(own[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([shared, before, own], dim=3).flatten(0, 1)

    future = torch.full((1, prefix, prefix), -1e4, dtype=value.dtype, device=value.device).triu(1)
    start = attend(query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], future)
    rest = attend(chunks(query).flatten(0, 1), context(key), context(value), bias.to(value.dtype))
    rest = rest.unflatten(0, (len(query), -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([start, rest], dim=2).transpose(1, 2).contiguous(), None


compat.register_attention(PACKED, packed_attention)


class LanguageLesson(nn.Module):
    """Packed questions on frozen features, or on no picture: cross-entropy of what is labelled."""

    def __init__(self, model: nn.Module, image_token: int):
        super().__init__()
        core: Any = model
        self.projector, self.decoder = compat_parts.projector(core), core.get_decoder()
        self.image_token = image_token

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(batch)
        chosen = batch["labels"] != lessons.IGNORE
        logits = F.linear(hidden[chosen], self.decoder.embed_tokens.weight).float()
        losses = F.cross_entropy(logits, batch["labels"][chosen], reduction="none")
        weights = batch["weights"][chosen]
        return (losses * weights).sum(), weights.sum()

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Final hidden states (B, S, D) of packed sequences."""
        ids, segments = batch["ids"], batch["segments"]
        embeds = self.decoder.embed_tokens(ids)
        if "features" in batch:
            seen = self.projector(batch["features"].to(self.projector.linear_1.weight.dtype))
            at = (ids == self.image_token)[..., None]
            embeds = embeds.masked_scatter(at, seen.to(embeds.dtype))
        prefix = int((segments[0] == 0).sum())
        unseen = ~chunk_mask(segments, prefix).flatten(0, 1)
        bias = torch.zeros(unseen.shape, device=ids.device).masked_fill(unseen, -1e4)
        config = self.decoder.config
        with compat.attending(config, PACKED):
            return self.decoder(
                inputs_embeds=embeds,
                position_ids=batch["positions"],
                use_cache=False,
                packed=(prefix, bias),
            ).last_hidden_state


# -- batches, and accuracy on what is held out -----------------------------------------------------


def with_features(
    packed: list[lessons.Packed], features: np.ndarray | None = None
) -> dict[str, Tensor]:
    """Collate, and add the features of the pictures, if any, in the order of their tokens."""
    batch = {k: torch.from_numpy(v) for k, v in lessons.collate(packed).items()}
    if features is not None:
        pictures = [i for one in packed for i in one.images]
        batch["features"] = torch.from_numpy(np.stack([features[i] for i in pictures]))
    return batch


@torch.no_grad()
def _graded(
    lesson: LanguageLesson,
    packed: list[lessons.Packed],
    features: np.ndarray | None,
    precision: str,
) -> Iterator[tuple[int, Question, bool]]:
    """The row of each question but captions, and whether its answer's first token is right."""
    device = next(lesson.parameters()).device
    batch = {k: v.to(device) for k, v in with_features(packed, features).items()}
    with autocast(precision, device):
        hidden = lesson.hidden(batch)
        best = F.linear(hidden, lesson.decoder.embed_tokens.weight).argmax(-1).cpu()
    for row, one in enumerate(packed):
        for question, at in one.asked:
            if question.category != "caption":
                yield row, question, int(best[row, at]) == int(one.labels[at])


def quiz(
    lesson: LanguageLesson,
    packer: lessons.Packer,
    held: lessons.Pool,
    features: np.ndarray,
    precision: str = "bf16",
) -> dict[str, float]:
    """Accuracy of the first answer token on held-out pictures, by category and form."""
    right: dict[str, list[bool]] = defaultdict(list)
    for i in range(0, len(held), 16):
        items = list(range(i, min(i + 16, len(held))))
        packed = [packer.item(held, k, "yesno", random.Random(k)) for k in items]
        for row, question, hit in _graded(lesson, packed, features, precision):
            form = "yesno" if question.label else "open"
            where = "" if held.scenes > items[row] else "_window"
            name = f"{form}_{question.category}"
            if question.category == "print":
                name += f"{where}_{question.topic}"
            else:
                right[form].append(hit)
            right[name].append(hit)
    return _shares(right)


def read_texts(
    lesson: LanguageLesson, held: dict[str, list[lessons.Packed]], precision: str = "bf16"
) -> dict[str, float]:
    """Accuracy of the first answer token on texts, by their kind and the question's form."""
    right: dict[str, list[bool]] = defaultdict(list)
    for kind, packed in held.items():
        for i in range(0, len(packed), 16):
            for _, question, hit in _graded(lesson, packed[i : i + 16], None, precision):
                right[f"{kind}_{'yesno' if question.label else 'open'}"].append(hit)
    return _shares(right)


def _shares(right: dict[str, list[bool]]) -> dict[str, float]:
    return {name: round(float(np.mean(v)), 4) for name, v in sorted(right.items())}
