"""The tiny families are fit to test with: what holds in plain transformers before any method."""

import pytest
import torch
from transformers import PreTrainedModel

from tests import models, newer
from tests.models import rounding
from tests.references.full import difference, generate
from tests.references.vcd import plain


@pytest.mark.parametrize("kind", ["image", "images", "text", "mixed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_rows_equal_single_runs(
    model: PreTrainedModel, family: str, attention: str, kind: str
) -> None:
    model.set_attn_implementation(attention)
    batch = models.inputs(family, kind, batch=3)
    assert 0 in batch["attention_mask"]
    logits = model(**batch).logits[:, -1]
    answers = model.generate(**batch, max_new_tokens=8)[:, -8:]
    for row in range(3):
        alone = models.inputs(family, kind, row=row)
        torch.testing.assert_close(model(**alone).logits[0, -1], logits[row], atol=1e-5, rtol=0)
        assert model.generate(**alone, max_new_tokens=8)[0, -8:].equal(answers[row])


def test_decoding_equals_reading_from_the_start(model: PreTrainedModel, family: str) -> None:
    """To a third of what methods with two streams are allowed."""
    inputs = models.inputs(family, "images", row=1)
    out = generate(model, inputs)
    written = out.sequences[0, inputs["input_ids"].shape[1] :]
    for count, logits in enumerate(out.logits):
        assert difference(plain(model, inputs, written[:count]), logits[0]) < rounding(family) / 3


@torch.no_grad()
def test_attention_is_sharp_and_reaches_the_picture(model: PreTrainedModel, family: str) -> None:
    model.set_attn_implementation("eager")
    inputs = models.inputs(family, "image")
    plain = model(**inputs, output_attentions=True)
    visual = inputs["input_ids"][0] == models.IMAGE
    for weights in plain.attentions:
        assert weights[0, :, -1].amax(-1).mean() > 2 / len(visual)
    assert any(weights[0, :, -1, visual].sum(-1).mean() > 0.2 for weights in plain.attentions)
    other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]})
    assert (other.logits[0, -1] - plain.logits[0, -1]).abs().max() > 0.1


def test_every_build_has_equal_weights(family: str) -> None:
    shared, fresh = models.build(family), models.build(family, fresh=True)
    assert shared is models.build(family)
    assert fresh is not shared
    for key, value in fresh.state_dict().items():
        assert value.equal(shared.state_dict()[key]), key


def test_prefix_and_suffix_make_the_whole(family: str) -> None:
    for kind, prefix_row in (("image", None), ("shared", 0)):
        for row in range(3):
            prefix = models.inputs(family, "prefix", row=row if prefix_row is None else prefix_row)
            parts = [prefix["input_ids"], models.inputs(family, "suffix", row=row)["input_ids"]]
            assert torch.cat(parts, 1).equal(models.inputs(family, kind, row=row)["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("name", newer.BEAMLESS)
def test_beams_of_some_fail_without_any_method(name: str) -> None:
    if name in models.FAMILIES:
        with torch.no_grad(), pytest.raises(ValueError, match="features and image tokens"):
            models.build(name).generate(**models.inputs(name), num_beams=2, max_new_tokens=2)
