"""What clients can make grow has a bound, and what is forgotten comes back as it was."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate import enhance
from foveate.backends.transformers import attention
from foveate.methods.clvs import CLVS
from tests import models
from tests.serving.conftest import question, scene

KEPT = 4


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_KEPT", KEPT)


def names() -> list[str]:
    found = [name for name in ALL_ATTENTION_FUNCTIONS if name.startswith("foveate_")]
    assert found == [name for name in ALL_MASK_ATTENTION_FUNCTIONS if name.startswith("foveate_")]
    assert sorted(found) == sorted(attention._names)
    return found


def many(count: int, start: float = 0.5) -> list[CLVS]:
    return [CLVS(smoothing=start + i / 1000) for i in range(count)]


def logits(model: torch.nn.Module, method: CLVS | None = None) -> torch.Tensor:
    inputs = models.inputs("llava")
    with torch.no_grad(), enhance(model, *([] if method is None else [method])):
        return model(**inputs).logits


def test_requests_with_ever_new_parameters(client, vlm):
    options = {"messages": question("Is there a car?", scene(3)), "max_tokens": 2}
    first = vlm.ask(scene(3), "Is there a car?", "clvs(smoothing=0.1)", max_new_tokens=2).text
    for method in many(2 * KEPT, 0.2):
        client.chat.completions.create(model=f"pocket:{method}", **options)
        assert len(names()) <= KEPT
    again = client.chat.completions.create(model="pocket:clvs(smoothing=0.1)", **options)
    assert again.choices[0].message.content == first


def test_the_one_used_longest_ago_goes_first():
    model, (kept, *others) = models.build("llava"), many(KEPT + 1)
    logits(model, kept)
    [name] = {*attention._names} - {*list(attention._names)[:-1]}
    for method in others:
        logits(model, method)
        logits(model, kept)
    assert name in names()
    for method in many(KEPT, 0.9):
        logits(model, method)
    assert name not in names()


def test_an_open_block_keeps_its_name():
    model, other = models.build("llava", fresh=True), models.build("llava", fresh=True)
    method, inputs = CLVS(smoothing=0.3, stop_threshold=0), models.inputs("llava")
    expected = logits(model, method)
    with torch.no_grad(), enhance(model, method):
        for another in many(2 * KEPT):
            logits(other, another)
        assert model.get_decoder().config._attn_implementation in names()
        assert torch.equal(model(**inputs).logits, expected)
    for another in many(2 * KEPT):
        logits(other, another)
    assert len(names()) == KEPT


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
        for another in many(2 * KEPT):
            logits(model, another)


def test_a_long_queue_of_models(monkeypatch: pytest.MonkeyPatch):
    """Even where all names but the newest are in use, the newest stays."""
    monkeypatch.setattr(attention, "_KEPT", 1)
    first, second = models.build("llava", fresh=True), models.build("llava", fresh=True)
    with enhance(first, CLVS(smoothing=0.31)), enhance(second, CLVS(smoothing=0.32)):
        assert len(names()) == 2
