"""The tables of README and site are those that their command writes."""

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


def test_every_method_is_of_one_kind() -> None:
    rows = list(readme.kind_table())[1:]
    named = re.findall(r"`(\w+)`", "".join(row[2] for row in rows))
    assert sorted(named) == sorted(methods())
    for page in ("README.md", "docs/index.md"):
        text = " ".join((readme.ROOT / page).read_text("utf-8").split())
        assert f"{len(named)} published methods" in text


def test_published_gains_stand_beside_the_plain_score() -> None:
    rows = list(readme.gain_table())[1:]
    assert {row[0] for row in rows} - {""} == set(readme.TROUBLES)
    first = rows[0]
    assert first[3] == "71.4"  # LLaVA-1.5-7B on AMBER's existence, and CLVS 77.6
    assert first[4] == "`clvs` +6.2"


def test_an_outdated_table_is_told_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("# x\n<!-- one -->\nold\n<!-- end of one -->\nrest\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "TABLES", {"one": lambda: iter([["a", "b"], ["1", "2"]])})
    monkeypatch.setattr(readme, "PAGES", {"README.md": ("one",)})
    assert readme.main(["--check"]) == 1
    assert "run python benchmarks/readme.py" in capsys.readouterr().err
    assert readme.main([]) == 0
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert page.read_text() == f"# x\n<!-- one -->\n{table}\n<!-- end of one -->\nrest\n"
    assert readme.main(["--check"]) == 0
