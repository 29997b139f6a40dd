"""The stages of the pocket model's training, as data.

    RECIPES: {"pictures-first" | "language-first": (Stage, ...)}
    stages("language-first", ["tuning.steps=300"]) -> tuple[Stage, ...]

"pictures-first" made the shipped model: its language model reads its first word beside a picture.
"language-first" goes LLaVA's way: a language model that reads text alone, then a projector that
brings a trained tower's pictures to it, then a short tuning of both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..base.errors import FoveateError
from .build import SYSTEM

PARTS = ("tower", "projector", "language")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of its checkpoints and its folder.
        teaches: "patches" (what each shows), "texts" (no picture), or pictures with the questions
            that `lessons.lesson` calls "captions", "caption", "open" or "yesno".
        trains: which of PARTS change.
        rate: peak learning rate. batch: pictures, or texts, per step.
        minutes, steps: the budget, one of them; minutes are of two CPU cores.
        fresh: parts that begin anew, whatever earlier stages made of them.
    """

    name: str
    teaches: str
    trains: tuple[str, ...]
    rate: float
    batch: int
    minutes: float = 0.0
    steps: int = 0
    fresh: tuple[str, ...] = ()


TOWER = Stage("tower", "patches", PARTS, 3e-3, 32, minutes=25)
SPEAKING = ("projector", "language")
RECIPES: dict[str, tuple[Stage, ...]] = {
    "pictures-first": (
        TOWER,
        Stage("caption", "caption", SPEAKING, 2e-3, 16, minutes=3),
        Stage("open", "open", SPEAKING, 2e-3, 16, minutes=19),
        Stage("yesno", "yesno", SPEAKING, 2e-3, 16, minutes=44),
    ),
    "language-first": (
        TOWER,
        Stage("language", "texts", ("language",), 2e-3, 16, steps=1200, fresh=SPEAKING),
        Stage("projector", "captions", ("projector",), 2e-3, 8, steps=300),
        Stage("tuning", "yesno", SPEAKING, 5e-4, 8, steps=400),
    ),
}
SYSTEMS = {"pictures-first": "", "language-first": SYSTEM}
NUMBERS = {"rate": float, "batch": int, "minutes": float, "steps": int}


def stages(recipe: str, settings: Iterable[str] = ()) -> tuple[Stage, ...]:
    """A recipe's stages with other numbers, each given as ``STAGE.NUMBER=VALUE``.

    Raises `FoveateError`: no such recipe, stage or number, or a value that is none.
    """
    if recipe not in RECIPES:
        raise FoveateError(f'Unknown recipe "{recipe}": choose one of {", ".join(RECIPES)}.')
    made = {stage.name: stage for stage in RECIPES[recipe]}
    for setting in settings:
        where, _, text = setting.partition("=")
        name, _, number = where.strip().partition(".")
        if name not in made or number not in NUMBERS:
            raise FoveateError(
                f'"{setting}" sets nothing: give STAGE.NUMBER=VALUE with one of the stages '
                f"{', '.join(made)} and one of the numbers {', '.join(NUMBERS)}."
            )
        try:
            value = NUMBERS[number](text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise FoveateError(f'"{setting}" needs a number above 0 after the sign "=".')
        budget = {"minutes": 0.0, "steps": 0} if number in ("minutes", "steps") else {}
        made[name] = replace(made[name], **(budget | {number: value}))
    return tuple(made.values())
