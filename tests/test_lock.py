"""constraints.txt fits what pyproject.toml declares; `make lock` was not forgotten."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def test_the_lock_holds_all_that_is_declared_but_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lock = dict(line.split("==") for line in lines if not line.startswith("#"))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = declared["project"]["optional-dependencies"], declared["dependency-groups"]
    texts = list(declared["project"]["dependencies"])
    extras.pop("vllm")  # it has an environment of its own
    extras.pop("vision")  # it has, too: the version of torchvision goes with that of torch
    for several in [*extras.values(), *groups.values()]:
        texts += [text for text in several if isinstance(text, str)]
    for wanted in map(Requirement, texts):
        if wanted.name != "torch":
            version = lock.get(canonicalize_name(wanted.name))
            assert version, f"{wanted.name} is not in constraints.txt: make lock"
            assert version in wanted.specifier, f"{wanted} is declared, {version} is locked"
    assert not [name for name in lock if name.startswith(("torch", "nvidia", "triton", "sympy"))]
