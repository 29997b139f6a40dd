"""How an injection or a base is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base.errors import FoveateError

BASES = ("frozen", "lora", "full")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class Recipe:
    """The options of a training.

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
        budgets = [b for b in (self.steps, self.epochs, self.minutes) if b is not None]
        if len(budgets) > 1:
            raise FoveateError("Give one budget: steps, epochs or minutes.")
        if any(budget <= 0 for budget in budgets):
            raise FoveateError("The budget must be more than nothing.")
        if self.batch_size < 1 or self.lora_rank < 1:
            raise FoveateError("Batch size and LoRA rank must be at least 1.")
        if self.rate <= 0 or (self.base_rate is not None and self.base_rate <= 0):
            raise FoveateError("Learning rates must be positive.")
