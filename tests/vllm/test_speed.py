"""The script that measures methods inside vLLM writes its tables. No times here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from benchmarks import vllm_speed


@pytest.mark.slow
def test_script_writes_its_tables(tmp_path: Path) -> None:
    given = ["--sizes", "pocket", "--method", "clvs", "--method", "adhh", "--pairs", "1"]
    given += ["--prefills", "1", "--tokens", "2"]
    assert vllm_speed.main([*given, "--out", str(tmp_path / "vllm")]) == 0
    found = json.loads((tmp_path / "vllm.json").read_text())["sizes"]["pocket"]
    half = vllm_speed.HALF + "clvs"
    assert list(found["figures"]) == ["clvs", "adhh", half, vllm_speed.OFF]
    for name, row in found["samples"].items():
        for phase in ("decode",) if name == half else ("prefill", "decode"):
            ((plain, own),) = row[phase]
            assert plain > 0 < own
    text = (tmp_path / "vllm.md").read_text()
    for name in found["figures"]:
        assert f"| {name} |" in text


@pytest.mark.slow
def test_a_method_that_vllm_refuses_stops_the_script_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--sizes", "pocket", "--method", "sid", "--pairs", "1", "--tokens", "2"]
    assert vllm_speed.main([*given, "--out", str(tmp_path / "vllm")]) == 2
    assert "does not run inside vLLM" in capsys.readouterr().out
