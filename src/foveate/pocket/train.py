"""The pocket model's training: four stages on `foveate.training.loop`, and the exam of its card.

    train_pocket(out, until="yesno", seed=0, resume=True, ...) -> Path   # the last stage's folder
    evaluate_pocket(folder=WEIGHTS, n=100, seed=0) -> dict               # the card's table
    format_report(report) -> str

Stages: "tower" (every patch learns to say what it shows, in the words of the language model),
"caption", "open" (captions and open questions), "yesno" (pairs of yes/no questions on the same
fact, beside open ones). Each ends by its budget with a learning rate run down to nothing, and
leaves `out/<stage>/`, a folder that plain transformers loads. A run that is killed continues from
its last checkpoint as if nothing had happened.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.transformers import compat
from ..base.errors import FoveateError
from ..scenes import lessons, questions, world
from ..training.loop import drawn, drop_checkpoints, fit
from . import build

STAGES = ("tower", "caption", "open", "yesno")
MINUTES = {"tower": 25.0, "caption": 3.0, "open": 19.0, "yesno": 44.0}  # of two CPU cores
RATES = {"tower": 3e-3, "caption": 2e-3, "open": 2e-3, "yesno": 2e-3}
BATCH = {"tower": 32, "caption": 16, "open": 16, "yesno": 16}

# ----------------------------------------------------------------------- what is minimised

# what matters most for answers, and comes last, weighs most
WEIGHTS = {"kind": 2.0, "color": 1.0, "pattern": 1.0, "size": 1.0, "print": 1.5, "row": 0.5,
           "column": 0.5, "number": 0.1}  # fmt: skip


class TowerLesson(nn.Module):
    """Every patch says what it shows: scores are products with the words' own embeddings.

    The projected features thereby start out in the language model's space, which is what lets
    its attention find things by name as soon as it starts to learn.
    """

    def __init__(self, model: nn.Module, processor: Any):
        super().__init__()
        core: Any = model
        self.tower, self.projector = compat.image_tower(core), compat.projector(core)
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
            weight = WEIGHTS[name]
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


class LanguageLesson(nn.Module):
    """Packed questions on frozen features: cross-entropy of the answers' tokens."""

    def __init__(self, model: nn.Module, image_token: int):
        super().__init__()
        core: Any = model
        self.projector, self.decoder = compat.projector(core), core.get_decoder()
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
        seen = self.projector(batch["features"].to(self.projector.linear_1.weight.dtype))
        embeds = self.decoder.embed_tokens(ids)
        embeds = embeds.masked_scatter((ids == self.image_token)[..., None], seen.to(embeds.dtype))
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


# Attention of packed sequences. A mask over all pairs would do; but a question sees the shared
# start and itself, so questions are cut into chunks that see the start, the chunk before and
# their own. Plain products, because the CPU's fused kernel takes longer to differentiate when
# heads are this small.
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


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (B, 96, 96, 3) to what the image processor gives: float (B, 3, 96, 96)."""
    mean, std = (torch.tensor(v, device=pixels.device) for v in (build.MEAN, build.STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------- the pocket model


def train_pocket(
    out: Path | str,
    until: str = "yesno",
    *,
    seed: int = 0,
    resume: bool = True,
    minutes: dict[str, float] | None = None,
    steps: dict[str, int] | None = None,
    scenes: int = 30_000,
    windows: int = 14_000,
    batch: dict[str, int] | None = None,
    rates: dict[str, float] | None = None,
    shape: dict[str, int] | None = None,
    precision: str = "bf16",
    checkpoint_every: float = 120,
    evaluate_every: float = 180,
) -> Path:
    """Train the pocket model through its stages up to `until`; returns that stage's folder.

    `minutes` or `steps` per stage override the budgets; `shape` goes to `build_pocket`. With
    `resume`, finished stages in `out` are taken as they are and a broken-off one is continued.
    `out` takes 85 KB of disk per scene and window: 3.7 GB by default.
    """
    if until not in STAGES:
        raise FoveateError(f'Unknown stage "{until}": choose one of {", ".join(STAGES)}.')
    out = Path(out)
    if not resume and out.exists() and any(out.glob("*.pt")):
        raise FoveateError(f"{out} holds a run already: resume it, or choose another folder.")
    budget = MINUTES | (minutes or {})
    sizes = BATCH | (batch or {})
    model, processor = build.build_pocket(seed, **(shape or {}))
    pool = lessons.Pool(out / "pool", scenes, windows, seed).build()
    held = lessons.Pool(
        out / "held", min(64, scenes), min(48, windows), seed, questions.FIRST_HELD_OUT
    ).build()
    for stage in STAGES[: STAGES.index(until) + 1]:
        ended = out / f"{stage}.pt"
        if ended.exists():
            model.load_state_dict(torch.load(ended, weights_only=True))
            continue
        common: dict[str, Any] = {
            "folder": out,
            "name": stage,
            "minutes": None if steps else budget[stage],
            "steps": steps[stage] if steps else None,
            "seed": seed,
            "resume": resume,
            "precision": precision,
            "checkpoint_every": checkpoint_every,
            "evaluate_every": evaluate_every,
            "rate": (RATES | (rates or {}))[stage],
        }
        for p in model.parameters():
            p.requires_grad_(True)
        if stage == "tower":
            _train_tower(model, processor, pool, held, sizes[stage], common)
        else:
            _train_language(model, processor, pool, held, sizes[stage], stage, common)
        part = ended.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.replace(ended)
        build.save_pocket(model, processor, out / stage)
        drop_checkpoints(out, stage)
    return out / until


def _train_tower(
    model: Any,
    processor: Any,
    pool: lessons.Pool,
    held: lessons.Pool,
    size: int,
    common: dict[str, Any],
) -> None:
    lesson = TowerLesson(model, processor)
    with torch.no_grad():  # words of some length, so that scores can be large from the start
        torch.nn.init.normal_(
            lesson.embed.weight, std=0.05, generator=torch.Generator().manual_seed(common["seed"])
        )

    def batches(step: int) -> dict[str, Tensor]:
        items = drawn(len(pool), size, step, common["seed"])
        return {k: torch.from_numpy(v) for k, v in lessons.dense_batch(pool, items).items()}

    def evaluate() -> dict[str, float]:
        return tower_accuracy(lesson, held, common["precision"])

    model.train()
    fit(lesson, batches, evaluate=evaluate, **common)
    model.eval()


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


def autocast(precision: str, device: torch.device) -> Any:
    """Accelerate's precision for code outside its loop."""
    if precision == "no":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def tower_features(model: Any, pool: lessons.Pool, precision: str) -> np.ndarray:
    """The frozen tower's output for a whole pool: float16 (items, 144, D), computed once."""
    path, width = pool.folder / "features.npy", model.config.vision_config.hidden_size
    if not path.exists():
        part = path.with_suffix(".part")
        shape = (len(pool), build.VISUAL_TOKENS, width)
        array = np.lib.format.open_memmap(part, "w+", np.float16, shape)
        device = next(model.parameters()).device
        with torch.no_grad(), autocast(precision, device):
            for i in range(0, len(pool), 64):
                pixels = torch.from_numpy(np.array(pool.pixels[i : i + 64])).to(device)
                hidden = compat.image_tower(model)(normalised(pixels)).last_hidden_state[:, 1:]
                array[i : i + 64] = hidden.half().cpu().numpy()
        array.flush()
        part.replace(path)
    return np.load(path, mmap_mode="r")


def _train_language(
    model: Any,
    processor: Any,
    pool: lessons.Pool,
    held: lessons.Pool,
    size: int,
    stage: str,
    common: dict[str, Any],
) -> None:
    compat.image_tower(model).requires_grad_(False)
    seen = {id(p): tower_features(model, p, common["precision"]) for p in (pool, held)}
    packer = lessons.Packer(processor)
    lesson = LanguageLesson(model, packer.image)
    salt = common["seed"] + 1000 * STAGES.index(stage)

    def batches(step: int) -> dict[str, Tensor]:
        items = drawn(len(pool), size, step, salt)
        rng = random.Random(f"{salt}-{step}")
        return pack_batch(packer, pool, seen[id(pool)], items, stage, rng)

    def evaluate() -> dict[str, float]:
        return quiz(lesson, packer, held, seen[id(held)], common["precision"])

    model.train()
    fit(lesson, batches, evaluate=evaluate, **common)
    model.eval()


def pack_batch(
    packer: lessons.Packer,
    pool: lessons.Pool,
    features: np.ndarray,
    items: list[int],
    stage: str,
    rng: random.Random,
) -> dict[str, Tensor]:
    """The batch of some pool items; one batch in twenty shows windows after their scenes."""
    both = rng.random() < 0.05 and pool.windows > 0
    if both:
        items = [pool.scenes + i % pool.windows for i in items]
    return with_features([packer.item(pool, i, stage, rng, both) for i in items], features)


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


# -------------------------------------------------------------------------- the card's table

EXAM_SEED = questions.FIRST_HELD_OUT + 500_000_000


@torch.no_grad()
def evaluate_pocket(
    folder: Path | str = build.WEIGHTS, n: int = 100, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Ask a saved model about n fresh scenes with and n against the habit, as a user would.

    Pictures of 768 pixels go through the processor, windows are cropped out of them, questions
    through the chat template, answers come from greedy `generate` in fp32 and must be right word
    by word. Returns {habit: {row: {"accuracy", "yes" (share of yes answers, else nan), "n"}}}.
    """
    model, processor = build.load_pocket(folder)
    report = {}
    for habit in ("with", "against"):
        given: dict[str, list[tuple[bool, bool | None]]] = defaultdict(list)
        for k in range(n):
            scene = world.sample(EXAM_SEED + seed * 1_000_003 + k, habit)
            rng = random.Random(f"exam-{seed}-{k}")
            image = world.draw(scene, 768)
            asked = [([image], q, rows_of(q)) for q in questions.exam(scene, rng)]
            for box, i in questions.print_windows(scene, rng):
                view, thing = questions.look(scene, box), scene.things[i]
                if i not in view.single():
                    continue
                text = rng.choice(questions.OPEN["print"]["phrases"]).format(kind=thing.kind)
                one = questions.Question(text, thing.print.lower(), "print", "print")
                x0, y0, x1, y1 = (round(768 * edge) for edge in box)
                crop = image.crop((x0, y0, x1, y1))
                asked += [
                    ([image], one, ["print, whole scene"]),
                    ([crop], one, ["print, correct window"]),
                    ([image, crop], one, ["print, scene and window"]),
                ]
            for _, question, answer, rows in _answers(model, processor, asked):
                said = answer.strip().lower() == "yes" if question.label else None
                for row in rows:
                    given[row].append((answer.strip().lower() == question.answer, said))
        report[habit] = {
            row: {
                "accuracy": float(np.mean([hit for hit, _ in got])),
                "yes": float(np.mean([s for _, s in got])) if got[0][1] is not None else math.nan,
                "n": len(got),
            }
            for row, got in sorted(given.items())
        }
    return report


def rows_of(question: questions.Question) -> list[str]:
    """The rows of the table that a question counts in."""
    if question.label is None:
        return ["open", f"open, {question.topic}"]
    if question.category == "existence":
        return ["existence", f"existence, {question.split}"]
    if question.category == "attribute":
        return ["attribute", f"attribute, {question.topic}"]
    return [question.category]


def _answers(
    model: Any, processor: Any, asked: list[tuple[list[Any], questions.Question, list[str]]]
) -> Iterator[tuple[list[Any], questions.Question, str, list[str]]]:
    """Greedy answers, batched by the number of pictures."""
    for pictures in (1, 2):
        group = [one for one in asked if len(one[0]) == pictures]
        if not group:
            continue
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}] * pictures
                  + [{"type": "text", "text": question.text}]}],
                add_generation_prompt=True,
            )
            for _, question, _ in group
        ]  # fmt: skip
        inputs = processor(
            images=[image for images, _, _ in group for image in images],
            text=prompts,
            padding=True,
            return_tensors="pt",
        )
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        texts = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for (images, question, rows), text in zip(group, texts, strict=True):
            yield images, question, text, rows


def format_report(report: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of `evaluate_pocket` as markdown."""
    lines = ["| questions | with the habit | yes | n | against the habit | yes | n |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip

    def percent(x: float) -> str:
        return "" if math.isnan(x) else f"{100 * x:.1f} %"

    for row in sorted({row for part in report.values() for row in part}):
        cells = [row]
        for habit in ("with", "against"):
            got = report.get(habit, {}).get(row)
            cells += (
                [percent(got["accuracy"]), percent(got["yes"]), str(got["n"])]
                if got
                else ["", "", ""]
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
