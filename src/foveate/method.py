"""What a method is: a frozen dataclass that overrides only the stages it needs.

Everything else derives from the class: the engine installs hooks for the overridden stages only,
the registry finds the class by its `name`, the text form ``clvs(smoothing=0.7)+vcd`` and the JSON
form are its fields, and the invariant test-suite runs over whatever is registered.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import pkgutil
import types
import typing
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from .attention import Rows
    from .context import Context

STAGES = ("rewrite", "contrast", "begin", "before", "scores", "weights", "logits")
RESERVED = ("vanilla", "all")

_registry: dict[str, type[Method]] = {}


class FoveateError(ValueError):
    """A mistake of the caller, told in one sentence that says what is wrong and what to do."""


@dataclass(frozen=True)
class Method:
    """Override the stages you need; what you do not override costs nothing.

    A subclass with a `name` registers itself. Fields are the parameters: they are checked against
    their annotations, printed in the text form and shown by ``foveate methods``.

    Attributes:
        layers: decoder layers (0-based) whose attention the method edits. ``None`` means the
            class's `paper_layers`, else every full-attention layer; given explicitly, literal.
    """

    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # arXiv id
    rows: ClassVar[Literal["last", "text", "all"]] = "last"  # query rows for scores and weights
    paper_layers: ClassVar[tuple[int, ...] | None] = None
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # model_type prefix -> values of None fields
    neutral: ClassVar[dict[str, Any]] = {}  # parameters that make it the plain model
    example: ClassVar[dict[str, Any]] = {}  # parameters for the test-suite
    row_sum_one: ClassVar[bool] = True  # edited attention rows still sum to 1
    shares_prefix: ClassVar[bool] = True  # the question does not change image rows
    needs_image: ClassVar[bool] = True  # without visual tokens the method does nothing
    reorders: ClassVar[bool] = True  # its memory follows the rows of beam search

    stages: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.stages = frozenset(s for s in STAGES if getattr(cls, s) is not getattr(Method, s))
        name = cls.__dict__.get("name", "")
        if not name or not register:
            return
        if not name.isidentifier() or name in RESERVED:
            raise FoveateError(f"A method cannot be called {name!r}: choose another identifier.")
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise FoveateError(
                f"The method name {name!r} is taken by {known.__module__}.{known.__qualname__}: "
                "choose another name."
            )
        _registry[name] = cls

    def __post_init__(self) -> None:
        for f, hint in _parameters(type(self)):
            value = getattr(self, f.name)
            if isinstance(value, list):  # JSON knows no tuples
                value = _as_tuple(value)
                object.__setattr__(self, f.name, value)
            if isinstance(value, int) and not isinstance(value, bool) and _matches(1.5, hint):
                value = float(value)
                object.__setattr__(self, f.name, value)
            if not _matches(value, hint):
                raise FoveateError(
                    f"{self.name}: {f.name} must be {_describe(hint)}, got {value!r}."
                )
        self.check()

    def check(self) -> None:
        """Raise `FoveateError` where parameter values make no sense (types are checked before)."""

    def require(self, condition: bool, what: str) -> None:
        """Raise ``<name>: <what>`` unless `condition` holds; for use in `check`."""
        if not condition:
            raise FoveateError(f"{self.name}: {what}.")

    # -- stages ------------------------------------------------------------------------------------

    def setup(self, model: Any) -> Any:
        """Once per `enhance`: whatever the other stages want to find as ``ctx.plan``."""

    def rewrite(self, vlm: Any, chats: list[Any]) -> list[Any]:
        """Input stage: all chats about one image, before `enhance` is entered."""
        return chats

    def contrast(self, inputs: dict[str, Any], ctx: Context) -> dict[str, Any] | None:
        """Changed prefill inputs of a second stream, or None for no second stream."""
        return None

    def begin(self, ctx: Context) -> None:
        """A sequence starts: allocate ``ctx.memory`` (tensors batch-first)."""

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

    def resolve(self, model: Any) -> Method:
        """The same method with layers and presets filled in for `model`.

        Published layer numbers are literal on models of 28 or more layers and scaled to
        ``floor(l * L / 32)`` on shallower ones. Layers with sliding-window attention never see
        the whole image and are left out; asking for one explicitly raises `FoveateError`.
        """
        from .context import attention_layers

        config = model.get_decoder().config
        full, depth = attention_layers(model), config.num_hidden_layers
        if self.layers is not None:
            for layer in self.layers:
                if not 0 <= layer < depth:
                    raise FoveateError(
                        f"{self.name}: layer {layer} does not exist, this model has layers 0 to "
                        f"{depth - 1}."
                    )
                if layer not in full:
                    raise FoveateError(
                        f"{self.name}: layer {layer} has sliding-window attention and cannot be "
                        f"edited, the full-attention layers are {', '.join(map(str, full))}."
                    )
            layers = tuple(sorted(set(self.layers)))
        elif self.paper_layers is not None:
            scaled = (p if depth >= 28 else p * depth // 32 for p in self.paper_layers)
            layers = tuple(sorted(set(scaled) & set(full)))
        else:
            layers = full
        values: dict[str, Any] = {"layers": layers}
        model_type = getattr(model.config, "model_type", "")
        for prefix in sorted(self.presets, key=len):
            if model_type.startswith(prefix):
                values |= {
                    k: v for k, v in self.presets[prefix].items() if getattr(self, k) is None
                }
        return dataclasses.replace(self, **values)

    @property
    def is_neutral(self) -> bool:
        """Whether the parameters are those that make the method the plain model."""
        return bool(self.neutral) and all(getattr(self, k) == v for k, v in self.neutral.items())

    def parameters(self) -> dict[str, Any]:
        """Field name -> value, in order."""
        return {f.name: getattr(self, f.name) for f, _ in _parameters(type(self))}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f, _ in _parameters(type(self))
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


# -- registry --------------------------------------------------------------------------------------


def methods() -> dict[str, type[Method]]:
    """Every registered method by name: this package's, installed plug-ins', and the user's own."""
    from . import methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group="foveate.methods"):
        point.load()
    return dict(sorted(_registry.items()))


def get(name: str) -> type[Method]:
    """The method class called `name`; unknown names are refused with the nearest one."""
    known = methods()
    if name not in known:
        raise FoveateError(f"There is no method {name!r}{_nearest(name, [*known, 'vanilla'])}.")
    return known[name]


# -- text and JSON ---------------------------------------------------------------------------------


def parse(text: str) -> tuple[Method, ...]:
    """Methods from their text form.

    ``"clvs(smoothing=0.7)+vcd"`` gives two methods, in this order; ``"vanilla"`` gives none.
    Values are Python literals; a bare word is a string, so ``mode=add`` works.

    Raises:
        FoveateError: on malformed text, an unknown method or an unknown parameter.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise FoveateError(
            f"Cannot read the method {text!r}: write it like clvs(smoothing=0.7)+vcd."
        ) from None
    parts: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        parts.insert(0, tree.right)
        tree = tree.left
    parts.insert(0, tree)
    if len(parts) == 1 and isinstance(tree, ast.Name) and tree.id == "vanilla":
        return ()
    return tuple(_parse_one(part, text) for part in parts)


def text(stack: typing.Iterable[Method]) -> str:
    """The text form of a stack of methods; `parse` reads it back."""
    return "+".join(map(str, stack)) or "vanilla"


def to_json(stack: typing.Iterable[Method]) -> list[dict[str, Any]]:
    """A JSON-ready list, one ``{"method": name, parameter: value, ...}`` per method."""
    return [{"method": m.name, **m.parameters()} for m in stack]


def from_json(data: typing.Iterable[dict[str, Any]]) -> tuple[Method, ...]:
    """The inverse of `to_json`."""
    return tuple(
        _build(entry["method"], {k: v for k, v in entry.items() if k != "method"}) for entry in data
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
    owners = [m.name for m in stack if "contrast" in m.stages]
    if len(owners) > 1:
        raise FoveateError(
            f"{' and '.join(owners)} both want the second stream: use only one of them at a time."
        )
    return tuple(stack)


def _parse_one(node: ast.expr, text: str) -> Method:
    if isinstance(node, ast.Name):
        name, keywords = node.id, []
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        name, keywords = node.func.id, node.keywords
    else:
        raise FoveateError(
            f"Cannot read the method {text!r}: write it like clvs(smoothing=0.7)+vcd."
        )
    values: dict[str, Any] = {}
    for keyword in keywords:
        value = keyword.value
        if keyword.arg is None:
            raise FoveateError(f"Cannot read the method {text!r}: ** is not allowed here.")
        if isinstance(value, ast.Name):
            values[keyword.arg] = {"true": True, "false": False, "none": None}.get(
                value.id, value.id
            )
            continue
        try:
            values[keyword.arg] = ast.literal_eval(value)
        except ValueError:
            raise FoveateError(
                f"Cannot read {keyword.arg}={ast.unparse(value)} in {text!r}: "
                "give a number, a word, True, False, None or a tuple."
            ) from None
    return _build(name, values)


def _build(name: str, values: dict[str, Any]) -> Method:
    cls = get(name)
    known = [f.name for f, _ in _parameters(cls)]
    for key in values:
        if key not in known:
            raise FoveateError(f"{name} has no parameter {key!r}{_nearest(key, known)}.")
    return cls(**values)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f"; there are {', '.join(known)}"


# -- parameter types -------------------------------------------------------------------------------


def _parameters(cls: type[Method]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    own = [f for f in dataclasses.fields(cls) if f.init]
    own.sort(key=lambda f: f.name == "layers")  # the method's own parameters first
    return [(f, hints[f.name]) for f in own]


def _matches(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is ...:
            return all(_matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(_matches, value, args))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, origin or hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is tuple:
        return f"a tuple of {_describe(args[0])}"
    return {
        float: "a number",
        int: "a whole number",
        str: "a text",
        bool: "True or False",
        type(None): "None",
    }.get(hint, str(hint))


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
