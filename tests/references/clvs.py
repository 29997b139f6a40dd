"""Cross-layer vision smoothing (arXiv 2509.12897), slowly: full attention maps and plain loops.

Written from the paper's equations, for comparison with the fast method; it shares nothing with it.
Every layer computes its whole (B, H, Q, K) map as eager attention does, and the map's last row is
edited sample by sample. Earlier rows are never recomputed: a token's keys and values stay what they
were when that token was the last row, as in any cached decoding.

What is checked here by other means than the fast path's: the first layer's row is computed from
queries and keys as they were *before* RoPE, kept for all past tokens, and the model's own rotary
module applied to the unified positions; positions are computed from the prompt, not observed.

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
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "clvs_full_map_reference"


@dataclass(frozen=True)
class Parameters:
    """lambda, beta, tau, K of the paper, and the choices it leaves open."""

    smoothing: float = 0.8
    memory: float = 0.8
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
class Step:
    """One forward pass: what came out, and what each layer did to its last row.

    Lists are per sample. ``rows[l]`` (B, H, K) float32 are the weights used in layer l, edited or
    not; ``memory[l]`` is the memory after layer l (visual tokens of the sample,), absent where it
    was not written; ``uncertainty[l]`` is u of equation (8), absent where it was not tested;
    ``stopped[b]`` is the layer whose test ended the edits, or None.
    """

    logits: Tensor
    rows: dict[int, Tensor] = field(default_factory=dict)
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


def prompt_positions(model: PreTrainedModel, seen: dict[str, Tensor]) -> Tensor:
    """Positions (C, B, K) of a left-padded conversation; C = 3 for M-RoPE, else 1."""
    mask = seen["attention_mask"]
    if "image_grid_thw" not in seen:
        return (mask.cumsum(-1) - 1).clamp(min=0)[None]
    known = inspect.signature(model.model.get_rope_index).parameters
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{key: seen[key] for key in keys if key in known})[0]


class Reference:
    """CLVS on one model and one conversation. Use through ``run``."""

    def __init__(self, model: PreTrainedModel, parameters: Parameters) -> None:
        self.model, self.p = model, parameters
        self.decoder = model.get_decoder()
        config = self.decoder.config
        self.depth = config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or (
            ["sliding_attention" if window else "full_attention"] * self.depth
        )
        self.layers = [
            layer
            for layer in range(self.depth)
            if kinds[layer] == "full_attention"
            and (parameters.layers is None or layer in parameters.layers)
        ]
        self.first_test = math.floor(self.depth * parameters.stop_from) + 1
        self.raw_keys: Tensor | None = None  # (B, Hkv, K, D) of the first edited layer, before RoPE
        self.before_rope: tuple[Any, Tensor, Tensor] | None = None
        self.seen: dict[str, Tensor] = {}
        self.cache: Any = None

    # one forward pass

    def forward(self, turn: dict[str, Tensor], edit: bool = True) -> Step:
        """Feed a turn's inputs (B, n) on top of what was seen; edit its last row unless told."""
        turn = dict(turn)
        turn.setdefault("attention_mask", torch.ones_like(turn["input_ids"]))
        if "image_grid_thw" in self.seen or "image_grid_thw" in turn:
            turn.setdefault("mm_token_type_ids", torch.zeros_like(turn["input_ids"]))
        for key in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
            if key in turn:
                parts = [self.seen[key], turn[key]] if key in self.seen else [turn[key]]
                self.seen[key] = torch.cat(parts, dim=0 if key == "image_grid_thw" else 1)
        batch, length = turn["input_ids"].shape
        shown = turn["input_ids"] == self.model.config.image_token_id
        if "pixel_values" not in turn:
            shown = torch.zeros_like(shown)
        old = self.seen.get("visual", shown[:, :0])
        self.seen["visual"] = torch.cat([old, shown], dim=1)

        self.positions = prompt_positions(self.model, self.seen)
        given = self.positions[..., -length:]
        turn["position_ids"] = given if len(given) == 3 else given[0]
        turn["attention_mask"] = self.seen["attention_mask"]
        self.columns = [row.nonzero()[:, 0] for row in self.seen["visual"]]
        self.memory: list[Tensor | None] = [None] * batch
        self.pooled: list[Tensor | None] = [None] * batch
        self.active = [edit and len(columns) > 0 for columns in self.columns]
        self.step = Step(logits=torch.empty(0), stopped=[None] * batch)
        with torch.no_grad(), self.installed():
            out = self.model(**turn, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        self.step.logits = out.logits[:, -1].float()
        return self.step

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The reference's attention and stop test in place of the language model's own."""
        config = self.decoder.config
        attention = self.decoder.layers[0].self_attn
        modeling = sys.modules[type(attention).__module__]
        names = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")  # the latter till 5.0
        name = next(name for name in names if hasattr(modeling, name))
        rotate = getattr(modeling, name)

        def remember(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Any:
            self.before_rope = (lambda q, k, cos, sin: rotate(q, k, cos, sin, *rest), q, k)
            return rotate(q, k, cos, sin, *rest)

        ALL_ATTENTION_FUNCTIONS.register(NAME, self.attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
        before = config._attn_implementation
        config._attn_implementation = NAME
        hooks = [
            layer.register_forward_hook(
                lambda module, args, out, layer=index: self.after(
                    layer, out if isinstance(out, Tensor) else out[0]
                )
            )
            for index, layer in enumerate(self.decoder.layers)
        ]
        try:
            with mock.patch.object(modeling, name, remember):
                yield
        finally:
            config._attn_implementation = before
            for hook in hooks:
                hook.remove()

    # inside a layer

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """Eager attention over all rows (query (B, H, Q, D)), its last row edited."""
        layer, groups = module.layer_idx, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query.float() @ key.float().transpose(2, 3) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        if self.layers and layer == self.layers[0]:
            assert self.before_rope is not None
            raw = self.before_rope[2]
            old = [] if self.raw_keys is None else [self.raw_keys]
            self.raw_keys = torch.cat([*old, raw], dim=2)
        for sample, active in enumerate(self.active):
            if active and layer in self.layers:
                last = attention_mask[sample, 0, -1] if attention_mask is not None else 0.0
                weights[sample, :, -1] = self.edit(
                    layer, sample, weights[sample, :, -1], last, scaling
                )
        self.step.rows[layer] = weights[:, :, -1].clone()
        out = weights.to(value.dtype) @ value
        return out.transpose(1, 2).contiguous(), weights

    def edit(
        self, layer: int, sample: int, row: Tensor, mask: Tensor | float, scaling: float
    ) -> Tensor:
        """Equations (2) to (7) on one sample's row (H, K); the update waits for the stop test."""
        p, image = self.p, self.columns[sample]
        row = row.clone()
        if layer == self.layers[0]:
            if p.unified_positions:
                row = (self.unified_scores(sample) * scaling + mask).softmax(-1)
            self.memory[sample] = self.pool(row[:, image])
            self.note(sample, layer)
            return row
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
        return row

    def pool(self, weights: Tensor) -> Tensor:
        return weights.max(dim=0).values if self.p.pool == "max" else weights.mean(dim=0)

    def unified_scores(self, sample: int) -> Tensor:
        """The last row's scores (H, K) from raw queries and keys at the unified positions."""
        assert self.before_rope is not None
        assert self.raw_keys is not None
        rotate, query, _ = self.before_rope
        positions = unified(self.positions[:, sample], self.seen["visual"][sample])
        cos, sin = self.rotation(positions)
        keys = self.raw_keys[sample : sample + 1]
        last = query[sample : sample + 1, :, -1:]
        _, keys = rotate(keys, keys, cos, sin)
        last, _ = rotate(last, last, cos[..., -1:, :], sin[..., -1:, :])
        keys = keys.repeat_interleave(last.shape[1] // keys.shape[1], 1)
        return (last.float() @ keys.float().transpose(2, 3))[0, :, 0]

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own cos and sin (1, K, D) at positions (C, K), for full-attention layers."""
        rotary, places = self.decoder.rotary_emb, positions[:, None]
        options = inspect.signature(rotary.forward).parameters
        kind = ["full_attention"] if "layer_type" in options else []
        return rotary(self.before_rope[1], places if len(places) == 3 else places[0], *kind)

    # after a layer

    def after(self, layer: int, hidden: Tensor) -> None:
        """Equations (8), then (7), on the residual stream (B, Q, width) that leaves ``layer``."""
        p = self.p
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
                self.memory[sample] = p.memory * memory + (1 - p.memory) * pooled
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
    """Logits (B, V) of ``steps`` tokens, the first from the prompt, with CLVS as specified.

    Each further step feeds the greedy token of the one before, or column ``i`` of ``tokens``
    (B, steps - 1) where given. ``turns`` are more prompts (input_ids, and pixel_values ... as for
    the model) put on the same cache before decoding; every one adds a Step. ``prefix_only``: the
    first forward fills the cache without editing anything (a shared prefix).
    """
    reference = Reference(model, Parameters(**parameters))
    done = [reference.forward(dict(inputs), edit=not prefix_only)]
    done += [reference.forward(dict(turn)) for turn in turns]
    for i in range(steps - 1):
        token = done[-1].logits.argmax(-1) if tokens is None else tokens[:, i]
        done.append(reference.forward({"input_ids": token[:, None]}))
    return done
