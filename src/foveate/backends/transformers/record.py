"""The recorder: a method that reads attention and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...core import FoveateError, Method, Rows
from ...core.sequence import remembered


@dataclass(frozen=True)
class Recorder(Method, register=False):
    """Keep the last row's attention of chosen layers and steps; never a full map.

    Put it last in the stack to see what the other methods made of the weights::

        with enhance(model, "clvs", Recorder()):
            out = model.generate(**inputs, return_dict_in_generate=True)
        record = Recorder.read(out)

    Attributes:
        heads: "mean" or "max" over query heads, the mean over those of these numbers (0-based), or
            "all".
        steps: which rows to keep, 0 = the prompt's last row; None = all.
        layers: None = every full-attention layer.
    """

    heads: Literal["mean", "max", "all"] | tuple[int, ...] = "mean"
    steps: tuple[int, ...] | None = None

    name: ClassVar[str] = "recorder"
    needs_image: ClassVar[bool] = False
    example: ClassVar[dict[str, Any]] = {}

    def weights(self, rows: Rows) -> Tensor:
        memory = rows.memory
        if rows.layer == self.layers[0]:  # type: ignore[index]  # resolved before use
            if rows.phase != "decode":  # tokens of the answer are not visual
                memory["visual"] = rows.visual
            memory["steps"] = [*memory.get("steps", ()), []]
        steps = memory["steps"]
        if self.steps is None or len(steps) - 1 in self.steps:
            steps[-1].append(self._reduce(rows))
        return rows.x

    def _reduce(self, rows: Rows) -> Tensor:
        """What is kept of the last row: (B, K), or (B, H, K) of all heads."""
        last = rows.x[:, :, -1:]
        if self.heads == "mean" or self.heads == "max":
            return rows.over_heads(last, self.heads)[:, 0, 0]
        last = rows.all_heads(last)[:, :, 0]
        return last if self.heads == "all" else last[:, list(self.heads)].mean(1)

    @staticmethod
    def read(out: Any) -> Record:
        """What was recorded.

        Args:
            out: what a forward or `generate` (with ``return_dict_in_generate=True``) returned
                inside `enhance`, or its KV cache.

        Raises:
            FoveateError: if no recorder was active while the cache was filled.
        """
        kept = remembered(out, Recorder)
        if kept is not None:
            method, memory = kept
            return Record(
                layers=method.layers or (),
                visual=memory.get("visual"),
                values={
                    step: torch.stack([x.to(rows[0].device) for x in rows], 1)
                    for step, rows in enumerate(memory.get("steps", ()))
                    if rows
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
        values: step -> (B, layers, K) float32; (B, layers, H, K) for ``heads="all"``. K are the key
            columns of that step: the prompt's, then one more for every token of the answer.
        visual: (B, K) bool, the visual columns among the prompt's, so K as in step 0. Later columns
            are text.
    """

    layers: tuple[int, ...]
    values: dict[int, Tensor] = field(repr=False)
    visual: Tensor | None = field(repr=False)

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
