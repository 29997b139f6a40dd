"""The pocket model's training, in four stages on `foveate.training.loop`.

    train_pocket(out, until="yesno", seed=0, resume=True, ...) -> Path   # the last stage's folder

Stages: "tower" (every patch learns to say what it shows, in the words of the language model),
"caption", "open" (captions and open questions), "yesno" (pairs of yes/no questions on the same
fact, beside open ones). Each ends by its budget with a learning rate run down to nothing, and
leaves `out/<stage>/`, a folder that plain transformers loads. A run that is killed continues from
its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.transformers import compat_parts
from ..base.errors import FoveateError
from ..base.files import make_folder, owned, replacing, writing
from ..base.progress import Progress
from ..scenes import lessons, questions, world
from ..training.checkpoints import drop_checkpoints, own_memory, what_is_safe
from ..training.loop import drawn, fit, start
from . import build
from .packed import LanguageLesson

STAGES = ("tower", "caption", "open", "yesno")
MINUTES = {"tower": 25.0, "caption": 3.0, "open": 19.0, "yesno": 44.0}  # of two CPU cores
RATES = {"tower": 3e-3, "caption": 2e-3, "open": 2e-3, "yesno": 2e-3}
BATCH = {"tower": 32, "caption": 16, "open": 16, "yesno": 16}

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

Prepared = tuple[nn.Module, Callable[[int], dict[str, Tensor]], Callable[[], dict[str, float]]]
"""What `fit` takes of a stage: the lesson, its batches, its accuracy on held-out pictures."""


@dataclass(frozen=True)
class Stage:
    """A stage's name, pictures per step, precision and seed."""

    name: str
    batch: int
    precision: str
    seed: int


def train_pocket(
    out: Path | str,
    until: str = "yesno",
    *,
    seed: int = 0,
    resume: bool = True,
    steps: dict[str, int] | None = None,
    scenes: int = 30_000,
    windows: int = 14_000,
    batch: dict[str, int] | None = None,
    shape: dict[str, int] | None = None,
    precision: str = "bf16",
    checkpoint_every: float = 120,
) -> Path:
    """Train the pocket model through its stages up to `until`; returns that stage's folder.

    `steps` per stage replace the budgets of minutes; `shape` goes to `build_pocket`. With
    `resume`, finished stages in `out` are taken as they are and a broken-off one is continued.
    `out` takes 85 KB of disk per scene and window: 3.7 GB by default.
    """
    if until not in STAGES:
        raise FoveateError(f'Unknown stage "{until}": choose one of {", ".join(STAGES)}.')
    out = make_folder(Path(out))
    with owned(out):
        return _train(
            out, until, seed, resume, steps, scenes, windows, batch or {}, shape or {}, precision,
            checkpoint_every,
        )  # fmt: skip


def _train(
    out: Path,
    until: str,
    seed: int,
    resume: bool,
    steps: dict[str, int] | None,
    scenes: int,
    windows: int,
    batch: dict[str, int],
    shape: dict[str, int],
    precision: str,
    checkpoint_every: float,
) -> Path:
    """`train_pocket` in a folder that is this run's alone."""
    if not resume and any((out / ended(stage)).exists() for stage in STAGES):
        raise FoveateError(f"{out} holds a run already: resume it, or choose another folder.")
    model, processor = build.build_pocket(seed, **shape)
    pool = lessons.Pool(out / "pool", scenes, windows, seed)
    with Progress("pictures") as progress:
        pool.build(watch=lambda done, total: progress(done, total, "drawing what to learn from"))
    held = lessons.Pool(
        out / "held", min(64, scenes), min(48, windows), seed, questions.FIRST_HELD_OUT
    ).build()
    for stage in STAGES[: STAGES.index(until) + 1]:
        weights = out / ended(stage)
        if weights.exists():
            _load(model, weights)
            continue
        model.requires_grad_(True)
        settings = Stage(stage, (BATCH | batch)[stage], precision, seed)
        make = _tower_stage if stage == "tower" else _language_stage
        lesson, batches, evaluate = make(settings, model, processor, pool, held)
        model.train()
        fit(
            lesson,
            batches,
            start(precision),
            make_optimizers(lesson, RATES[stage]),
            folder=out,
            name=stage,
            minutes=None if steps else MINUTES[stage],
            steps=steps[stage] if steps else None,
            seed=seed,
            resume=resume,
            checkpoint_every=checkpoint_every,
            evaluate=evaluate,
        )
        model.eval()
        with writing(out, what_is_safe(out, stage)):
            build.save_pocket(model, processor, out / stage)
            with replacing(weights) as part:
                save_file(own_memory(model.state_dict()), part)
        drop_checkpoints(out, stage)
    return out / until


def ended(stage: str) -> str:
    """The file with the weights (float32) after a stage."""
    return f"{stage}.safetensors"


def _load(model: nn.Module, weights: Path) -> None:
    try:
        model.load_state_dict(load_file(weights))
    except Exception as error:  # damaged files raise nearly anything
        reason = " ".join(str(error).split())[:120].rstrip(".")
        raise FoveateError(
            f"{weights} cannot be read ({reason}): delete it, and the same command trains this "
            "stage again."
        ) from error


def make_optimizers(lesson: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices between hidden layers, AdamW for embeddings, norms, biases, kernels."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in lesson.named_parameters():
        if p.requires_grad:
            flat = any(part in name for part in ("embed", "lm_head", "helper"))
            (matrices if p.ndim == 2 and not flat else others).append(p)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if matrices:
        made.append(
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        )
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = rate
    return made


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


# -- the tower -------------------------------------------------------------------------------------


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


def _tower_stage(
    stage: Stage, model: Any, processor: Any, pool: lessons.Pool, held: lessons.Pool
) -> Prepared:
    lesson = TowerLesson(model, processor)
    with torch.no_grad():  # words of some length, so that scores can be large from the start
        torch.nn.init.normal_(
            lesson.embed.weight, std=0.05, generator=torch.Generator().manual_seed(stage.seed)
        )

    def batches(step: int) -> dict[str, Tensor]:
        items = drawn(len(pool), stage.batch, step, stage.seed)
        return {k: torch.from_numpy(v) for k, v in lessons.dense_batch(pool, items).items()}

    return lesson, batches, lambda: tower_accuracy(lesson, held, stage.precision)


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


# -- the language model ----------------------------------------------------------------------------


def _language_stage(
    stage: Stage, model: Any, processor: Any, pool: lessons.Pool, held: lessons.Pool
) -> Prepared:
    compat_parts.image_tower(model).requires_grad_(False)
    features, held_features = (tower_features(model, p, stage.precision) for p in (pool, held))
    packer = lessons.Packer(processor)
    lesson = LanguageLesson(model, packer.image)
    salt = stage.seed + 1000 * STAGES.index(stage.name)

    def batches(step: int) -> dict[str, Tensor]:
        items = drawn(len(pool), stage.batch, step, salt)
        rng = random.Random(f"{salt}-{step}")
        both = rng.random() < 0.05 and pool.windows > 0  # windows after their scenes
        if both:
            items = [pool.scenes + i % pool.windows for i in items]
        return with_features([packer.item(pool, i, stage.name, rng, both) for i in items], features)

    return lesson, batches, lambda: quiz(lesson, packer, held, held_features, stage.precision)


def with_features(packed: list[lessons.Packed], features: np.ndarray) -> dict[str, Tensor]:
    """Collate, and add the features of the pictures in the order of their tokens."""
    batch = {k: torch.from_numpy(v) for k, v in lessons.collate(packed).items()}
    pictures = [i for one in packed for i in one.images]
    batch["features"] = torch.from_numpy(np.stack([features[i] for i in pictures]))
    return batch


@torch.no_grad()
def quiz(
    lesson: LanguageLesson,
    packer: lessons.Packer,
    held: lessons.Pool,
    features: np.ndarray,
    precision: str = "bf16",
) -> dict[str, float]:
    """Accuracy of the first answer token on held-out pictures, by category and form."""
    right: dict[str, list[bool]] = defaultdict(list)
    device = next(lesson.parameters()).device
    for i in range(0, len(held), 16):
        items = list(range(i, min(i + 16, len(held))))
        packed = [packer.item(held, k, "yesno", random.Random(k)) for k in items]
        batch = {k: v.to(device) for k, v in with_features(packed, features).items()}
        with autocast(precision, device):
            hidden = lesson.hidden(batch)
            best = F.linear(hidden, lesson.decoder.embed_tokens.weight).argmax(-1).cpu()
        for row, one in enumerate(packed):
            for question, at in one.asked:
                if question.category == "caption":
                    continue
                form = "yesno" if question.label else "open"
                where = "" if held.scenes > items[row] else "_window"
                name = f"{form}_{question.category}"
                if question.category == "print":
                    name += f"{where}_{question.topic}"
                hit = int(best[row, at]) == int(one.labels[at])
                right[name].append(hit)
                if question.category != "print":
                    right[form].append(hit)
    return {name: round(float(np.mean(v)), 4) for name, v in sorted(right.items())}
