"""Files of somebody else run nothing: a pickle is planted wherever this package reads files.

A planted pickle writes a file when it is loaded. Every loader must refuse it in one sentence, or
pass it over, and the file must not be there.
"""

from __future__ import annotations

import ast
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate import VLM, FoveateError
from foveate.base.artifact import HEADS, INJECTION, Artifact, read_config
from foveate.base.journal import Journal
from foveate.evaluation.merge import read_runs
from foveate.pocket import train as pocket
from foveate.scenes.lessons import Pool
from tests import tiny
from tests.hostile import TRIES

SOURCE = Path(pocket.__file__).parent.parent
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Ray itself sends pickles between its own processes
THEIR_OWN = {SOURCE / "bridges" / "ray.py"}


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "boom")


@pytest.fixture
def bomb(tmp_path: Path) -> Any:
    target = tmp_path / "boom"
    yield Bomb(target)
    assert not target.exists(), "a planted pickle was run"


def plant(bomb: Bomb, path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch":
        torch.save({"weight": bomb}, path)
    elif kind == "numpy":
        with path.open("wb") as file:
            np.save(file, np.array([bomb], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(bomb))


KINDS = ("plain", "torch", "numpy")


def test_the_bomb_works(tmp_path: Path) -> None:
    for kind in KINDS:
        plant(Bomb(tmp_path / "boom"), tmp_path / "file", kind)
        if kind == "torch":
            torch.load(tmp_path / "file", weights_only=False)
        elif kind == "numpy":
            np.load(tmp_path / "file", allow_pickle=True)
        else:
            pickle.loads((tmp_path / "file").read_bytes())
        assert (tmp_path / "boom").read_text() == "boom"
        (tmp_path / "boom").unlink()


def test_the_source_reads_no_pickles() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = PICKLES & {name.split(".")[0] for name in names}
            assert not found or path in THEIR_OWN, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec"), path
                assert not called.endswith((".load_state", ".save_state")), path
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert ast.unparse(node.value) == "False", path
            if isinstance(node, ast.keyword) and node.arg == "weights_only":
                assert ast.unparse(node.value) == "True", path


# -- trainings -------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint of a small training that was broken off."""
    pytest.importorskip("accelerate", reason="training needs the extra: train")
    from tests.test_train import fitted, line_batches

    def failing(step: int) -> dict[str, torch.Tensor]:
        if step == 6:
            raise InterruptedError
        return line_batches(step)

    with pytest.raises(InterruptedError):
        fitted(tmp_path / "run", failing, checkpoint_every=0)
    [checkpoint] = (tmp_path / "run").glob("line.step-*")
    return checkpoint


def resume(checkpoint: Path) -> Any:
    from tests.test_train import fitted

    return fitted(checkpoint.parent)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rank-0.safetensors", "rank-0.json"])
def test_a_checkpoint(trained: Path, bomb: Bomb, name: str, kind: str) -> None:
    plant(bomb, trained / name, kind)
    with pytest.raises(FoveateError, match=r"cannot be read .* delete it, and the same command"):
        resume(trained)


@pytest.mark.long
def test_a_checkpoint_of_accelerate(trained: Path, bomb: Bomb) -> None:
    """Its files, as older versions read them, beside ours and instead of ours."""
    names = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scaler.pt",
             "pytorch_model.bin", "scheduler.bin", ".metadata")  # fmt: skip
    for name in names:
        plant(bomb, trained / name, "torch" if name.endswith(("bin", "pt")) else "plain")
    resume(trained)
    shutil.rmtree(trained)
    for name in names:
        plant(bomb, trained / name, "plain")
    (trained / "complete").touch()
    with pytest.raises(FoveateError, match=r"cannot be read .* delete it, and the same command"):
        resume(trained)


def damaged(path: Path, rng: random.Random) -> None:
    """A file cut short, with other bytes, or with other words."""
    data = bytearray(path.read_bytes())
    how = rng.randrange(4)
    if how == 0:
        data = data[: rng.randrange(len(data))]
    elif how == 1:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
    elif how == 2:
        data = bytearray(rng.choice([b"", b"null", b"[]", b"{}", b"[" * 10_000, b"1e999", b"\0"]))
    else:
        words = [b"step", b"python", b"numpy", b"format", b"MT19937", b"F32", b"dtype", b"0"]
        data = data.replace(rng.choice(words), rng.choice([b"-1", b"x", b"NaN", b"[]"]), 1)
    path.write_bytes(data)


@pytest.mark.long
@pytest.mark.parametrize("tries", [25, pytest.param(TRIES // 5, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_one_sentence(tries: int, trained: Path, tmp_path: Path) -> None:
    rng, whole = random.Random(tries), tmp_path / "whole"
    shutil.copytree(trained.parent, whole)
    refused: list[str] = []
    for _ in range(tries):
        shutil.rmtree(trained.parent)
        shutil.copytree(whole, trained.parent)
        damaged(trained / rng.choice(["rank-0.safetensors", "rank-0.json"]), rng)
        try:
            resume(trained)
        except FoveateError as error:
            refused.append(str(error))
    assert len(refused) > tries // 4
    assert all(len(sentence) < 500 for sentence in refused)


@pytest.mark.long
def test_a_checkpoint_of_another_model(trained: Path) -> None:
    tensors = load_file(trained / "rank-0.safetensors")
    for name, change in (("model.layer.bias", torch.zeros(9)), ("model.other", torch.zeros(8))):
        save_file(tensors | {name: change}, trained / "rank-0.safetensors")
        with pytest.raises(FoveateError, match="weights are of another model"):
            resume(trained)


@pytest.mark.long
def test_weights_of_the_pocket_models_stages(bomb: Bomb, tmp_path: Path) -> None:
    from tests.test_train import RUN

    pytest.importorskip("accelerate", reason="training needs the extra: train")
    for kind in KINDS:
        plant(bomb, tmp_path / "run" / "tower.safetensors", kind)
        plant(bomb, tmp_path / "run" / "tower.pt", kind)
        with pytest.raises(FoveateError, match="trains this stage again"):
            pocket.train_pocket(tmp_path / "run", until="tower", **RUN)


@pytest.mark.parametrize("name", ["pixels.npy", "owners.npy"])
def test_drawn_pools(bomb: Bomb, tmp_path: Path, name: str) -> None:
    Pool(tmp_path / "pool", 4, 2).build(workers=1)
    plant(bomb, tmp_path / "pool" / name, "numpy")
    with pytest.raises(FoveateError, match="is damaged"):
        Pool(tmp_path / "pool", 4, 2).build(workers=1)


# -- everything else -------------------------------------------------------------------------------

READERS: dict[str, tuple[tuple[str, ...], Callable[[Path], Any]]] = {
    "an injection's weights": (
        ("model.safetensors", "pytorch_model.bin"),
        lambda folder: Artifact.from_pretrained(folder, INJECTION),
    ),
    "an injection's settings": (("config.json",), lambda folder: read_config(folder, INJECTION)),
    "heads": (
        ("config.json", "model.safetensors"), lambda folder: Artifact.from_pretrained(folder, HEADS)
    ),
    "a run": (("run.json", "records.jsonl", "results.json"), lambda folder: read_runs([folder])),
    "records": (("records.jsonl",), lambda folder: Journal(folder / "records.jsonl", len)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_other_files(reader: str, kind: str, bomb: Bomb, tmp_path: Path) -> None:
    names, read = READERS[reader]
    for name in names:
        plant(bomb, tmp_path / "folder" / name, kind)
    if reader == "an injection's weights":
        config = {"kind": "cross-layer injection", "base": {}, "vision_size": 8, "text_size": 8}
        (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    if reader == "records":  # one line, or a line cut short
        file = tmp_path / "folder" / "records.jsonl"
        file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(FoveateError):
        read(tmp_path / "folder")


@pytest.mark.parametrize("kind", ["plain", "torch"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_models_weights(name: str, kind: str, bomb: Bomb, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    plant(bomb, tmp_path / "model" / name, kind)
    with pytest.raises(FoveateError, match="could not be loaded"):
        VLM.load(str(tmp_path / "model"))


def test_a_models_code(bomb: Bomb, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    code = f"import pathlib\npathlib.Path({str(bomb.target)!r}).write_text('boom')\n"
    (tmp_path / "model" / "modeling_own.py").write_text(code)
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.Own"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FoveateError, match="could not be loaded"):
        VLM.load(str(tmp_path / "model"))
