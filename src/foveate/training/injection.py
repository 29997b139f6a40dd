"""Training on conversations: cross-layer injection on any model it serves, and its baseline.

    tune("pocket", "conversations.jsonl", "out", Recipe(method="cli", base="frozen")) -> Tuned

Trained is the injection alone (base "frozen"), LoRA on the language model beside it, or the
language model and the projector themselves ("full"); the vision tower never. The method "vanilla"
trains the base alone, which is the baseline: the same data, the same steps, no injection.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backends.transformers import compat_parts
from ..backends.transformers.anatomy import anatomy
from ..backends.transformers.enhance import attach
from ..base.errors import FoveateError
from ..base.files import make_folder, owned, writing
from ..base.journal import write_json
from ..core.method import as_stack, text
from ..methods.cli.method import CLI
from ..vlm.vlm import VLM
from .check import check
from .checkpoints import drop_checkpoints, what_is_safe
from .conversations import read
from .lesson import Lesson, make_optimizer, prepare
from .loop import WARM_UP, drawn, fit, start
from .output import begun_run, draw_losses, read_json, report_broken, save_base, write_run
from .recipe import DTYPES, Recipe
from .writer import Writer

NAME = "tuning"  # of the stage in log.jsonl
PACKED = ("llava", "llava_next", "llava_onevision")  # the families whose conversations are packed
MOST_TOKENS = 8192  # of a sequence, where the model takes more and nobody chose


@dataclass(frozen=True)
class Tuned:
    """What a run left.

    Attributes:
        injection: its folder; None where none was trained.
        model: the folder of the whole model; None where the base is unchanged.
        method: the text form to ask with.
        main: whether this is the process that reports for all.
    """

    injection: Path | None
    model: Path | None
    method: str
    main: bool


def tune(
    model: str,
    data: Path | str,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    images: Path | str | None = None,
    revision: str | None = None,
    resume: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Train on the conversations in `data` and leave what was learnt in `out`.

    `out` gets ``injection/`` (`CrossLayerInjection.save_pretrained`), ``model/`` (the whole model
    and its processor, where the base was trained), ``adapter/`` (LoRA), ``log.jsonl``, ``loss.png``
    and ``run.json``. A run that was killed goes on where it was, with the same arguments.

    Args:
        model, revision: as `VLM.load` takes them.
        images: folder of the pictures; default: the data's.
        say: called with a sentence whenever something happens, in the main process only.

    Raises:
        FoveateError: on arguments that do not go together, on broken rows unless they may be
            skipped, where `out` holds another run or another process writes to it, and where the
            disk refuses what is written.
    """
    out = make_folder(Path(out))
    recipe = recipe or Recipe()
    precision = recipe.precision or ("bf16" if torch.cuda.is_available() else "no")
    method = _method(recipe)
    accelerator = start(precision)
    with owned(out) if accelerator.is_main_process else contextlib.nullcontext():
        return _tune(
            model, Path(data), out, recipe, images, revision, resume, say, accelerator, precision,
            method,
        )  # fmt: skip


def _tune(
    model: str,
    data: Path,
    out: Path,
    recipe: Recipe,
    images: Path | str | None,
    revision: str | None,
    resume: bool,
    say: Callable[[str], None],
    accelerator: Any,
    precision: str,
    method: CLI | None,
) -> Tuned:
    """`tune` in a folder that is this run's alone."""
    main, device = accelerator.is_main_process, accelerator.device
    dtype = torch.float32 if recipe.base == "full" else DTYPES[precision]
    place = "cpu" if "FSDP" in str(accelerator.distributed_type) else device
    vlm = VLM.load(model, dtype=dtype, device=place, revision=revision)
    if method:
        method = cast(CLI, method.resolve(anatomy(vlm.model)))
    if recipe.packed:
        _packable(vlm, method)
    try:
        sha = hashlib.sha256(data.read_bytes()).hexdigest()
    except OSError as error:
        raise FoveateError(f"The data {data} cannot be read: {error.strerror}.") from error
    settings = {
        **dataclasses.asdict(recipe),
        "method": str(method or "vanilla"),
        **vlm.source,
        "data": sha,
        "images": str(images or data.parent),
        "precision": precision,
        "processes": accelerator.num_processes,
    }
    tuned = Tuned(
        injection=out / "injection" if method else None,
        model=None if recipe.base == "frozen" else out / "model",
        method=str(CLI(path=str(out / "injection"))) if method else "vanilla",
        main=main,
    )
    run = begun_run(out, settings, resume)
    if run and "loss" in run:
        if main:
            say(f"the run in {out} has ended already")
        return tuned
    rows: list[Any] = read(data, images)  # `units` names none of the broken ones
    takes = getattr(vlm.model.get_decoder().config, "max_position_embeddings", MOST_TOKENS)
    limit = recipe.max_length or min(takes, MOST_TOKENS)
    writer = Writer(vlm.processor, vlm.model.config, _ends(vlm.model))
    accelerator.wait_for_everyone()  # before the first writes what the others look for
    if main and not run:
        checked = check(rows, writer, limit, recipe.packed, say)
        report_broken(checked, len(rows), recipe.skip_broken, out, say)
        write_json(out / "units.json", {"units": checked.units, "tokens": checked.tokens})
        write_run(out, settings)
    accelerator.wait_for_everyone()
    units = read_json(out / "units.json", "units")["units"]

    size, total = recipe.batch_size, recipe.batch_size * accelerator.num_processes
    steps = recipe.steps
    if recipe.minutes is None and steps is None:
        steps = math.ceil((recipe.epochs or 1.0) * len(units) / total)
    first = accelerator.process_index * size

    def batches(step: int) -> dict[str, Tensor]:
        mine = drawn(len(units), total, step, recipe.seed)[first : first + size]
        groups = [[writer.example(rows[i]) for i in units[unit]] for unit in mine]
        return writer.packed(groups) if recipe.packed else writer.batch([g[0] for g in groups])

    injection = method.build(anatomy(vlm.model)) if method else None
    shell = copy.deepcopy(injection).cpu() if injection is not None else None
    adapted = prepare(vlm.model, recipe)
    lesson = Lesson(vlm.model, injection).train()
    compat_parts.image_encoder(vlm.model).eval()
    state: dict[str, Tensor] = {}

    def finish(trained: nn.Module) -> None:
        state.update(accelerator.get_state_dict(trained))

    if main:
        say(_summary(lesson, method, units, steps, total))
    plans = {"cli": injection} if method else None
    with warnings.catch_warnings(), attach(vlm.model, (method,) if method else (), plans=plans):
        warnings.filterwarnings("ignore", "The prompt has no image")
        clock = fit(
            lesson,
            batches,
            accelerator,
            [make_optimizer(lesson, recipe)],
            folder=out,
            name=NAME,
            minutes=recipe.minutes,
            steps=steps,
            warm_up=WARM_UP if steps is None else max(1, min(WARM_UP, steps // 10)),
            seed=recipe.seed,
            resume=resume,
            checkpoint_every=60 * recipe.checkpoint_every,
            log_every=1,
            finish=finish,
        )
    if main:
        with writing(out, what_is_safe(out, NAME)):
            if shell is not None:
                shell.load_state_dict(_part(state, "injection."))
                shell.save_pretrained(out / "injection", made=settings)
            if recipe.base != "frozen":
                save_base(vlm, _part(state, "model."), adapted, DTYPES[precision], out)
        loss = draw_losses(out, NAME, text(as_stack(recipe.method)), say)
        seconds = round(clock.seconds, 1)
        write_run(out, settings, {"steps": clock.step, "seconds": seconds, "loss": loss})
        drop_checkpoints(out, NAME)
    accelerator.wait_for_everyone()
    return tuned


def _method(recipe: Recipe) -> CLI | None:
    """The injection that is trained, None for vanilla."""
    stack = as_stack(recipe.method)
    method = stack[0] if stack else None
    if len(stack) > 1 or not isinstance(method, CLI | None):
        raise FoveateError(f"{text(stack)} cannot be trained: the method is cli(...) or vanilla.")
    if method is None and recipe.base == "frozen":
        raise FoveateError("Nothing is left to train: vanilla wants --base lora or --base full.")
    if method and not method.path and method.seed is None:
        method = dataclasses.replace(method, seed=recipe.seed)
    return method


def _packable(vlm: VLM, method: CLI | None) -> None:
    if method and method.summary != "image":
        raise FoveateError(
            "Packed conversations share what a summary of the prompt would see of each: use "
            "cli(summary=image), or leave out --packed."
        )
    kind = vlm.model.config.model_type
    if kind not in PACKED:
        raise FoveateError(
            f"Packed conversations are for {', '.join(PACKED)}, not for {kind}, whose positions "
            "or masks are made in another way: leave out --packed."
        )


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _summary(
    lesson: Lesson, method: CLI | None, units: list[list[int]], steps: int | None, total: int
) -> str:
    trained = sum(p.numel() for p in lesson.parameters() if p.requires_grad)
    added = sum(p.numel() for p in lesson.injection.parameters()) if lesson.injection else 0
    rest = f", {added:,} of them the injection's" if added and added < trained else ""
    budget = f"{steps:,} steps of" if steps else "steps of"
    conversations = sum(map(len, units))
    return (
        f"{method or 'vanilla'}: {trained:,} parameters learn{rest}; {budget} {total} sequences "
        f"from {len(units):,} with {conversations:,} conversations; the vision tower stays frozen"
    )


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
