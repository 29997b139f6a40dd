"""A decoder of which most layers are linear attention and keep no keys: Qwen3.5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from foveate import enhance
from foveate.methods.adaptvis import AdaptVis
from foveate.methods.clvs import CLVS
from tests import models
from tests.test_engine import Contrast

pytestmark = pytest.mark.skipif(
    not hasattr(tf, "Qwen3_5Config"), reason="this transformers has no Qwen3.5"
)
STEPS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    """Eight layers, the fourth and the eighth with full attention, behind Qwen3-VL's tower."""
    tower = models.FAMILIES["qwen3_vl"]().config.vision_config.to_dict()
    names = tf.Qwen3_5Config().vision_config.to_dict()
    config = tf.Qwen3_5Config(
        text_config={
            "vocab_size": models.VOCAB, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16, "pad_token_id": models.PAD,
        },
        vision_config={k: v for k, v in tower.items() if k in names and k != "model_type"},
        image_token_id=models.IMAGE,
        video_token_id=models.VIDEO,
        vision_start_token_id=models.START,
        vision_end_token_id=models.END,
    )  # fmt: skip
    return models.randomise(tf.Qwen3_5ForConditionalGeneration(config))


def answer(model: Any, inputs: dict[str, Tensor], method: Any) -> tuple[Tensor, Tensor]:
    """Logits (steps, B, V) and the tokens (B, steps)."""
    with torch.no_grad(), enhance(model, method):
        out = model.generate(
            **inputs, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(out.logits), out.sequences[:, -STEPS:]


def test_a_second_stream_of_pixels_equals_two_runs_by_hand(model: Any) -> None:
    inputs = models.inputs("qwen3_vl")
    got, tokens = answer(model, inputs, Contrast())
    ids = torch.cat([inputs["input_ids"], tokens[:, :-1]], 1)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole["mm_token_type_ids"] = (ids == models.IMAGE).long()
    dimmed = whole | {"pixel_values": 0.1 * inputs["pixel_values"]}
    with torch.no_grad():
        one, other = (model(**x).logits[:, -STEPS:].transpose(0, 1) for x in (whole, dimmed))
    assert torch.allclose(got, 2 * one - other, atol=1e-3)


@pytest.mark.parametrize("method", [CLVS(), Contrast(), AdaptVis()], ids=lambda m: type(m).__name__)
def test_a_padded_batch_equals_single_runs(model: Any, method: Any) -> None:
    got, _ = answer(model, models.inputs("qwen3_vl", batch=3), method)
    for row in range(3):
        want, _ = answer(model, models.inputs("qwen3_vl", row=row), method)
        assert torch.allclose(got[:, row], want[:, 0], atol=1e-3)
