"""VAR: visual attention redistribution (arXiv 2503.03321).

Some image tokens carry huge values in a few fixed dimensions and draw attention while they show
nothing: sinks. In heads that look at the image, VAR takes part of what the sinks get and gives it
to the other image tokens.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import Anatomy, FoveateError, Method, Rows, Sequences, Stream, costly
from ..core.sequence import remembered

# text_model_type, hidden_size, layers, attention_heads, key_value_heads (, vocab_size)
KNOWN: dict[tuple[Any, ...], tuple[int, ...]] = {
    ("llama", 4096, 32, 32, 32): (1415, 2533),  # LLaMA-2 7B, Vicuna 7B: in the authors' code
    ("llama", 5120, 40, 40, 40): (2100, 4743),  # LLaMA-2 13B, Vicuna 13B: in the authors' code
    ("qwen2_vl_text", 3584, 28, 28, 4): (458, 2570),  # Qwen2-VL 7B: reported from the paper
    # InternVL2 8B: reported from the paper; the vocabulary tells InternLM2 from LLaMA 3
    ("internlm2", 4096, 32, 32, 8): (3584,),
    ("llama", 4096, 32, 32, 8, 92553): (3584,),
}


@dataclass(frozen=True)
class VAR(Method):
    """Visual attention redistribution, from sink tokens to the rest of the image.

    A token is a sink of a layer where phi, its largest absolute value in `sink_dims` of the
    residual stream entering that layer, divided by the stream's root mean square, exceeds
    `sink_threshold`. Sinks are found in the prompt, anew for every request, and frozen while
    decoding; a further turn adds its own, generated tokens never are. (Text of an earlier turn
    that came before any image is not looked at.)

    Acts on the rows after the last image, in the prompt and at every decode step: a head whose
    row passes both filters below gives ``1 - keep`` of what its sinks get, on the image and on
    text, to the other image tokens, each in proportion to its weight. Row sums do not change.
    Decided per sample, head and row. A row without a sink on the image, or with nothing but sinks
    there, stays as it is.

    The values are the defaults of the authors' code. It thresholds the share of sinks and *keeps*
    `keep`, where the paper thresholds the share of other tokens, rho, and *removes* p: that is
    ``max_sink_fraction=1-rho, keep=1-p``. Where the code departs from the paper, the paper is
    followed: the code also edits the last layer (``layers=tuple(range(2, 32))``), uses the 7B
    dimensions for 13B (``sink_dims=(1415, 2533)``), and finds no sinks from the second sample on,
    which is not offered.

    As phi is at most the square root of the hidden size, no model of width 400 or less has a sink
    at the published threshold: VAR does nothing on the pocket model.

    Attributes:
        sink_threshold: tau, 0 or more. Published: 20.
        max_sink_fraction: largest share of the sinks in a row's attention to the image, 0 to 1,
            from which the head counts as looking at the image; 0.5 as published for
            hallucination (the paper: 0.2 for general, 0.1 for vision-centric tasks).
        min_visual_mass: least attention to the image, 0 to 1; 0.2 in the authors' code.
        keep: what sinks keep of their attention, 0 to 1; 1 leaves the row as it is. 0.6 in the
            authors' code.
        sink_dims: dimensions of the residual stream. None: the published ones of LLaMA-2 and
            Vicuna 7B and 13B, Qwen2-VL 7B and InternVL2 8B, known by architecture and shape;
            for other models found by `find_sink_dims` (inferred). Empty: VAR does nothing.
    """

    sink_threshold: float = 20.0
    max_sink_fraction: float = 0.5
    min_visual_mass: float = 0.2
    keep: float = 0.6
    sink_dims: tuple[int, ...] | None = costly(None, limit=16)

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = "2503.03321"
    rows: ClassVar = "text"
    reads_prompt: ClassVar[bool] = True
    paper_layers: ClassVar = (2, ..., -2)
    neutral: ClassVar[dict[str, Any]] = {"keep": 1.0}
    example: ClassVar[dict[str, Any]] = {
        "sink_threshold": 1.0,
        "max_sink_fraction": 0.9,
        "min_visual_mass": 0.05,
        "keep": 0.1,
        "sink_dims": (3, 17),
    }

    def check(self) -> None:
        self.require(self.sink_threshold >= 0, "sink_threshold must be 0 or more")
        for name in ("max_sink_fraction", "min_visual_mass", "keep"):
            self.require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1")
        self.require(
            all(m >= 0 for m in self.sink_dims or ()), "sink_dims are counted from 0 upwards"
        )

    @property
    def is_neutral(self) -> bool:
        """Whether nothing can move: sinks keep all, or there are no dimensions to tell them by."""
        return self.keep == 1 or self.sink_dims == ()

    def wants(self, stage: str) -> bool:
        return super().wants(stage) and self.sink_dims != ()

    def resolve(self, anatomy: Anatomy) -> Method:
        """The same method with layers and `sink_dims` filled in for a model.

        On a model without weights (on the meta device) unknown dimensions stay None. Where no
        dimension qualifies, a warning says so and `sink_dims` is empty.
        """
        resolved: Any = super().resolve(anatomy)
        dims = known_sink_dims(anatomy) if self.sink_dims is None else self.sink_dims
        if dims is None:
            dims = find_sink_dims(anatomy, self.sink_threshold)
        for m in dims or ():
            if m >= anatomy.width:
                raise FoveateError(
                    f"var: there is no dimension {m}, this model's residual stream has 0 to "
                    f"{anatomy.width - 1}."
                )
        return dataclasses.replace(resolved, sink_dims=dims)

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        layer, x = stream.layer, stream.x
        if seq.phase == "decode" or layer not in (self.layers or ()):
            return x
        peak = torch.stack([x[..., m].abs() for m in self.sink_dims or ()], -1).amax(-1)
        phi = peak.float() / _rms(x)  # (B, Q)
        sink = phi > self.sink_threshold
        start = seq.visual.shape[1] - sink.shape[1]
        visual = seq.visual[:, start:].to(x.device)
        # (B, Q, 3): sinks; what else shows the image; sinks among the image's tokens
        sets = torch.stack([sink, visual & ~sink, visual & sink], -1).float()
        if start:  # generated tokens in between are in no set; a cropped cache has fewer columns
            old = seq.memory.get(f"sets {layer}", sets[:, :0])
            sets = torch.cat([pad(old, (0, 0, 0, start - old.shape[1])), sets], 1)
        seq.memory[f"sets {layer}"] = sets
        _, content, sinks = sets.sum(1, keepdim=True).unbind(-1)  # (B, 1) each: how many tokens
        slack = self.max_sink_fraction * 1e-6 * (content + sinks)
        seq.memory[f"slack {layer}"] = slack.masked_fill(sinks == 0, -math.inf)
        return x

    def weights(self, rows: Rows) -> Tensor:
        a, memory = rows.x, rows.memory
        sets, slack = memory[f"sets {rows.layer}"], memory[f"slack {rows.layer}"]
        sets = sets[:, : a.shape[3]]  # an engine may leave out columns that no row here sees
        known = sets.shape[1]
        prompt = a[..., :known].flatten(1, 2)  # (B, H * R, P), a view
        # what a row gives to all sinks, to the image's content, to the sinks on the image
        to_sinks, to_content, to_image_sinks = torch.bmm(prompt, sets).unbind(-1)
        mass = to_content + to_image_sinks
        # to_image_sinks / (mass + 1e-6 per visual token) <= max_sink_fraction, as in their code
        looks = to_image_sinks <= torch.add(slack, mass, alpha=self.max_sink_fraction)
        looks = looks & (mass >= self.min_visual_mass) & (to_content > 0)
        removed = looks * (1 - self.keep)  # of every sink's weight; content gains in proportion
        gained = removed * to_sinks / to_content.clamp(min=1e-12)
        factors = torch.bmm(torch.stack([-removed, gained], -1), sets[..., :2].transpose(1, 2))
        edited = torch.addcmul(prompt, prompt, factors).unflatten(1, a.shape[1:3])
        return edited if known == a.shape[3] else torch.cat([edited, a[..., known:]], -1)

    @staticmethod
    def sinks(out: Any) -> dict[int, Tensor]:
        """Layer -> which prompt columns are sinks, (B, P) bool.

        To check `sink_dims` on a model: the visual ones among them should lie on background, as
        ``grid.heat(VAR.sinks(out)[layer][0][visual])`` shows.

        Args:
            out: what a forward or `generate` returned inside `enhance`, or its KV cache.

        Raises:
            FoveateError: if VAR was not active there.
        """
        kept = remembered(out, VAR)
        if kept is not None:
            sets = {k: v for k, v in kept[1].items() if k.startswith("sets ")}
            return {int(k.removeprefix("sets ")): v[..., 0] > 0 for k, v in sets.items()}
        raise FoveateError(
            "No sinks were looked for: put VAR() into enhance() and pass what the model or "
            "generate(..., return_dict_in_generate=True) returned."
        )


def known_sink_dims(anatomy: Anatomy) -> tuple[int, ...] | None:
    """The published sink dimensions of a model of this architecture and shape, or None."""
    _, *key, vocabulary = anatomy.shape.values()
    return KNOWN.get(tuple(key), KNOWN.get((*key, vocabulary)))


def find_sink_dims(anatomy: Anatomy, threshold: float) -> tuple[int, ...] | None:
    """Dimensions that are extreme where every text has a sink: at its first token.

    Being first is what makes a sink, so one pass over the BOS token alone tells. A dimension
    qualifies if its absolute value divided by the root mean square of the stream exceeds
    `threshold` on entering more than half of the middle layers, which are those from a quarter of
    the depth up to three quarters. The pass is made once per model object; changed weights need a
    new one.

    Returns:
        The dimensions, sorted; empty, with a warning, where none qualifies; None for a model
        without weights.
    """
    if "first token" not in anatomy.kept:
        first = anatomy.first_token()
        if first is None:
            return None
        middle = first[anatomy.depth // 4 : max(anatomy.depth // 4 + 1, 3 * anatomy.depth // 4)]
        anatomy.kept["first token"] = middle.abs() / _rms(middle)[:, None]
    phi = anatomy.kept["first token"]  # (layers, D)
    dims = tuple(((phi > threshold).float().mean(0) > 0.5).nonzero()[:, 0].tolist())
    if not dims:
        limit = math.sqrt(anatomy.width)
        why = (
            f", at width {anatomy.width} none can exceed {limit:.3g}" if limit <= threshold else ""
        )
        warnings.warn(
            f"var does nothing on this model: no dimension of its first token exceeds "
            f"sink_threshold={threshold:g} in the middle layers{why}.",
            stacklevel=2,
        )
    return dims


def _rms(hidden: Tensor) -> Tensor:
    """Root mean square over the last dimension, float32, never 0."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    return (norm.square() / hidden.shape[-1] + 1e-6).sqrt()
