"""Text forms: whatever somebody writes is a value that can be written again, or one sentence."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.base.errors import FoveateError
from foveate.base.form import CHARACTERS, LARGEST, MESSAGE, Form, Registry
from foveate.core import method
from foveate.core.method import from_json
from foveate.evaluation import benchmark
from foveate.insight import analysis
from tests.hostile import MANY, tries

REGISTRIES = {
    "method": method.registry,
    "benchmark": benchmark.registry,
    "analysis": analysis.registry,
}

NAUGHTY = (  # values of fields, each of which has hurt
    "9" * 309, "9" * 40, "9" * 5000, "0x" + "f" * 5000, "1e999", "-1e999", "1e-320", "1e308",
    "{[]: 1}", "{*()}", "{**{}}", "-" * 50 + "x", "-" * 3000 + "1", "'\\ud800'", "'\ud800'", "''",
    "'\\0'", "()", "(((((1,),),),),)", "[" * 100 + "]" * 100, "[" * 5000, "1 + 2j", "1j", "b'x'",
    "...", "None", "True", "nan", "inf", "__import__('os')", "lambda: 1", "(x := 1)", "f'{1}'",
    "'" + "x" * 5000 + "'", "(" + "1," * 20_000 + ")", "1 if 1else 2", "-0.0", "1_000", "0.1 + 0j",
)  # fmt: skip
PIECES = (
    "(", ")", "[", "]", "{", "}", ",", "=", "+", "-", "~", "*", "**", ".", ":", "'", '"', "\\", "#",
    "\n", "\0", " ", "\t", "not ", "lambda:", "1if 1else ", "a", "1", "0", "e", "j", "\ud800", "é",
    "ﬁ", "clvs", "vcd", "pope", "smoothing", "layers", "await ", "yield ", "=1,",
)  # fmt: skip


@functools.cache
def known() -> list[tuple[Registry, str, list[str]]]:
    """Everything that has a name, with its fields."""
    return [
        (registry, name, list(cls().parameters()))
        for registry in REGISTRIES.values()
        for name, cls in registry.all().items()
    ]


literals = st.one_of(
    st.sampled_from(NAUGHTY),
    st.integers().map(repr),
    st.floats().map(repr),
    st.text(max_size=20).map(repr),
    st.text(max_size=20).map(lambda text: f"'{text}'"),
    st.lists(st.one_of(st.integers(-2, 100), st.floats(0, 1), st.text(max_size=3)), max_size=4).map(
        lambda values: repr(tuple(values))
    ),
    st.sampled_from(["max", "visual", "last", "all", "paper", "released", "true", "none"]),
)


@st.composite
def calls(draw: Callable[[Any], Any]) -> str:
    """A call of something that exists, with fields that exist for the most part."""
    _, name, fields = draw(st.sampled_from(known()))
    words = st.one_of(st.sampled_from(fields or ["x"]), st.text(min_size=1, max_size=5))
    given = draw(st.lists(st.tuples(words, literals), max_size=3))
    return f"{name}({', '.join(f'{field}={value}' for field, value in given)})"


texts = st.one_of(
    calls(),
    st.lists(calls(), min_size=2, max_size=3).map("+".join),
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.tuples(st.sampled_from(PIECES), st.integers(1, 60_000)).map(lambda p: p[0] * p[1]),
    st.tuples(st.sampled_from(PIECES), st.integers(1, 9000)).map(
        lambda p: f"clvs(smoothing={p[0] * p[1]})"
    ),
    st.text(max_size=50),
)


def read(registry: Registry, text: str) -> None:
    """A value whose text form gives the same value, or one short sentence."""
    try:
        stack = registry.parse(text)
    except FoveateError as error:
        message = str(error)
        assert len(message) <= MESSAGE
        assert message.isprintable(), message
        assert message.endswith((".", " ...")), message
        return
    written = "+".join(map(str, stack))
    assert registry.parse(written) == stack
    assert "+".join(map(str, registry.parse(written))) == written


def read_everywhere(text: str) -> None:
    for registry in REGISTRIES.values():
        read(registry, text)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@tries(150)
@given(texts)
def test_texts(text: str) -> None:
    read_everywhere(text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@MANY
@given(texts)
def test_many_texts(text: str) -> None:
    read_everywhere(text)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("value", NAUGHTY, ids=lambda value: ascii(value)[:20])
def test_naughty_values_in_every_field(value: str) -> None:
    for registry, name, fields in known():
        for field in fields if len(value) < 1000 else fields[:1]:
            read(registry, f"{name}({field}={value})")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"clvs(smoothing={'9' * 309})", "smoothing must lie between .* more than 60 digits"),
        ("clvs(smoothing={[]:1})", r"Cannot read smoothing=\{\[\]:1\}"),
        (f"clvs(smoothing={'-' * 50}x)", "Cannot read smoothing=--"),
        (f"clvs(smoothing={'-' * 3000}1)", "Cannot read the method"),
        ("clvs(pool=\ud800)", r"Cannot read the method 'clvs\(pool=\\ud800"),
        (f"vcd(seed={'9' * 40})", "seed must lie between"),
        (f"adaptvis(decimals={'9' * 40})", "decimals must lie between"),
        (f"tarac(beta={'9' * 40})", "beta must lie between"),
        ("vaf(suppress=1e999)", "suppress must lie between .* got inf"),
        ("carve(ratio_floor=1e-300)", "ratio_floor must be 0 or 1e-30 or more"),
        ("clvs(smoothing=0.1, smoothing=0.2)", "'smoothing' is given twice"),
        (f"vicrop(suffix='{'x' * 5000}')", f"suffix may have {CHARACTERS:,} characters"),
        (f"clvs(layers=({'1,' * 20_000}))", "layers may have 10,000 values"),
        ("x" * 300_000, "may have 200,000 characters, and this has 300,000"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_has_hurt_is_one_short_sentence(text: str, says: str) -> None:
    with pytest.raises(FoveateError, match=says) as error:
        method.parse(text)
    assert len(str(error.value)) <= MESSAGE


def test_the_bounds_themselves_are_good() -> None:
    for text in (f"vcd(seed={LARGEST})", "vaf(suppress=1e-30)", f"vicrop(suffix={'x' * 4096!r})"):
        assert "+".join(map(str, method.parse(text))) == text


def test_a_warning_of_python_about_a_text_is_not_printed() -> None:
    """It would print one line per number: a request of 500 characters, 4 kB of log."""
    code = "from foveate.core.method import parse; parse('1if 1else ' * 40)"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True
    )
    assert "Cannot read the method '1if 1else" in done.stderr
    assert "SyntaxWarning" not in done.stderr


def nested(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "entry",
    [
        None, [], "clvs", {}, {"method": 1}, {"method": ["clvs"]}, {"method": "clvs", "x": 1},
        {"method": "clvs", "layers": nested(900)}, {"method": "clvs", 1: 2},
        {"method": "clvs", "smoothing": 10**400}, {"method": "clvs", "smoothing": float("nan")},
        {"method": "clvs", "pool": "\ud800"}, {"method": "clvs", "pool": {"a": []}},
    ],
    ids=lambda entry: ascii(entry)[:30],
)  # fmt: skip
def test_what_is_no_method_in_json(entry: Any) -> None:
    with pytest.raises(FoveateError) as error:
        from_json([entry])
    assert len(str(error.value)) <= MESSAGE


def test_a_value_of_another_program_is_shown_short() -> None:
    with pytest.raises(FoveateError, match="A method is a text") as error:
        method.as_stack(nested(5000))  # type: ignore[arg-type]
    assert len(str(error.value)) <= MESSAGE
    assert isinstance(method.as_stack("clvs")[0], Form)
