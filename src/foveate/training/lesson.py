"""What of a model is trained, and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backends.transformers import compat_parts
from ..base.errors import FoveateError
from .recipe import Recipe
from .writer import IGNORE


class Lesson(nn.Module):
    """A model and its injection, and the loss of the answers' tokens.

    Its state holds only what is trained.
    """

    def __init__(self, model: Any, injection: nn.Module | None) -> None:
        super().__init__()
        self.model, self.injection = model, injection
        compat_parts.shard_by_layer(self, model.get_decoder())
        spoken = {id(p) for p in model.get_decoder().parameters()}
        spoken |= {id(p) for p in model.get_output_embeddings().parameters()}
        self.with_pictures = [
            name for name, p in self.named_parameters() if p.requires_grad and id(p) not in spoken
        ]
        self.register_state_dict_post_hook(_only_trained)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of the losses of a batch of `Writer`, and the number of tokens it sums."""
        labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        kept = (labels != IGNORE).any(0).nonzero().flatten()
        dtype = self.model.dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        labels = labels[:, kept]
        out = self.model(
            **inputs, **compat_parts.summed_loss(labels), logits_to_keep=kept, use_cache=False
        )
        # A batch without pictures does not use these, but all processes must agree on gradients.
        unused = sum(self.get_parameter(name).float().sum() for name in self.with_pictures)
        return out.loss + 0.0 * unused, (labels != IGNORE).sum()


def _trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def _only_trained(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
    """Leave what is frozen out of a state."""
    kept = {prefix + name for name in _trained(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def prepare(model: Any, recipe: Recipe) -> Any:
    """Freeze what is not trained and put LoRA in; returns PEFT's model, or None without LoRA."""
    model.requires_grad_(recipe.base == "full")
    compat_parts.image_encoder(model).requires_grad_(False)
    if (projector := compat_parts.projector(model)) is not None:  # which may stand in the tower
        projector.requires_grad_(recipe.base == "full")
    if recipe.checkpointing:
        compat_parts.start_checkpointing(model)
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


def make_optimizer(lesson: Lesson, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW without weight decay, each group with its peak rate under "peak"."""
    base_rate = recipe.base_rate or (2e-5 if recipe.base == "full" else 2e-4)
    injection: list[nn.Parameter] = []
    base: list[nn.Parameter] = []
    for name, p in lesson.named_parameters():
        if p.requires_grad:
            (injection if name.startswith("injection.") else base).append(p)
    groups = [
        {"params": parameters, "lr": rate, "peak": rate}
        for rate, parameters in ((recipe.rate, injection), (base_rate, base))
        if parameters
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)
