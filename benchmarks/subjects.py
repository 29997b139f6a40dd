"""The models that are measured: the pocket model, and random ones in the shapes of known models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from report import dtype_of, size_of  # beside this file
from torch import Tensor
from transformers.initialization import no_init_weights

from foveate import VLM
from foveate.pocket.build import WEIGHTS, load_pocket
from foveate.scenes import world


@dataclass
class Subject:
    """A model with one prompt."""

    model: Any
    inputs: dict[str, Tensor]

    @property
    def note(self) -> str:
        ids, config = self.inputs["input_ids"], self.model.get_decoder().config
        visual = int((ids == self.model.config.image_token_id).sum())
        return (
            f"{size_of(self.model)}, {config.num_hidden_layers} layers, "
            f"vocabulary {config.vocab_size:,}, prompt of {ids.shape[1]:,} tokens, "
            f"{visual:,} visual, {dtype_of(self.model)}"
        )


QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 152_000,
    "tie_word_embeddings": True,
}
TINY = QWEN | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
TINY_ROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}  # of heads 16 wide
QWEN_VL = {  # the language model of Qwen2.5-VL 7B
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "rope_parameters": ROPE | {"mrope_section": [16, 24, 24]},
}
LLAMA = {"model_type": "llama", "vocab_size": 32_064}  # its defaults are those of 7B
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "patch_size": 4,
}


SMALL_TOWER = {  # of Qwen2.5-VL
    "hidden_size": 32,
    "intermediate_size": 32,
    "depth": 1,
    "num_heads": 1,
    "fullatt_block_indexes": [0],
}


def llava(
    text_config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    side: int = 24,
    clip: bool = False,
) -> Subject:
    """A random LLaVA-1.5 shape: side x side visual tokens and 64 of text.

    Args:
        clip: with LLaVA's own tower, CLIP-L/336, in place of a tiny one.
    """
    vision: dict[str, Any] = {}
    if not clip:
        vision = {"vision_config": TOWER | {"image_size": 4 * side}, "vision_feature_layer": -1}
    config = transformers.LlavaConfig(
        text_config=text_config, image_token_index=3, image_seq_length=side**2, **vision
    )
    size = config.vision_config.image_size
    model = random_model(config, device, dtype)
    return _prompt(model, side**2 + 64, torch.randn(1, 3, size, size))


def llava_next(
    text_config: dict[str, Any], device: torch.device, dtype: torch.dtype, length: int = 2900
) -> Subject:
    """A random LLaVA-NeXT shape: a whole picture and its 2 x 2 tiles, `length` tokens in all."""
    size = 4 * 24
    config = transformers.LlavaNextConfig(
        text_config=text_config,
        vision_config=TOWER | {"image_size": size},
        image_token_index=3,
        image_grid_pinpoints=[[2 * size, 2 * size]],
        vision_feature_layer=-1,
    )
    model = random_model(config, device, dtype)
    sizes = torch.tensor([[2 * size - 8, 2 * size]], device=device)
    return _prompt(model, length, torch.randn(1, 5, 3, size, size), image_sizes=sizes)


def qwen_vl(
    text_config: dict[str, Any], device: torch.device, dtype: torch.dtype, side: int = 24
) -> Subject:
    """A random Qwen2.5-VL shape: side x side visual tokens and 64 of text, behind a tiny tower."""
    width = text_config["hidden_size"]
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=SMALL_TOWER | {"out_hidden_size": width},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    model = random_model(config, device, dtype)
    grid = torch.tensor([[1, 2 * side, 2 * side]], device=device)
    pixels = torch.randn(4 * side**2, 3 * 2 * 14**2)
    subject = _prompt(model, side**2 + 64, pixels, image_grid_thw=grid)
    ids = subject.inputs["input_ids"]
    visual = ids == model.config.image_token_id
    subject.inputs["mm_token_type_ids"] = visual.int()
    start = int(visual[0].int().argmax())
    ids[0, start - 1], ids[0, start + side**2] = 5, 6
    return subject


def pocket(device: torch.device, dtype: torch.dtype) -> Subject:
    """The shipped model, on a drawn scene and a question."""
    if not list(WEIGHTS.glob("*.safetensors")):
        raise FileNotFoundError("the pocket model's weights are not there (foveate train pocket)")
    model, processor = load_pocket()
    content = [{"type": "image"}, {"type": "text", "text": "Is there a car in the image?"}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    picture = world.draw(world.sample(0))
    inputs = dict(processor(images=[picture], text=[prompt], return_tensors="pt").to(device))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return Subject(model.to(device, dtype), inputs)


SIZES: dict[str, Callable[[torch.device, torch.dtype], Subject]] = {
    "pocket": pocket,
    "0.5b": partial(llava, QWEN),
    "0.5b-clip": partial(llava, QWEN, clip=True),
    "0.5b-32k": partial(llava, QWEN | {"vocab_size": 32_064}),
    "next": partial(llava_next, QWEN),
    "7b": partial(llava, LLAMA),
    "qwen-7b": partial(qwen_vl, QWEN_VL),
    "tiny": partial(llava, TINY, side=6),  # to try the script out
    "qwen-tiny": partial(qwen_vl, QWEN_VL | TINY | TINY_ROPE, side=6),
}


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of this configuration with unit-variance random maps, filled in seconds."""
    torch.manual_seed(0)
    with no_init_weights(), device:
        kind = transformers.AutoModelForImageTextToText
        model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    for p in model.parameters():
        if p.dim() < 2:
            p.data.fill_(1.0)  # gains; where it is a bias, one that changes nothing of the cost
        else:
            width = (3 / p[0].numel()) ** 0.5
            p.data.uniform_(-width, width)
    return model.eval()


def _prompt(model: Any, length: int, pixels: Tensor, **more: Tensor) -> Subject:
    """BOS and system text, the picture, a question: `length` tokens."""
    picture = {"pixel_values": pixels.to(model.device, model.dtype), **more}
    with torch.no_grad():
        features = model.model.get_image_features(**picture, return_dict=True).pooler_output
    visual = sum(f.shape[:-1].numel() for f in features)
    ids = torch.randint(10, 400, (1, length), device=model.device)
    start = min(35, length - visual - 1)
    ids[:, start : start + visual] = model.config.image_token_id
    return Subject(model, {"input_ids": ids, **picture})


# -- models that answer ----------------------------------------------------------------------------


def clip_vlm(device: torch.device, dtype: torch.dtype) -> VLM:
    """The random 0.5B shape behind a random CLIP-L/336, with the pocket model's words."""
    processor = load_pocket()[1]
    config = transformers.LlavaConfig(
        text_config=QWEN, image_token_index=processor.image_token_id, image_seq_length=576
    )
    side = {"height": 336, "width": 336}
    processor.image_processor = type(processor.image_processor)(size=side, crop_size=side)
    processor.patch_size = 14
    model = random_model(config, device, dtype)
    model.generation_config.eos_token_id = None
    return VLM(model, processor, "0.5b")


def pocket_vlm(device: torch.device, dtype: torch.dtype) -> VLM:
    """The shipped model."""
    return VLM.load("pocket", device=device, dtype=dtype)


VLMS: dict[str, Callable[[torch.device, torch.dtype], VLM]] = {
    "pocket": pocket_vlm,
    "0.5b": clip_vlm,
}
