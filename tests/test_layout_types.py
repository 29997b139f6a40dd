"""Types that share a layout file with a tested family: looking finds what the file says."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from foveate.families.layout import grids
from foveate.families.probe import agreement, find
from tests import tiny
from tests.survey.shrink import shrunk

QWEN = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}}
SQUARE = {"size": {"height": 16, "width": 16}}
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "cosmos3_omni": ("Qwen2VL", QWEN),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoe", QWEN),
    "exaone4_5": ("Qwen2VL", QWEN),
    "glm_ocr": ("Glm46V", QWEN),
    "glmga": ("Glmga", QWEN),
    "janus": ("Janus", SQUARE),
    "paddleocr_vl": ("PaddleOCRVL", QWEN),
    "qwen2_5_omni_thinker": ("Qwen2VL", QWEN),
    "qwen3_omni_moe_thinker": ("Qwen2VL", QWEN),
}
NARROW = {
    "hidden_size": 64, "embed_dim": 64, "intermediate_size": 64, "num_heads": 2, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "depth": 1, "num_hidden_layers": 1,
    "patch_size": 4, "image_size": 16, "spatial_merge_size": 2,
}  # fmt: skip
HEARING = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}


def tower(kind: str) -> Any:
    """A tiny model of the type whose tower lets no token look at another."""
    config = shrunk(kind)
    for part, sizes in (("vision_config", NARROW), ("audio_config", HEARING)):
        for name, value in sizes.items():
            if isinstance(getattr(getattr(config, part, None), name, None), int):
                setattr(getattr(config, part), name, value)
    if hasattr(config.vision_config, "fullatt_block_indexes"):
        config.vision_config.fullatt_block_indexes = [0]
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    draw = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1 and not ("language" in name or "text" in name):
            p.data = torch.randn(p.shape, generator=draw) / p[0].numel() ** 0.5
            if "attn" in name or "attention" in name:
                p.data.zero_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_looking_agrees_with_the_file(kind: str) -> None:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    name, options = TYPES[kind]
    model, processor = tower(kind), tiny.image_processor(name)(**options)
    owner = model if hasattr(model, "get_image_features") else model.model
    wanted = inspect.signature(owner.get_image_features).parameters

    def seen(picture: Image.Image) -> tuple[dict[str, Tensor], Tensor]:
        inputs = processor([picture], return_tensors="pt")
        with torch.no_grad():
            given = {k: v for k, v in inputs.items() if k in wanted}
            found = owner.get_image_features(**given, return_dict=True).pooler_output
        parts = [found] if isinstance(found, Tensor) else list(found)
        return inputs, torch.cat([part.flatten(0, -2) for part in parts])

    for size in [(160, 120), (90, 200)]:
        inputs, features = seen(Image.new("RGB", size, (70, 80, 60)))
        ids = torch.tensor([[1] + [model.config.image_token_id] * len(features)])
        door = SimpleNamespace(image_processor=processor)
        (laid,) = grids(model, {**inputs, "input_ids": ids}, [[size]], door)
        looked = find(lambda picture: seen(picture)[1], size)
        same, of = agreement(looked, laid)
        assert same == of > 0, size
        assert looked.confidence > 0.9, size
