"""The vision tower's stage: every patch learns to say what it shows.

TowerLesson(model, processor)                       # the loss
tower_accuracy(lesson, held) -> {"kind": 0.93, ...} # on held-out patches
tower_features(model, pool, precision) -> array     # what the frozen tower makes of a pool
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.transformers import compat_parts
from ..base.files import writing
from ..base.progress import Progress
from ..scenes import lessons, world
from . import build

# of the tower's loss: what answers need most, and what is learnt last, weighs most
LABEL_WEIGHTS = {
    "kind": 2.0,
    "color": 1.0,
    "pattern": 1.0,
    "size": 1.0,
    "print": 1.5,
    "row": 0.5,
    "column": 0.5,
    "number": 0.1,
}


def autocast(precision: str, device: torch.device) -> Any:
    """Accelerate's precision for code outside its loop."""
    if precision == "no":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (B, 96, 96, 3) to what the image processor gives: float (B, 3, 96, 96)."""
    mean, std = (torch.tensor(v, device=pixels.device) for v in (build.MEAN, build.STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


class TowerLesson(nn.Module):
    """Every patch says what it shows: scores are products with the words' own embeddings.

    The projected features thereby start out in the language model's space, which is what lets
    its attention find things by name as soon as it starts to learn.
    """

    def __init__(self, model: nn.Module, processor: Any):
        super().__init__()
        core: Any = model
        self.tower, self.projector = compat_parts.image_tower(core), compat_parts.projector(core)
        self.embed = core.get_decoder().get_input_embeddings()
        self.helper = nn.Linear(core.config.text_config.hidden_size, 2)  # the thing's centre
        for p in self.helper.parameters():
            nn.init.zeros_(p)
        words = [w for group in lessons.DENSE.values() for w in group]
        ids = [build.encode(processor, word) for word in words]
        assert all(len(i) == 1 for i in ids)
        self.register_buffer("words", torch.tensor(ids).flatten(), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        values, scores = self.scores(batch["pixels"])
        loss = scores.new_zeros(())
        parts = scores.split([len(g) for g in lessons.DENSE.values()], -1)
        for k, (name, part) in enumerate(zip(lessons.DENSE, parts, strict=True)):
            target = batch["labels"][..., k].flatten()
            part = part.flatten(0, 1)
            weight = LABEL_WEIGHTS[name]
            if name == "print":
                some = target == lessons.SOME_PRINT
                target = target.masked_fill(some, lessons.IGNORE)
                nothing = F.log_softmax(part[some], -1)[:, -1]
                missed = -torch.log1p(-nothing.exp().clamp(max=1 - 1e-6)).sum()
                loss = loss + missed / max(1, len(some) // 4)
            valid = (target != lessons.IGNORE).sum().clamp(min=1)
            total = F.cross_entropy(part, target, ignore_index=lessons.IGNORE, reduction="sum")
            loss = loss + weight * total / valid
        centers = batch["centers"]
        there = ~centers.isnan().any(-1)
        loss = loss + 10 * F.mse_loss(self.helper(values)[there].float(), centers[there])
        return loss, torch.ones_like(loss)

    def scores(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features (B, 144, D) and word scores (B, 144, words) in fp32."""
        hidden = self.tower(normalised(pixels)).last_hidden_state[:, 1:]
        values = self.projector(hidden)
        return values, 16 * (values @ self.embed(self.words).T).float()


@torch.no_grad()
def tower_accuracy(
    lesson: TowerLesson, held: lessons.Pool, precision: str = "bf16"
) -> dict[str, float]:
    """Share of the held-out patches whose word is right, per kind of label."""
    right: dict[str, list[float]] = defaultdict(list)
    device = next(lesson.parameters()).device
    for i in range(0, len(held), 32):
        batch = lessons.dense_batch(held, list(range(i, min(i + 32, len(held)))))
        with autocast(precision, device):
            scores = lesson.scores(torch.from_numpy(batch["pixels"]).to(device))[1].cpu()
        parts = scores.split([len(g) for g in lessons.DENSE.values()], -1)
        for (name, words), part in zip(lessons.DENSE.items(), parts, strict=True):
            target = torch.from_numpy(batch["labels"][..., lessons.TAG[name]])
            hit = part.argmax(-1) == target
            valid = (target >= 0) & (target < len(words))
            if name == "kind":
                valid &= target < len(world.KINDS)
            if name == "print":
                valid &= target < len(lessons.GLYPHS)
            right[name] += hit[valid].float().tolist()
    return {name: round(float(np.mean(v)), 4) for name, v in right.items() if v}


def tower_features(model: Any, pool: lessons.Pool, precision: str) -> np.ndarray:
    """The frozen tower's output for a whole pool: float16 (items, 144, D), computed once."""
    path, width = pool.folder / "features.npy", model.config.vision_config.hidden_size
    if not path.exists():
        part = path.with_suffix(".part")
        shape = (len(pool), build.VISUAL_TOKENS, width)
        with writing(path, "what was trained is safe"):
            array = lessons.new_array(part, np.float16, shape)
        device = next(model.parameters()).device
        with torch.no_grad(), autocast(precision, device), Progress("pictures") as progress:
            for i in range(0, len(pool), 64):
                pixels = torch.from_numpy(np.array(pool.pixels[i : i + 64])).to(device)
                hidden = compat_parts.image_tower(model)(normalised(pixels)).last_hidden_state[
                    :, 1:
                ]
                array[i : i + 64] = hidden.half().cpu().numpy()
                progress(min(i + 64, len(pool)), len(pool), "looking at them once")
        array.flush()
        part.replace(path)
    return np.load(path, mmap_mode="r")
