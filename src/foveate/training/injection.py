"""Training on conversations: cross-layer injection on any model it serves, and its baseline.

    tune("pocket", "conversations.jsonl", "out", Recipe(method="cli", base="frozen")) -> Tuned

What is learnt is the injection alone (base "frozen"), LoRA on the language model beside it, or the
language model and the projector themselves ("full"); the vision tower never. The method "vanilla"
trains the base alone, which is the baseline: the same data, the same steps, no injection.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backends.transformers import compat
from ..backends.transformers.anatomy import anatomy
from ..backends.transformers.enhance import attach
from ..base.errors import FoveateError
from ..base.journal import alike, difference, write_json
from ..core.method import as_stack, text
from ..methods.cli.method import CLI, SERVES
from ..vlm.vlm import VLM
from .conversations import IGNORE, Checked, Progress, Row, Writer, check, read
from .loop import WARM_UP, drawn, drop_checkpoints, fit, start

NAME = "tuning"  # of the stage in log.jsonl
BASES = ("frozen", "lora", "full")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
MOST_TOKENS = 8192  # of a sequence, where the model takes more and nobody chose


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        method: "cli(...)" in text form, a fresh injection of `seed` where it names neither seed nor
            path; or "vanilla".
        base: "frozen", "lora" or "full".
        steps, epochs, minutes: the budget, one of them; one epoch where none is given.
        batch_size: sequences per process and step. 16 on 8 processes is LLaVA-1.5's 128 (arXiv
            2310.03744).
        rate: peak learning rate of the injection. Inferred: that of LoRA in LLaVA's scripts.
        base_rate: peak learning rate of the base; None is 2e-5 for "full" (LLaVA-1.5) and
            2e-4 for "lora" (LLaVA's scripts).
        lora_rank: of each language layer's matrices, with alpha twice that (LLaVA's scripts).
        precision: "bf16", "fp16" or "no"; None is bf16 on a GPU and no elsewhere.
        checkpointing: compute activations again in the backward pass, to save memory.
        packed: conversations about one picture in one sequence.
        max_length: tokens of a sequence; None is what the model takes, at most 8192.
        skip_broken: train on the rows that are left.
        checkpoint_every: minutes.
    """

    method: str = "cli"
    base: str = "frozen"
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 16
    rate: float = 2e-4
    base_rate: float | None = None
    lora_rank: int = 128
    precision: str | None = None
    checkpointing: bool = False
    packed: bool = False
    max_length: int | None = None
    seed: int = 0
    skip_broken: bool = False
    checkpoint_every: float = 10.0

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise FoveateError(f'There is no base "{self.base}": choose frozen, lora or full.')
        if self.precision not in (None, *DTYPES):
            raise FoveateError(f'There is no precision "{self.precision}": bf16, fp16 or no.')
        budget = (self.steps, self.epochs, self.minutes)
        if sum(b is not None for b in budget) > 1:
            raise FoveateError("Give one budget: steps, epochs or minutes.")
        if any(b is not None and b <= 0 for b in budget):
            raise FoveateError("The budget must be more than nothing.")
        if self.batch_size < 1 or self.lora_rank < 1:
            raise FoveateError("Batch size and LoRA rank must be at least 1.")
        if self.rate <= 0 or (self.base_rate is not None and self.base_rate <= 0):
            raise FoveateError("Learning rates must be positive.")


@dataclass(frozen=True)
class Tuned:
    """What a run left: `model` is None where the base is as it was."""

    injection: Path | None
    model: Path | None
    method: str
    """Text form of what to ask with."""
    main: bool
    """Whether this is the process that speaks for all."""


class Lesson(nn.Module):
    """A model and its injection, and the loss of the answers' tokens.

    Only what is trained is in its state.
    """

    def __init__(self, model: Any, injection: nn.Module | None) -> None:
        super().__init__()
        self.model, self.injection = model, injection
        compat.shard_by_layer(self, model.get_decoder())
        spoken = {id(p) for p in model.get_decoder().parameters()}
        spoken |= {id(p) for p in model.get_output_embeddings().parameters()}
        self.seldom = [
            name for name, p in self.named_parameters() if p.requires_grad and id(p) not in spoken
        ]
        self.register_state_dict_post_hook(_only_trained)
        self.register_load_state_dict_post_hook(_frozen_may_miss)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of the losses of a batch of `Writer`, and how many tokens it is of."""
        labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        kept = (labels != IGNORE).any(0).nonzero().flatten()
        dtype = self.model.dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        labels = labels[:, kept]
        out = self.model(
            **inputs,
            **compat.summed_loss(labels),
            logits_to_keep=kept,
            use_cache=False,
        )
        # a batch without pictures leaves these out, which several processes must agree about
        idle = sum(self.get_parameter(name).float().sum() for name in self.seldom)
        return out.loss + 0.0 * idle, (labels != IGNORE).sum()


def _trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def _only_trained(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
    """Leave what is frozen out of a state."""
    kept = {prefix + name for name in _trained(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _frozen_may_miss(module: nn.Module, keys: Any) -> None:
    """Do not ask a state for what is frozen."""
    missed = {key.removeprefix("module.") for key in keys.missing_keys}  # DDP's own name
    keys.missing_keys[:] = sorted(missed & _trained(module))


def tune(
    model: str,
    data: Path | str,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    images: Path | str | None = None,
    revision: str | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Train on the conversations in `data` and leave what was learnt in `out`.

    `out` gets ``injection/`` (`CrossLayerInjection.save_pretrained`), ``model/`` (the whole model
    and its processor, where the base was trained), ``adapter/`` (LoRA), ``log.jsonl``, ``loss.png``
    and ``run.json``. A run that was killed goes on where it was, with the same arguments.

    Args:
        model, revision: as `VLM.load` takes them.
        images: folder of the pictures; default: the data's.
        progress: told how far the look at the data is.
        say: told what happens, a sentence at a time, in the main process only.

    Raises:
        FoveateError: on arguments that do not go together, on broken rows unless they may be
            skipped, and where `out` holds another run.
    """
    recipe, data, out = recipe or Recipe(), Path(data), Path(out)
    precision = recipe.precision or ("bf16" if torch.cuda.is_available() else "no")
    stack = as_stack(recipe.method)
    method = cast(CLI, stack[0]) if stack else None
    if len(stack) > 1 or not isinstance(method, CLI | None):
        raise FoveateError(f"{text(stack)} cannot be trained: the method is cli(...) or vanilla.")
    if method is None and recipe.base == "frozen":
        raise FoveateError("Nothing is left to train: vanilla wants --base lora or --base full.")
    if method and not method.path and method.seed is None:
        method = dataclasses.replace(method, seed=recipe.seed)
    accelerator = start(precision)
    main, device = accelerator.is_main_process, accelerator.device
    out.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32 if recipe.base == "full" else DTYPES[precision]
    place = "cpu" if _sharded(accelerator) else device
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
    run = _begun(out, settings, resume)
    if run and "loss" in run:
        if main:
            say(f"the run in {out} has ended already")
        return tuned
    rows = read(data, images)
    limit = recipe.max_length or min(_positions(vlm.model), MOST_TOKENS)
    writer = Writer(vlm.processor, vlm.model.config, _ends(vlm.model))
    accelerator.wait_for_everyone()  # before the first writes what the others look for
    if main and not run:
        checked = check(rows, writer, limit, recipe.packed, progress)
        _judge(checked, rows, recipe.skip_broken, out, say)
        write_json(out / "units.json", {"units": checked.units, "tokens": checked.tokens})
        _write_run(out, settings, {})
    accelerator.wait_for_everyone()
    units = json.loads((out / "units.json").read_text("utf-8"))["units"]

    size, total = recipe.batch_size, recipe.batch_size * accelerator.num_processes
    steps = recipe.steps
    if recipe.minutes is None and steps is None:
        steps = math.ceil((recipe.epochs or 1.0) * len(units) / total)
    first = accelerator.process_index * size

    def batches(step: int) -> dict[str, Tensor]:
        mine = drawn(len(units), total, step, recipe.seed)[first : first + size]
        groups = [[writer.example(cast(Row, rows[i])) for i in units[unit]] for unit in mine]
        return writer.packed(groups) if recipe.packed else writer.batch([g[0] for g in groups])

    injection = method.build(anatomy(vlm.model)) if method else None
    shell = copy.deepcopy(injection).cpu() if injection is not None else None
    adapted = prepare(vlm.model, recipe)
    lesson = Lesson(vlm.model, injection).train()
    tower(vlm.model).eval()
    kept: dict[str, Tensor] = {}

    def finish(trained: nn.Module) -> None:
        kept.update(accelerator.get_state_dict(trained))

    if main:
        say(_summary(lesson, method, rows, units, steps, total))
    plans = {"cli": injection} if method else None
    with warnings.catch_warnings(), attach(vlm.model, (method,) if method else (), plans=plans):
        warnings.filterwarnings("ignore", "The prompt has no image")
        clock = fit(
            lesson,
            batches,
            folder=out,
            name=NAME,
            minutes=recipe.minutes,
            steps=steps,
            warm_up=WARM_UP if steps is None else max(1, min(WARM_UP, steps // 10)),
            seed=recipe.seed,
            resume=resume,
            checkpoint_every=60 * recipe.checkpoint_every,
            log_every=1,
            accelerator=accelerator,
            optimizers=[_optimizer(lesson, recipe)],
            finish=finish,
        )
    if main:
        if shell is not None:
            shell.load_state_dict(_part(kept, "injection."))
            shell.save_pretrained(out / "injection")
        if recipe.base != "frozen":
            _save_base(vlm, kept, adapted, DTYPES[precision], out)
        losses = _losses(out)
        _draw(text(as_stack(recipe.method)), losses, out, say)
        ended = {"steps": clock.step, "seconds": round(clock.seconds, 1), "loss": losses[-1]}
        _write_run(out, settings, ended)
        drop_checkpoints(out, NAME)
    accelerator.wait_for_everyone()
    return tuned


# -- what is trained -------------------------------------------------------------------------------


def prepare(model: Any, recipe: Recipe) -> Any:
    """Freeze what is not trained and put LoRA in; returns PEFT's model, or None without LoRA."""
    model.requires_grad_(recipe.base == "full")
    tower(model).requires_grad_(False)
    if recipe.checkpointing:
        compat.start_checkpointing(model)
    if recipe.base != "lora":
        return None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise FoveateError('LoRA needs peft: pip install "foveate[train]".') from error
    decoder = model.get_decoder()
    place = next(name for name, module in model.named_modules() if module is decoder)
    linear = {n.rsplit(".")[-1] for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        target_modules=rf"{place}\..*\.({'|'.join(sorted(linear))})",
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(recipe.seed)
        return get_peft_model(model, config)


def tower(model: Any) -> nn.Module:
    """The vision tower."""
    return compat.image_encoder(model)


def _optimizer(lesson: Lesson, recipe: Recipe) -> torch.optim.Optimizer:
    base_rate = recipe.base_rate or (2e-5 if recipe.base == "full" else 2e-4)
    own: list[nn.Parameter] = []
    base: list[nn.Parameter] = []
    for name, p in lesson.named_parameters():
        if p.requires_grad:
            (own if name.startswith("injection.") else base).append(p)
    groups = [
        {"params": parameters, "lr": rate, "peak": rate}
        for rate, parameters in ((recipe.rate, own), (base_rate, base))
        if parameters
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _packable(vlm: VLM, method: CLI | None) -> None:
    if method and method.summary != "image":
        raise FoveateError(
            "Packed conversations share what a summary of the prompt would see of each: use "
            "cli(summary=image), or leave out --packed."
        )
    kind = vlm.model.config.model_type
    if kind not in SERVES:
        raise FoveateError(
            f"Packed conversations are for {', '.join(SERVES)}, not for {kind}, whose positions "
            "or masks are made in another way: leave out --packed."
        )


def _sharded(accelerator: Any) -> bool:
    return "FSDP" in str(accelerator.distributed_type)


def _positions(model: Any) -> int:
    return getattr(model.get_decoder().config, "max_position_embeddings", MOST_TOKENS)


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


# -- the folder of a run ---------------------------------------------------------------------------


def _begun(out: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """run.json of the run in `out`, if there is one to go on with."""
    path = out / "run.json"
    if not path.exists():
        return None
    if not resume:
        raise FoveateError(f"{out} holds a run already: resume it, or choose another folder.")
    run = json.loads(path.read_text("utf-8"))
    if not alike(run["settings"], settings):
        raise FoveateError(f"The run in {out} {difference(run['settings'], settings)}.")
    return run


def _write_run(out: Path, settings: dict[str, Any], ended: dict[str, Any]) -> None:
    packages = ("foveate", "torch", "transformers", "accelerate")
    versions = {name: version(name) for name in packages}
    write_json(out / "run.json", {"settings": settings, "versions": versions, **ended})


def _judge(
    checked: Checked, rows: list[Any], skip: bool, out: Path, say: Callable[[str], None]
) -> None:
    """Report broken rows, and refuse them unless they may be skipped."""
    if not checked.broken:
        return
    with (out / "broken.jsonl").open("w", encoding="utf-8") as file:
        for row in checked.broken:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")
    found = f"{len(checked.broken)} of {len(rows)} rows are broken"
    lines = "; ".join(checked.problems.lines())
    if not checked.units:
        raise FoveateError(f"All {len(rows)} rows are broken: {lines}.")
    if not skip:
        raise FoveateError(
            f"{found} ({lines}), all listed in {out / 'broken.jsonl'}: mend them, or leave them "
            "out with --skip-broken."
        )
    say(f"{found} and left out: {lines}")


def _summary(
    lesson: Lesson, method: CLI | None, rows: list[Any], units: list[Any], steps: int | None,
    total: int,
) -> str:  # fmt: skip
    trained = sum(p.numel() for p in lesson.parameters() if p.requires_grad)
    added = sum(p.numel() for p in lesson.injection.parameters()) if lesson.injection else 0
    rest = f", {added:,} of them the injection's" if added and added < trained else ""
    budget = f"{steps:,} steps of" if steps else "steps of"
    conversations = sum(map(len, units))
    return (
        f"{method or 'vanilla'}: {trained:,} parameters learn{rest}; {budget} {total} sequences "
        f"from {len(units):,} with {conversations:,} conversations; the vision tower stays frozen"
    )


def _losses(out: Path) -> list[float]:
    with (out / "log.jsonl").open(encoding="utf-8") as file:
        return [row["loss"] for row in map(json.loads, file) if row["stage"] == NAME]


def _draw(title: str, losses: list[float], out: Path, say: Callable[[str], None]) -> None:
    from ..insight.plots.loss import show_loss

    try:
        show_loss(title, losses, out / "loss.png")
    except FoveateError as error:
        say(f"no loss.png: {error}")


def _part(kept: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)}


def _save_base(
    vlm: VLM, kept: dict[str, Tensor], adapted: Any, dtype: torch.dtype, out: Path
) -> None:
    """The whole model, loaded afresh with what was learnt put in; LoRA's adapter beside it."""
    # the same commit, as a branch may have moved since
    fresh = VLM.load(vlm.name, dtype=dtype, device="cpu", revision=vlm.commit)
    base, learnt = fresh.model, _part(kept, "model.")
    if adapted is None:
        base.load_state_dict(learnt, strict=False)
    else:
        from peft import PeftModel

        state = {f"base_model.model.{k}": v for k, v in learnt.items()}
        adapted.save_pretrained(out / "adapter", state_dict=state)
        base = PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload()
    base.save_pretrained(out / "model")
    fresh.processor.save_pretrained(out / "model")
