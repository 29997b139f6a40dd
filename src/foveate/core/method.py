"""What a method is: a frozen dataclass that overrides only the stages it needs.

Everything else derives from the class: the engine installs hooks for the overridden stages only,
the registry finds the class by its `name`, the text form ``clvs(smoothing=0.7)+vcd`` and the JSON
form are its fields, and the invariant test-suite runs over whatever is registered.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..base.errors import FoveateError
from ..base.form import Form, Registry, shown
from .anatomy import Anatomy
from .prompt import Prompt, Vision
from .rows import FeedForward, Rows, Sequences, Stream
from .search import Beams, Found
from .simple import Simple

__all__ = [
    "Method",
    "as_stack",
    "from_json",
    "get",
    "identity",
    "methods",
    "parse",
    "text",
    "to_json",
]

STAGES = (
    "rewrite",
    "contrast",
    "begin",
    "tower",
    "see",
    "before",
    "scores",
    "weights",
    "mlp",
    "other_embeds",
    "other_row",
    "other_hidden",
    "logits",
    "search",
)
RESERVED = ("vanilla", "all")

_numbers = itertools.count()

registry = Registry("method", "foveate.methods", "clvs(smoothing=0.7)+vcd", RESERVED)


@dataclass(frozen=True)
class Method(Form):
    """Override the stages you need; what you do not override costs nothing.

    A subclass with a `name` registers itself. Fields are the parameters: they are checked against
    their annotations, printed in the text form and shown by ``foveate methods``.

    `paper_layers` are the published layers, 0-based; ``(9, ..., 14)`` is a range, and an end below
    zero counts from the model's last layer, -1.

    Attributes:
        layers: decoder layers, counted from 0, whose attention or feed-forward the method edits
            or reads. None: the published ones, as they come out for this model; where none are
            published, all that see the whole image.
    """

    layers: tuple[int, ...] | None = None

    paper: ClassVar[str] = ""  # arXiv id
    # query rows for scores and weights: the last one, of the prompt and of every step; the
    # prompt's last one only; those after the image; or all
    rows: ClassVar[Literal["last", "prompt", "text", "all"]] = "last"
    to_the_norm: ClassVar[bool] = False  # `layers` may name one more: the final norm's input
    paper_layers: ClassVar[tuple[int | EllipsisType, ...] | None] = None
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # model_type prefix -> values of None fields
    neutral: ClassVar[dict[str, Any]] = {}  # parameters that make it the plain model
    example: ClassVar[dict[str, Any]] = {}  # parameters for the test-suite
    # key columns that its rows need one by one: the image's, all up to the image's end, or all; an
    # engine may show the others as one column, after the image
    columns: ClassVar[Literal["visual", "through", "all"]] = "all"
    remembers: ClassVar[bool] = True  # its memory may go on from token to token
    reads_prompt: ClassVar[bool] = False  # `before` needs every row of the prompt
    row_sum_one: ClassVar[bool] = True  # edited attention rows still sum to 1
    shares_prefix: ClassVar[bool] = True  # the question does not change image rows
    needs_image: ClassVar[bool] = True  # without visual tokens the method does nothing
    needs_pixels: ClassVar[bool] = False  # `contrast` changes pixels, so nobody may encode them
    looks_again: ClassVar[bool] = False  # its `rewrite` reads the attention of `layers`
    passes: ClassVar[str] = ""  # what it runs beside the answer, in words
    # after `resolve`: vision blocks whose output it wants in `see`; k is the output of block k - 1
    vision_layers: ClassVar[tuple[int, ...] | None] = None

    stages: ClassVar[frozenset[str]] = frozenset()
    _number: ClassVar[int] = next(_numbers)  # of the class, in this process

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._number = next(_numbers)
        cls.stages = frozenset(s for s in STAGES if getattr(cls, s) is not getattr(Method, s))
        if cls.__dict__.keys() & {"scores", "weights"} and "simple" not in cls.__dict__:
            cls.simple = Method.simple  # type: ignore[method-assign]  # what a parent says is another edit
        if register:
            registry.add(cls)

    # -- stages ------------------------------------------------------------------------------------

    def setup(self, anatomy: Anatomy) -> Any:
        """Once per `enhance`: what the other stages want to find as `plan`."""

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        """Input stage: all chats about one image, before `enhance` is entered.

        `self` is resolved for the model by then. What the method finds out goes to the notes of
        the chats it returns.
        """
        return chats

    def contrast(self, prompt: Prompt, seq: Sequences) -> Prompt | tuple[Prompt, ...] | None:
        """This piece of prompt as a second stream reads it, or None where it reads the same.

        Or what one pass ahead reads, or several: see `Prompt.ahead`.
        """
        return None

    def begin(self, seq: Sequences) -> None:
        """A sequence starts: allocate `seq.memory`."""

    def tower(self, fed: FeedForward, seq: Sequences) -> Tensor:
        """What the feed-forward of a block of the vision tower returns, in place of ``fed.out``.

        Called for every block, with (images or tiles, patches, D_v) where the decoder's has
        (B, Q, D); ``fed.layer`` is the block, from 0.
        """
        return fed.out

    def see(self, vision: Vision, seq: Sequences) -> None:
        """The images of a piece of prompt are encoded, the language model has not begun."""

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        """The residual stream (B, Q, D) that `stream.layer` is to get, in place of ``stream.x``."""
        return stream.x

    def scores(self, rows: Rows) -> Tensor:
        """Scores (B, H, R, K) float32: scaled, before mask and softmax."""
        return rows.x

    def weights(self, rows: Rows) -> Tensor:
        """Weights (B, H, R, K) float32: after the softmax."""
        return rows.x

    def simple(self, rows: Rows) -> Simple | None:
        """What `scores` and `weights` do to these rows as numbers; None where it is only code.

        Not a stage: an engine with a kernel for such edits may ask, and then calls neither.
        """
        return None

    def other_embeds(self, embeds: Tensor, seq: Sequences) -> Tensor:
        """Input embeddings (B, N, D) of a piece of prompt that the second stream is to read.

        This and the next two act where `contrast` puts the prompt `after` the main pass.
        """
        return embeds

    def other_row(self, rows: Rows) -> None:
        """The second stream's last query row after the softmax, (B, H, 1, K); only to be read."""

    def other_hidden(self, layer: int, seq: Sequences) -> Tensor | None:
        """Key columns (B, K) bool that no row of the second stream sees in this layer, or None."""
        return None

    def mlp(self, fed: FeedForward, seq: Sequences) -> Tensor:
        """What the feed-forward of a layer returns (B, Q, D), in place of ``fed.out``.

        Called for `mlp_layers`, in every phase, for all rows.
        """
        return fed.out

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        """Next-token logits (B, V); `other` are the second stream's, or None."""
        return logits

    def search(self, beams: Beams) -> Found:
        """The answer to one prompt, in place of `generate`'s own decoding.

        The method says in a field `num_beams` how many beams it wants.
        """
        raise NotImplementedError

    # -- derived -----------------------------------------------------------------------------------

    def wants(self, stage: str) -> bool:
        """Whether `stage` is overridden; extend it where parameter values make a stage idle."""
        return stage in self.stages

    @property
    def edits_attention(self) -> bool:
        """Whether it edits or reads attention, in either stream."""
        return any(self.wants(s) for s in ("scores", "weights", "other_row", "other_hidden"))

    def other_layers(self, anatomy: Anatomy) -> tuple[Iterable[int], Iterable[int]]:
        """Layers in which `other_row` reads, and in which `other_hidden` is asked."""
        return (), ()

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """Layers whose feed-forward `mlp` gets, once the method is resolved."""
        return self.layers or ()

    def resolve(self, anatomy: Anatomy) -> Method:
        """The same method with layers and presets filled in for a model.

        Published layer numbers are literal on models of 28 or more layers and scaled to
        ``floor(l * L / 32)`` on shallower ones. Only layers with full attention see the whole
        image. Others are left out, with a warning where published ones are among them.

        Raises:
            FoveateError: for a layer that does not exist or does not see the whole image, and
                where no layer is left.
        """
        kind, kinds = anatomy.kind, anatomy.layer_kinds
        values: dict[str, Any] = {}
        for prefix in sorted(self.presets, key=len):
            if kind.startswith(prefix):
                preset = self.presets[prefix].items()
                values |= {name: value for name, value in preset if getattr(self, name) is None}
        published = values.pop("layers", self.paper_layers)
        if self.looks_again and not anatomy.placed:
            raise FoveateError(
                f"{self.name} has to know where {kind}'s image tokens lie on the image, and "
                "no layout file describes it, and without its weights here foveate cannot look "
                "for itself: use a method that does not look again."
            )
        about_layers = self.edits_attention or self.wants("before") or self.wants("mlp")
        if not (about_layers or self.looks_again):
            if self.layers is not None:
                raise FoveateError(f"{self.name} acts on no layer: leave out layers.")
            return dataclasses.replace(self, **values)

        whole = self.edits_attention or self.looks_again
        states = range(anatomy.depth + self.to_the_norm)
        full = anatomy.full_layers if whole else tuple(states)
        if not full:
            window = {*kinds} == {"sliding_attention"}
            raise FoveateError(
                f"{self.name} cannot act on {kind}: none of its layers sees the whole image "
                f"through plain attention (there are {_counted(kinds)}): use another model"
                + (
                    ", or load it with sliding_window=None in text_config, which changes nothing "
                    "where a prompt and its answer are shorter than the window."
                    if window
                    else "."
                )
            )
        if self.layers is not None:
            layers = self._literal(full, kinds)
        elif published is not None:
            wanted = published_layers(published, anatomy.depth)
            layers = tuple(sorted(wanted & set(full)))
            if not layers:
                raise FoveateError(
                    f"{self.name} has nothing to act on in {kind}: its published layers, "
                    f"here {_listed(wanted)}, do not see the whole image (there are "
                    f"{_counted(kinds)}); choose among {_listed(full)} with layers=(N,)."
                )
            if len(layers) < len(wanted):
                warnings.warn(
                    f"{self.name}: of its published layers, here {_listed(wanted)}, only "
                    f"{_listed(layers)} see the whole image in {kind}; it acts there.",
                    stacklevel=2,
                )
        else:
            layers = full
        return dataclasses.replace(self, layers=layers, **values)

    def _literal(self, full: tuple[int, ...], kinds: tuple[str, ...]) -> tuple[int, ...]:
        """`layers` in order, if every one of them is there and among `full`."""
        assert self.layers is not None
        for layer in self.layers:
            last = len(kinds) - 1 + self.to_the_norm
            if not 0 <= layer <= last:
                raise FoveateError(
                    f"{self.name}: layer {layer} does not exist, this model has layers 0 to {last}."
                )
            if layer not in full:
                raise FoveateError(
                    f"{self.name}: layer {layer} ({kinds[layer]}) does not see the whole "
                    f"image, the full-attention layers are {_listed(full)}."
                )
        if not self.layers:
            raise FoveateError(f"{self.name}: layers is empty: name at least one, or None.")
        return tuple(sorted(set(self.layers)))

    @property
    def is_neutral(self) -> bool:
        """Whether the parameters are those that make the method the plain model."""
        return bool(self.neutral) and all(getattr(self, k) == v for k, v in self.neutral.items())


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


def _counted(kinds: Iterable[str]) -> str:
    """Layer kinds in words: "6 full_attention, 24 linear_attention"."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())


def published_layers(layers: tuple[int | EllipsisType, ...], depth: int) -> set[int]:
    """Published layers such as `paper_layers` on a model of `depth` layers."""

    def here(layer: int | EllipsisType) -> int:
        assert isinstance(layer, int)
        if layer < 0:
            return depth + layer
        return layer if depth >= 28 else layer * depth // 32

    if len(layers) == 3 and layers[1] is ...:
        return set(range(here(layers[0]), here(layers[2]) + 1))
    return {here(layer) for layer in layers}


# -- registry, text and JSON -----------------------------------------------------------------------

methods = registry.all
get = registry.get


def parse(text: str) -> tuple[Method, ...]:
    """Methods from their text form.

    ``"clvs(smoothing=0.7)+vcd"`` gives two methods, in this order; ``"vanilla"`` gives none.
    Values are Python literals; a bare word is a string, so ``mode=add`` works.

    Raises:
        FoveateError: on malformed text, an unknown method or an unknown parameter.
    """
    return () if text.strip().lower() == "vanilla" else registry.parse(text)


def text(stack: Iterable[Method]) -> str:
    """The text form of a stack of methods; `parse` reads it back where all of them have names."""
    return "+".join(map(str, stack)) or "vanilla"


def identity(stack: Iterable[Method]) -> str:
    """What tells a stack from every other in this process: its text form, and its classes.

    A class without a name, or one that inherits another's, is not to be told by its text alone.
    """
    return "+".join(f"{method}#{method._number}" for method in stack)


def to_json(stack: Iterable[Method]) -> list[dict[str, Any]]:
    """A JSON-ready list, one ``{"method": name, parameter: value, ...}`` per method."""
    return [{"method": m.name, **m.parameters()} for m in stack]


def from_json(data: Iterable[dict[str, Any]]) -> tuple[Method, ...]:
    """The inverse of `to_json`.

    Raises:
        FoveateError: an entry that names no method, an unknown one or an unknown parameter.
    """
    stack = []
    for entry in data:
        if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
            raise FoveateError(f"{shown(entry)} names no method: write it as `to_json` does.")
        values = {str(k): v for k, v in entry.items() if k != "method"}
        stack.append(registry.build(entry["method"], values))
    return tuple(stack)


def as_stack(*given: Method | str) -> tuple[Method, ...]:
    """Methods and text forms, flattened in order."""
    stack: list[Method] = []
    for item in given:
        if isinstance(item, str):
            stack.extend(parse(item))
        elif isinstance(item, Method):
            stack.append(item)
        else:
            raise FoveateError(
                f"A method is a text such as 'clvs' or a Method instance, got {shown(item)}."
            )
    names = [m.name or type(m).__qualname__ for m in stack]
    for name in names:
        if names.count(name) > 1:
            raise FoveateError(f"The method {name} is named twice: give each method once.")
    lookers = [m.name for m in stack if m.looks_again and not m.is_neutral]
    if len(lookers) > 1:
        raise FoveateError(
            f"{' and '.join(lookers)} both look for a better picture: use only one at a time."
        )
    owners = [m.name for m in stack if m.wants("contrast") and not m.is_neutral]
    if len(owners) > 1:
        raise FoveateError(
            f"{' and '.join(owners)} both want the second stream: use only one of them at a time."
        )
    searching = [m for m in stack if m.wants("search") and not m.is_neutral]
    if searching and (owners or len(searching) > 1):
        both = " and ".join([*(m.name for m in searching), *owners])
        raise FoveateError(
            f"{both} cannot be used together: a search runs one stream of tokens, and one search "
            "at a time."
        )
    return tuple(stack)
