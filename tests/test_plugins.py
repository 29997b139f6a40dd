"""Plug-ins: found once, and a broken one is a warning that stops nothing."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from foveate import Method
from foveate.base.errors import FoveateError
from foveate.base.plugins import load_file
from foveate.commands import main
from foveate.core import method
from foveate.evaluation import benchmark
from foveate.families import layout as vision
from foveate.insight import analysis

REGISTRIES = (method.registry, benchmark.registry, analysis.registry)

METHOD = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from foveate import Method

@dataclass(frozen=True)
class {cls}(Method):
    '''A plug-in.'''
    strength: {hint} = 0.5
    name: ClassVar[str] = "{name}"
"""
GOOD = METHOD.format(cls="Good", name="goodplug", hint="float")
BROKEN = {  # what is wrong -> (source, what the entry point names, what the warning says)
    "import": ("import no_such_package", "badplug:Bad", "No module named 'no_such_package'"),
    "syntax": ("def", "badplug:Bad", "SyntaxError"),
    "attribute": (METHOD.format(cls="Good2", name="goodplug2", hint="float"), "badplug:Bad", "Bad"),
    "its own error": ("def Bad(): 1 / 0\nBad()", "badplug", "division by zero"),
    "no method": ("class Bad: pass", "badplug:Bad", "Bad is no method with a name of its own"),
    "annotation": (METHOD.format(cls="Bad", name="badplug", hint="Flaot"), "badplug:Bad", "Flaot"),
    "of a module": (METHOD.format(cls="Bad", name="badplug", hint="str"), "badplug", "a text"),
    "taken": (METHOD.format(cls="Bad", name="clvs", hint="float"), "badplug:Bad", "is taken by"),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a module with an entry point where Python finds it, as pip would."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "classes", dict(registry.all()))
        monkeypatch.setattr(registry, "walked", False)
    vision._layouts.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def installing(group: str, module: str, source: str, names: str | None = None) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        points = f"[{group}]\n{module} = {names or module}\n"
        (info / "entry_points.txt").write_text(points)
        made.append(module)

    yield installing
    vision._layouts.cache_clear()
    for module in made:
        sys.modules.pop(module, None)


def told(caught: list[Any]) -> list[str]:
    return [str(w.message) for w in caught if "plug-in" in str(w.message)]


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_method_is_one_warning(install: Any, what: str) -> None:
    source, names, says = BROKEN[what]
    install("foveate.methods", "badplug", source, names)
    install("foveate.methods", "goodplug", GOOD, "goodplug:Good")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        known = method.methods()
        assert str(method.parse("goodplug(strength=0.25)")[0]) == "goodplug(strength=0.25)"
        assert method.parse("clvs")
    (said,) = told(caught)
    assert "'badplug'" in said
    assert f"(foveate.methods: {names})" in said
    assert says in said
    assert said.endswith("Upgrade badplug, or uninstall it.")
    assert "\n" not in said
    assert "goodplug" in known
    assert "badplug" not in known


@pytest.mark.parametrize(
    ("group", "arguments"),
    [
        ("foveate.methods", ["methods"]),
        ("foveate.methods", ["doctor", "--model", "pocket"]),
        ("foveate.benchmarks", ["eval", "nowhere", "--out", "x"]),
        ("foveate.analyses", ["analyze", "nowhere"]),
    ],
)
def test_a_broken_plugin_stops_no_command(
    install: Any, group: str, arguments: list[str], capsys: Any
) -> None:
    install(group, "badplug", "raise RuntimeError('far too\\n old')")
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == (0 if group == "foveate.methods" else 2)
    out, err = capsys.readouterr()
    assert err.count("foveate: note: The plug-in 'badplug' of badplug") == 1
    assert "RuntimeError: far too old. Upgrade" in err
    assert "clvs" in out if group == "foveate.methods" else "There is no" in err


def test_a_broken_layout_is_one_warning(install: Any) -> None:
    install("foveate.families", "badplug", "serves = ('seen',)")
    install("foveate.families", "goodplug", "serves = ('here',)\ndef grid(picture): return None")
    with pytest.warns(UserWarning, match=r"The plug-in 'badplug' .* no attribute 'grid'"):
        layouts = vision._layouts()
    assert {"llava", "here"} <= layouts.keys()
    assert "seen" not in layouts


def test_plugins_are_looked_for_once(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install("foveate.methods", "goodplug", GOOD, "goodplug:Good")
    asked, ask = [], importlib.metadata.entry_points

    def asking(**wanted: Any) -> Any:
        asked.append(wanted["group"])
        return ask(**wanted)

    monkeypatch.setattr(importlib.metadata, "entry_points", asking)
    for _ in range(3):
        method.parse("clvs+goodplug")
        method.methods()
    assert asked == ["foveate.methods"]


def test_a_plugin_may_look_for_methods_while_it_is_imported(install: Any) -> None:
    source = (
        GOOD + "\nfrom foveate.core.method import methods, parse\nassert parse('clvs'), methods()\n"
    )
    install("foveate.methods", "goodplug", source, "goodplug:Good")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "goodplug" in method.methods()


def test_classes_made_later_are_found(install: Any) -> None:
    with pytest.raises(FoveateError, match="There is no method 'goodplug'"):
        method.parse("goodplug")

    @dataclass(frozen=True)
    class Good(Method):
        name: ClassVar[str] = "goodplug"

    assert isinstance(method.parse("goodplug")[0], Good)


# -- a file of one's own ---------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Python file with a method; what it makes known is forgotten afterwards."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "classes", dict(registry.all()))
    path = tmp_path / "my_method.py"
    path.write_text(GOOD + "    def logits(self, logits, other, seq): return -logits\n")
    yield path
    sys.modules.pop("foveate_plugin_my_method", None)


def test_a_file_of_ones_own_gives_its_methods(own: Path, run: Any) -> None:
    asked = ("ask", "demo", "Is there a car?", "--method", "goodplug(strength=0.25)", "--json")
    assert "There is no method 'goodplug'" in run(*asked)[2]
    code, out, err = run(*asked, "--plugin", own)
    assert (code, err) == (0, "")
    (answer,) = json.loads(out)["answers"]
    assert answer["method"] == "goodplug(strength=0.25)"
    assert not answer["answer"].startswith(("yes", "no")), "logits are turned round"


@pytest.mark.parametrize("command", ["eval", "sweep", "trace", "serve", "analyze"])
def test_other_commands_take_it_too(own: Path, command: str, run: Any) -> None:
    needed = {
        "eval": ("pocket", "--out", "x"),
        "sweep": ("clvs", "--over", "smoothing=1", "--bench", "pocket", "--out", "x"),
        "trace": ("demo", "red"),
        "analyze": ("decay",),
    }.get(command, ())
    own.write_text("1 / 0")
    code, _, err = run(command, *needed, "--plugin", own)
    assert code == 2
    assert err == (
        f"foveate: The plug-in {own}, line 1, raises ZeroDivisionError: division by zero.\n"
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = (", "line 1, raises SyntaxError"),
        ("x = 1", "defines nothing that has a name"),
        (METHOD.format(cls="Bad", name="badplug", hint="Flaot"), "Flaot"),
        (METHOD.format(cls="Bad", name="clvs", hint="float"), "is taken by"),
        (None, "give a Python file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(own: Path, source: Any, says: str) -> None:
    own.unlink() if source is None else own.write_text(source)
    with pytest.raises(FoveateError, match=says):
        load_file(own)
