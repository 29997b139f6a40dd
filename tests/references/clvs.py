"""Cross-layer vision smoothing (arXiv 2509.12897), slowly: full attention maps and plain loops.

Written from the paper's equations, for comparison with the fast method; it shares nothing with it.
The map's last row is edited sample by sample, on `FullMap`.

What is checked here by other means than the fast path's: nothing is re-rotated. The first layer's
attention is run again on the hidden states of all tokens so far, with the model's own rotary module
at the unified positions, and says which queries and keys it makes.

Readings of what the paper leaves open:
* "Layer 0" is the first edited layer. Layers with a sliding window are never edited and give
  nothing to the memory; ``layers`` (0-based) narrows the choice further. The stop test may follow
  any layer, once there is a memory.
* An image is a contiguous run of image tokens. Tokens that are not image tokens (row breaks, tile
  marks) end a run, so a picture cut into tiles by such marks counts as several. One memory covers
  all runs; each run has its own unified position: that of its first token, less what earlier runs
  gave up. With several position components (M-RoPE) all take that value, and what follows goes on
  counting from it by one.
* Pooling is over query heads. A text-only sample has no memory and stays plain.
* ``memory_norm``: where the memory enters equation (5) it is divided by its own sum.
* Image tokens that the model itself writes are text: the image is what the prompt gave.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.backends.transformers.compat import CACHE_NAMES
from tests.references import full
from tests.references.full import FullMap

UNUSED = ("attention_mask", *CACHE_NAMES)  # where a layer is asked once more


@dataclass(frozen=True)
class Parameters:
    """lambda, beta, tau, K of the paper, and the choices it leaves open."""

    smoothing: float = 0.8
    beta: float = 0.8
    stop_threshold: float = 0.5
    top_k: int = 10
    stop_from: float = 0.5
    stop_every: int = 1
    unified_positions: bool = True
    pool: str = "max"
    final_norm: bool = False
    memory_norm: bool = False
    mode: str = "interpolate"
    layers: tuple[int, ...] | None = None


@dataclass
class Step(full.Step):
    """One forward pass: what came out, and what each layer did to its last row.

    Lists are per sample. ``memory[l]`` is the memory after layer l (visual tokens of the sample,),
    absent where it was not written; ``uncertainty[l]`` is u of equation (8), absent where it was
    not tested; ``stopped[b]`` is the layer whose test ended the edits, or None.
    """

    memory: dict[int, list[Tensor | None]] = field(default_factory=dict)
    uncertainty: dict[int, list[float | None]] = field(default_factory=dict)
    stopped: list[int | None] = field(default_factory=list)


def unified(positions: Tensor, visual: Tensor) -> Tensor:
    """Equation (2): positions (C, K) of one sample -> the same with one position per image run."""
    out, gave_up, start = positions.clone(), 0, 0
    while start < len(visual):
        end = start + 1
        if visual[start]:
            while end < len(visual) and visual[end]:
                end += 1
            first = int(positions[:, start].min())
            out[:, start:end] = first - gave_up
            gave_up += int(positions[:, start:end].max()) - first
        else:
            out[:, start] = positions[:, start] - gave_up
        start = end
    return out


class Reference(FullMap):
    """CLVS on one model and one conversation. Use through ``run``."""

    def __init__(self, model: PreTrainedModel, parameters: Parameters) -> None:
        super().__init__(model, parameters.layers)
        self.p = parameters
        self.first_test = math.floor(self.depth * parameters.stop_from) + 1
        self.hidden: Tensor | None = None  # (B, K, width), given to the first edited layer so far
        self.given: tuple[Any, dict[str, Any]] = (None, {})  # its attention and last arguments
        self.asked: list[Tensor] | None = None  # queries and keys that it is asked for, once more

    def begin(self) -> None:
        batch = len(self.image)
        self.memory: list[Tensor | None] = [None] * batch
        self.pooled: list[Tensor | None] = [None] * batch
        self.active = [len(rows) > 0 for rows in self.queries]
        self.step: Step = Step(self.step.logits, stopped=[None] * batch)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """What the base installs, and a look at what the first layer's attention is given."""
        if not self.layers:
            with super().installed():
                yield
            return
        place = self.layers[0]
        parts = self.decoder.layers[place].modules()
        module = next(part for part in parts if getattr(part, "layer_idx", None) == place)
        hook = module.register_forward_pre_hook(self.look, with_kwargs=True)
        with super().installed():
            try:
                yield
            finally:
                hook.remove()

    def look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the arguments, and the hidden states of all tokens so far."""
        if self.asked is None:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            given = {**bound.pop("kwargs", {}), **bound}
            old = [] if self.hidden is None else [self.hidden]
            self.hidden = torch.cat([*old, given["hidden_states"]], 1)
            self.given = module, given

    # inside a layer

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **given: Any
    ) -> Any:
        if self.asked is not None:
            self.asked[:] = [query, key]
            return query.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2), None
        return super().attention(module, query, key, value, *rest, **given)

    def scores(self, layer: int, sample: int, z: Tensor) -> Tensor:
        """Equations (2) and (3), in the first layer."""
        if layer == self.layers[0] and self.p.unified_positions:
            z[:, 0] = self.unified_scores(sample) * self.scaling
        return z

    def weights(self, layer: int, sample: int, a: Tensor) -> Tensor:
        """Equations (4) to (6) on one sample's row; the update waits for the stop test."""
        p, image, row = self.p, self.image[sample], a[:, 0]
        if not self.active[sample]:
            return a
        if layer == self.layers[0]:
            self.memory[sample] = self.pool(row[:, image])
            self.note(sample, layer)
            return a
        memory = self.memory[sample]
        assert memory is not None
        self.pooled[sample] = self.pool(row[:, image])
        if p.memory_norm:
            memory = memory / memory.sum()
        for head in range(len(row)):
            if p.mode == "add":
                row[head, image] = row[head, image] + (p.smoothing - 1) * memory
            else:
                row[head, image] = p.smoothing * row[head, image] + (1 - p.smoothing) * memory
            row[head] = row[head] / row[head].sum()
        return a

    def pool(self, weights: Tensor) -> Tensor:
        return weights.max(dim=0).values if self.p.pool == "max" else weights.mean(dim=0)

    def unified_scores(self, sample: int) -> Tensor:
        """The last row's scores (H, K), from the layer's own attention at unified positions."""
        query, key = self.placed(sample, unified(self.positions[:, sample], self.visual[sample]))
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return (query[:, :, -1:].float() @ keys.float().transpose(2, 3))[0, :, 0]

    @property
    def visual(self) -> Tensor:
        return self.seen["visual"]

    def placed(self, sample: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (1, heads, K, D) of the first layer, were the tokens at `positions`."""
        module, given = self.given
        assert self.hidden is not None
        given = {k: None if k in UNUSED else v for k, v in given.items()}
        given["hidden_states"] = self.hidden[sample : sample + 1]
        if given["position_embeddings"] is not None:  # a layer without positions gets none
            given["position_embeddings"] = self.rotation(positions)
        if given.get("position_ids") is not None:  # some scale queries by where they stand
            given["position_ids"] = self.positions[0, sample : sample + 1]
        if given.get("shared_kv_states") is not None:  # where later layers find their keys
            given["shared_kv_states"] = {}
        self.asked = []
        try:
            module(**given)
            query, key = self.asked
        finally:
            self.asked = None
        return query, key

    def rotation(self, positions: Tensor) -> Any:
        """What the model's own rotary module makes of positions (C, K), for full attention."""
        rotary, places = self.decoder.rotary_emb, positions[:, None]
        options = inspect.signature(rotary.forward).parameters
        kind = ["full_attention"] if "layer_type" in options else []
        return rotary(self.hidden, places if len(places) == 3 else places[0], *kind)

    # after a layer

    def entering(self, layer: int, hidden: Tensor) -> None:
        """Equations (8), then (7), on the stream (B, Q, width) that leaves the layer below."""
        p, layer = self.p, layer - 1
        tested = layer >= self.first_test and (layer - self.first_test) % p.stop_every == 0
        for sample, active in enumerate(self.active):
            if not active or self.memory[sample] is None:
                continue
            if tested:
                u = self.uncertainty(hidden[sample, -1])
                self.step.uncertainty.setdefault(layer, [None] * len(self.active))[sample] = u
                if u < p.stop_threshold:
                    self.active[sample] = False
                    self.step.stopped[sample] = layer
                    continue
            pooled, memory = self.pooled[sample], self.memory[sample]
            if pooled is not None and memory is not None:
                self.memory[sample] = p.beta * memory + (1 - p.beta) * pooled
                self.pooled[sample] = None
                self.note(sample, layer)

    def uncertainty(self, hidden: Tensor) -> float:
        """u of equation (8) from one sample's residual stream (width,)."""
        if self.p.final_norm:
            hidden = self.decoder.norm(hidden)
        logits = self.model.get_output_embeddings()(hidden).float()
        top = logits.topk(min(self.p.top_k, len(logits))).values.softmax(-1)
        return float(-sum(w * w.log() for w in top if w > 0) / math.log(len(top)))

    def note(self, sample: int, layer: int) -> None:
        self.step.memory.setdefault(layer, [None] * len(self.active))[sample] = self.memory[sample]


def run(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    steps: int = 1,
    turns: Sequence[dict[str, Tensor]] = (),
    tokens: Tensor | None = None,
    prefix_only: bool = False,
    **parameters: Any,
) -> list[Step]:
    """`FullMap.run` with CLVS as specified."""
    reference = Reference(model, Parameters(**parameters))
    return cast(list[Step], reference.run(inputs, steps, turns, tokens, prefix_only))
