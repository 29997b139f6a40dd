"""The benchmark script runs, and decoding is free of what would make it slow. No times here."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import looks
import pytest
import torch
from subjects import pocket_vlm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from benchmarks import speed
from foveate import enhance
from foveate.backends.transformers.compat import cache_of, passing
from foveate.scenes import world
from foveate.vlm.look import read
from tests import models

SYNCS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


@pytest.mark.long
def test_script_writes_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "SIZES", speed.SIZES | {"pocket": missing})
    out = tmp_path / "new" / "speed-v1.0"
    given = ["--sizes", "pocket,tiny", "--device", "cpu", "--repetitions", "1", "--tokens", "1"]
    assert speed.main([*given, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "pocket is left out: no weights." in printed
    report = json.loads((tmp_path / "new" / "speed-v1.0.json").read_text())
    rows = report["sizes"]["tiny"]["figures"]
    assert list(rows) == ["clvs(stop_threshold=0.0)", "clvs", "eager"]
    assert "test" not in rows["clvs(stop_threshold=0.0)"]
    assert rows["clvs"]["test"]["layers"] == 1  # 6 layers: after layer 3, before the last
    assert len(report["sizes"]["tiny"]["samples"]["rows"]["clvs"]["prefill"]) == 1
    text = (tmp_path / "new" / "speed-v1.0.md").read_text()
    for name in ("sdpa", *rows):
        assert f"| {name} |" in text
        assert name in printed
    # allocations are counted, not timed: explicit full maps show, explicit last rows do not
    assert rows["clvs"]["peak"]["ratio"] < 1.02 < rows["eager"]["peak"]["ratio"]


@pytest.mark.long
def test_script_counts_questions_per_second(tmp_path: Path) -> None:
    out = tmp_path / "eval"
    given = ["--eval", "--sizes", "pocket", "--method", "clvs", "--device", "cpu"]
    assert speed.main([*given, "--repetitions", "2", "--out", str(out)]) == 0
    report = json.loads((tmp_path / "eval.json").read_text())
    found = report["sizes"]["pocket"]
    assert len(found["samples"]["clvs"]["pairs"]) == 2
    assert found["figures"]["clvs"]["same"] == 1.0
    assert found["figures"]["clvs"]["loop"] > 0
    assert "| clvs |" in (tmp_path / "eval.md").read_text()


def test_script_times_methods_that_look_again(tmp_path: Path) -> None:
    out = tmp_path / "look"
    given = ["--look", "--sizes", "pocket", "--method", "carve(steps=2)", "--device", "cpu"]
    assert speed.main([*given, "--repetitions", "1", "--out", str(out)]) == 0
    report = json.loads((tmp_path / "look.json").read_text())
    found = report["sizes"]["pocket"]["figures"]["carve(steps=2)"]
    assert found["read"] == 2
    assert found["plain"] < found["method"] + found["published"]
    assert (tmp_path / "look.md").stat().st_size


def test_published_reading_is_ours() -> None:
    """The slow side of the comparison reads the same numbers."""
    vlm = pocket_vlm(torch.device("cpu"), torch.float32)
    chat = vlm.chat([world.draw(world.sample(5))], "Describe this image.", None)
    slow = looks.read_again(vlm, chat, 3)
    fast = read(vlm, [chat], None, max_new_tokens=3)[0].weights
    visual = (vlm.inputs([chat])["input_ids"] == vlm.model.config.image_token_id)[0]
    assert len(fast) == len(slow) == 3
    for own, full in zip(fast, slow, strict=True):
        assert (own - full[:, : len(visual)][:, visual]).abs().max() < 1e-5


def missing(device: torch.device, dtype: torch.dtype) -> None:
    raise FileNotFoundError("no weights")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--sizes", "8b"], "there is no size '8b'"),
        (["--eval", "--sizes", "next"], "there is no size 'next'; there are pocket, 0.5b"),
        (["--method", "clsv"], "did you mean 'clvs'"),
        (["--dtype", "int8"], "there is no dtype 'int8'"),
        (["--tokens", "0"], "must be 1 or more"),
    ],
)
def test_script_refuses_in_one_sentence(
    capsys: pytest.CaptureFixture[str], given: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        speed.main(given)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_peak_counts_what_is_held_at_once() -> None:
    model = models.build("llava")

    def call() -> None:
        first = torch.empty(2**18)  # 1 MiB each
        second = first + 1
        del first, second
        torch.empty(2**18)

    assert 0 <= speed.peak(model, call) - 2 * 2**20 < 100  # and a few scalars


class Watch(TorchDispatchMode):
    """Counts, by operator, host synchronisations and fresh tensors of at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.syncs, self.large = size, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        bases = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.syncs[name] += name in SYNCS
        for t in tree_leaves(out):
            fresh = isinstance(t, Tensor) and storage(t) not in bases and t.data_ptr() not in given
            self.large[name] += fresh and t.numel() >= self.size
        return out


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def watched(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Watch:
    """The third decode step after this prompt."""
    with torch.no_grad():
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        for step in range(3):
            cache, token = cache_of(out), out.logits[:, -1:].argmax(-1)
            size = min(layer.keys.numel() for layer in cache.layers)
            with Watch(size if step == 2 else 2**62) as watch:
                out = model(input_ids=token, **passing(model, cache), use_cache=True)
    return watch


def test_decode_neither_waits_nor_copies_keys(family: str, model: PreTrainedModel) -> None:
    inputs = models.inputs(family)
    plain = watched(model, inputs)
    with enhance(model, "clvs(stop_threshold=0)"):
        ours = watched(model, inputs)
    assert plain.large["cat"], "the cache's own growth should have been seen"
    assert ours.syncs - plain.syncs == Counter()
    assert ours.large - plain.large == Counter()


def test_watch_sees_waits_and_copies() -> None:
    key = torch.randn(1, 2, 30, 16)
    with Watch(key.numel()) as watch:
        key.clone()
        key.transpose(1, 2)
        key[:, :, :-1].clone()  # smaller
        bool(key.sum() > 0)
    assert +watch.large == Counter(clone=1)
    assert +watch.syncs == Counter(_local_scalar_dense=1)
