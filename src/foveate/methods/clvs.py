"""CLVS: cross-layer vision smoothing (arXiv 2509.12897).

A model often looks at the right object in a middle layer and has lost it a layer or two later.
CLVS keeps a memory of where the layers below have looked, mixes every head's attention to the
image with it, and stops once the layer's own prediction is certain.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..core import Anatomy, Method, Mixing, Rows, Sequences, Simple, Stream
from ..core.visual import runs


class Plan(NamedTuple):
    """What CLVS needs to know of a model.

    Attributes:
        tested: the layers after which u is computed. moves: whether positions are unified.
    """

    anatomy: Anatomy
    tested: frozenset[int]
    moves: bool


@dataclass(frozen=True)
class CLVS(Method):
    """Cross-layer vision smoothing: each layer looks partly where the layers below it looked.

    Equations (1) to (8) of arXiv 2509.12897. Acts on the last query row of self-attention in
    prefill and at every decode step. The vision memory M, one float32 value per visual token, is
    rebuilt from scratch at every token. The first of `layers` (layer 0 of the paper) starts M; the
    others are smoothed.

    Attributes:
        smoothing: lambda of eq. (5): the share of a layer's own attention, 0 to 1; 1 leaves the
            row as it is. With ``mode="add"`` the row gets ``(smoothing - 1) * M``, so 1 or more.
            Published: 0.8 for all models.
        beta: of eq. (7), 0 to 1: how much of M a layer keeps. None: the published value of the
            family: 0.7 for LLaVA-NeXT and Qwen, 0.8 for others.
        stop_threshold: tau, any number. Once the uncertainty u of eq. (8), which is never below 0
            nor above 1, falls below it, the layers above run plain. 0 or less never stops and
            costs nothing. Each test is a product with the output embeddings, which is dear where
            the vocabulary is large: `foveate doctor --model M` says how dear.
        top_k: how many tokens u is computed over, 2 or more. The authors' code: 10.
        stop_from: the first layer tested is the first strictly after this relative depth, 0 to 1,
            as in the authors' code; the paper's words also allow "from".
        stop_every: test every n-th layer, 1 or more. Published: 1.
        unified_positions: eq. (2): give all tokens of an image the position of its first token
            in layer 0 and move later tokens up. "visual" leaves later tokens where they are.
            Inferred, as the paper does not define them: several images are unified one by one
            (an image is a contiguous run of visual tokens), with one M over all; under
            M-RoPE all three components are unified and text continues one position later.
        pool: how heads are pooled into M; "max" as published. With grouped key/value
            heads the pool is over query heads (inferred).
        final_norm: apply the final norm before unembedding in eq. (8); the authors' code does not.
        memory_norm: use M divided by its sum over the image; the authors' code does not.
        mode: "interpolate" is eq. (5); "add" is in the authors' code only.
    """

    smoothing: float = 0.8
    beta: float | None = None
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
        "": {"beta": 0.8},
        "llava_next": {"beta": 0.7},
        "qwen": {"beta": 0.7},
    }
    neutral: ClassVar[dict[str, Any]] = {"smoothing": 1.0, "unified_positions": False}
    example: ClassVar[dict[str, Any]] = {"smoothing": 0.6, "stop_threshold": 0.0}
    remembers: ClassVar[bool] = False  # M is rebuilt, and keys may be moved again

    def check(self) -> None:
        if self.mode == "add":
            self.require(self.smoothing >= 1, "smoothing must be 1 or more with mode='add'")
        else:
            self.require(
                0 <= self.smoothing <= 1,
                "smoothing must lie between 0 and 1 (above 1 only with mode='add')",
            )
        self.require(self.beta is None or 0 <= self.beta <= 1, "beta must lie between 0 and 1")
        self.require(self.top_k >= 2, "top_k must be 2 or more")
        self.require(0 <= self.stop_from <= 1, "stop_from must lie between 0 and 1")
        self.require(self.stop_every >= 1, "stop_every must be 1 or more")

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and (stage != "before" or self.stop_threshold > 0)

    @property
    def columns(self) -> Literal["visual", "through", "all"]:  # type: ignore[override]
        return "visual" if self.unified_positions is False else "through"

    def setup(self, anatomy: Anatomy) -> Plan:
        layers = self.layers or ()
        moves = bool(layers) and self.unified_positions is not False
        if moves and not anatomy.turns(layers[0]):
            moves = False
            warnings.warn(
                f"clvs: layer {layers[0]} of {anatomy.kind} has no position embedding, so unified "
                "positions change nothing there.",
                stacklevel=2,
            )
        if self.stop_threshold <= 0 or not layers:
            return Plan(anatomy, frozenset(), moves)
        start = math.floor(self.stop_from * anatomy.depth) + 1
        tested = range(start, anatomy.depth, self.stop_every)
        # a test after the last smoothed layer could stop nothing
        return Plan(anatomy, frozenset(layer for layer in tested if layer < layers[-1]), moves)

    def is_first(self, layer: int) -> bool:
        """Whether a layer is layer 0 of the paper."""
        return bool(self.layers) and layer == self.layers[0]  # type: ignore[index]

    # -- layer 0: unified positions, eq. (2) and (3) -----------------------------------------------

    def scores(self, rows: Rows) -> Tensor:
        if not rows.plan.moves or not self.is_first(rows.layer):
            return rows.x
        if rows.phase != "decode" or not rows.has_moved:
            rows.move(*self.unified(rows.seq))
        return rows.moved()

    def unified(self, seq: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
        """Eq. (2) as differences of positions: what moves, by how much, and the text after it.

        Returns:
            Key columns from the first to the last image, (B, N) int64; what each of them moves by,
            (C, B, N) int64; what the text after the last image moves by, (C, B, 1) int64, or None
            where it stays.
        """
        p, image = seq.positions, runs(seq.visual)  # (C, B, P) and (B, P)
        by, later = torch.zeros_like(p), torch.zeros_like(p[:, :, :1])
        column = torch.arange(image.shape[1], device=image.device)
        for n in range(1, int(image.max()) + 1):
            inside = image == n
            there = inside.any(1)[:, None]
            start = inside.int().argmax(1)[:, None]
            first = p.gather(2, start.expand(len(p), -1, -1))
            by = torch.where(inside, first + later - p, by)  # all of an image at its first token
            if self.unified_positions is True:  # and the tokens after it follow
                last = p.masked_fill(~inside, -1).amax((0, 2), keepdim=True)
                later = torch.where(there, later + first - last, later)
                by = torch.where(there & (column > start) & ~inside, later, by)
        first, last = seq.first[:, None], seq.last[:, None]
        count = int((last - first).amax().clamp(min=0)) + 1
        columns = (first + column[:count]).minimum(last).clamp(0, image.shape[1] - 1)
        by = by.gather(2, columns.expand(len(p), -1, -1))
        return columns, by, later if self.unified_positions is True else None

    # -- memory and smoothing, eq. (4) to (7) ------------------------------------------------------

    def weights(self, rows: Rows) -> Tensor:
        a, memory, beta = rows.x, rows.memory, self.beta
        pooled = rows.over_heads(a, self.pool)  # (B, 1, 1, K)
        if self.is_first(rows.layer):
            memory["M"] = pooled  # (4)
            share = 1 - self.smoothing if self.mode == "interpolate" else self.smoothing - 1
            memory["share"] = rows.visual[:, None, None].float() * share  # 0 beside the image
            memory.pop("active", None)
            return a
        M, share = memory["M"].to(a.device), memory["share"].to(a.device)
        memory["M"] = torch.lerp(pooled, M, beta)  # type: ignore[arg-type]  # (7): b M + (1 - b) pooled
        if self.memory_norm:
            total = (M * rows.visual[:, None, None]).sum(-1, keepdim=True)
            M = M / total.clamp(min=1e-12)
        if self.mode == "interpolate":
            smoothed = torch.lerp(a, M, share)  # (5) s a + (1 - s) M on the image, a elsewhere
        else:
            smoothed = torch.addcmul(a, M, share)
        smoothed = smoothed / smoothed.sum(-1, keepdim=True)  # (6)
        if "active" in memory:
            smoothed = torch.where(memory["active"].to(a.device)[:, None, None, None], smoothed, a)
        return smoothed

    def simple(self, rows: Rows) -> Simple | None:
        if self.is_first(rows.layer) or self.memory_norm or self.beta is None:
            return None
        pull, push = 1 - self.smoothing, 0.0
        if self.mode == "add":
            pull, push = 0.0, self.smoothing - 1
        gate = "active" if "active" in rows.memory else ""
        return Simple(
            mixing=Mixing("M", self.beta, 1 - self.beta, self.pool, pull, push, gate=gate)
        )

    # -- uncertainty, eq. (8) ----------------------------------------------------------------------

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        plan: Plan = seq.plan
        if stream.layer - 1 not in plan.tested or seq.phase == "prefix":
            return stream.x
        memory = seq.memory
        active = self.uncertainty(stream.last, plan.anatomy) >= self.stop_threshold
        if "active" in memory:
            active &= memory["active"].to(active.device)
        memory["active"] = active
        if not torch.compiler.is_compiling() and not bool(active.any()):  # a wait for the device
            seq.rest()
        return stream.x

    def uncertainty(self, hidden: Tensor, anatomy: Anatomy) -> Tensor:
        """u of eq. (8), (B,) float32 between 0 and 1, from the residual stream (B, D)."""
        z = anatomy.unembed(anatomy.norm(hidden) if self.final_norm else hidden)
        top = min(self.top_k, z.shape[-1])
        pi = z.topk(top, dim=-1).values.softmax(-1)
        return torch.special.entr(pi).sum(-1) / math.log(top)  # -sum pi ln pi / ln K
