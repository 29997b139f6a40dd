"""The anatomy of a transformers model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...base.errors import FoveateError
from ...core.anatomy import Anatomy, Block, Tower
from ...families.layout import layout_of
from . import compat, compat_parts
from .rotary import turns

_kept: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class ModelAnatomy(Anatomy):
    """See `anatomy`."""

    model: Any = field(repr=False)
    decoder: nn.Module = field(repr=False)
    head: nn.Module = field(repr=False)
    final: nn.Module | None = field(repr=False)

    def unembed(self, hidden: Tensor) -> Tensor:
        weight: Any = self.head.weight
        return self.head(hidden.to(weight.device)).float()

    def readout(self) -> Callable[[Tensor], Tensor]:
        if "readout" not in self.kept:
            self.kept["readout"] = self._behind_the_head()
        kind, value = self.kept["readout"]
        if kind == "cap":
            return lambda hidden: _capped(self.unembed(hidden), value)
        if kind == "scale":
            return lambda hidden: self.unembed(hidden) * value
        return self.unembed

    def _behind_the_head(self) -> tuple[str, float]:
        """What happens to logits behind the unembedding: ("cap" | "scale" | "nothing", value)."""
        place = self._place()
        if place is None:
            return "nothing", 1.0
        made: list[Tensor] = []
        handle = self.head.register_forward_hook(lambda module, args, out: made.append(out))
        try:
            with torch.no_grad(), compat.keeping_positions(self.model):
                given = self.model(input_ids=self._first(place), use_cache=False).logits
        finally:
            handle.remove()
        x, out = made[-1][0, -1].float(), given[0, -1].float().to(made[-1].device)
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        scale = float((out @ x) / (x @ x))
        found: dict[tuple[str, float], Tensor] = {("nothing", 1.0): x, ("scale", scale): x * scale}
        if cap is not None:
            found["cap", float(cap)] = _capped(x, cap)
        apart = {how: float((logits - out).abs().max()) for how, logits in found.items()}
        allowed = (1e-4 if given.dtype == torch.float32 else 1e-2) * float(out.abs().max())
        if apart["nothing", 1.0] <= 1e-3 * allowed:  # a scale of nearly 1 may seem to fit better
            return "nothing", 1.0
        best = min(apart, key=lambda how: apart[how])
        if apart[best] <= allowed:
            return best
        raise FoveateError(
            f"{type(self.model).__name__} changes its logits behind the unembedding in a way that "
            "foveate does not know: use a method that predicts from no inner states."
        )

    def norm(self, hidden: Tensor) -> Tensor:
        if self.final is None:
            raise FoveateError(
                f"This decoder ({self.text_kind}) has no final norm that foveate knows: use a "
                "method or a parameter that reads no inner states."
            )
        return self.final(hidden)

    def block(self, layer: int) -> Block:
        layers: Any = self.decoder.layers
        parts = compat_parts.block_parts(layers[layer])
        if parts is None:
            raise FoveateError(
                f"The layers of this decoder ({self.text_kind}) are not attention and then a "
                "feed-forward part, each behind a norm, so one row cannot be led through parts of "
                "them: use another method."
            )
        norm, output, second, feed_forward = parts
        place = self.layer_device(layer)

        def fed(x: Tensor) -> Tensor:
            # not by calling the module, whose hooks belong to the layer's own pass
            out = feed_forward.forward(second(x.to(place)))
            return out[0] if isinstance(out, tuple) else out  # with a router's logits

        return Block(
            norm=lambda x: norm(x.to(place)),
            output=lambda heads: output(heads.flatten(-2).to(place)),
            feed_forward=fed,
        )

    def layer_device(self, layer: int) -> torch.device:
        layers: Any = self.decoder.layers
        return _device(layers[layer])

    def turns(self, layer: int) -> bool:
        place = self._place()
        return place is None or turns(self.model, self.decoder, layer, place)

    def first_token(self) -> Tensor | None:
        decoder: Any = self.decoder
        place = self._place()
        if place is None:
            return None
        entering: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(compat.hidden_in(args, kwargs)[0, 0].float().cpu())

        handles = [h.register_forward_pre_hook(look, with_kwargs=True) for h in decoder.layers]
        try:
            with torch.no_grad():
                decoder(self._first(place), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(entering)

    def _place(self) -> torch.device | None:
        """Where token ids go; None for a model without weights."""
        return _place(self.decoder)

    def _first(self, place: torch.device) -> Tensor:
        """The BOS token, (1, 1) int64; token 0 where the model names none."""
        bos = getattr(cast(Any, self.decoder).config, "bos_token_id", None)
        return torch.tensor([[bos if isinstance(bos, int) else 0]], device=place)


def _place(decoder: Any) -> torch.device | None:
    place = decoder.get_input_embeddings().weight.device
    if place.type != "meta":
        return place
    return torch.device("cpu") if compat.offloaded(decoder) else None  # hooks bring weights


def has_weights(model: Any) -> bool:
    """Whether a model can run here; one on the meta device cannot."""
    return _place(compat.decoder_of(compat.unwrapped(model))) is not None


def anatomy(model: Any) -> ModelAnatomy:
    """What methods may know of `model`; one without weights, on the meta device, will do."""
    model = compat.unwrapped(model)
    decoder, config = compat.decoder_of(model), model.config
    text, head = decoder.config, model.get_output_embeddings()
    heads, key_value_heads = compat.head_counts(text)
    return ModelAnatomy(
        kind=config.model_type,
        text_kind=text.model_type,
        width=text.hidden_size,
        depth=text.num_hidden_layers,
        heads=heads,
        key_value_heads=key_value_heads,
        vocabulary=text.vocab_size,
        layer_kinds=compat.layer_kinds(text),
        tied=head.weight is model.get_input_embeddings().weight,
        placed=layout_of(config) is not None or has_weights(model),
        tower=_tower(model),
        dtype=model.dtype,
        device=model.device,
        kept=_kept.setdefault(model, {}),
        model=model,
        decoder=decoder,
        head=head,
        final=compat.final_norm(decoder),
    )


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _tower(model: Any) -> Tower | None:
    """The vision tower of a model whose projector is known, where its blocks can be read."""
    vision: Any = getattr(model.config, "vision_config", None)
    used = compat_parts.feature_layers(model.config)
    depth = compat_parts.tower_depth(model.config)
    if depth is None or compat_parts.projector(model) is None:
        return None
    merged = compat_parts.merged_width(model)
    if merged is not None and not used:
        used = (-1,)
    if not used or (merged is not None and used != (-1,)):
        return None
    return Tower(
        kind=vision.model_type,
        width=getattr(vision, "embed_dim", vision.hidden_size),  # Qwen2-VL's own
        depth=depth,
        used=tuple(k if k >= 0 else depth + 1 + k for k in used),
        device=_device(compat_parts.projector(model)),
        merged=merged,
    )


def _device(module: nn.Module) -> torch.device:
    """Where a module computes; the CPU where its weights are offloaded."""
    device = next(module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
