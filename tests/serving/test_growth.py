"""What clients can make grow has a bound, and what is forgotten comes back as it was."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate import enhance
from foveate.methods.clvs import CLVS
from tests import models
from tests.serving.conftest import question, scene


def names() -> list[str]:
    registered = [name for name in ALL_ATTENTION_FUNCTIONS if name.startswith("foveate_")]
    masks = [name for name in ALL_MASK_ATTENTION_FUNCTIONS if name.startswith("foveate_")]
    assert registered == masks
    return registered


def logits(model: torch.nn.Module, method: CLVS) -> torch.Tensor:
    with torch.no_grad(), enhance(model, method):
        return model(**models.inputs("llava")).logits


def test_requests_with_many_parameter_values_leave_no_name_behind(client, vlm):
    options = {"messages": question("Is there a car?", scene(3)), "max_tokens": 2}
    first = vlm.ask(scene(3), "Is there a car?", "clvs(smoothing=0.1)", max_new_tokens=2).text
    for value in range(4):
        model = f"pocket:clvs(smoothing=0.{value + 2})"
        client.chat.completions.create(model=model, **options)
    assert names() == []
    again = client.chat.completions.create(model="pocket:clvs(smoothing=0.1)", **options)
    assert again.choices[0].message.content == first


def test_a_name_lives_as_long_as_a_block_uses_it():
    model, other = models.build("llava", fresh=True), models.build("llava", fresh=True)
    method = CLVS(smoothing=0.3, stop_threshold=0)
    expected = logits(model, method)
    with torch.no_grad(), enhance(model, method):
        [name] = names()
        logits(other, method)  # the same name, and another block of it is left
        with enhance(other, CLVS(smoothing=0.9)):
            assert len(names()) == 2
        assert names() == [name]
        assert torch.equal(model(**models.inputs("llava")).logits, expected)
    assert names() == []


@pytest.mark.slow
def test_a_graph_compiled_before_its_name_was_forgotten():
    model, inputs = models.build("llava", fresh=True), models.inputs("llava")
    one, two = CLVS(smoothing=0.3, stop_threshold=0), CLVS(smoothing=0.9, stop_threshold=0)
    expected = {method: logits(model, method) for method in (one, two)}
    assert (expected[one] - expected[two]).abs().max() > 1e-3
    compiled = torch.compile(model, backend="eager")
    for method in (one, two, one):
        with torch.no_grad(), enhance(compiled, method):
            got = compiled(**inputs, use_cache=False).logits
        assert torch.allclose(got, expected[method], atol=1e-5)
        assert names() == []
