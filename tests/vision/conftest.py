import pytest

from foveate.vlm.vlm import VLM
from tests.vision.families import PROCESSORS, vlm


@pytest.fixture(params=PROCESSORS)
def family(request: pytest.FixtureRequest) -> str:
    """Every family of `tests/vision` in turn."""
    return request.param


@pytest.fixture
def model(family: str) -> VLM:
    """The family's model with its processor, shared by the session."""
    return vlm(family)
