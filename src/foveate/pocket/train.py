"""The pocket model's training, stage by stage on `foveate.training.loop`.

    train_pocket(out, "pictures-first", until="yesno", seed=0, resume=True, ...) -> Path

The stages of a recipe stand in `recipes`. Each ends by its budget with a learning rate run down to
nothing, and leaves `out/<stage>/`, a folder that plain transformers loads; the last one's is
returned. A run that is killed continues from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..backends.transformers import compat_parts
from ..base.errors import FoveateError
from ..base.files import make_folder, owned, replacing, write_text, writing
from ..base.progress import Progress
from ..scenes import lessons, questions
from ..training.checkpoints import drop_checkpoints, own_memory, what_is_safe
from ..training.loop import drawn, fit, start
from . import build
from .packed import LanguageLesson, quiz, read_texts, with_features
from .recipes import PARTS, SYSTEMS, Stage, stages
from .tower import TowerLesson, tower_accuracy, tower_features

NOTE = "recipe.json"  # in a run's folder: what it is trained by
HELD_TEXTS = 32  # of each kind
P_READ = 0.65  # of the batches of text

Prepared = tuple[nn.Module, Callable[[int], dict[str, Tensor]], Callable[[], dict[str, float]]]
"""What `fit` takes of a stage: the lesson, its batches, its accuracy on what is held out."""


@dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    model: Any
    processor: Any
    pool: lessons.Pool
    held: lessons.Pool
    precision: str
    seed: int


def train_pocket(
    out: Path | str,
    recipe: str = "pictures-first",
    until: str | None = None,
    *,
    settings: Iterable[str] = (),
    tower: str | None = None,
    seed: int = 0,
    resume: bool = True,
    scenes: int = 30_000,
    windows: int = 14_000,
    shape: dict[str, int] | None = None,
    precision: str = "bf16",
    checkpoint_every: float = 120,
) -> Path:
    """Train the pocket model through a recipe's stages up to `until`; returns that one's folder.

    Args:
        out: takes 85 KB of disk per scene and window: 3.7 GB by default.
        until: the last stage; default: the recipe's last.
        settings: other numbers of stages, as "tuning.steps=300".
        tower: a saved pocket model whose vision tower is taken, in place of the first stage;
            "pocket" is the shipped one.
        resume: take finished stages in `out` as they are and continue a broken-off one.
        shape: goes to `build_pocket`.

    Raises:
        FoveateError: unknown names; a run in `out` that was made otherwise.
    """
    course = stages(recipe, settings)
    names = [stage.name for stage in course]
    if until is not None and until not in names:
        raise FoveateError(f'Unknown stage "{until}": choose one of {", ".join(names)}.')
    course = course[: names.index(until or names[-1]) + 1]
    if windows > scenes:
        raise FoveateError(f"{windows} windows need as many scenes: {scenes} are too few.")
    out = make_folder(Path(out))
    with owned(out):
        if not resume and any((out / ended(name)).exists() for name in names):
            raise FoveateError(f"{out} holds a run already: resume it, or choose another folder.")
        about = {
            "recipe": recipe,
            "seed": seed,
            "tower": tower,
            "scenes": scenes,
            "windows": windows,
            "precision": precision,
            "stages": [asdict(stage) for stage in course],
        }
        _note(out, about)
        run = _prepare(out, recipe, seed, scenes, windows, shape or {}, precision)
        if tower is not None and not (out / ended("tower")).exists():
            _take_tower(run, tower, out / ended("tower"))
        for number, stage in enumerate(course):
            _train(out, run, stage, number, resume, checkpoint_every)
    return out / course[-1].name


def _note(out: Path, about: dict[str, Any]) -> None:
    """Write down what a run is made by; stages that it has finished must be the same."""
    note = out / NOTE
    if note.exists():
        earlier = _noted(note)
        done = {s["name"]: s for s in earlier["stages"] if (out / ended(s["name"])).exists()}
        made = [(key, earlier[key], about[key]) for key in ("recipe", "seed", "tower")]
        for key, before, now in made if done else ():
            if before != now:
                raise FoveateError(
                    f"{out} holds a run with {key} {before}, not {now}: choose another folder."
                )
        for stage in json.loads(json.dumps(about["stages"])):
            if stage != done.get(stage["name"], stage):
                raise FoveateError(
                    f"{out} holds stage {stage['name']}, trained with other numbers: choose "
                    "another folder."
                )
    write_text(note, json.dumps(about, indent=1))


def _noted(note: Path) -> dict[str, Any]:
    try:
        return json.loads(note.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FoveateError(
            f"{note} cannot be read: delete it, if all stages in its folder were made by this "
            "same command."
        ) from error


def _prepare(
    out: Path,
    recipe: str,
    seed: int,
    scenes: int,
    windows: int,
    shape: dict[str, int],
    precision: str,
) -> Run:
    """The untrained model, and the pictures to learn from and to be tested on."""
    model, processor = build.build_pocket(seed, system=SYSTEMS[recipe], **shape)
    pool = lessons.Pool(out / "pool", scenes, windows, seed)
    with Progress("pictures") as progress:
        pool.build(watch=lambda done, total: progress(done, total, "drawing what to learn from"))
    held = lessons.Pool(
        out / "held", min(64, scenes), min(48, windows), seed, questions.FIRST_HELD_OUT
    ).build()
    return Run(model, processor, pool, held, precision, seed)


def _take_tower(run: Run, tower: str, file: Path) -> None:
    """The first stage's end, with the vision tower of a saved pocket model."""
    folder = build.WEIGHTS if tower == "pocket" else Path(tower)
    if not (folder / "model.safetensors").exists():
        raise FoveateError(f'{folder} holds no trained model: give one, or "pocket".')
    taken = compat_parts.image_tower(build.load_pocket(folder)[0])
    try:
        compat_parts.image_tower(run.model).load_state_dict(taken.state_dict())
    except RuntimeError as error:
        raise FoveateError(f"{folder} has a vision tower of another shape.") from error
    _save(run.model, file)


def _train(
    out: Path, run: Run, stage: Stage, number: int, resume: bool, checkpoint_every: float
) -> None:
    """One stage, unless its end is there already."""
    weights = out / ended(stage.name)
    if weights.exists():
        _load(run.model, weights)
        return
    if stage.fresh:
        _renew(run, stage)
    run.model.zero_grad()  # what an earlier stage left would count in the gradient's norm
    for part in PARTS:
        _part(run.model, part).requires_grad_(part in stage.trains)
    make = {"patches": _patches, "texts": _texts}.get(stage.teaches, _pictures)
    lesson, batches, evaluate = make(run, stage, run.seed + 1000 * number)
    run.model.train()
    fit(
        lesson,
        batches,
        start(run.precision),
        make_optimizers(lesson, stage.rate),
        folder=out,
        name=stage.name,
        minutes=stage.minutes or None,
        steps=stage.steps or None,
        seed=run.seed,
        resume=resume,
        checkpoint_every=checkpoint_every,
        evaluate=evaluate,
    )
    run.model.eval()
    with writing(out, what_is_safe(out, stage.name)):
        build.save_pocket(run.model, run.processor, out / stage.name)
        _save(run.model, weights)
    drop_checkpoints(out, stage.name)


def _part(model: Any, part: str) -> nn.Module:
    return {
        "tower": compat_parts.image_tower,
        "projector": compat_parts.projector,
        "language": lambda whole: whole.get_decoder(),
    }[part](model)


def _renew(run: Run, stage: Stage) -> None:
    """Give the stage's fresh parts the weights of an untrained model."""
    untrained = type(run.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        anew = untrained(run.model.config)
    for part in stage.fresh:
        _part(run.model, part).load_state_dict(_part(anew, part).state_dict())


def ended(stage: str) -> str:
    """The file with the weights (float32) after a stage."""
    return f"{stage}.safetensors"


def _save(model: nn.Module, weights: Path) -> None:
    with replacing(weights) as part:
        save_file(own_memory(model.state_dict()), part)


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


# -- what stages teach -----------------------------------------------------------------------------


def _patches(run: Run, stage: Stage, salt: int) -> Prepared:
    lesson = TowerLesson(run.model, run.processor)
    with torch.no_grad():  # words of some length, so that scores can be large from the start
        torch.nn.init.normal_(
            lesson.embed.weight, std=0.05, generator=torch.Generator().manual_seed(run.seed)
        )

    def batches(step: int) -> dict[str, Tensor]:
        items = drawn(len(run.pool), stage.batch, step, salt)
        return {k: torch.from_numpy(v) for k, v in lessons.dense_batch(run.pool, items).items()}

    return lesson, batches, lambda: tower_accuracy(lesson, run.held, run.precision)


def _texts(run: Run, stage: Stage, salt: int) -> Prepared:
    packer = lessons.Packer(run.processor)
    lesson = LanguageLesson(run.model, packer.image)

    def batches(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{salt}-{step}")
        read = rng.random() < P_READ
        numbers = range(HELD_TEXTS + step * stage.batch, HELD_TEXTS + (step + 1) * stage.batch)
        return with_features([packer.texts(number, rng, read) for number in numbers])

    held = {
        name: [packer.texts(number, random.Random(number), read) for number in range(HELD_TEXTS)]
        for name, read in (("hearsay", False), ("page", True))
    }
    return lesson, batches, lambda: read_texts(lesson, held, run.precision)


def _pictures(run: Run, stage: Stage, salt: int) -> Prepared:
    pool, held = run.pool, run.held
    features, held_features = (tower_features(run.model, p, run.precision) for p in (pool, held))
    packer = lessons.Packer(run.processor)
    lesson = LanguageLesson(run.model, packer.image)

    def batches(step: int) -> dict[str, Tensor]:
        items = drawn(len(pool), stage.batch, step, salt)
        rng = random.Random(f"{salt}-{step}")
        both = rng.random() < 0.05 and pool.windows > 0  # windows after their scenes
        if both:
            items = [pool.scenes + i % pool.windows for i in items]
        packed = [packer.item(pool, i, stage.teaches, rng, both) for i in items]
        return with_features(packed, features)

    return lesson, batches, lambda: quiz(lesson, packer, held, held_features, run.precision)
