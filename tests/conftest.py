import logging
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from tests import models


class _Deprecated(logging.Handler):
    """What transformers says it will drop is an error in tests."""

    def emit(self, record: logging.LogRecord) -> None:
        assert "deprecated" not in record.getMessage(), record.getMessage()


logging.getLogger("transformers").addHandler(_Deprecated())
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
