"""Rotary position embeddings of a model of transformers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import FoveateError
from ...base.interrupts import whole
from . import compat

_turning: weakref.WeakKeyDictionary[Any, dict[int, bool]] = weakref.WeakKeyDictionary()
_PROBE = "foveate_positions"
_PLACES = (5, 9, 14, 3)  # different ones where positions have three components


class ModelRotary:
    """Rotary embeddings of one layer; a `core.rows.Rotary`.

    Args:
        decoder: the language model. module: the layer's attention.
        like: states on the device where the embeddings are used.
    """

    def __init__(self, decoder: Any, module: nn.Module, like: Tensor) -> None:
        self.decoder, self.module, self.like = decoder, module, like

    def rotation(self, by: Tensor) -> tuple[Tensor, Tensor]:
        place = self.like.device
        cos, sin = compat.rotation(self.decoder, self.module, self.like, by.to(place))
        return cos.to(place), sin.to(place)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return compat.rotate(self.module, x, *rotation).to(x.dtype)


def rotary(decoder: Any, module: nn.Module, like: Tensor) -> ModelRotary | None:
    """The rotary embeddings of a layer; None where the decoder has no single module for them."""
    return ModelRotary(decoder, module, like) if compat.rotary(decoder) is not None else None


def turns(model: Any, decoder: Any, layer: int, place: torch.device) -> bool:
    """Whether `ModelRotary` turns a layer's keys as the model does; False where nothing turns.

    One token is read alone at two positions. Alone it attends to itself, so what a layer is given
    does not depend on where it stands, and its keys differ by the rotation and nothing else.

    Raises:
        FoveateError: its keys depend on positions in another way.
    """
    known = _turning.setdefault(decoder, {})
    if layer not in known:
        known[layer] = _turns(model, decoder, layer, place)
    return known[layer]


def _turns(model: Any, decoder: Any, layer: int, place: torch.device) -> bool:
    found: list[tuple[nn.Module, Tensor]] = []
    usual = compat.kernel("sdpa")

    def look(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(module, "layer_idx", None) == layer:
            found.append((module, key.float()))
        return usual(module, query, key, *args, **kwargs)

    axes = compat.position_axes(model)
    by = torch.tensor(_PLACES[:axes], device=place)[:, None, None]
    with _looking(decoder.config, look), torch.no_grad():
        for positions in (torch.zeros_like(by), by):
            _read(decoder, positions if axes > 1 else positions[0], place)
    if len(found) != 2:
        return True  # its attention was not reached, which the checks of a block name
    (module, before), (_, after) = found
    allowed = (1e-3 if decoder.dtype == torch.float32 else 3e-2) * float(after.abs().max())
    if _apart(before, after) <= allowed:
        return False
    embedding = ModelRotary(decoder, module, before)
    turned = _tried(lambda: embedding.rotate(before, embedding.rotation(by)))
    if turned is None or turned.shape != after.shape or _apart(turned, after) > allowed:
        raise FoveateError(
            f"Layer {layer} of {type(model).__name__} places its keys in another way than by one "
            "rotary embedding, so they cannot be moved to a common position: switch unified "
            "positions off, as in clvs(unified_positions=False)."
        )
    return True


@whole
def _looking(config: Any, look: Callable[..., Any]) -> Iterator[None]:
    """Attention is `look` for a while."""
    compat.register_attention(_PROBE, look, like="sdpa")
    try:
        with compat.attending(config, _PROBE):
            yield
    finally:
        compat.forget_attention(_PROBE)


def _read(decoder: Any, positions: Tensor, place: torch.device) -> None:
    """One token at `positions` through the decoder."""
    bos = getattr(decoder.config, "bos_token_id", None)
    known = isinstance(bos, int) and bos < decoder.get_input_embeddings().weight.shape[0]
    token = torch.tensor([[bos if known else 0]], device=place)  # 0 may be padding, which is zero
    decoder(input_ids=token, position_ids=positions, use_cache=False)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _tried(make: Callable[[], Tensor]) -> Tensor | None:
    """What `make` gives; None where shapes or names of a model do not allow it."""
    try:
        return make()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return None
