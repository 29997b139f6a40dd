"""Tiny random models of other families, with processors and tokenizers made from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MARK = "<|vision_start|><|image_pad|><|vision_end|>"
_SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


def qwen2_5_vl(folder: Path) -> Path:
    """A Qwen2.5-VL of six layers with grouped heads and M-RoPE; tokens are bytes."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    vocabulary = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": list(_SPECIAL)})
    end, start, stop, image, video = (
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<|endoftext|>", *_SPECIAL[2:4], *_SPECIAL[5:])
    )
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template="{{ messages }}",
    ).save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config={
            "model_type": "qwen2_5_vl_text",
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": rope,
            "rope_scaling": rope,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 128,
            "in_channels": 3,
            "in_chans": 3,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=stop,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                weight.normal_(0, 0.3)
            elif weight.dim() > 1:
                weight.normal_(0, 0.16 if "language" in name else 0.1)
    model.save_pretrained(folder)
    return folder


def requests(folder: Path, methods: list[str]) -> list[dict[str, Any]]:
    """One request per method, about one or two pictures of several shapes."""
    out = []
    for n, method in enumerate(methods):
        noise = np.random.default_rng(n)
        shapes = [(112 + 28 * (n % 3), 168), (84, 112)][: 1 + n % 2]
        files = []
        for k, (height, width) in enumerate(shapes):
            files.append(str(folder / f"qwen-{n}-{k}.png"))
            pixels = noise.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(files[-1])
        asked = " and ".join([MARK] * len(files)) + f"What is in picture {n}, please?"
        prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        out.append({"method": method, "images": files, "prompt": prompt})
    return out
