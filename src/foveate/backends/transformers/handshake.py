"""The handshake: what foveate needs of a model, looked for before a method is switched on.

A model that lacks something is refused in one sentence. `foveate doctor --model` prints the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...base.errors import FoveateError
from . import compat
from .compat import VERSION


@dataclass(frozen=True)
class Handshake:
    """What a model offers.

    Attributes:
        decoder: its language model.
        cache: the argument of its forward that takes the KV cache.
        attention: the attention implementation in use.
        kinds: what each decoder layer attends to, such as "full_attention".
    """

    decoder: Any
    cache: str
    attention: str
    kinds: tuple[str, ...]


def handshake(model: Any) -> Handshake:
    """What `model` offers; weights are not needed, so a model on the meta device will do.

    Raises:
        FoveateError: something that every method needs is missing.
    """
    name = type(model).__name__
    if not compat.is_model(model):
        raise FoveateError(
            f"{name} is not a transformers model: pass the model that "
            "AutoModelForImageTextToText.from_pretrained returns, without any wrapper around it."
        )
    if compat.image_aside(model):
        raise FoveateError(
            f"{name} looks at the image in cross-attention, so its text holds no image tokens "
            "whose attention could be edited: use a model that reads images as tokens of its "
            "prompt."
        )
    depth = getattr(compat.decoder_of(model).config, "num_hidden_layers", None)
    if not model.can_generate() or depth is None or model.get_output_embeddings() is None:
        raise FoveateError(
            f"{name} does not write one token after the other from an unembedding that it names "
            "(transformers' GenerationMixin and get_output_embeddings()), so there are no next "
            "tokens to edit: use another model."
        )
    decoder = compat.decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if not layers:
        raise FoveateError(
            f"The decoder of {name} ({type(decoder).__name__}, transformers {VERSION}) has no list "
            "of layers under the name `layers`, so nothing can be edited: use another model, or "
            "upgrade foveate."
        )
    if not compat.dispatches(decoder):
        raise FoveateError(
            f"{name} (transformers {VERSION}) does not dispatch its attention through "
            "transformers' AttentionInterface, so its attention cannot be edited: load the version "
            "of the model that transformers ships."
        )
    if getattr(decoder.config, "attn_logit_softcapping", None) is not None:
        raise FoveateError(
            f"{name} soft-caps its attention scores, which no SDPA kernel reproduces: "
            "it cannot be enhanced."
        )
    cache, kinds = compat.cache_argument(model), compat.layer_kinds(decoder.config)
    if len(kinds) != len(layers):
        raise FoveateError(
            f"{name} (transformers {VERSION}) has {len(layers)} decoder layers, but its "
            f"configuration describes {len(kinds)}: the configuration is not that of the model."
        )
    return Handshake(decoder, cache, compat.attention_name(decoder), kinds)


def check_feed_forwards(model: Any, layers: Iterable[int]) -> None:
    """Whether the layers whose feed-forward methods edit have one that is known.

    Raises:
        FoveateError: one has not.
    """
    decoder = compat.decoder_of(model)
    for layer in layers:
        if not compat.feed_forward(decoder.layers[layer]):
            raise FoveateError(
                f"Layer {layer} of {type(model).__name__} (transformers {VERSION}) has no "
                "feed-forward module whose output could be edited: choose other layers, as in "
                "layers=(N,), or another model."
            )


def check_layers(model: Any, layers: Iterable[int]) -> None:
    """Whether the layers that methods edit have attention that knows its own number.

    Raises:
        FoveateError: one has not.
    """
    decoder = compat.decoder_of(model)
    for layer in layers:
        numbers = {getattr(part, "layer_idx", None) for part in decoder.layers[layer].modules()}
        if layer not in numbers:
            raise FoveateError(
                f"Layer {layer} of {type(model).__name__} (transformers {VERSION}) has no "
                "attention with its number in `layer_idx`: it cannot be told from others. Choose "
                "other layers, as in layers=(N,), or upgrade foveate."
            )
