"""Parts of transformers' models, processors and training whose names are private or may change.

`compat.py` holds what the engine needs of a forward; here is what else foveate touches.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ...base.errors import FoveateError
from .compat import CACHE_NAMES, decoder_of

Streamer = transformers.generation.streamers.BaseStreamer  # told of every token by `generate`

# -- decoder layers --------------------------------------------------------------------------------


def block_parts(layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, Any] | None:
    """The parts of a decoder layer of LLaMA's shape.

    Returns:
        The norm before the attention, the attention's output projection, the norm before the
        feed-forward part and that part; None for parallel blocks, layers that have norms only
        behind their parts, and attention that does more between its heads and the projection.
    """
    attention = getattr(layer, "self_attn", None)
    output, query = getattr(attention, "o_proj", None), getattr(attention, "q_proj", None)
    widths = getattr(output, "in_features", None), getattr(query, "out_features", None)
    if None not in widths and widths[0] != widths[1]:  # gated, or keys of another width
        return None
    feed_forward = getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)
    second = getattr(layer, "pre_feedforward_layernorm", None)  # Gemma has norms behind, too
    second = second or getattr(layer, "post_attention_layernorm", None)
    first = getattr(layer, "input_layernorm", None)
    if first is None or output is None or second is None or feed_forward is None:
        return None
    return first, output, second, feed_forward


def with_embeds(kwargs: dict[str, Any], embeds: Tensor) -> dict[str, Any]:
    """A decoder's arguments with other input embeddings (B, N, D).

    Where layers add features to image tokens (Qwen3-VL), tokens that changed get none.
    """
    added = kwargs.get("deepstack_visual_embeds")
    if added is not None:
        changed = (embeds != kwargs["inputs_embeds"]).any(-1)
        changed = changed[kwargs["visual_pos_masks"].to(changed.device)][:, None]
        added = [x.masked_fill(changed.to(x.device), 0) for x in added]
        kwargs = kwargs | {"deepstack_visual_embeds": added}
    return kwargs | {"inputs_embeds": embeds}


# -- images ----------------------------------------------------------------------------------------


def image_tower(model: Any) -> Any:
    """The vision tower of a model of LLaVA's shape, or None."""
    return getattr(getattr(model, "model", None), "vision_tower", None)


def vision_blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks of a model's vision tower, in order.

    Raises:
        FoveateError: where the model has no tower of such blocks.
    """
    tower = image_tower(model)
    depth = getattr(getattr(model.config, "vision_config", None), "num_hidden_layers", None)
    for module in tower.modules() if isinstance(tower, nn.Module) else ():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise FoveateError(f"{model.config.model_type} has no vision tower whose blocks can be read.")


def feature_layers(config: Any) -> tuple[int, ...]:
    """Which vision layers a model of LLaVA's shape uses, -1 being the tower's last; else none."""
    used = getattr(config, "vision_feature_layer", None)
    return () if used is None else (used,) if isinstance(used, int) else tuple(used)


def projector(model: Any) -> Any:
    """What brings vision features to the language model, in a model of LLaVA's shape; or None."""
    return getattr(getattr(model, "model", None), "multi_modal_projector", None)


def image_encoder(model: Any) -> nn.Module:
    """The part of a model that encodes images."""
    return model.get_encoder(modality="image")


def image_features(
    model: Any,
    states: Tensor,
    k: int,
    project: Callable[[nn.Module, Tensor], Tensor],
    inputs: dict[str, Any],
) -> Tensor:
    """Vision layer k as the model would pack it were it the one it uses, (visual tokens, D).

    The model's own `get_image_features` runs with a tower that gives `states` and a projector that
    calls `project(the model's projector, chosen states)`. So classification tokens, tiles, padding
    and newlines are as in the ordinary features.

    Args:
        states: (images or tiles, patches, D_v), the output of vision block k - 1.
        inputs: the model's inputs.
    """
    core = model.model
    seen = _Seen(k, states)
    usual = core.multi_modal_projector
    wanted = {n: v for n, v in inputs.items() if n in _FOR_FEATURES and v is not None}
    standing = {
        "vision_tower": _Standing(lambda *args, **kwargs: seen),
        "multi_modal_projector": _Standing(lambda chosen: project(usual, chosen)),
    }
    kept = {name: core._modules[name] for name in standing}
    core._modules.update(standing)
    try:
        out = core.get_image_features(**wanted, vision_feature_layer=k, return_dict=True)
    finally:
        core._modules.update(kept)
    features = out.pooler_output
    return torch.cat(list(features)) if not isinstance(features, Tensor) else features.flatten(0, 1)


_FOR_FEATURES = ("pixel_values", "image_sizes", "batch_num_images")


class _Seen:
    """The tower's output, of which only one layer is asked for."""

    def __init__(self, k: int, states: Tensor) -> None:
        self.hidden_states = {k: states}


class _Standing(nn.Module):
    """A function in a module's place."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def clip_image_processor(**options: Any) -> Any:
    """CLIP's image processor on PIL and numpy, which needs no torchvision."""
    name = "CLIPImageProcessor"  # early transformers 5 calls it so, without `Pil`
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return kind(**options)


# -- generation ------------------------------------------------------------------------------------


def read_prompt(model: Any, ids: Tensor, config: Any, inputs: dict[str, Any]) -> Any:
    """The forward over a prompt that `generate` has prepared; its output holds the cache."""
    return model._prefill(ids, config, inputs)


def beam_output(cache: Any, **fields: Any) -> Any:
    """What `generate` returns after beam search, where a dictionary is asked for."""
    known = GenerateBeamDecoderOnlyOutput.__dataclass_fields__
    name = next(name for name in CACHE_NAMES if name in known)
    return GenerateBeamDecoderOnlyOutput(**fields, **{name: cache})


# -- loading and training --------------------------------------------------------------------------


def is_vision_language(config: Any) -> bool:
    """Whether transformers has an image-text-to-text model for this configuration."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def has_family(model_type: str) -> bool:
    """Whether transformers has this vision-language family."""
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def needs_torchvision(model_type: str) -> bool:
    """Whether a family's processor cannot be built without torchvision."""
    try:
        processor = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
    except (AttributeError, ImportError):  # early transformers 5 imports what it needs at once
        return True
    video = "video_processor" in inspect.signature(processor.__init__).parameters
    return video or "torchvision" in getattr(processor, "_backends", ())


def summed_loss(labels: Tensor) -> dict[str, Tensor]:
    """What a forward is told, so that its loss is the sum over `labels`.

    Args:
        labels: (B, Q) int64, each the token after its position; -100 where none counts.
    """
    return {"shift_labels": labels, "num_items_in_batch": labels.new_ones(())}


@functools.cache
def pocket_weights() -> dict[str, Any]:
    """What `from_pretrained` is told, so that it finds the pocket model's weights by their names.

    Before 5.6 a CLIP tower keeps its parts in `vision_model`.
    """
    small = transformers.CLIPVisionConfig(num_hidden_layers=1)
    with torch.device("meta"):
        nested = hasattr(transformers.CLIPVisionModel(small), "vision_model")
    if not nested:
        return {}
    names = {
        "^language_model.model": "model.language_model",
        "^language_model.lm_head": "lm_head",
        "^multi_modal_projector": "model.multi_modal_projector",
        "^vision_tower": "model.vision_tower.vision_model",
    }
    return {"key_mapping": names}


def without_weights(config: Any) -> Any:
    """A model of a configuration on the meta device, but with true frequencies of its positions."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    decoder = decoder_of(model)
    if hasattr(decoder, "rotary_emb"):
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
    return model


def shard_by_layer(module: Any, decoder: Any) -> None:
    """Tell FSDP to shard `module` by the decoder's layers."""
    module._no_split_modules = [type(decoder.layers[0]).__name__]


def start_checkpointing(model: Any) -> None:
    """Keep the inputs of layers in training, and run layers again in the backward pass."""
    start = getattr(model, "activation_checkpointing_enable", None)  # since 5.23
    (start or model.gradient_checkpointing_enable)({"use_reentrant": False})


def head_projection(layer: Any) -> nn.Module | None:
    """The projection of a decoder layer where its heads meet; None where it has none."""
    found = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    return found if isinstance(found, nn.Module) else None
