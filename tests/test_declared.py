"""What a field declares: which one names a file, and which one makes a request costly."""

from __future__ import annotations

import json
import sys
import typing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from foveate import VLM, FoveateError, Method
from foveate.base import artifact
from foveate.base.form import costly, file, parameters, permit
from foveate.core.method import methods
from foveate.scenes import world

# Fields that take any whole number, tuple or text, and a value that costs nothing more
HARMLESS: dict[tuple[str, str], Any] = {
    ("adaptvis", "decimals"): 12,  # places of one number
    ("adhh", "heads"): ((2, 0),) * 1000,  # each head of the model counts once
    ("carve", "regions"): 10**9,  # of those that are found anyway
    ("clvs", "stop_every"): 10**9,  # fewer tests
    ("clvs", "top_k"): 10**9,  # at most the vocabulary, over which logits are made anyway
    ("deco", "top_k"): 10**9,  # at most the vocabulary
    ("laser", "first_layer"): 11,  # the last one
    ("laser", "floor"): 10**9,  # a crop is at most the image
    ("laser", "heads"): 10**9,  # at most those of the model
    ("ritual", "seed"): 10**9,
    ("ritual", "transform"): "blur",  # the second stream is there anyway
    ("opera", "window"): 10**9,  # at most the answer, which is read again anyway
    ("m3id", "first_step"): 10**9,  # a factor
    ("vcd", "noise_step"): 999,  # the last one
    ("vcd", "seed"): 10**9,
    ("vicrop", "window"): 10**9,  # a crop is at most the image
}
CANARY = "canary"
_opened: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and CANARY in str(args[0]):
        _opened.append(str(args[0]))


sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM.load("pocket", device="cpu")


def fields() -> Iterator[tuple[type[Method], Any, Any]]:
    for cls in methods().values():
        if cls.__module__.startswith("foveate."):
            for field, hint in parameters(cls):
                yield cls, field, hint


def takes(hint: Any, kind: type) -> bool:
    """Whether any value of this kind will do; a tuple may be of any length."""
    if typing.get_origin(hint) is tuple:
        return kind is tuple and typing.get_args(hint)[-1] is ...
    if typing.get_origin(hint) is Literal:
        return False
    return hint is kind or any(takes(part, kind) for part in typing.get_args(hint))


def ask(vlm: VLM, method: Method) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vlm.ask(world.draw(world.sample(7), 96), "Is there a car?", method, max_new_tokens=2)


def test_every_field_that_opens_a_file_says_so(vlm: VLM, tmp_path: Path) -> None:
    """Every text is given the name of a file, and of a folder with files, and watched."""
    global _opened
    (tmp_path / f"{CANARY}.json").write_text("[[2, 0]]")
    (tmp_path / CANARY).mkdir()
    (tmp_path / CANARY / "config.json").write_text("{}")
    opens, says = set(), set()
    for cls, field, hint in fields():
        if "file" in field.metadata:
            says.add((cls.name, field.name))
        if not takes(hint, str):
            continue
        for name in (f"{CANARY}.json", CANARY):
            artifact._read.cache_clear()
            _opened = []
            try:
                ask(vlm, cls(**{field.name: str(tmp_path / name)}))
            except FoveateError:
                pass
            finally:
                if _opened:
                    opens.add((cls.name, field.name))
                _opened = None
    assert opens == says == {("adhh", "heads"), ("cli", "path"), ("vti", "path")}


def test_every_field_that_could_be_costly_has_a_limit_or_a_reason() -> None:
    could, limited = set(), set()
    for cls, field, hint in fields():
        if "limit" in field.metadata:
            limited.add((cls.name, field.name))
            permit(cls())  # what a method does by itself, it may be asked for
        if any(takes(hint, kind) for kind in (int, str, tuple)):
            could.add((cls.name, field.name))
    layers = {(name, "layers") for name in methods()}  # each of the model's counts once
    files = {("cli", "path"), ("vti", "path")}
    assert could - limited - layers - files == HARMLESS.keys()
    assert not limited & HARMLESS.keys()
    assert ("carve", "steps") in limited


@pytest.mark.parametrize(("name", "field"), HARMLESS)
def test_what_has_no_limit_costs_nothing_more(vlm: VLM, name: str, field: str) -> None:
    cls = methods()[name]
    plain = tokens(vlm, cls(**cls.example))
    assert tokens(vlm, cls(**{**cls.example, field: HARMLESS[name, field]})) <= plain


def test_what_has_a_limit_costs_more(vlm: VLM) -> None:
    carve = methods()["carve"]
    costs = [tokens(vlm, carve(steps=steps)) for steps in (1, 4)]
    assert costs[0] < costs[1]


def tokens(vlm: VLM, method: Method) -> int:
    """How many go through the decoder for one question."""
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        seen.append((kwargs["input_ids"] if given is None else given).shape[:2].numel())

    vlm.readings.clear()
    handle = vlm.model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        ask(vlm, method)
    finally:
        handle.remove()
    return sum(seen)


@dataclass(frozen=True)
class Declared(Method, register=False):
    weights_file: str = file("auto")
    steps: int = costly(3, limit=64)
    words: str | None = costly(None, limit=10)
    sides: tuple[float, ...] = costly((1.0,), limit=2)
    fresh: int | None = costly(None, limit=None)
    free: int = 1

    name: ClassVar[str] = "declared"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weights_file": "/etc/passwd"}, "weights_file='/etc/passwd' names a file"),
        ({"steps": 65}, "steps=65 is too much, a request may ask for 64 at most"),
        ({"words": "eleven char"}, "words='eleven char' is too much, .* 10 characters at most"),
        ({"sides": (1.0, 2.0, 3.0)}, r"sides=\(1.0, 2.0, 3.0\) is too much, .* 2 values at most"),
        ({"fresh": 0}, "a request may not set fresh: leave it out"),
    ],
)
def test_what_a_stranger_may_not_ask_for(values: dict[str, Any], says: str) -> None:
    with pytest.raises(FoveateError, match=f"^declared: .*{says}") as error:
        permit(Declared(**values))
    assert "\n" not in str(error.value)


def test_what_a_stranger_may_ask_for() -> None:
    permit(Declared())
    permit(Declared(steps=64, words="ten chars!", sides=(1.0, 2.0), free=10**6))
    assert str(Declared(steps=64)) == "declared(steps=64)"
    assert json.dumps(Declared().parameters())
