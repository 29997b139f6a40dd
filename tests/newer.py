"""Families of today beside those of `tests/models.py`; their tests run in `make test-slow`.

A builder here is one there, marked ``@newer``. A release of transformers that lacks a family goes
without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf

from tests import models
from tests.models import END, IMAGE, START, VIDEO, Family, cut, family, grid, text, tower, wrapped

FAMILIES: list[str] = []


def newer(needs: str) -> Callable[[Callable[[], Family]], Callable[[], Family]]:
    """Register a builder where transformers has the class `needs`."""

    def register(builder: Callable[[], Family]) -> Callable[[], Family]:
        if hasattr(tf, needs):
            FAMILIES.append(builder.__name__)
            return family(builder)
        return builder

    return register


def _qwen(kind: str, cls: Any, config: Any, section: list[int], **words: Any) -> Family:
    """A model with Qwen3-VL's tower."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    rope |= {"mrope_interleaved": True} | words.pop("rope", {})
    vision = {
        "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "hidden_size": 32,
        "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
    }  # fmt: skip
    if "deepstack_visual_indexes" in config().vision_config.to_dict():
        vision["deepstack_visual_indexes"] = [0, 1]
    given = config(
        text_config=text(f"{kind}_text", 4, rope_parameters=rope, **words).to_dict(),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return Family(cls, given, grid, wrapped, type_ids="mm_token_type_ids")


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope": {"partial_rotary_factor": 0.25},
}


@newer("Qwen3VLMoeConfig")
def qwen3_vl_moe() -> Family:
    cls = tf.Qwen3VLMoeForConditionalGeneration
    return _qwen("qwen3_vl_moe", cls, tf.Qwen3VLMoeConfig, [4, 2, 2], **EXPERTS)


@newer("Qwen3_5Config")
def qwen3_5() -> Family:
    cls = tf.Qwen3_5ForConditionalGeneration
    return _qwen("qwen3_5", cls, tf.Qwen3_5Config, [2, 1, 1], **DELTA)


@newer("Qwen3_5MoeConfig")
def qwen3_5_moe() -> Family:
    words = DELTA | EXPERTS | {"shared_expert_intermediate_size": 32}
    cls = tf.Qwen3_5MoeForConditionalGeneration
    return _qwen("qwen3_5_moe", cls, tf.Qwen3_5MoeConfig, [2, 1, 1], **words)


@newer("InternVLConfig")
def internvl_qwen3() -> Family:
    """InternVL 3.5."""
    config = tf.InternVLConfig(
        text_config=text("qwen3"),
        vision_config=tower("internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return Family(tf.InternVLForConditionalGeneration, config, cut, wrapped)


@newer("Idefics2Config")
def idefics2() -> Family:
    config = tf.Idefics2Config(
        text_config=text("mistral", sliding_window=None),
        vision_config=tower("idefics2_vision"),
        perceiver_config={
            "hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1,
            "resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
        pad_token_id=models.PAD,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Family(
        tf.Idefics2ForConditionalGeneration, config, models.masked, models.marked, per_row=True
    )


@newer("Glm4vConfig")
def glm4v() -> Family:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = tf.Glm4vConfig(
        text_config=text("glm4v_text", rope_parameters=rope | {"partial_rotary_factor": 0.5}),
        vision_config={
            "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 16,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    cls = tf.Glm4vForConditionalGeneration
    return Family(cls, config, grid, wrapped, type_ids="mm_token_type_ids")


@newer("Lfm2VlConfig")
def lfm2_vl() -> Family:
    kinds = ["conv", "full_attention"] * 2
    config = tf.Lfm2VlConfig(
        text_config=text("lfm2", layer_types=kinds, block_auto_adjust_ff_dim=False),
        vision_config=tower("siglip2_vision_model", num_patches=16, vision_use_head=False),
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=48,
        tie_word_embeddings=False,
    )

    def picture(shape: str, alone: bool) -> dict[str, Any]:
        height, width = (2 * side for side in models.SHAPES[shape])
        most = 32
        pixels = models.noise(shape, 1, most, 3 * 4 * 4)
        mask = models.torch.zeros(1, most).long()
        mask[:, : height * width] = 1
        shapes = models.torch.tensor([[height, width]])
        return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}

    return Family(tf.Lfm2VlForConditionalGeneration, config, picture, wrapped)


@newer("Kimi_K25Config")
def kimi_k25() -> Family:
    latent = {
        "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
        "topk_group": 1,
    }  # fmt: skip
    config = tf.Kimi_K25Config(
        text_config=text("deepseek_v3", **latent),
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8,
        },
        image_token_id=IMAGE,
        projection_hidden_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip

    def picture(shape: str, alone: bool) -> dict[str, Any]:
        height, width = (2 * side for side in models.SHAPES[shape])
        pixels = models.noise(shape, height * width, 3, 4, 4)
        return {"pixel_values": pixels, "image_grid_thw": models.torch.tensor([[1, height, width]])}

    return Family(tf.Kimi_K25ForConditionalGeneration, config, picture, wrapped)
