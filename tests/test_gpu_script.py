"""The script for a GPU runs through, on tiny models and on the CPU. No times here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_every_part_leaves_its_tables(tmp_path: Path) -> None:
    given = ["--tiny", "--device", "cpu", "--repetitions", "1", "--tokens", "1", "--slower", "10"]
    assert gpu.main([*given, "--out", str(tmp_path / "gpu")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["sizes"]
    assert list(found) == list(gpu.PARTS)
    text = (tmp_path / "gpu.md").read_text()
    for part in found.values():
        assert part["tables"]
        for title, _, cells in part["tables"]:
            assert f"## {title}" in text
            assert cells
    for family in ("llava", "qwen"):
        _, _, cells = found[f"right-{family}"]["tables"][0]
        assert [line[1] for line in cells] == ["sdpa", *gpu.METHODS]
        assert all(float(line[4]) > 0.01 for line in cells[1:]), "every method acts"
        assert all(float(line[3]) < 3 for line in cells[1:]), "and adds no error of its own"


@pytest.mark.slow
def test_a_part_that_takes_too_long_leaves_a_sentence_and_the_others_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.PARTS, "right-llava", (0.1, gpu.PARTS["right-llava"][1]))
    given = ["--tiny", "--device", "cpu", "--parts", "right-llava,vllm", "--slower", "20"]
    assert gpu.main([*given, "--out", str(tmp_path / "gpu")]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["sizes"]
    assert found["right-llava"] == {"failed": "It took longer than 2 s."}
    assert found["vllm"]["tables"]
    assert "## what failed" in (tmp_path / "gpu.md").read_text()


def test_all_limits_together_are_eight_minutes() -> None:
    assert sum(seconds for seconds, _ in gpu.PARTS.values()) <= 8 * 60


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--parts", "right"], "there is no part 'right'"),
        (["--device", "cpu"], "there is no GPU here"),
        (["--tokens", "0"], "must be 1 or more"),
    ],
)
def test_bad_arguments_are_told(
    given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(given)
    assert sentence in capsys.readouterr().err
