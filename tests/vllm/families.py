"""Tiny random models of other families, with processors and tokenizers made from nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.vllm.answers import tower_renamed

SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_bos_token": "<vision>",
    "vision_eos_token": "</vision>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
}
TEXT = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
TOWER = {"hidden_size": 64, "intermediate_size": 128}
CLIP = TOWER | {
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Tiny:
    """A family.

    Attributes:
        build: makes its processor and its configuration with a tokenizer.
        mark: a picture, in the text of a prompt.
        options: of the engine. leaves_out: inputs of transformers' model that vLLM has not.
    """

    build: Callable[[Any], tuple[Any, Any]]
    mark: str = "<image>"
    options: dict[str, Any] = field(default_factory=dict)
    leaves_out: tuple[str, ...] = ()

    def save(self, folder: Path) -> Path:
        """The model in a folder; its random weights are wide, so that attention is not uniform."""
        import torch
        from transformers import AutoModelForImageTextToText

        processor, config = self.build(_tokenizer())
        processor.save_pretrained(folder)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "embed_tokens" in name or "lm_head" in name:
                    weight.normal_(0, 0.3)
                elif weight.dim() > 1:
                    weight.normal_(0, 0.16 if "language" in name else 0.1)
        model.save_pretrained(folder)
        clip = config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model")
        return tower_renamed(folder) if clip else folder


def _tokenizer() -> Any:
    """Tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(list(dict.fromkeys(SPECIAL.values())))  # from 256 on
    named = {k: v for k, v in SPECIAL.items() if k[:3] not in ("bos", "eos", "pad", "unk")}
    plain = {k: v for k, v in SPECIAL.items() if k not in named}
    return PreTrainedTokenizerFast(tokenizer_object=bare, extra_special_tokens=named, **plain)


def _id(tokenizer: Any, name: str) -> int:
    found: int = tokenizer.convert_tokens_to_ids(SPECIAL[name])
    return found


def _qwen(tokenizer: Any, config: Any, processor: Any, **vision: Any) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    patch = vision["patch_size"]
    pictures = Qwen2VLImageProcessor(patch_size=patch)
    rope = TEXT["rope_parameters"] | {"mrope_section": [4, 6, 6]}
    if "deepstack_visual_indexes" in vision:
        rope["mrope_interleaved"] = True
    tower = {
        "depth": 2,
        "num_heads": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "in_channels": 3,
        "in_chans": 3,
    }
    made = config(
        text_config=TEXT | {"rope_parameters": rope, "rope_scaling": rope, "head_dim": 32},
        vision_config=TOWER | tower | vision,
        image_token_id=_id(tokenizer, "image_token"),
        video_token_id=_id(tokenizer, "video_token"),
        vision_start_token_id=_id(tokenizer, "vision_bos_token"),
        vision_end_token_id=_id(tokenizer, "vision_eos_token"),
        tie_word_embeddings=False,
    )
    return processor(pictures, tokenizer), made


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    def processor(pictures: Any, tokenizer: Any) -> Any:
        films = Qwen2VLVideoProcessor()
        return Qwen2_5_VLProcessor(pictures, tokenizer, films, chat_template="{{ messages }}")

    window = {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
    return _qwen(tokenizer, Qwen2_5_VLConfig, processor, **window)


def _qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    def processor(pictures: Any, tokenizer: Any) -> Any:
        films = Qwen3VLVideoProcessor()
        return Qwen3VLProcessor(pictures, tokenizer, films, chat_template="{{ messages }}")

    deep = {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return _qwen(tokenizer, Qwen3VLConfig, processor, **deep)


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    size = {"height": 32, "width": 32}
    tower = CLIP | {"image_size": [32, 32], "patch_size": [8, 8], "model_type": "internvl_vision"}
    config = InternVLConfig(
        text_config=TEXT | {"model_type": "qwen3"},
        vision_config=tower,
        image_token_id=_id(tokenizer, "context_image_token"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    pictures = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    films = InternVLVideoProcessor(size=size)
    how = {"image_seq_length": 4, "chat_template": "{{ messages }}"}
    return InternVLProcessor(pictures, tokenizer, films, **how), config


PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]


def _llava_next(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor

    config = LlavaNextConfig(
        text_config=TEXT | {"model_type": "mistral", "sliding_window": None},
        vision_config=CLIP | {"model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=_id(tokenizer, "image_token"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=PINPOINTS,
    )
    how = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaNextProcessor(pictures, tokenizer, patch_size=8, **how), config


def _llava_onevision(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    size = {"height": 32, "width": 32}
    config = LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=_id(tokenizer, "image_token"),
        video_token_index=_id(tokenizer, "video_token"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    pictures = LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS)
    films = LlavaOnevisionVideoProcessor(size=size)
    how = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return LlavaOnevisionProcessor(pictures, tokenizer, films, **how), config


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    tokenizer.add_tokens([n * "\n" for n in range(1, 5)])  # vLLM looks them up
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    rope = TEXT["rope_parameters"]
    sliding = {"sliding_window": 24, "layer_types": kinds, "query_pre_attn_scalar": 32}
    sliding |= {"rope_parameters": dict.fromkeys(kinds, rope), "head_dim": 32}
    config = Gemma3Config(
        text_config=TEXT | sliding | {"model_type": "gemma3_text"},
        vision_config=CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=_id(tokenizer, "boi_token"),
        eoi_token_index=_id(tokenizer, "eoi_token"),
        image_token_index=_id(tokenizer, "image_token"),
        tie_word_embeddings=False,
    )
    pictures = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return Gemma3Processor(pictures, tokenizer, image_seq_length=4), config


BOTH = {"limit_mm_per_prompt": {"image": 2, "video": 0}}
FAMILIES = {
    "qwen2_5_vl": Tiny(_qwen2_5_vl, "<vision><image></vision>", BOTH),
    "qwen3_vl": Tiny(_qwen3_vl, "<vision><image></vision>", BOTH),
    "internvl": Tiny(_internvl, "<image>", BOTH),
    "llava_next": Tiny(_llava_next),
    "llava_onevision": Tiny(_llava_onevision, "<image>", BOTH),
    "gemma3": Tiny(_gemma3, "<boi>", leaves_out=("token_type_ids",)),
}


def requests(folder: Path, methods: list[str], mark: str) -> list[dict[str, Any]]:
    """One request per method, about one or two pictures of several shapes."""
    out = []
    for n, method in enumerate(methods):
        noise = np.random.default_rng(n)
        shapes = [(112 + 28 * (n % 3), 168), (84, 112)][: 1 + n % 2]
        files = []
        for k, (height, width) in enumerate(shapes):
            files.append(str(folder / f"{n}-{k}.png"))
            pixels = noise.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(files[-1])
        asked = " and ".join([mark] * len(files)) + f"What is in picture {n}, please?"
        prompt = f"user\n{asked}\nassistant\n"
        out.append({"method": method, "images": files, "prompt": prompt})
    return out
