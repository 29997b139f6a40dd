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
    """The vision tower of a model, or None."""
    core = getattr(model, "model", None)
    found = (getattr(core, name, None) for name in ("vision_tower", "visual", "vision_model"))
    return next((tower for tower in found if tower is not None), None)


def tower_depth(config: Any) -> int | None:
    """Blocks of the vision tower, where the configuration tells."""
    vision = getattr(config, "vision_config", None)
    return getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None)


def vision_blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks of a model's vision tower, in order.

    Raises:
        FoveateError: where the model has no tower of such blocks.
    """
    tower, depth = image_tower(model), tower_depth(model.config)
    for module in tower.modules() if isinstance(tower, nn.Module) else ():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise FoveateError(f"{model.config.model_type} has no vision tower whose blocks can be read.")


def feature_layers(config: Any) -> tuple[int, ...]:
    """Which vision layers a model of LLaVA's shape uses, -1 being the tower's last; else none."""
    used = getattr(config, "vision_feature_layer", None)
    return () if used is None else (used,) if isinstance(used, int) else tuple(used)


def projector(model: Any) -> Any:
    """What brings vision features to the language model, or None."""
    place = _projector_place(model)
    return place and getattr(*place)


def _projector_place(model: Any) -> tuple[nn.Module, str] | None:
    core = getattr(model, "model", None)
    owners: dict[str, Any] = {
        "multi_modal_projector": core,
        "merger": getattr(core, "visual", None),  # Qwen and GLM-V
        "modality_projection": getattr(core, "connector", None),  # Idefics3 and SmolVLM
    }
    return next(((owner, name) for name, owner in owners.items() if hasattr(owner, name)), None)


def merged_width(model: Any) -> int | None:
    """The width of what stands for one token at the entry of the projector, where patches are
    merged before it or in it; None where every patch is a token."""
    module, config = projector(model), model.config
    vision: Any = getattr(config, "vision_config", None)
    if hasattr(module, "avg_pool"):  # Gemma 3
        return vision.hidden_size
    if hasattr(image_tower(model), "downsample"):  # GLM-V
        return vision.out_hidden_size
    if isinstance(getattr(module, "hidden_size", None), int):  # Qwen
        return module.hidden_size
    if hasattr(getattr(model, "model", None), "connector") and hasattr(config, "scale_factor"):
        return vision.hidden_size * config.scale_factor**2
    if hasattr(config, "downsample_ratio"):  # InternVL
        return vision.hidden_size * round(1 / config.downsample_ratio) ** 2
    return None


def _merged(module: Any, states: Tensor) -> Tensor:
    """States (..., patches, D_v) that enter a projector, as one vector per token."""
    if hasattr(module, "avg_pool"):
        side = module.patches_per_image
        pooled = module.avg_pool(states.transpose(1, 2).unflatten(-1, (side, side)))
        return pooled.flatten(2).transpose(1, 2)
    width = getattr(module, "hidden_size", None)  # Qwen: patches of a token follow one another
    return states.reshape(-1, width) if isinstance(width, int) else states


def image_encoder(model: Any) -> nn.Module:
    """The part of a model that encodes images."""
    return model.get_encoder(modality="image")


def image_features(
    model: Any,
    states: Tensor,
    k: int,
    project: Callable[[Tensor, Tensor], Tensor],
    inputs: dict[str, Any],
) -> Tensor:
    """Vision layer k as the model would pack it were it the one it uses, (visual tokens, D).

    The model's own `get_image_features` runs with a tower, or with blocks, that give `states`. For
    its projector stands `project(what the projector makes of the states, the states)`, the states
    as one vector per token. So classification tokens, norms behind the blocks, merged
    patches, tiles, padding and newlines are as in the ordinary features.

    Args:
        states: (images or tiles, patches, D_v), the output of vision block k - 1.
        inputs: the model's inputs.
    """
    core, place = model.model, _projector_place(model)
    assert place is not None
    owner, name = place
    usual: Any = getattr(owner, name)
    wanted = {n: v for n, v in inputs.items() if n in _FOR_FEATURES and v is not None}
    at_projector = _Standing(lambda chosen: project(usual(chosen), _merged(usual, chosen)))
    changed: list[tuple[Any, str, Any]] = [(owner, name, at_projector)]
    if merged_width(model) is None:
        seen = _Seen(k, states)
        changed.append((core, "vision_tower", _Standing(lambda *args, **kwargs: seen)))
        wanted["vision_feature_layer"] = k
    else:
        blocks = vision_blocks(model)
        given = _Standing(lambda *args, **kwargs: states)
        changed += [(blocks, number, given) for number in blocks._modules]
    kept = [(module, part, module._modules[part]) for module, part, _ in changed]
    try:
        for module, part, other in changed:
            module._modules[part] = other
        out = core.get_image_features(**wanted, return_dict=True)
    finally:
        for module, part, other in kept:
            module._modules[part] = other
    features = out.pooler_output
    return torch.cat(list(features)) if not isinstance(features, Tensor) else features.flatten(0, 1)


_FOR_FEATURES = (
    "pixel_values",
    "image_sizes",
    "batch_num_images",
    "image_grid_thw",
    "pixel_attention_mask",
)


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
