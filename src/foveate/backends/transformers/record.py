"""The recorder: a method that reads attention and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...base.errors import FoveateError
from ...core.method import Method
from .compat import cache_of

if TYPE_CHECKING:
    from .attention import Rows


@dataclass(frozen=True)
class Recorder(Method, register=False):
    """Keep the last row's attention of chosen layers and steps; never a full map.

    Put it last in the stack to see what the other methods made of the weights::

        with enhance(model, "clvs", Recorder()):
            out = model.generate(**inputs, return_dict_in_generate=True)
        record = Recorder.read(out)

    Attributes:
        keep: "weights" (a value per key column), "entropy" (nats, of the row as it is), "mass"
            (the sum over `tokens`).
        heads: "mean" or "max" over query heads (of whatever is kept), or "all".
        tokens: for "mass": key columns (0-based, padding included), or "visual".
        steps: which rows to keep, 0 = the prompt's last row; None = all.
        layers: None = every full-attention layer.
    """

    keep: Literal["weights", "entropy", "mass"] = "weights"
    heads: Literal["mean", "max", "all"] = "mean"
    tokens: tuple[int, ...] | Literal["visual"] = "visual"
    steps: tuple[int, ...] | None = None

    name: ClassVar[str] = "recorder"
    needs_image: ClassVar[bool] = False
    example: ClassVar[dict[str, Any]] = {}

    def weights(self, rows: Rows) -> Tensor:
        memory = rows.memory
        if rows.layer == self.layers[0]:  # type: ignore[index]  # resolved before use
            memory["visual"] = rows.visual
            memory["step"] = memory.get("step", -1) + 1
            memory.setdefault("steps", {})
        step = memory["step"]
        if self.steps is None or step in self.steps:
            memory["steps"].setdefault(step, []).append(self._reduce(rows))
        return rows.x

    def _reduce(self, rows: Rows) -> Tensor:
        x = rows.x[:, :, -1]
        if self.keep == "entropy":
            x = torch.special.entr(x).sum(-1)
        elif self.keep == "mass":
            if self.tokens == "visual":
                x = (x * rows.visual[:, None]).sum(-1)
            else:
                x = x[:, :, list(self.tokens)].sum(-1)
        if self.heads == "mean":
            return x.mean(1)
        return x.amax(1) if self.heads == "max" else x

    @staticmethod
    def read(out: Any) -> Record:
        """What was recorded.

        Args:
            out: what a forward or `generate` (with ``return_dict_in_generate=True``) returned
                inside `enhance`, or its KV cache.

        Raises:
            FoveateError: if no recorder was active while the cache was filled.
        """
        ctx: Any = getattr(cache_of(out), "foveate", None)
        for i, method in enumerate(ctx.stack.methods if ctx else ()):
            if isinstance(method, Recorder):
                memory = ctx.memories[i]
                return Record(
                    layers=method.layers or (),
                    visual=memory.get("visual"),
                    values={
                        step: torch.stack([x.to(found[0].device) for x in found], 1)
                        for step, found in memory.get("steps", {}).items()
                    },
                )
        raise FoveateError(
            "Nothing was recorded: put Recorder() into enhance() and pass what the model or "
            "generate(..., return_dict_in_generate=True) returned."
        )


@dataclass(frozen=True)
class Record:
    """Recorded rows.

    Attributes:
        layers: the recorded layers, in order.
        values: step -> (B, layers, K) float32 for head-reduced weights; without K for "entropy"
            and "mass", with a heads axis after layers for ``heads="all"``.
        visual: (B, K) bool, the visual columns.
    """

    layers: tuple[int, ...]
    values: dict[int, Tensor]
    visual: Tensor | None

    def row(self, row: int) -> Record:
        """What belongs to one sample, B = 1."""
        values = {step: kept[row : row + 1] for step, kept in self.values.items()}
        visual = None if self.visual is None else self.visual[row : row + 1]
        return replace(self, values=values, visual=visual)

    def image(self, step: int = 0) -> list[Tensor]:
        """Weights on the visual tokens, one (layers, N_v) or (layers, H, N_v) per sample."""
        if self.visual is None:
            raise FoveateError("The recorded prompt has no image.")
        values = self.values[step]
        visual = self.visual[:, : values.shape[-1]]
        return [v[..., m.to(v.device).nonzero()[:, 0]] for v, m in zip(values, visual, strict=True)]
