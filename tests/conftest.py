import logging
from collections.abc import Callable, Iterator
from fnmatch import fnmatch

import pytest
import torch
from transformers import PreTrainedModel

from foveate import commands
from tests import models, newer


class _Deprecated(logging.Handler):
    """What transformers says it will drop is an error in tests."""

    def emit(self, record: logging.LogRecord) -> None:
        assert "deprecated" not in record.getMessage(), record.getMessage()


logging.getLogger("transformers").addHandler(_Deprecated())
torch.set_num_threads(1)  # tiny models: threads cost more than they give, and sums stay in order


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families",
        help="test these model families only: names or patterns, such as llava or llava*,qwen*",
    )


# what families of tests/newer.py run: what holds for every method, and the methods' references
NEWER_RUN = (
    "models", "invariants", "families", "probe", "adhh", "cli", "clvs", "deco", "dola",
    "icd", "image_attention", "m3id", "pai", "sid", "spin", "tuning", "var", "vcd",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _runs(item)]
    for item in items:
        if "llama4" in _words(item):  # what is told, and right: its full attention has no positions
            item.add_marker(pytest.mark.filterwarnings("ignore:clvs. layer 3 of llama4 has no pos"))
    if not (chosen := config.getoption("--families")):
        return
    patterns = chosen.split(",")
    left_out = {
        name for name in models.FAMILIES if not any(fnmatch(name, pattern) for pattern in patterns)
    }
    if len(left_out) == len(models.FAMILIES):
        raise pytest.UsageError(f"--families {chosen}: tests/models.py has no such family")
    config.hook.pytest_deselected(items=[item for item in items if left_out & _words(item)])
    items[:] = [item for item in items if not left_out & _words(item)]


def _runs(item: pytest.Item) -> bool:
    """Whether a test is for the families that it is given."""
    given = {*newer.FAMILIES} & _words(item)
    if not given:
        return True
    if item.nodeid.startswith("tests/vision/"):
        return True
    name = item.nodeid.partition("::")[0].removeprefix("tests/test_").removesuffix(".py")
    if name not in NEWER_RUN or any(name in newer.REFUSED.get(family, ()) for family in given):
        return False
    return not (given & {*newer.BEAMLESS} and "beams" in item.name)


def _words(item: pytest.Item) -> set[str]:
    """The words among a test's parameters."""
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {word for value in given if isinstance(value, str) for word in value.split()}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Layouts that tests find are not kept among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in newer.FAMILIES else name
        for name in models.FAMILIES
    ]
)
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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            commands.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call
