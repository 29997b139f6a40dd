"""Sweeps: a method over values of one or two of its parameters, in one run, compared with vanilla.

    grid = SweepGrid.read("clvs", ["smoothing=0.5..1.0/0.1"])
    sweep(grid, Plan([POPE()], grid.methods, Path("runs/s"), root=data), VLM.load("pocket"))

Every combination of values is a method, so a sweep is an ordinary run of `foveate.evaluation.ask`:
it goes on where it was killed, and `foveate report` reads it, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..backends.transformers.anatomy import anatomy
from ..base import stats
from ..base.errors import FoveateError
from ..base.journal import write_json
from ..core.method import Method, as_stack, text
from ..vlm.vlm import VLM
from .ask import as_record, evaluate
from .benchmark import Benchmark, EvalRecord, image_of
from .choice import Choice, choice_sentence, choose
from .merge import Key, gaps, merge, read_runs
from .points import ACCURACY, ByMethod, Point, Records, fill
from .run import Plan, Question, Stack, Watch, unwatched

MOST = 1_000  # settings in a sweep
UNITS = {"length": "words", "score": "points", "perception": "points", "cognition": "points"}
NUMBER = r"([+-]?\d*\.?\d+(?:[eE][+-]?\d+)?)"
RANGE = re.compile(rf"{NUMBER}\.\.{NUMBER}/{NUMBER}")


# -- what to try -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A parameter and the values to try, numbers in ascending order.

    Attributes:
        parameter: as the user wrote it: its name, or ``method.name``.
        default: the value without the sweep, on the model; known once there is a model.
    """

    parameter: str
    values: tuple[Any, ...]
    default: Any = None

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return _numbers(self.values)

    @property
    def places(self) -> list[float]:
        """Where the values lie on a line: numbers at their value, others at 0, 1, 2, ..."""
        return list(self.values) if self.numeric else list(map(float, range(len(self.values))))

    @property
    def default_at(self) -> float | None:
        """Where the default lies on that line; None outside of it."""
        if self.default in self.values:
            return self.places[self.values.index(self.default)]
        within = self.numeric and _numbers([self.default])
        return self.default if within and self.values[0] < self.default < self.values[-1] else None


@dataclass(frozen=True)
class SweepGrid:
    """Every combination of values as methods.

    Attributes:
        stack: the methods that are varied.
        axes: one or two.
        places: per axis, the number of the method in the stack, and the field's name.
        settings: a value of every axis -> the methods with these values.
    """

    stack: Stack
    axes: tuple[Axis, ...]
    places: tuple[tuple[int, str], ...]
    settings: dict[tuple[Any, ...], Stack]

    @property
    def methods(self) -> list[str | Method | Stack]:
        """What a sweep asks: vanilla, and every setting."""
        return ["vanilla", *self.settings.values()]

    @classmethod
    def read(cls, method: str, over: Sequence[str]) -> SweepGrid:
        """From ``"clvs"`` and one or two such as ``"smoothing=0.5,0.7..1.0/0.1"``.

        Values are those of a method's text form, separated by commas; ``a..b/step`` stands for
        numbers from a up to b, b included where the steps meet it. Where several methods of a
        stack have the parameter, write ``clvs.layers=...``.

        Raises:
            FoveateError: what cannot be read, an unknown parameter, a value it cannot have, or
                more than `MOST` combinations.
        """
        stack = as_stack(method)
        if not stack:
            raise FoveateError("vanilla has no parameters: name a method to sweep over.")
        if not 1 <= len(over) <= 2:
            raise FoveateError(
                f"A sweep is over one or two parameters, got {len(over)} times --over: write "
                "others into the method, such as 'clvs(beta=0.7)'."
            )
        named = [_over(stack, given) for given in over]
        places = tuple((place, field) for _, place, field, _ in named)
        if len(set(places)) < len(places):
            raise FoveateError(f"{named[0][0]} is swept over twice: give all values in one --over.")
        count = math.prod(len(pieces) for *_, pieces in named)
        if count > MOST:
            raise FoveateError(
                f"The sweep has {count:,} settings, at most {MOST:,} are possible: give fewer "
                "values."
            )
        settings: dict[tuple[Any, ...], Stack] = {}
        for pieces in itertools.product(*(pieces for *_, pieces in named)):
            chosen = dict(zip(places, pieces, strict=True))
            varied = _varied(stack, chosen)
            settings[tuple(getattr(varied[place], field) for place, field in places)] = varied
        axes = tuple(
            Axis(name, _ordered(key[n] for key in settings)) for n, (name, *_) in enumerate(named)
        )
        keys = itertools.product(*(axis.values for axis in axes))
        return cls(stack, axes, places, {key: settings[key] for key in keys})


def _over(stack: Stack, given: str) -> tuple[str, int, str, list[str]]:
    """The parameter as written, which method of the stack has it, its field, and the values."""
    name, _, values = (part.strip() for part in given.partition("="))
    pieces = [piece.strip() for piece in re.split(r",(?![^(\[]*[)\]])", values)]
    if not name or not all(pieces):
        raise FoveateError(
            f"Cannot read --over {given!r}: write it like smoothing=0.5,0.7,0.9 or "
            "smoothing=0.5..1.0/0.1."
        )
    owner, _, field = name.rpartition(".")
    owners = [
        place
        for place, method in enumerate(stack)
        if field in method.parameters() and owner in ("", method.name)
    ]
    if not owners:
        known = ", ".join(dict.fromkeys(name for method in stack for name in method.parameters()))
        raise FoveateError(f"{text(stack)} has no parameter {name!r}; there are {known}.")
    if len(owners) > 1:
        names = " or ".join(f"{stack[place].name}.{field}" for place in owners)
        raise FoveateError(f"Several methods have the parameter {field!r}: write {names}.")
    return name, owners[0], field, [value for piece in pieces for value in _values(piece)]


def _values(piece: str) -> list[str]:
    """A value as it is; a range as its values."""
    if ".." not in piece or piece[0] in "'\"([":
        return [piece]
    match = RANGE.fullmatch(piece.replace(" ", ""))
    first, last, step = map(Decimal, match.groups()) if match else (Decimal(0),) * 3
    if not match or step <= 0 or last < first:
        raise FoveateError(
            f"Cannot read the range {piece!r}: write it like 0.5..1.0/0.1, from the smallest to "
            "the largest in steps above 0."
        )
    count = int((last - first) / step) + 1
    if count > MOST:
        raise FoveateError(
            f"The range {piece!r} has {count:,} values, at most {MOST:,} are possible: take larger "
            "steps."
        )
    whole = all(re.fullmatch(r"[+-]?\d+", part) for part in match.groups())
    steps = [first + number * step for number in range(count)]
    return [str(int(value)) if whole else repr(float(value)) for value in steps]


def _varied(stack: Stack, chosen: dict[tuple[int, str], str]) -> Stack:
    """The stack with the chosen texts as values, read and checked as every text form is."""
    forms = []
    for number, method in enumerate(stack):
        defaults = {f.name: f.default for f in dataclasses.fields(method)}
        values = {k: repr(v) for k, v in method.parameters().items() if v != defaults[k]}
        values |= {field: value for (place, field), value in chosen.items() if place == number}
        forms.append(f"{method.name}({', '.join(f'{k}={v}' for k, v in values.items())})")
    varied = as_stack("+".join(forms))
    if len(varied) != len(stack):
        raise FoveateError(
            f"Cannot read the value {', '.join(chosen.values())!r}: give a number, a word, True, "
            "False, None or a tuple."
        )
    return varied


def _ordered(values: Iterable[Any]) -> tuple[Any, ...]:
    """Each value once, numbers in ascending order."""
    unique = tuple(dict.fromkeys(values))
    return tuple(sorted(unique)) if _numbers(unique) else unique


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


# -- what came out ---------------------------------------------------------------------------------


@dataclass
class Sweep:
    """All numbers of a sweep; the content of ``sweep.json``.

    Attributes:
        metric: "accuracy", the mean score of single answers, or one of the benchmark's scores.
        unit: of the metric.
        digits: after the point, as the benchmark prints them.
        questions, images: that every number is about.
        vanilla: the plain model's number.
        notes: what a reader must know.
        choice: the best setting and its check on images that did not choose it; None where
            `unchosen` says why not.
        revision, commit: of a model from the hub.
    """

    method: str
    model: str
    benchmark: str
    title: str
    metric: str
    unit: str
    digits: int
    axes: tuple[Axis, ...]
    questions: int
    images: int
    vanilla: float
    points: list[Point]
    notes: list[str]
    choice: Choice | None = None
    unchosen: str = ""
    revision: str | None = None
    commit: str | None = None


def sweep(
    grid: SweepGrid, plan: Plan, vlm: VLM, *, metric: str = ACCURACY, watch: Watch = unwatched
) -> Sweep:
    """Ask every question with vanilla and every setting, and write ``sweep.json``.

    With shards, each one that ends writes what all of them have answered by then.

    Args:
        plan: of one benchmark, with the grid's `methods`.
        metric: "accuracy" over all questions, or one of the names of `Benchmark.score`.
        watch: as in `foveate.evaluation.ask.evaluate`.

    Raises:
        FoveateError: what `evaluate` refuses, an unknown metric, a model that answered nothing.
    """
    stats.require_statsmodels()
    [b] = plan.benchmarks
    if metric != ACCURACY:
        _check_metric(b, metric, plan.root)
    resolved = [method.resolve(anatomy(vlm.model)) for method in grid.stack]
    axes = tuple(
        dataclasses.replace(axis, default=getattr(resolved[place], field))
        for axis, (place, field) in zip(grid.axes, grid.places, strict=True)
    )
    evaluate(plan, vlm, watch)
    runs = read_runs([plan.out])
    points = [Point(text(stack), values) for values, stack in grid.settings.items()]
    shared, notes = _shared(merge(runs)[str(b)], ["vanilla", *(point.method for point in points)])
    if metric != ACCURACY:
        shared = {name: _about(metric, records) for name, records in shared.items()}
    plain = shared.pop("vanilla")
    answered = [point for point in points if point.method in shared]
    vanilla = fill(answered, plain, shared, b, metric)
    choice, unchosen = choose(
        answered, plain, shared, b, metric, tuple(axis.default for axis in axes), plan.seed
    )
    result = Sweep(
        method=text(grid.stack),
        model=vlm.name,
        benchmark=str(b),
        title=b.title or b.name,
        metric=metric,
        unit=UNITS.get(metric.rpartition("/")[2], "%"),
        digits=b.digits,
        axes=axes,
        questions=len(plain),
        images=len(set(map(image_of, plain))),
        vanilla=vanilla,
        points=points,
        notes=[*gaps(runs), *notes],
        choice=choice,
        unchosen=unchosen,
        revision=vlm.revision,
        commit=vlm.commit,
    )
    write_json(plan.out / "sweep.json", dataclasses.asdict(result), "all records are safe")
    return result


def best(sweep: Sweep) -> str:
    """Which setting is the best, in words, with its check; or why none is named."""
    if sweep.choice is None:
        return sweep.unchosen
    return choice_sentence(sweep.choice, sweep.metric, sweep.unit, sweep.digits)


def _check_metric(b: Benchmark, metric: str, root: Path | None) -> None:
    """Refuse, before anything is asked, a name that the benchmark does not score."""
    made_up = [as_record(Question(str(b), s, 1), "vanilla", "", 0.0) for s in b.samples(root)]
    for record in made_up:
        record["answer"] = "Yes"
    known = list(dict.fromkeys([ACCURACY, *b.score(made_up)]))
    if metric not in known:
        raise FoveateError(f"{b.name} has no score {metric!r}; there are {', '.join(known)}.")


def _shared(
    answers: dict[str, dict[Key, EvalRecord]], names: list[str]
) -> tuple[ByMethod, list[str]]:
    """The questions that all settings answered, per setting and in order; what was left out.

    Settings without any answer are left out themselves.
    """
    given = {
        name: {k: r for k, r in answers.get(name, {}).items() if r["answer"] is not None}
        for name in names
    }
    silent = [name for name in names if not given[name]]
    spoken = [set(records) for records in given.values() if records]
    common = set.intersection(*spoken) if spoken else set()
    if "vanilla" in silent or len(silent) == len(names) - 1 or not common:
        errors = [e for rs in answers.values() for r in rs.values() if (e := r.get("error"))]
        why = f", the first failure is: {errors[0].rstrip('.')}" if errors else ""
        raise FoveateError(
            f"There is no question that vanilla and some setting both answered{why}."
        )
    asked = {key for records in answers.values() for key in records}
    notes = [f"{name} answered no question." for name in silent]
    if lost := len(asked) - len(common):
        notes.append(
            f"{lost} of {len(asked)} questions are left out, as not every setting answered them."
        )
    return {n: [given[n][k] for k in sorted(common)] for n in names if n not in silent}, notes


def _about(metric: str, records: Records) -> Records:
    """The records of the split in the metric's name; all records where it names none."""
    splits = {r["split"] for r in records if metric.startswith(f"{r['split']}/")}
    return [r for r in records if r["split"] in splits or not splits]
