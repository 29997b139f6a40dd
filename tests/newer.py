"""Families of today beside those of `tests/models.py`; their tests run in `make test-slow`.

A builder here is one there, marked ``@newer``. A release of transformers that lacks a family goes
without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests import models
from tests.models import END, IMAGE, START, VIDEO, Family, cut, family, grid, text, tower, wrapped

FAMILIES: list[str] = []
BEAMLESS = ("llama4",)
"""Families whose plain beam search fails: transformers 5.24 repeats the prompts and not the image's
features, which Llama 4 keeps under another name."""


REFUSED = {
    "paligemma": ("avisc", "icd", "m3id", "pai", "sid", "vista"),
    "gemma4_moe": ("memvr", "vista", "vti"),  # its feed-forward is no single module
}
"""Methods that a family is refused, as `tests/test_invariants.py` finds."""


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


def _glm(cls: Any, config: Any, kind: str = "glm4v_text", **words: Any) -> Family:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    rope |= {"partial_rotary_factor": 0.5}
    given = config(
        text_config=text(kind, rope_parameters=rope, **words).to_dict(),
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
    return Family(cls, given, grid, wrapped, type_ids="mm_token_type_ids")


@newer("Glm4vConfig")
def glm4v() -> Family:
    return _glm(tf.Glm4vForConditionalGeneration, tf.Glm4vConfig)


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
        mask = torch.zeros(1, most).long()
        mask[:, : height * width] = 1
        shapes = torch.tensor([[height, width]])
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
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}

    return Family(tf.Kimi_K25ForConditionalGeneration, config, picture, wrapped)


def places(shape: str, most: int) -> Tensor:
    """Gemma 4: (1, most, 2) int64, each patch's column and row; -1 for padding."""
    height, width = (2 * side for side in models.SHAPES[shape])
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    found = torch.stack([cols, rows], -1).view(1, -1, 2)
    return torch.nn.functional.pad(found, (0, 0, 0, most - found.shape[1]), value=-1)


def gemma4_picture(shape: str, alone: bool) -> dict[str, Any]:
    """Patches of a picture, padded to 32 of them, unnormalised."""
    where = places(shape, 32)
    pixels = models.noise(shape, 1, 32, 3 * 4 * 4) / 4 + 0.5
    return {"pixel_values": pixels * (where >= 0).any(-1, True), "image_position_ids": where}


def _gemma4(**words: Any) -> Family:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = tf.Gemma4Config(
        text_config=text(
            "gemma4_text", 6, layer_types=kinds, sliding_window=8, global_head_dim=32,
            vocab_size_per_layer_input=models.VOCAB, **words,
        ),
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 4,
            "pooling_kernel_size": 2, "position_embedding_size": 160,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    cls = tf.Gemma4ForConditionalGeneration
    return Family(cls, config, gemma4_picture, wrapped, type_ids="mm_token_type_ids")


@newer("Gemma4Config")
def gemma4() -> Family:
    """The small ones: embeddings per layer, and layers that share keys and values."""
    return _gemma4(hidden_size_per_layer_input=16, num_kv_shared_layers=3)


@newer("Gemma4Config")
def gemma4_moe() -> Family:
    """The large ones: keys that are values, experts, and image tokens that see each other."""
    words = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True}
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    bidirectional = {"use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0}
    return _gemma4(**words, **experts, **bidirectional)


@newer("Llama4Config")
def llama4() -> Family:
    # in transformers 5.24 its forward reads a field that its language model's output lacks
    tf.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None
    config = tf.Llama4Config(
        text_config=text(
            "llama4_text", 8, intermediate_size_mlp=96, num_local_experts=4,
            moe_layers=[1, 3, 5, 7], attention_chunk_size=8,
        ),
        vision_config={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "vision_output_dim": 48,
            "projector_input_dim": 48, "projector_output_dim": 48,
        },
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )  # fmt: skip

    def layout(n: int, shape: str) -> list[int]:
        return [START, *([IMAGE] * 4 + [models.BREAK]) * (n // 4), END]

    return Family(tf.Llama4ForConditionalGeneration, config, cut, layout)


@newer("PaliGemmaConfig")
def paligemma() -> Family:
    config = tf.PaliGemmaConfig(
        text_config=text("gemma"),
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
        vocab_size=models.VOCAB,
        tie_word_embeddings=False,
    )
    cls, single = tf.PaliGemmaForConditionalGeneration, models.single(16)
    # 0 is what may be read in both directions: the whole prompt
    return Family(cls, config, single, type_ids="token_type_ids", marked_as=0)


@newer("Molmo2Config")
def molmo2() -> Family:
    config = tf.Molmo2Config(
        text_config=text("molmo2_text", additional_vocab_size=0),
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 2, "image_size": [16, 16],
            "patch_size": 4,
        },
        adapter_config={
            "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
            "intermediate_size": 48, "text_hidden_size": 64, "vision_feature_layer": [1, 0],
        },
        image_patch_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    cls = tf.Molmo2ForConditionalGeneration
    return Family(cls, config, cropped, wrapped, type_ids="mm_token_type_ids", join=counted)


def cropped(shape: str, alone: bool) -> dict[str, Any]:
    """Molmo 2: 4 x 4 patches of the whole picture and of each crop, four to a token."""
    height, width = (side // 2 for side in models.SHAPES[shape])
    crops = 1 + height * width
    patches = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    tiled = torch.arange(16 * height * width).view(height, width, 4, 4).transpose(1, 2)
    tiled = tiled.reshape(2 * height, 2, 2 * width, 2).transpose(1, 2).reshape(-1, 4)
    return {
        "pixel_values": models.noise(shape, crops, 16, 3 * 4 * 4),
        "image_token_pooling": torch.cat([patches, 16 + tiled]),
        "image_grids": torch.tensor([[2, 2, 2 * height, 2 * width]]),
        "image_num_crops": torch.tensor([crops]),
    }


def counted(pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """Molmo 2 numbers the patches of all pictures of a batch in a row."""
    before, moved = 0, []
    for one in pictures:
        moved.append(one | {"image_token_pooling": one["image_token_pooling"] + before})
        before += one["pixel_values"][..., 0].numel()
    return models.joined(moved)


@newer("MiniCPMV4_6Config")
def minicpmv4_6() -> Family:
    words = dict(DELTA)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    rope |= {"mrope_interleaved": True} | words.pop("rope")
    config = tf.MiniCPMV4_6Config(
        text_config=text("qwen3_5_text", 4, rope_parameters=rope, **words),
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
        },
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )  # fmt: skip

    def picture(shape: str, alone: bool) -> dict[str, Any]:
        height, width = (4 * side for side in models.SHAPES[shape])
        pixels = models.noise(shape, 1, 3, 4, height * width * 4)
        return {"pixel_values": pixels, "target_sizes": torch.tensor([[height, width]])}

    def join(pictures: list[dict[str, Any]]) -> dict[str, Any]:
        """The patches of all pictures lie side by side in one long picture."""
        pixels = torch.cat([one["pixel_values"] for one in pictures], -1)
        return models.joined(pictures) | {"pixel_values": pixels}

    return Family(tf.MiniCPMV4_6ForConditionalGeneration, config, picture, wrapped, join=join)


@newer("Glm46VConfig")
def glm46v() -> Family:
    """GLM-4.6V Flash; the larger one has the experts of GLM-4.5V."""
    return _glm(tf.Glm46VForConditionalGeneration, tf.Glm46VConfig)
