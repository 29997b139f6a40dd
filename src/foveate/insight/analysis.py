"""What the papers' figures measure, on any model: `foveate analyze`.

    run(parse("decay(covered=0.6)"), vlm, pocket_pictures(200), Path("figures"))

An analysis reads one picture at a time into a row of ``NAME.jsonl``; all numbers derive from the
rows, so that a run may be stopped at any moment and goes on where it was. ``NAME.json`` then holds
every number that is drawn, ``NAME.png`` the figure, and ``NAME.md`` its caption.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..backends.transformers.anatomy import anatomy
from ..base import __version__
from ..base.errors import FoveateError
from ..base.files import write_text
from ..base.form import Form, Registry
from ..base.journal import Journal, write_json
from ..core.method import Method, as_stack, text
from .reading import Watch, read_all
from .truth import AnnotatedImage

if TYPE_CHECKING:
    from ..vlm.chat import Chat
    from ..vlm.vlm import VLM
    from .plots.analysis import Sheet

Measurement = dict[str, Any]
Numbers = dict[str, Any]
Stack = tuple[Method, ...]

DIGITS = 7  # significant, of what is measured

registry = Registry(
    "analysis", "foveate.analyses", "decay(covered=0.6)", (), package="foveate.insight.analyses"
)


@dataclass(frozen=True)
class Analysis(Form, ABC):
    """One figure: what is read of a picture, what is counted over all of them, how it is drawn.

    A subclass with a `name` registers itself; its fields are its options.
    """

    title: ClassVar[str] = ""  # of the figure
    source: ClassVar[str] = ""  # the published figures, with their arXiv id, where there are any
    methods: ClassVar[tuple[str, ...]] = ()  # set beside vanilla where nobody chose
    compares: ClassVar[bool] = False  # whether methods can be chosen at all
    needs: ClassVar[tuple[str, ...]] = ("scipy",)  # modules of the extra `plot`
    pictures: ClassVar[int] = 200  # read where nobody says how many

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registry.add(cls)

    @abstractmethod
    def measure(self, vlm: VLM, picture: AnnotatedImage, stacks: dict[str, Stack]) -> Measurement:
        """One picture's readings, ready for JSON.

        Args:
            stacks: methods by their text forms, vanilla first.
        """

    @abstractmethod
    def count(self, rows: Sequence[Measurement]) -> Numbers:
        """Every number of the figure and its caption, ready for JSON; NaN where there is none."""

    @abstractmethod
    def caption(self, numbers: Numbers) -> str:
        """What was measured, on how many, and how to read the figure."""

    @abstractmethod
    def draw(self, numbers: Numbers, sheet: Sheet) -> None:
        """The figure's panels."""

    def suit(self, stacks: dict[str, Stack]) -> None:
        """Raise `FoveateError` where it cannot measure these methods."""


analyses = registry.all


def parse(text: str) -> Analysis:
    """An analysis from its text form.

    Raises:
        FoveateError: for anything but one known analysis.
    """
    analysis, *others = registry.parse(text)
    if others:
        raise FoveateError("One analysis at a time: run the others with commands of their own.")
    return analysis


def run(
    analysis: Analysis,
    vlm: VLM,
    pictures: Sequence[AnnotatedImage],
    out: Path,
    *,
    methods: Sequence[str] = (),
    data: str = "drawn scenes",
    command: str = "",
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Read every picture, count, and write NAME.json, NAME.png and NAME.md into `out`.

    Args:
        out: an existing folder. Rows that it already holds in NAME.jsonl are not read again.
        methods: text forms to set beside vanilla; none = the analysis's own choice.
        data: what the pictures are, in words. command: that repeats this run, for the caption.
        watch: is told after every picture how far the run is, for a progress bar.

    Returns:
        What NAME.json holds: "numbers" and "caption", "pictures" (how many), "model", "revision",
        "commit", "analysis", "source", "methods", "data", "command", "version".

    Raises:
        FoveateError: a package is missing, methods where none are compared, a method that the
            model cannot be served with, other settings in NAME.jsonl, no usable picture.
    """
    from .plots.analysis import Sheet

    compared = stacks(analysis, methods)
    for stack in compared.values():
        with vlm.using(stack):  # what the model cannot be served with is refused here
            pass
    settings = {
        "analysis": str(analysis),
        **vlm.source,
        "shape": anatomy(vlm.model).shape,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "methods": list(compared),
        "data": data,
    }
    journal = Journal(out / f"{analysis.name}.jsonl", lambda row: row["picture"], settings)
    rows = read_all(
        journal,
        {picture.name: picture for picture in pictures},
        lambda picture: {"picture": picture.name, **analysis.measure(vlm, picture, compared)},
        watch=watch,
    )
    numbers = analysis.count(rows)
    caption = (
        f"{analysis.caption(numbers)} Model {vlm.name} ({settings['dtype']}), "
        f"{len(rows):,} pictures ({data})."
    )
    caption += f" After {analysis.source}." * bool(analysis.source)
    content = {
        "analysis": str(analysis),
        "source": analysis.source,
        **vlm.source,
        "methods": list(compared),
        "data": data,
        "pictures": len(rows),
        "command": command,
        "version": __version__,
        "caption": caption,
        "numbers": _finite(numbers),
    }
    safe = f"the rows of all {len(rows)} pictures are safe in {journal.path.name}"
    write_json(out / f"{analysis.name}.json", content, safe)
    sheet = Sheet(f"{analysis.title}, {vlm.name}", caption)
    analysis.draw(numbers, sheet)
    sheet.save(out / f"{analysis.name}.png")
    told = f"![{analysis.name}]({analysis.name}.png)\n\n{caption}\n"
    told += f"\n```\n{command}\n```\n" * bool(command)
    write_text(out / f"{analysis.name}.md", told, safe)
    return content


def stacks(analysis: Analysis, methods: Sequence[str] = ()) -> dict[str, Stack]:
    """What is compared, by its text form, vanilla first.

    Raises:
        FoveateError: a package is missing, or the methods cannot be compared.
    """
    for module in ("matplotlib", *analysis.needs):
        if importlib.util.find_spec(module) is None:
            raise FoveateError(
                f"{analysis.name} needs {module}: install it with `pip install 'foveate[plot]'`."
            )
    if methods and not analysis.compares:
        raise FoveateError(f"{analysis.name} is about the plain model: leave out --method.")
    compared: dict[str, Stack] = {"vanilla": ()}
    for given in methods or analysis.methods:
        stack = as_stack(given)
        for method in stack:
            if method.wants("rewrite"):
                raise FoveateError(
                    f"{method.name} shows the model another picture, which {analysis.name} cannot "
                    "compare: choose methods that leave it as it is."
                )
        compared[text(stack)] = stack
    analysis.suit(compared)
    return compared


def _finite(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------- what measures share


def rounded(values: Tensor) -> list[Any]:
    """A tensor as nested lists of few digits, for a row."""
    flat = [float(f"{value:.{DIGITS}g}") for value in values.double().flatten().tolist()]
    nested: list[Any] = torch.tensor(flat, dtype=torch.float64).view(values.shape).tolist()
    return nested


def about(vlm: VLM, picture: AnnotatedImage, questions: Sequence[str]) -> list[Chat]:
    """Questions about one picture; methods and models share its prefix."""
    image = picture.load()
    return [vlm.chat([image], question, None) for question in questions]


def pooled(rows: Sequence[Measurement], key: str) -> tuple[list[Measurement], list[str]]:
    """The entries that all rows hold in their list `key`, and the picture that each is of."""
    entries = [(entry, row["picture"]) for row in rows for entry in row[key]]
    return [entry for entry, _ in entries], [picture for _, picture in entries]


def percent(value: float, digits: int = 1, sign: bool = False) -> str:
    """A fraction in words: ``31.7 %``."""
    return f"{100 * value:{'+' if sign else ''}.{digits}f} %"


def chance(p: float) -> str:
    """A p-value in words; what is too small for the computation's digits as a bound."""
    return f"p = {p:.2g}" if not p < 1e-16 else "p < 1e-16"
