"""Artifacts: saved, found again, and refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from foveate import FoveateError
from foveate.base import artifact
from foveate.base.artifact import DIRECTIONS, HEADS, INJECTION, TYPES, VECTOR, Artifact, check_model

SHAPE = {"model_type": "llava", "hidden_size": 8, "layers": 2}


def vector() -> Artifact:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 8, generator=generator)
    made = {"how": "mean difference", "examples": 40}
    return Artifact(VECTOR, SHAPE, {"vector": states.T.contiguous().T}, {"alpha": 0.5}, made)


def test_a_steering_vector_comes_back_as_it_was(tmp_path: Path) -> None:
    vector().save_pretrained(tmp_path / "new" / "folder")
    found = Artifact.from_pretrained(str(tmp_path / "new" / "folder"), VECTOR)
    assert torch.equal(found.tensors["vector"], vector().tensors["vector"])
    assert (found.type, found.model, found.settings, found.made) == (
        VECTOR, SHAPE, vector().settings, vector().made,
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert {"foveate", "torch"} <= config["versions"].keys()
    assert config["checksum"].startswith("sha256:")


@pytest.mark.parametrize("type", TYPES)
def test_every_type_has_a_card_that_says_how_it_is_used(type: str) -> None:
    card = Artifact(type, SHAPE, {}).card()
    assert card.startswith("---\nlibrary_name: foveate\n")
    assert TYPES[type][1] in card


def test_it_goes_to_the_hub_and_comes_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def create(self: Any, repo_id: str, **rest: Any) -> Any:
        asked.update(rest)
        return SimpleNamespace(repo_id=repo_id)

    def upload(self: Any, *, repo_id: str, folder_path: str) -> str:
        (tmp_path / "hub").mkdir()
        for path in Path(folder_path).iterdir():
            (tmp_path / "hub" / path.name).write_bytes(path.read_bytes())
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert vector().push_to_hub("somebody/vector", private=True) == "somebody/vector"
    assert asked == {"private": True, "exist_ok": True}
    artifact._fetched.cache_clear()
    monkeypatch.setattr(artifact, "snapshot_download", lambda name, **rest: tmp_path / "hub")
    found = Artifact.from_pretrained("somebody/vector", VECTOR)
    assert torch.equal(found.tensors["vector"], vector().tensors["vector"])
    artifact._fetched.cache_clear()


def test_it_serves_models_of_its_shape_only(tmp_path: Path) -> None:
    vector().save_pretrained(tmp_path)
    assert check_model(tmp_path, VECTOR, SHAPE)["settings"] == {"alpha": 0.5}
    for other in (SHAPE | {"layers": 3}, SHAPE | {"vision_layers": 2}):
        with pytest.raises(
            FoveateError, match=r"^\S+ belongs to another model: its .*\.$"
        ) as error:
            check_model(tmp_path, VECTOR, other)
        assert "\n" not in str(error.value)


def damaged(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = json.loads(config.read_text())
    if what == "a bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif what == "half the weights":
        weights.write_bytes(weights.read_bytes()[:40])
    elif what == "no safetensors":
        weights.write_bytes(b"nothing")
        config.write_text(json.dumps(content | {"checksum": artifact._checksum(b"nothing")}))
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        config.unlink()
    elif what == "half the config":
        config.write_text(config.read_text()[:30])
    elif what == "a list":
        config.write_text("[]")
    elif what == "no shape":
        config.write_text(json.dumps(content | {"model": 3}))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("a bit", "is damaged: its model.safetensors is not the one"),
        ("half the weights", "is damaged: its model.safetensors is not the one"),
        ("no safetensors", "could not be loaded"),
        ("no weights", "has no model.safetensors"),
        ("no config", "has no readable config.json"),
        ("half the config", "has no readable config.json"),
        ("a list", "is no steering vector"),
        ("no shape", "is damaged: its config.json lacks"),
    ],
)
def test_a_damaged_one_is_refused_in_one_sentence(tmp_path: Path, what: str, says: str) -> None:
    vector().save_pretrained(tmp_path)
    damaged(tmp_path, what)
    with pytest.raises(FoveateError, match=says) as error:
        Artifact.from_pretrained(tmp_path, VECTOR)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_other_types_and_places_are_refused(tmp_path: Path) -> None:
    vector().save_pretrained(tmp_path / "vector")
    for type in (HEADS, DIRECTIONS, INJECTION):
        with pytest.raises(FoveateError, match=f"is no {type}"):
            Artifact.from_pretrained(tmp_path / "vector", type)
        with pytest.raises(FoveateError, match=rf"no folder .*: `{TYPES[type][0]}` makes one"):
            Artifact.from_pretrained(tmp_path / "none", type)
    (tmp_path / "file").write_text("")
    with pytest.raises(FoveateError, match="cannot be made a folder"):
        vector().save_pretrained(tmp_path / "file" / "folder")


def test_injections_of_the_first_release_are_read(tmp_path: Path) -> None:
    """Their config.json had the settings at its top, the shape as "base", and no checksum."""
    Artifact(INJECTION, SHAPE, {"a": torch.ones(2)}, {"rank": 4}).save_pretrained(tmp_path)
    old = {"kind": INJECTION, "base": SHAPE, "rank": 4, "vision_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(old))
    found = Artifact.from_pretrained(tmp_path, INJECTION)
    assert found.model == SHAPE
    assert found.settings == {"rank": 4, "vision_size": 3}
    assert found.tensors["a"].tolist() == [1, 1]
