"""The script that measures mitigv beside foveate: its own parts, and a run where mitigv is."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import pocket_vlm

from benchmarks import peers
from foveate import VLM, FoveateError
from foveate.core.method import methods, parse
from foveate.scenes import world

needed = pytest.mark.skipif(
    importlib.util.find_spec("mitigv") is None,
    reason="mitigv is in an environment of its own: make peers",
)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    vlm = pocket_vlm(torch.device("cpu"), torch.float32)
    vlm.model.generation_config.eos_token_id = None
    return vlm


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--sizes", "8b"], "there is no size '8b'"),
        (["--method", "clvs"], "there is no method 'clvs'; there are vcd"),
        (["--tokens", "1"], "--tokens 2 or more"),
        (["--dtype", "int8"], "there is no dtype 'int8'"),
    ],
)
def test_it_refuses_in_one_sentence(
    capsys: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        peers.main(given)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_without_mitigv_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        peers.main([])
    assert stop.value.code == 2
    assert "run `make peers`" in capsys.readouterr().err


def test_every_method_that_is_here_is_asked_for_by_what_it_takes() -> None:
    for name, peer in peers.PEERS.items():
        if name in methods():
            for text in (peer.method, peer.nearly):
                assert [method.name for method in parse(text)] == [name]
            assert not parse(peer.nearly)[0].is_neutral
    assert {"vcd", "pai", "opera"} <= peers.PEERS.keys() & methods().keys()


def test_both_get_the_tensors_of_one_processor_call(vlm: VLM) -> None:
    chat = vlm.chat([world.draw(world.sample(0))], peers.QUESTION, None)
    own = dict(vlm.inputs([chat]))
    given = peers.Processor(vlm)(
        text=vlm.prompt(chat), images=chat.images, return_tensors="pt", padding=True
    )
    assert own.keys() == given.keys()
    assert all(torch.equal(own[key], given[key]) for key in own)


def test_a_way_that_fails_gives_place_to_the_next_and_is_told() -> None:
    def fails(tokens: int) -> list[int]:
        raise RuntimeError("It needs layers (e.g. Llama). More of it.\nAnd more.")

    def short(tokens: int) -> list[int]:
        return [1]

    def works(tokens: int) -> list[int]:
        return [1] * tokens

    told = "RuntimeError: It needs layers (e.g. Llama)."
    assert peers.working("mitigv", "x", [works, fails]) == (works, "")
    assert peers.working("mitigv", "x", [fails, works]) == (
        works,
        f"{told} On the bare model it runs.",
    )
    assert peers.working("mitigv", "x", [fails, fails]) == (None, told)
    assert peers.working("mitigv", "x", [short])[1] == "It wrote 1 tokens where 2 were asked."
    assert "no method 'x' in this version of foveate" in peers.working("foveate", "x", [])[1]
    assert peers.sentence(FoveateError("So it is.")) == "So it is."


def test_what_is_neutral_here_is_plain(vlm: VLM) -> None:
    task = peers.Task(vlm, vlm.chat([world.draw(world.sample(0))], peers.QUESTION, None))
    for name in ("vcd", "pai", "opera"):
        (way,) = peers.ways(task, name)[peers.OURS]
        assert peers.same(task, name, peers.OURS, way, 3) == [True, True]
        assert len(way(3)) == 3


def test_figures_are_differences_and_ratios_within_repetitions() -> None:
    pairs = {"plain": [[1.0, 2.0]], "foveate": [[1.0, 3.0], [2.0, 6.0]], "mitigv": [[1, 9], [1, 9]]}
    row = {
        "told": {"mitigv": "It is slow."},
        "memory": dict.fromkeys(pairs, 2**20),
        "neutral": {"foveate": [True, True], "mitigv": [False, "It broke."]},
        "seconds": pairs,
    }
    empty: dict[str, Any] = {"told": {"foveate": "No."}, "memory": {}, "neutral": {}, "seconds": {}}
    found = peers.figures({"vcd": row, "icd": empty}, tokens=3)
    assert found["vcd"]["packages"]["foveate"]["token"] == 1.5
    assert found["vcd"]["ratio"]["median"] == 3.0  # of 4 / 1 and 4 / 2
    table, failed = list(peers.tables({"pocket": {"note": "small", "figures": found}}))
    assert [line[:2] for line in table[2]] == [["vcd", "plain"], ["", "foveate"], ["", "mitigv"]]
    assert [line[6:8] for line in table[2]] == [["", ""], ["yes", "yes"], ["no", ""]]
    assert [line[1:] for line in failed[2]] == [
        ["vcd", "mitigv", "It is slow."],
        ["vcd", "mitigv", "It broke."],
        ["icd", "foveate", "No."],
    ]


@needed
def test_it_measures_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # mitigv passes past_key_values, whose deprecation is an error in tests
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [])
    given = ["--sizes", "pocket", "--method", "vcd", "--repetitions", "1", "--tokens", "2"]
    assert peers.main([*given, "--device", "cpu", "--out", str(tmp_path / "peers")]) == 0
    found = json.loads((tmp_path / "peers.json").read_text())["sizes"]["pocket"]["figures"]["vcd"]
    assert set(found["packages"]) == {"plain", "foveate", "mitigv"}
    assert found["neutral"] == {"foveate": [True, True], "mitigv": [True, True]}
    assert "| vcd | plain |" in (tmp_path / "peers.md").read_text()
