"""The bridge to VLMEvalKit, on a stand-in for its `BaseModel`: messages become questions."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foveate import FoveateError
from foveate.scenes import world

QUESTION = ["Describe", "this image."]


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = ModuleType("vlmeval.vlm.base")
    base.BaseModel = object  # type: ignore[attr-defined]
    for name in ("vlmeval", "vlmeval.vlm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", base)
    monkeypatch.delitem(sys.modules, "foveate.bridges.vlmeval", raising=False)
    yield importlib.import_module("foveate.bridges.vlmeval")
    sys.modules.pop("foveate.bridges.vlmeval", None)


def test_a_message_is_asked_with_the_method(bridge: Any, tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    world.draw(world.sample(1, "against"), 96).save(picture)
    message = [{"type": "image", "value": str(picture)}]
    message += [{"type": "text", "value": text} for text in QUESTION]
    model = bridge.Foveate("pocket", "clvs", max_new_tokens=4, device="cpu")
    answer = model.vlm.ask(picture, "\n".join(QUESTION), "clvs", max_new_tokens=4)
    assert model.generate_inner(message, "toy") == answer.text
    plain = bridge.Foveate("pocket", max_new_tokens=4, device="cpu")
    assert plain.generate_inner(message) != answer.text
    assert plain.generate_inner(message[1:]) == (
        plain.vlm.ask(None, "\n".join(QUESTION), max_new_tokens=4).text
    )
    with pytest.raises(FoveateError, match="toy has a picture after text"):
        plain.generate_inner(message[::-1], "toy")
