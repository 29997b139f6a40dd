"""CLVS: cross-layer vision smoothing (arXiv 2509.12897).

A model often looks at the right object in a middle layer and has lost it a layer or two later.
CLVS keeps a memory of where the layers below have looked, mixes every head's attention to the
image with it, and stops once the layer's own prediction is certain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..backends.transformers.compat import final_norm
from ..core.method import Method
from ..core.visual import runs

if TYPE_CHECKING:
    from ..backends.transformers.attention import Rows
    from ..core.context import Context


@dataclass(frozen=True)
class CLVS(Method):
    """Cross-layer vision smoothing: each layer looks partly where the layers below it looked.

    Equations (1) to (8) of arXiv 2509.12897. Acts on the last query row of self-attention in
    prefill and at every decode step; the memory, one float32 value per visual token, is rebuilt
    from scratch at every token. The first of `layers` (layer 0 of the paper) starts the memory;
    the others are smoothed.

    Attributes:
        smoothing: lambda of eq. (5): the share of a layer's own attention, 0 to 1; 1 leaves the
            row as it is. With ``mode="add"`` the row gets ``(smoothing - 1) * memory``, so 1 or
            more. Published: 0.8 for all models.
        memory: beta of eq. (7), 0 to 1: how much of the memory a layer keeps. None = the published
            value of the family: 0.7 for LLaVA-NeXT and Qwen, 0.8 for others.
        stop_threshold: tau: once the uncertainty u of eq. (8), 0 to 1, falls below it, the layers
            above run plain. 0 or less never stops and costs nothing.
        top_k: tokens that u is computed over, as in the authors' code.
        stop_from: the first layer tested is the first strictly after this relative depth, as in
            the authors' code; the paper's words also allow "from".
        stop_every: test every n-th layer; 1 as published.
        unified_positions: eq. (2): give all tokens of an image the position of its first token
            in layer 0 and move later tokens up. "visual" leaves later tokens where they are.
            Inferred, as the paper does not define them: several images are unified one by one
            (an image is a contiguous run of visual tokens), with one memory over all; under
            M-RoPE all three components are unified and text continues one position later.
        pool: how heads are pooled into the memory; "max" as published. With grouped key/value
            heads the pool is over query heads (inferred).
        final_norm: apply the final norm before unembedding in eq. (8); the authors' code does not.
        memory_norm: use the memory divided by its sum over the image; the authors' code does not.
        mode: "interpolate" is eq. (5); "add" is in the authors' code only.
    """

    smoothing: float = 0.8
    memory: float | None = None
    stop_threshold: float = 0.5
    top_k: int = 10
    stop_from: float = 0.5
    stop_every: int = 1
    unified_positions: bool | Literal["visual"] = True
    pool: Literal["max", "mean"] = "max"
    final_norm: bool = False
    memory_norm: bool = False
    mode: Literal["interpolate", "add"] = "interpolate"

    name: ClassVar[str] = "clvs"
    paper: ClassVar[str] = "2509.12897"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"memory": 0.8},
        "llava_next": {"memory": 0.7},
        "qwen": {"memory": 0.7},
    }
    neutral: ClassVar[dict[str, Any]] = {"smoothing": 1.0, "unified_positions": False}
    example: ClassVar[dict[str, Any]] = {"smoothing": 0.6, "stop_threshold": 0.0}

    def check(self) -> None:
        if self.mode == "add":
            self.require(self.smoothing >= 1, "smoothing must be 1 or more with mode='add'")
        else:
            self.require(
                0 <= self.smoothing <= 1,
                "smoothing must lie between 0 and 1 (above 1 only with mode='add')",
            )
        self.require(self.memory is None or 0 <= self.memory <= 1, "memory must lie in 0 to 1")
        self.require(self.top_k >= 2, "top_k must be 2 or more")
        self.require(0 <= self.stop_from <= 1, "stop_from must lie between 0 and 1")
        self.require(self.stop_every >= 1, "stop_every must be 1 or more")

    def setup(self, model: Any) -> SimpleNamespace:
        layers = self.layers or ()
        decoder = model.get_decoder()
        depth = decoder.config.num_hidden_layers
        tested = range(math.floor(self.stop_from * depth) + 1, depth, self.stop_every)
        if self.stop_threshold <= 0 or not layers:
            tested = range(0)
        return SimpleNamespace(
            first=layers[0] if layers else -1,
            # a test after the last smoothed layer could stop nothing
            tested=frozenset(layer for layer in tested if layer < layers[-1]),
            unembed=model.get_output_embeddings(),
            norm=final_norm(decoder) if self.final_norm else None,
        )

    # -- layer 0: unified positions, eq. (2) and (3) -----------------------------------------------

    def scores(self, rows: Rows) -> Tensor:
        if rows.layer != rows.plan.first or self.unified_positions is False:
            return rows.x
        if rows.ctx.phase != "decode":
            self._unify(rows)
        memory = rows.memory
        query = rows.query
        if self.unified_positions is True:
            query = rows.rotate(query, memory["turn"])
            # before the image nothing moved, after it everything did: only the query is turned
            x = torch.where(rows.after[:, None, None], rows.x, rows.dot(query, rows.key))
        else:
            x = rows.x
        index = memory["columns"][:, None, None].expand(-1, x.shape[1], 1, -1)
        return x.scatter(3, index, rows.dot(query, memory["keys"]))

    def _unify(self, rows: Rows) -> None:
        """Once per prompt: re-rotate the cached keys of layer 0 from the first to the last image.

        Rotations compose, so a key rotated to position p and turned by p~ - p is the key at p~.
        """
        ctx, memory = rows.ctx, rows.memory
        positions, visual = ctx.positions, ctx.visual
        number = runs(visual)  # (B, P)
        delta = torch.zeros_like(positions)
        shift = torch.zeros_like(positions[:, :, :1])  # what text moves by, so far
        for n in range(1, int(number.max()) + 1):
            inside = number == n
            start = inside.int().argmax(1)[None, :, None].expand(len(positions), -1, 1)
            first = positions.gather(2, start)
            delta = torch.where(inside, first - positions - shift, delta)
            if self.unified_positions is True:
                end = positions.masked_fill(~inside, -1).amax((0, 2), keepdim=True)
                grown = torch.where(inside.any(1)[None, :, None], end - first, 0)
                shift = shift + grown
                later = torch.arange(visual.shape[1], device=visual.device) > start
                delta = torch.where(later & ~inside & inside.any(1)[:, None], -shift, delta)
        span = (ctx.last - ctx.first + 1).clamp(min=1)
        column = torch.arange(int(span.max()), device=visual.device)
        column = ctx.first.clamp(max=visual.shape[1] - 1)[:, None] + column.minimum(
            span[:, None] - 1
        )
        column = torch.where(ctx.has_image[:, None], column, 0)
        delta = delta.gather(2, column.expand(len(positions), -1, -1))
        column = column.to(rows.key.device)
        wide = column[:, None, :, None].expand(-1, rows.key.shape[1], -1, rows.key.shape[3])
        memory["columns"] = column
        memory["keys"] = rows.rotate(rows.key.gather(2, wide), rows.rotation(delta))
        memory["turn"] = rows.rotation(-shift)

    # -- memory and smoothing, eq. (4) to (7) ------------------------------------------------------

    def weights(self, rows: Rows) -> Tensor:
        x, memory = rows.x, rows.memory
        pooled = x.amax(1, keepdim=True) if self.pool == "max" else x.mean(1, keepdim=True)
        if rows.layer == rows.plan.first:
            # (B, 1, 1, K): what the memory weighs in visual columns; nothing elsewhere
            share = 1 - self.smoothing if self.mode == "interpolate" else self.smoothing - 1
            memory["share"] = rows.visual[:, None, None].float() * share
            memory["vision"] = pooled
            memory.pop("active", None)
            return x
        share, vision = memory["share"].to(x.device), memory["vision"].to(x.device)
        used = vision
        if self.memory_norm:
            total = (vision * rows.visual[:, None, None]).sum(-1, keepdim=True)
            used = vision / total.clamp(min=1e-12)
        if self.mode == "interpolate":
            smoothed = torch.lerp(x, used, share)
        else:
            smoothed = torch.addcmul(x, used, share)
        smoothed = smoothed / smoothed.sum(-1, keepdim=True)
        memory["vision"] = torch.lerp(pooled, vision, self.memory)  # type: ignore[arg-type]
        if "active" in memory:
            smoothed = torch.where(memory["active"].to(x.device)[:, None, None, None], smoothed, x)
        return smoothed

    # -- uncertainty, eq. (8) ----------------------------------------------------------------------

    def before(self, hidden: Tensor, ctx: Context, layer: int) -> Tensor:
        if layer - 1 not in ctx.plan.tested or ctx.phase == "prefix":
            return hidden
        memory = ctx.memory
        active = self.uncertainty(hidden[:, -1], ctx.plan) >= self.stop_threshold
        if "active" in memory:
            active &= memory["active"].to(active.device)
        memory["active"] = active
        if not torch.compiler.is_compiling() and not bool(active.any()):  # a wait for the device
            ctx.rest()
        return hidden

    def uncertainty(self, hidden: Tensor, plan: SimpleNamespace) -> Tensor:
        """u of eq. (8), (B,) float32 between 0 and 1, from the residual stream (B, D)."""
        if plan.norm is not None:
            hidden = plan.norm(hidden)
        logits = plan.unembed(hidden.to(plan.unembed.weight.device)).float()
        top = min(self.top_k, logits.shape[-1])
        chances = logits.topk(top, dim=-1).values.softmax(-1)
        return torch.special.entr(chances).sum(-1) / math.log(top)
