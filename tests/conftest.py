from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from tests import models

torch.set_num_threads(1)  # tiny models: threads cost more than they give, and sums stay in order


@pytest.fixture(params=list(models.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family's name in turn, for tests that hold for all of them."""
    return request.param


@pytest.fixture
def model(family: str) -> Iterator[PreTrainedModel]:
    """The family's model, shared by the session (weights are never edited), on plain SDPA."""
    model = models.build(family)
    model.set_attn_implementation("sdpa")
    yield model
    assert not model._forward_hooks, "a test left a hook on the shared model"
