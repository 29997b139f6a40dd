"""The README's tables are those that its command writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme
from foveate.core.method import methods


def test_the_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_every_method_has_a_row_with_measured_costs() -> None:
    looks, rows = list(readme.look_table())[1:], list(readme.method_table())[1:]
    again = [name for name, cls in methods().items() if cls(**cls.example).wants("rewrite")]
    assert [row[0] for row in rows] == [f"`{name}`" for name in methods() if name not in again]
    assert {re.match(r"`(\w+)", row[0])[1] for row in looks} == set(again)
    assert all(float(cost) > 0 for row in rows + looks for cost in row[-2:])


def test_an_outdated_table_is_told_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("# x\n<!-- one -->\nold\n<!-- end of one -->\nrest\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "TABLES", {"one": lambda: iter([["a", "b"], ["1", "2"]])})
    assert readme.main(["--check"]) == 1
    assert "run python benchmarks/readme.py" in capsys.readouterr().err
    assert readme.main([]) == 0
    text = (tmp_path / "README.md").read_text()
    assert (
        text
        == "# x\n<!-- one -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end of one -->\nrest\n"
    )
    assert readme.main(["--check"]) == 0
