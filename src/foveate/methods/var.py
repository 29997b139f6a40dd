"""VAR: visual attention redistribution (arXiv 2503.03321).

Some image tokens carry huge values in a few fixed dimensions and draw attention while they show
nothing: sinks. In heads that look at the image, VAR takes part of what the sinks get and gives it
to the other image tokens.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..backends.transformers.compat import cache_of, hidden_in
from ..base.errors import FoveateError
from ..base.form import costly
from ..core.method import Method, shape

if TYPE_CHECKING:
    from ..backends.transformers.attention import Rows
    from ..core.context import Context

# text_model_type, hidden_size, layers, attention_heads, key_value_heads (, vocab_size)
KNOWN: dict[tuple[Any, ...], tuple[int, ...]] = {
    ("llama", 4096, 32, 32, 32): (1415, 2533),  # LLaMA-2 7B, Vicuna 7B: in the authors' code
    ("llama", 5120, 40, 40, 40): (2100, 4743),  # LLaMA-2 13B, Vicuna 13B: in the authors' code
    ("qwen2_vl_text", 3584, 28, 28, 4): (458, 2570),  # Qwen2-VL 7B: reported from the paper
    # InternVL2 8B: reported from the paper; the vocabulary tells InternLM2 from LLaMA 3
    ("internlm2", 4096, 32, 32, 8): (3584,),
    ("llama", 4096, 32, 32, 8, 92553): (3584,),
}

_profiles: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


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
        sink_threshold: tau; 20 as published.
        max_sink_fraction: largest share of the sinks in a row's attention to the image, 0 to 1,
            from which the head counts as looking at the image; 0.5 as published for
            hallucination (the paper: 0.2 for general, 0.1 for vision-centric tasks).
        min_visual_mass: least attention to the image, 0 to 1; 0.2 in the authors' code.
        keep: what sinks keep of their attention, 0 to 1; 1 leaves the row as it is. 0.6 in the
            authors' code.
        sink_dims: dimensions of the residual stream. None = the published ones of LLaMA-2 and
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

    def resolve(self, model: Any) -> Method:
        """The same method with layers and `sink_dims` filled in for `model`.

        On a model without weights (on the meta device) unknown dimensions stay None. Where no
        dimension qualifies, a warning says so and `sink_dims` is empty.
        """
        resolved: Any = super().resolve(model)
        dims = known_sink_dims(model) if self.sink_dims is None else self.sink_dims
        if dims is None:
            dims = find_sink_dims(model, self.sink_threshold)
        width = model.get_decoder().config.hidden_size
        for m in dims or ():
            if m >= width:
                raise FoveateError(
                    f"var: there is no dimension {m}, this model's residual stream has 0 to "
                    f"{width - 1}."
                )
        return dataclasses.replace(resolved, sink_dims=dims)

    def begin(self, ctx: Context) -> None:
        ctx.memory.update(kinds={}, room={})

    def before(self, hidden: Tensor, ctx: Context, layer: int) -> Tensor:
        if ctx.phase == "decode" or layer not in (self.layers or ()):
            return hidden
        peaks = torch.stack([hidden[..., m].abs() for m in self.sink_dims or ()], -1).amax(-1)
        sinks = peaks.float() / _rms(hidden) > self.sink_threshold  # (B, Q)
        start = ctx.visual.shape[1] - sinks.shape[1]
        visual = ctx.visual[:, start:].to(hidden.device)
        # (B, Q, 3): sinks; what else is visual, and gets; sinks on the image
        kinds = torch.stack([sinks, visual & ~sinks, visual & sinks], -1).float()
        if start:  # generated columns in between are of no kind; a cropped cache has fewer
            old = ctx.memory["kinds"].get(layer, kinds[:, :0])
            kinds = torch.cat([pad(old, (0, 0, 0, start - old.shape[1])), kinds], 1)
        ctx.memory["kinds"][layer] = kinds
        _, others, on_image = kinds.sum(1, keepdim=True).unbind(-1)  # (B, 1) each: how many
        room = self.max_sink_fraction * 1e-6 * (others + on_image)
        ctx.memory["room"][layer] = room.masked_fill(on_image == 0, -math.inf)
        return hidden

    def weights(self, rows: Rows) -> Tensor:
        x, memory = rows.x, rows.memory
        kinds, room = memory["kinds"][rows.layer], memory["room"][rows.layer]
        known = kinds.shape[1]
        part = x[..., :known].flatten(1, 2)  # (B, H * R, P), a view
        spent, others, on_image = torch.bmm(part, kinds).unbind(-1)
        mass = others + on_image
        # the share of sinks is on_image / (mass + 1e-6 per visual token), as in the authors' code
        chosen = on_image <= torch.add(room, mass, alpha=self.max_sink_fraction)
        chosen = chosen & (mass >= self.min_visual_mass) & (others > 0)
        taken = chosen * (1 - self.keep)
        given = taken * spent / others.clamp(min=1e-12)
        moved = torch.bmm(torch.stack([-taken, given], -1), kinds[..., :2].transpose(1, 2))
        edited = torch.addcmul(part, part, moved).unflatten(1, x.shape[1:3])
        return edited if known == x.shape[3] else torch.cat([edited, x[..., known:]], -1)

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
        ctx: Any = getattr(cache_of(out), "foveate", None)
        for i, method in enumerate(ctx.stack.methods if ctx else ()):
            if isinstance(method, VAR):
                found = ctx.memories[i]["kinds"]
                return {layer: kinds[..., 0] > 0 for layer, kinds in found.items()}
        raise FoveateError(
            "No sinks were looked for: put VAR() into enhance() and pass what the model or "
            "generate(..., return_dict_in_generate=True) returned."
        )


def known_sink_dims(model: Any) -> tuple[int, ...] | None:
    """The published sink dimensions of a model of this architecture and shape, or None."""
    of = shape(model)
    *key, vocabulary = (of[name] for name in of if name != "model_type")
    return KNOWN.get(tuple(key), KNOWN.get((*key, vocabulary)))


def find_sink_dims(model: Any, threshold: float) -> tuple[int, ...] | None:
    """Dimensions that are extreme where every text has a sink: at its first token.

    One pass of the decoder over its BOS token alone (token 0 where it names none; being first is
    what makes a sink), without any image. A dimension qualifies if its absolute value divided by
    the root mean square of the stream exceeds `threshold` on entering more than half of the
    middle layers, which are those from a quarter of the depth up to three quarters. The pass is
    made once per model object; changed weights want a new one. Nothing on the model is touched.

    Returns:
        The dimensions, sorted; empty, with a warning, where none qualifies; None for a model
        without weights.
    """
    profile = _profile(model)
    if profile is None:
        return None
    dims = tuple(((profile > threshold).float().mean(0) > 0.5).nonzero()[:, 0].tolist())
    if not dims:
        width = profile.shape[1]
        limit = math.sqrt(width)
        why = f", at width {width} none can exceed {limit:.3g}" if limit <= threshold else ""
        warnings.warn(
            f"var does nothing on this model: no dimension of its first token exceeds "
            f"sink_threshold={threshold:g} in the middle layers{why}.",
            stacklevel=2,
        )
    return dims


def _profile(model: Any) -> Tensor | None:
    """|x| / rms of the first token on entering each middle layer, (layers, D) float32."""
    decoder = model.get_decoder()
    if decoder in _profiles:
        return _profiles[decoder]
    place = decoder.get_input_embeddings().weight.device
    if place.type == "meta":
        if not hasattr(model, "hf_device_map"):
            return None
        place = torch.device("cpu")  # offloaded: its hooks bring the weights
    bos, depth = decoder.config.bos_token_id, decoder.config.num_hidden_layers
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_in(args, kwargs)[0, 0]
        seen.append((hidden.abs().float() / _rms(hidden)).cpu())

    middle = decoder.layers[depth // 4 : max(depth // 4 + 1, 3 * depth // 4)]
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in middle]
    try:
        with torch.no_grad():
            ids = torch.tensor([[bos if isinstance(bos, int) else 0]], device=place)
            decoder(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return _profiles.setdefault(decoder, torch.stack(seen))


def _rms(hidden: Tensor) -> Tensor:
    """Root mean square over the last dimension, float32, never 0."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    return (norm.square() / hidden.shape[-1] + 1e-6).sqrt()
