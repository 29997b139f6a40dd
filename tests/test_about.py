"""What is said of methods: `foveate methods NAME`, the pages of docs/methods, what to cite."""

from __future__ import annotations

import ast
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from benchmarks import method_pages
from foveate import FoveateError, Method
from foveate.base.form import parameters
from foveate.core.method import STAGES, methods
from foveate.evaluation.about import about, citations

OURS = {name: cls for name, cls in methods().items() if cls.__module__.startswith("foveate.")}
BOUNDS = re.compile(
    r"(?P<low>-?\d+) to (?P<high>\d+)|(?P<least>\d+) or more|as many as (?P<field>\w+) or more"
    r"|above (?P<above>0)(?:, up to (?P<most>[\de]+))?|(?P<any>[Aa]ny number)"
)


def test_every_method_is_explained() -> None:
    for name, cls in OURS.items():
        it = about(cls)
        assert it.summary, name
        assert it.idea, name
        assert it.stages == tuple(s for s in STAGES if s in it.stages), name
        assert it.costs, name
        assert all(p.text and p.default and p.kind for p in it.parameters), name
        assert all(ratio > 0 for cost in it.costs for ratio in cost.ratios.values()), name


def test_defaults_are_those_of_the_class() -> None:
    for name, cls in OURS.items():
        plain = cls()
        for p in about(cls).parameters:
            given = ast.literal_eval(p.default)
            value = getattr(plain, p.name)
            assert given == (pytest.approx(value, rel=1e-3) if type(value) is float else value), (
                name,
                p.name,
            )


def numbers() -> list[tuple[str, str, bool]]:
    found = []
    for name, cls in OURS.items():
        for field, hint in parameters(cls):
            kinds = {*(typing.get_args(hint) or (hint,))}
            if {int, float} & kinds and typing.get_origin(hint) is not tuple:
                found.append((name, field.name, float not in kinds))
    return found


@pytest.mark.parametrize(("name", "parameter", "whole"), numbers())
def test_stated_bounds_are_those_that_hold(name: str, parameter: str, whole: bool) -> None:
    text = {p.name: p.text for p in about(OURS[name]).parameters}[parameter]

    found = BOUNDS.search(text)
    assert found, f"the text of {name}.{parameter} states no bounds: {text}"
    bound = {key: float(value) for key, value in found.groupdict().items() if value and key in
             ("low", "high", "least", "above", "most")}  # fmt: skip
    if found["field"]:
        bound = {"least": getattr(OURS[name](), found["field"])}
    low, high = bound.get("low", bound.get("least")), bound.get("high", bound.get("most"))
    others = {"width": 10**7} if (name, parameter) == ("cli", "heads") else {}

    def allowed(value: float) -> bool:
        try:
            OURS[name](**others | {parameter: int(value) if whole else value})
        except FoveateError:
            return False
        return True

    step = 1 if whole else 0.25
    assert allowed(1e6 if high is None else high)
    assert high is None or not allowed(high + step)
    if "above" in bound:
        assert not allowed(0)
        assert allowed(1e-6)
    else:
        assert allowed(-1e6 if low is None else low)
        assert low is None or not allowed(low - step)


def test_every_method_has_an_entry_of_its_own_paper() -> None:
    for name, cls in OURS.items():
        entry = citations()[name]
        assert entry.count("@") == 1, name
        assert re.match(r"@(article|inproceedings)\{\w+,\n", entry), name
        lines = entry.splitlines()[1:-1]
        assert all(re.fullmatch(r"  \w+ = \{.+\},", line) for line in lines), name
        assert {"title", "author", "year"} <= {line.split()[0] for line in lines}, name
        assert entry.count("{") == entry.count("}"), name
        assert not cls.paper or f"eprint = {{{cls.paper}}}" in entry, name
    assert set(citations()) == set(OURS), "an entry is about a method that is not there"


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert method_pages.main(["--check"]) == 0, capsys.readouterr().err


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    pages = {path.stem for path in method_pages.PAGES.glob("*.md")} - {"index"}
    assert pages == set(OURS)
    assert {path.stem for path in method_pages.PAGES.glob("*.svg")} == set(OURS)
    parts = ["Idea", "Where it acts", "Equations", "Parameters", "Cost", "How sure we are"]
    parts += ["Where foveate departs", "When to use it", "What it refuses", "On pocket-bench"]
    for name in OURS:
        text = (method_pages.PAGES / f"{name}.md").read_text("utf-8")
        titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert titles == [*parts, "What papers report", "How to cite"], name


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in method_pages.PAGES.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_formulas_can_be_read() -> None:
    maths = pytest.importorskip("tools.maths", reason="latex2mathml comes with the site")
    for page in method_pages.PAGES.glob("*.md"):
        shown = maths.on_page_markdown(page.read_text("utf-8"))
        assert "```math" not in shown
        assert "$`" not in shown


def test_an_outdated_page_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [(tmp_path / "new", "a"), (tmp_path / "old", "b"), (tmp_path / "right", "c")]
    (tmp_path / "old").write_text("x")
    (tmp_path / "right").write_text("c")
    monkeypatch.setattr(method_pages, "ROOT", tmp_path)
    monkeypatch.setattr(method_pages, "contents", lambda: iter(files))
    assert method_pages.main(["--check"]) == 1
    err = capsys.readouterr().err
    assert "new is not up to date\nold is not up to date\nrun python" in err
    assert method_pages.main([]) == 0
    assert [path.read_text() for path, _ in files] == ["a", "b", "c"]
    assert method_pages.main(["--check"]) == 0


def test_a_method_of_ones_own_needs_no_page() -> None:
    class Own(Method, register=False):
        """Do nothing, well.

        Attributes:
            layers: those that are left alone.
        """

        name = "own"

        def weights(self, rows: Any) -> Any:
            return rows.x

    it = about(Own)
    assert it.summary == "Do nothing, well"
    assert (it.page, it.citation, it.costs) == ("", "", ())
    assert it.layers == "Those that are left alone."
    assert [p.name for p in it.parameters] == ["layers"]


# -- the command -----------------------------------------------------------------------------------


def test_the_command_prints_all_about_one_method(run: Any) -> None:
    for given in ("clvs", "CLVS"):
        code, out, err = run("methods", given)
        assert (code, err) == (0, "")
        for part in ("Cross-layer vision smoothing", "smoothing", "before, scores, weights",
                     "@article{zhao2025clvs,", "docs/methods/clvs.md", "decode"):  # fmt: skip
            assert part in out
        assert "next: foveate ask --method clvs" in out
    assert "did you mean 'clvs'?" in run("methods", "clvz")[2]
    assert "docs/methods/index.md#inferred" in out


def test_the_command_prints_json(run: Any) -> None:
    code, out, _ = run("methods", "vcd", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["name"] == "vcd"
    assert found["parameters"][0]["name"] == "alpha"
    assert set(found["costs"][0]["ratios"]) == {"prefill", "decode"}
    _, out, _ = run("methods", "--json")
    assert [entry["name"] for entry in json.loads(out)] == list(methods())


@pytest.mark.long
def test_the_command_shows_what_a_model_gets(run: Any) -> None:
    code, out, _ = run("methods", "pai", "--model", "pocket")
    assert code == 0
    assert "0..11" in out
    assert "alpha=0.5 (a number)" in out
    code, out, _ = run("methods", "cli", "--model", "pocket")
    assert code == 0
    assert "cli is trained: give path=FOLDER" in out
    found = json.loads(run("methods", "pai", "--model", "pocket", "--json")[1])
    assert found["here"]["layers"] == list(range(12))
    found = json.loads(run("methods", "cli", "--model", "pocket", "--json")[1])
    assert "is trained" in found["here"]["refused"]
