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
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..base.errors import FoveateError
from ..base.form import Form, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.transformers.attention import Rows
    from .context import Context

__all__ = [
    "FoveateError",
    "Method",
    "as_stack",
    "from_json",
    "get",
    "identity",
    "methods",
    "parse",
    "shape",
    "text",
    "to_json",
]

STAGES = ("rewrite", "contrast", "begin", "see", "before", "scores", "weights", "logits")
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
        layers: decoder layers (0-based) whose attention the method edits or reads. ``None`` means
            the published ones, of `presets` or `paper_layers`, else every full-attention layer;
            given explicitly, literal.
    """

    layers: tuple[int, ...] | None = None

    paper: ClassVar[str] = ""  # arXiv id
    rows: ClassVar[Literal["last", "text", "all"]] = "last"  # query rows for scores and weights
    paper_layers: ClassVar[tuple[int | EllipsisType, ...] | None] = None
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # model_type prefix -> values of None fields
    neutral: ClassVar[dict[str, Any]] = {}  # parameters that make it the plain model
    example: ClassVar[dict[str, Any]] = {}  # parameters for the test-suite
    row_sum_one: ClassVar[bool] = True  # edited attention rows still sum to 1
    shares_prefix: ClassVar[bool] = True  # the question does not change image rows
    needs_image: ClassVar[bool] = True  # without visual tokens the method does nothing
    reorders: ClassVar[bool] = True  # its memory follows the rows of beam search
    decodes: ClassVar[bool] = True  # it edits the attention of generated tokens, too
    ahead: ClassVar[bool] = False  # its second stream runs before the main pass, prompts only
    pixels: ClassVar[bool] = True  # its second stream is made from pixel values
    reads: ClassVar[bool] = False  # its `rewrite` reads the attention of `layers`
    passes: ClassVar[str] = ""  # what it runs beside the answer, in words
    # after `resolve`: vision blocks whose output it wants in `see`; k is the output of block k - 1
    vision_layers: ClassVar[tuple[int, ...] | None] = None

    stages: ClassVar[frozenset[str]] = frozenset()
    _number: ClassVar[int] = next(_numbers)  # of the class, in this process

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._number = next(_numbers)
        cls.stages = frozenset(s for s in STAGES if getattr(cls, s) is not getattr(Method, s))
        if register:
            registry.add(cls)

    # -- stages ------------------------------------------------------------------------------------

    def setup(self, model: Any) -> Any:
        """Once per `enhance`: whatever the other stages want to find as ``ctx.plan``."""

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        """Input stage: all chats about one image, before `enhance` is entered.

        `self` is resolved for the model by then. What the method finds out goes to the notes of
        the chats it returns.
        """
        return chats

    def contrast(self, inputs: dict[str, Any], ctx: Context) -> dict[str, Any] | None:
        """Changed inputs of this piece of prompt for a second stream, or None for no such stream.

        `inputs` are those of the forward, without caches and positions; ``attention_mask`` is
        always there, (B, new) int64.
        """
        return None

    def begin(self, ctx: Context) -> None:
        """A sequence starts: allocate ``ctx.memory`` (tensors batch-first)."""

    def see(self, ctx: Context) -> None:
        """This prompt's images are encoded, the language model has not begun: `ctx.vision` holds
        what the vision blocks of `vision_layers` gave, `ctx.inputs` what the model was given."""

    def before(self, hidden: Tensor, ctx: Context, layer: int) -> Tensor:
        """Residual stream (B, Q, D) entering `layer`; ``layer == L`` is the final norm's input."""
        return hidden

    def scores(self, rows: Rows) -> Tensor:
        """Pre-softmax scores (B, H, R, K) float32, scaled, not yet masked."""
        return rows.x

    def weights(self, rows: Rows) -> Tensor:
        """Post-softmax weights (B, H, R, K) float32."""
        return rows.x

    def logits(self, logits: Tensor, other: Tensor | None, ctx: Context) -> Tensor:
        """Next-token logits (B, V); `other` are the second stream's, or None."""
        return logits

    # -- derived -----------------------------------------------------------------------------------

    def wants(self, stage: str) -> bool:
        """Whether `stage` is overridden; extend it where parameter values make a stage idle."""
        return stage in self.stages

    @property
    def edits_attention(self) -> bool:
        return self.wants("scores") or self.wants("weights")

    def resolve(self, model: Any) -> Method:
        """The same method with layers and presets filled in for `model`.

        Published layer numbers are literal on models of 28 or more layers and scaled to
        ``floor(l * L / 32)`` on shallower ones. Only layers with full attention see the whole
        image. Others are left out, with a warning where published ones are among them.

        Raises:
            FoveateError: for a layer that does not exist or does not see the whole image, and
                where no layer is left.
        """
        from ..backends.transformers.compat import layer_kinds
        from ..families.layout import layout_of

        values: dict[str, Any] = {}
        model_type = getattr(model.config, "model_type", "")
        for prefix in sorted(self.presets, key=len):
            if model_type.startswith(prefix):
                values |= {
                    k: v for k, v in self.presets[prefix].items() if getattr(self, k) is None
                }
        published = values.pop("layers", self.paper_layers)
        if self.reads and layout_of(model.config) is None:
            raise FoveateError(
                f"{self.name} has to know where {model_type}'s image tokens lie on the image, and "
                "foveate.families has no layout for it: use a method that does not look again."
            )
        if not (self.edits_attention or self.wants("before") or self.reads):
            if self.layers is not None:
                raise FoveateError(f"{self.name} acts on no layer: leave out layers.")
            return dataclasses.replace(self, **values)

        depth = model.get_decoder().config.num_hidden_layers
        whole = self.edits_attention or self.reads
        kinds = layer_kinds(model.get_decoder().config)
        full = tuple(i for i in range(depth) if not whole or kinds[i] == "full_attention")
        if not full:
            raise FoveateError(
                f"{self.name} cannot act on {model_type}: none of its layers sees the whole image "
                f"through plain attention (there are {_counted(kinds)}): use another model."
            )
        if self.layers is not None:
            for layer in self.layers:
                if not 0 <= layer < depth:
                    raise FoveateError(
                        f"{self.name}: layer {layer} does not exist, this model has layers 0 to "
                        f"{depth - 1}."
                    )
                if layer not in full:
                    raise FoveateError(
                        f"{self.name}: layer {layer} ({kinds[layer]}) does not see the whole "
                        f"image, the full-attention layers are {', '.join(map(str, full))}."
                    )
            layers = tuple(sorted(set(self.layers)))
            if not layers:
                raise FoveateError(f"{self.name}: layers is empty: name at least one, or None.")
        elif published is not None:
            wanted = _published(published, depth)
            layers = tuple(sorted(wanted & set(full)))
            if not layers:
                raise FoveateError(
                    f"{self.name} has nothing to act on in {model_type}: its published layers, "
                    f"here {_listed(wanted)}, do not see the whole image (there are "
                    f"{_counted(kinds)}); choose among {_listed(full)} with layers=(N,)."
                )
            if len(layers) < len(wanted):
                warnings.warn(
                    f"{self.name}: of its published layers, here {_listed(wanted)}, only "
                    f"{_listed(layers)} see the whole image in {model_type}; it acts there.",
                    stacklevel=2,
                )
        else:
            layers = full
        return dataclasses.replace(self, layers=layers, **values)

    @property
    def is_neutral(self) -> bool:
        """Whether the parameters are those that make the method the plain model."""
        return bool(self.neutral) and all(getattr(self, k) == v for k, v in self.neutral.items())


def shape(model: Any) -> dict[str, Any]:
    """What tells one architecture from another, without a name: types and sizes.

    Returns:
        ``{"model_type", "text_model_type", "hidden_size", "layers", "attention_heads",
        "key_value_heads", "vocab_size"}``, the sizes being the language model's.
    """
    text = model.get_decoder().config
    return {
        "model_type": model.config.model_type,
        "text_model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "attention_heads": text.num_attention_heads,
        "key_value_heads": getattr(text, "num_key_value_heads", text.num_attention_heads),
        "vocab_size": text.vocab_size,
    }


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


def _counted(kinds: Iterable[str]) -> str:
    """Layer kinds in words: "6 full_attention, 24 linear_attention"."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())


def _published(layers: tuple[int | EllipsisType, ...], depth: int) -> set[int]:
    """`paper_layers` on a model of `depth` layers."""

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
    return () if text.strip() == "vanilla" else registry.parse(text)


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
    """The inverse of `to_json`."""
    return tuple(
        registry.build(entry["method"], {k: v for k, v in entry.items() if k != "method"})
        for entry in data
    )


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
                f"A method is a text such as 'clvs' or a Method instance, got {item!r}."
            )
    names = [m.name or type(m).__qualname__ for m in stack]
    for name in names:
        if names.count(name) > 1:
            raise FoveateError(f"The method {name} is named twice: give each method once.")
    lookers = [m.name for m in stack if m.reads and not m.is_neutral]
    if len(lookers) > 1:
        raise FoveateError(
            f"{' and '.join(lookers)} both look for a better picture: use only one at a time."
        )
    owners = [m.name for m in stack if m.wants("contrast") and not m.is_neutral]
    if len(owners) > 1:
        raise FoveateError(
            f"{' and '.join(owners)} both want the second stream: use only one of them at a time."
        )
    return tuple(stack)
