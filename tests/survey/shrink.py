"""A tiny model of any image-text-to-text type, by one set of rules for all configurations.

The language model is made narrow, and as shallow as shows every kind of layer that it has. Towers
lose layers, not width, so that what is between them and the language model still fits.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig
from transformers.initialization import no_init_weights

VOCAB, FIRST_TEXT = 256, 100
WIDTH, HEADS, KEY_VALUE_HEADS, HEAD = 64, 4, 2, 32

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "hidden_size_per_layer_input": 16,
    "ple_embed_dim": 32,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "d_ff": 96,
    "d_kv": HEAD,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "share_expert_dim": 32,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_hidden_size": 32,
    "num_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "attention_heads": HEADS,
    "num_heads": HEADS,
    "num_sliding_attention_heads": HEADS,
    "swa_num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "swa_num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD,
    "swa_head_dim": HEAD,
    "global_head_dim": HEAD,
    "num_global_key_value_heads": KEY_VALUE_HEADS,
    "query_pre_attn_scalar": HEAD,
    "rotary_dim": HEAD // 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "max_position_embeddings": 512,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
    "loop_gate_rank": 8,
    "laurel_rank": 8,
}


def _axes(*section: int) -> dict[str, Any]:
    """How many frequencies are for time, height and width."""
    return {"text_config.rope_parameters.mrope_section": list(section)}


BESIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config.codebook_size": 16,
        "audio_config.codebook_size": 16,
        "image_token_offset": 120,
        "audio_token_offset": 136,
    },
    "ovis2": {"hidden_size": WIDTH, "vocab_size": VOCAB},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 70} | _axes(2, 3, 3),
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 70} | _axes(2, 3, 3),
    **dict.fromkeys(
        ("glm46v", "glm4v", "glm_ocr", "glmga", "qwen2_5_vl", "qwen2_vl"), _axes(2, 3, 3)
    ),
    "glm4v_moe": _axes(2, 1, 1),
    "paddleocr_vl": _axes(4, 6, 6),
    "step3p7": {"text_config.sliding_window": 8},
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "chameleon": {"vocabulary_map": {"<image>": 8711 % 60 + 3, "IMGIMGA": 70}},
    "cohere_compass": {
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "dots3_note": {"text_config.per_layer_config": {}},
    "emu3": {"vocabulary_map": {"<image>": 8711 % 60 + 3, "<|extra_200|>": 70}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "glm5_next": {"text_config.index_topk": 16},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8"},
    "hunyuan_vl": {"text_config.head_dim": HEAD} | _axes(4, 4, 4, 4),
    "inkling_mm_model": {"vision_config.patch_size": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD,
        "text_config.indexer_budget": 16,
        "text_config.indexer_compress_ratio": 4,
    },
}
"""What a type needs beyond the rules, most of it missing in its own defaults."""

REPAIRED = {
    "granite4_vision": "it makes no cache by itself outside of `generate`",
    "llama4": "its forward reads `image_outputs`, which the output of its language model lacks",
}
"""Types whose own forward fails in transformers 5.24, for which reason."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "idefics2 without window": ("idefics2", {"text_config": {"sliding_window": None}}),
    "internvl with qwen3": ("internvl", {"text_config": {"model_type": "qwen3"}}),
    "internvl with qwen3_moe": ("internvl", {"text_config": {"model_type": "qwen3_moe"}}),
    "paligemma with gemma2": ("paligemma", {"text_config": {"model_type": "gemma2"}}),
}
"""Types with another language model than that of their default configuration."""


def default(name: str) -> Any:
    """The default configuration of a type, or of a variant."""
    model_type, words = VARIANTS.get(name, (name, {}))
    return AutoConfig.for_model(model_type, **words)


DEPTHS = ("num_hidden_layers", "decoder_layers", "encoder_layers", "num_layers", "n_layers")
KINDS = ("layer_types", "layers_block_type", "no_rope_layers", "mlp_layer_types")
"""Lists with an entry per layer of which every kind shall stay."""
TOWER_DEPTHS = (*DEPTHS, "depth", "layers")
TOWER_LAYERS = ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes")
"""Lists of layers of a tower."""


def shrunk(model_type: str) -> Any:
    """The default configuration of a type, made small."""
    config = default(model_type)
    small = config.to_dict()
    text = config.get_text_config()
    path = _path(config, text)
    here = small
    for name in path:
        here = here[name]
    _all(small, here)
    for path, value in BESIDES.get(model_type, {}).items():
        *names, last = path.split(".")
        place = small
        for name in names:
            place = place[name]
        place[last] = value
    return type(config).from_dict(small)


def _path(config: Any, text: Any) -> list[str]:
    """Names of the sub-configurations that lead to the language model's."""
    if config is text:
        return []
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "sub_configs"):
            if inner is text:
                return [name]
            deeper = _path(inner, text)
            if deeper:
                return [name, *deeper]
    return []


def _all(config: dict[str, Any], text: dict[str, Any]) -> None:
    if config is text:
        _text(config)
    elif "num_hidden_layers" in config or "depth" in config or "layers" in config:
        _tower(config)
    for name, value in config.items():
        if name in BRIDGES and value:
            config[name] = WIDTH
        if name.endswith(("_id", "_index")) and isinstance(value, int):
            config[name] = _token(name, value)
        if isinstance(value, dict) and "model_type" in value:
            _all(value, text)


BRIDGES = ("out_hidden_size", "text_hidden_size", "projector_output_dim", "adapter_out_dim")
"""What towers and projectors call the width of the language model."""

SPECIAL = {"pad": 0, "bos": 1, "eos": 2}


def _token(name: str, value: int) -> int:
    word = name.split("_")[0]
    return SPECIAL.get(word, 3 + value % 60)


def _text(config: dict[str, Any]) -> None:
    """A language model."""
    depth, equal = config.get("num_hidden_layers") or 0, "num_attention_heads"
    alike = config.get(equal) == config.get("num_key_value_heads")
    rotary = config.get("qk_rope_head_dim") and config["head_dim"] == config["qk_rope_head_dim"]
    for name, value in TEXT.items():
        old = config.get(name)
        if old:
            config[name] = [value] * len(old) if isinstance(old, list) else value
    if rotary:
        config["head_dim"] = TEXT["qk_rope_head_dim"]
    if alike:
        config["num_key_value_heads"] = HEADS
    few = _few(config, depth)
    for name in DEPTHS:
        if config.get(name):
            config[name] = few
    _cut(config, depth, few)
    rotated = config.get("qk_rope_head_dim") or config.get("head_dim") or WIDTH // HEADS
    for rope in _ropes(config.get("rope_parameters")):
        part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1)
        if "mrope_section" in rope:
            rope["mrope_section"] = _sections(rope["mrope_section"], int(rotated * part) // 2)


def _sections(old: list[int], half: int) -> list[int]:
    """Sections in the same proportions that sum to `half`."""
    new = [max(half * size // sum(old), 1) for size in old]
    return [new[0] + half - sum(new), *new[1:]]


def _cut(config: dict[str, Any], depth: int, few: int) -> None:
    """What is said per layer, of `few` layers out of `depth`."""
    for name, value in config.items():
        if isinstance(value, list) and len(value) == depth > few:
            config[name] = value[:few]
        elif isinstance(value, list) and name.endswith(("_layers", "_idxs")):
            config[name] = [x for x in value if not isinstance(x, int) or x < few]
        elif isinstance(value, dict) and value and all(str(k).isdigit() for k in value):
            config[name] = {
                k: {n: TEXT.get(n, x) for n, x in v.items()} if isinstance(v, dict) else v
                for k, v in value.items()
                if int(k) < few
            }


def _ropes(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, dict):
        return []
    return [value] + [v for v in value.values() if isinstance(v, dict)]


def _few(config: dict[str, Any], depth: int) -> int:
    """The smallest number of layers, four or more, among which is every kind."""
    few = 4
    for name in KINDS:
        kinds = config.get(name)
        if isinstance(kinds, list) and len(kinds) == depth:
            few = max([few] + [kinds.index(kind) + 1 for kind in set(kinds)])
    return min(few, depth) if depth else few


def _tower(config: dict[str, Any]) -> None:
    """A tower, or another part that is no language model: shallow, with a narrow feed-forward."""
    for name in TOWER_DEPTHS:
        if isinstance(config.get(name), int):
            _cut(config, config[name], 2)
            config[name] = min(config[name], 2)
    for name in TOWER_LAYERS:
        if isinstance(config.get(name), list):
            config[name] = [0, 1][: len(config[name])]


def build(model_type: str) -> Any:
    """The model; its language model on random weights, its tower on none."""
    config = shrunk(model_type)
    if model_type == "llama4":
        transformers.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None
    with no_init_weights():
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    if model_type == "granite4_vision":
        model.register_forward_pre_hook(_cached, with_kwargs=True)
    return model


def _cached(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("use_cache") and kwargs.get("cache") is None:
        kwargs["cache"] = transformers.DynamicCache(config=model.config.text_config)
    return args, kwargs
