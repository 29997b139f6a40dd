"""Inside the model: what enters a decoder layer, shown for the edited rows, and its logits.

vLLM has no hook for hidden states. After a model is loaded, every decoder layer and the final norm
get a forward pre-hook, and what the hook does is one opaque operation: a compiled graph would
otherwise keep the Python of the warm-up, when there was nothing to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import direct_register_custom_op

from ...base.errors import FoveateError
from ...core.anatomy import Block
from ...core.rows import Stream
from ...core.sequence import Stack
from ..transformers.compat_parts import block_parts
from .admission import Shape, ShapeAnatomy, fields_of, shape
from .asked import acting
from .reading import apart
from .watch import check_entered, enter, step, watched


def ranks() -> Any:
    """The group of processes that share the heads; None where there is one."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return group if group.world_size > 1 else None


def first_rank() -> bool:
    """Whether this is the first of the processes that share the heads."""
    group = ranks()
    return group is None or group.rank_in_group == 0


@dataclass(frozen=True, eq=False, kw_only=True)
class ServedAnatomy(ShapeAnatomy):
    """The same with the weights that vLLM has loaded.

    Attributes:
        speak: its own `compute_logits`. processor: what scales and caps logits in there.
        last: its final norm. layers: its decoder layers.
    """

    speak: Callable[[Tensor], Any] = field(repr=False)
    processor: Any = field(repr=False)
    last: Any = field(repr=False)
    layers: Any = field(repr=False)

    def unembed(self, hidden: Tensor) -> Tensor:
        head = self.processor
        kept = head.scale, head.soft_cap
        head.scale, head.soft_cap = 1.0, None
        try:
            return self.all_logits(hidden)
        finally:
            head.scale, head.soft_cap = kept

    def readout(self) -> Callable[[Tensor], Tensor]:
        return self.all_logits

    def all_logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (..., V) float32 of normed states (..., D), on every rank."""
        flat = hidden.flatten(0, -2)
        logits = self.speak(flat)
        group = ranks()
        if group is not None and not self.model_gathers:
            logits = group.broadcast(
                flat.new_empty((len(flat), self.vocabulary))
                if logits is None
                else logits.contiguous()
            )
        return logits.float().unflatten(0, hidden.shape[:-1])

    @property
    def model_gathers(self) -> bool:
        """Whether every rank gets the logits."""
        from vllm.platforms import current_platform

        return bool(current_platform.use_all_gather())

    def norm(self, hidden: Tensor) -> Tensor:
        out = self.last.forward(hidden)  # not by calling it, which would pass the hook of a step
        return out[0] if isinstance(out, tuple) else out

    def block(self, layer: int) -> Block:
        super().block(layer)  # refuses a model of another shape
        parts = block_parts(self.layers[layer])
        assert parts is not None
        norm, output, second, feed_forward = (functools.partial(_alone, part) for part in parts)
        return Block(
            norm=norm,
            output=lambda heads: output(heads.flatten(-2)),
            feed_forward=lambda x: feed_forward(second(x)),
        )


def _alone(module: Any, x: Tensor) -> Tensor:
    """A part of a layer on states (..., D) of its own."""
    out = module.forward(x.flatten(0, -2).contiguous())
    out = out[0] if isinstance(out, tuple) else out  # a linear layer gives its bias, too
    new: Tensor = out.unflatten(0, x.shape[:-1])
    return new


class Served:
    """The model that this process serves.

    Attributes:
        shape: the same model of transformers, without weights.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.shape: Shape = shape(config)
        language: Any = getattr(model, "get_language_model", lambda: model)()
        decoder = language.model
        plain = self.shape.anatomy
        given = fields_of(plain)
        # vLLM decides by the checkpoint, and its configuration may say otherwise
        head, embedding = language.lm_head, decoder.embed_tokens
        given["tied"] = head is embedding or head.weight is embedding.weight
        parts: Any = {"speak": model.compute_logits, "last": decoder.norm}
        parts["layers"] = decoder.layers
        parts["processor"] = language.logits_processor
        self.anatomy = ServedAnatomy(**given, **parts)
        self.stacks: dict[str, Stack] = {}
        for number, layer in enumerate(decoder.layers):
            hook = functools.partial(_enter, number, 1)  # behind the positions
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        hook = functools.partial(_enter, len(decoder.layers), 0)
        decoder.norm.register_forward_pre_hook(hook, with_kwargs=True)
        replaced: Any = model
        replaced.compute_logits = self.compute_logits

    def stack(self, text: str) -> Stack:
        """The methods of a text, set up for the model."""
        if text not in self.stacks:
            if len(self.stacks) >= 1024:
                self.stacks.pop(next(iter(self.stacks)))
            methods, readers = apart(text)
            self.stacks[text] = Stack(self.anatomy, (*acting(methods), *readers))
        return self.stacks[text]

    def compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's logits, in a step with those of its rows edited that methods change."""
        logits: Any = self.anatomy.speak(hidden, *args, **kwargs)
        speaking = [group for group in step() if group.speaks and not group.spoke]
        if speaking:
            check_entered()
            if logits is None:
                raise FoveateError(
                    "foveate: this rank has no logits to edit; set FOVEATE_VLLM=off."
                )
            plain = logits.float()
            coupled = any(group.others for group in speaking)
            logits = plain.clone() if coupled else plain
            for group in speaking:
                group.edit(logits, plain, step())
        return logits


_served: list[Served] = []


def serve(model: nn.Module, config: Any) -> None:
    """vLLM has loaded a model."""
    _served[:] = [Served(model, config)]


def served() -> Served:
    """The model that this process serves.

    Raises:
        FoveateError: vLLM loaded it in a way that foveate did not see.
    """
    if not _served:
        raise FoveateError(
            "foveate did not see how vLLM loaded the model, so no method can run: use a version "
            "of vLLM that foveate's documentation names."
        )
    return _served[0]


def _enter(
    number: int, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a module; `place` is where its arguments begin with the states, if by position."""
    if not torch.compiler.is_compiling() and not watched():  # a compiled graph asks each time
        return
    names = ("hidden_states", "x") if place == 0 else ("hidden_states",)
    named = next((kwargs[name] for name in names if name in kwargs), None)
    hidden = args[place] if named is None else named
    given = args[place + 1] if len(args) > place + 1 else None
    torch.ops.vllm.foveate_before(hidden, kwargs.get("residual", given), number)


def _before(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    """Before decoder layer `number`, or the final norm: methods look at the rows they edit."""
    groups = step()
    if not groups or not is_forward_context_available():
        return
    if not isinstance(get_forward_context().attn_metadata, dict):  # a run to warm up
        return
    enter(number)
    for group in groups:
        state, rows = group.state, None
        for i in group.stack.at("before"):
            method = group.stack.methods[i]
            if i not in group.acting or method.reads_prompt != group.piece:
                continue
            if not group.piece and not state.acts(i):
                continue
            if rows is None:
                index = group.rows.to(hidden.device)
                rows = hidden[index] if residual is None else hidden[index] + residual[index]
                rows = rows[None] if group.piece else rows[:, None]
            method.before(Stream(rows, number), state.seen_by(i))


def _fake(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    """What a compiler traces."""


# said to change `hidden`, so that its place in the graph is kept
direct_register_custom_op("foveate_before", _before, mutates_args=["hidden"], fake_impl=_fake)
