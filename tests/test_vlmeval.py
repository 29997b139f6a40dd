"""The bridge to VLMEvalKit: on a stand-in for its `BaseModel`, and in VLMEvalKit where it is."""

import base64
import csv
import importlib
import io
import random
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foveate import VLM, FoveateError
from foveate.scenes import questions, world

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
        plain.vlm.ask([], "\n".join(QUESTION), max_new_tokens=4).text
    )
    with pytest.raises(FoveateError, match="toy has a picture after text"):
        plain.generate_inner(message[::-1], "toy")


@pytest.mark.slow
def test_vlmevalkit_asks_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs an environment with `nvidia-vlmeval` and torchvision."""
    pytest.importorskip("vlmeval", reason="VLMEvalKit is not installed")
    monkeypatch.setenv("LMUData", str(tmp_path))
    from vlmeval.config import supported_VLM
    from vlmeval.dataset.image_yorn import ImageYORNDataset
    from vlmeval.run import main

    bridge = importlib.import_module("foveate.bridges.vlmeval")
    scene, rows = world.sample(questions.FIRST_HELD_OUT), []
    stream = io.BytesIO()
    world.draw(scene, 96).save(stream, "PNG")
    image = base64.b64encode(stream.getvalue()).decode()
    for question in questions.exam(scene, random.Random(0)):
        if question.answer in ("yes", "no"):
            rows.append((len(rows), image, question.text, question.answer.title(), "scene"))
    with (tmp_path / "POPE.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerows([("index", "image", "question", "answer", "category"), *rows])
    monkeypatch.setitem(ImageYORNDataset.DATASET_MD5, "POPE", None)
    monkeypatch.setitem(supported_VLM, "drawn", partial(bridge.Foveate, device="cpu"))
    out = tmp_path / "out"
    arguments = ["run.py", "--data", "POPE", "--model", "drawn", "--work-dir", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    scores = next(csv.DictReader((out / "drawn" / "drawn_POPE_score.csv").open()))
    (stored,) = tmp_path.glob("images/POPE/0.*")  # VLMEvalKit hands over a JPEG
    vlm = VLM.load("pocket", device="cpu")
    right = [vlm.ask(stored, text).text.lower() == label.lower() for _, _, text, label, _ in rows]
    assert float(scores["acc"]) == pytest.approx(100 * sum(right) / len(right))
