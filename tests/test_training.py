"""Methods in training: the backward pass sees what the forward saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import Method, enhance
from foveate.backends.transformers.compat_parts import start_checkpointing
from foveate.core.method import methods
from foveate.methods.cli.method import CLI
from foveate.methods.clvs import CLVS
from foveate.methods.vaf import VAF
from tests import models

METHODS: list[Method] = [  # CLI, which knows few families, has such a test of its own
    *(
        m
        for c in methods().values()
        if not (m := c(**c.example)).wants("rewrite") and c != CLI and "search" not in c.stages
    ),
    CLVS(smoothing=0.4, stop_threshold=0.9, stop_from=0.0, unified_positions=False),
]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_checkpointing_changes_no_gradient(method: Method, family: str) -> None:
    model = models.build(family, fresh=True)
    method = models.ready(method, family)
    inputs = models.inputs(family, batch=3)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == models.IMAGE, -100)
    model.train()
    grads: list[dict[str, Tensor]] = []
    losses: list[Tensor] = []
    for checkpointing in (False, True):
        if checkpointing:
            start_checkpointing(model)
        model.zero_grad()
        with enhance(model, method):
            loss: Any = model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5, rtol=1e-4), name


def test_a_gradient_through_two_turns_keeps_each_ones_phase() -> None:
    """The second forward is over when the first one's layers are differentiated."""
    model = models.build("llava", fresh=True)
    one, other = models.inputs("llava", row=0), models.inputs("llava", row=1)
    method = VAF(**VAF.example)
    with enhance(model, method):
        first = model(**one, use_cache=False).logits[:, -1].square().sum()
        first.backward()
        want = model.get_decoder().layers[2].self_attn.q_proj.weight.grad.clone()
        model.zero_grad()
        first = model(**one).logits[:, -1].square().sum()
        model(**other)
        first.backward()
    got = model.get_decoder().layers[2].self_attn.q_proj.weight.grad
    assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)
