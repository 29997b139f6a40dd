"""What methods and benchmarks share: a frozen dataclass with a name, a text form and a registry.

``clvs(smoothing=0.7)`` names a class and the fields that differ from their defaults. Fields are
checked against their annotations and against bounds that hold for all of them, so a typo gives one
short sentence and not a traceback, and so does the text of somebody who means harm.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.metadata
import pkgutil
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from .errors import FoveateError

LARGEST = 2**32 - 1
"""The most that a number in a field may be, in size: seeds have 32 bits, and the product of two
such numbers is finite in float32."""
SMALLEST = 1e-30
"""The least size of a number that is not 0: float32 holds it, and its inverse."""
CHARACTERS = 4096  # of a field that is a text
VALUES = 10_000  # of a field that is a tuple, those of tuples inside it counted
LONGEST = 200_000  # characters of a text form: a list of all heads of a large model fits
MESSAGE = 300  # characters of what is said about a text form, whatever it holds

SOURCE = "<text form>"  # where Python says that a text form stands
# it warns of each number with a word right behind it, and a text can hold thousands
warnings.filterwarnings("ignore", module=SOURCE)


@dataclass(frozen=True)
class Form:
    """A frozen dataclass whose fields are its parameters."""

    name: ClassVar[str] = ""

    def __new__(cls, *given: Any, **values: Any) -> Self:
        """Refuse parameters without a name, and names that the class does not have."""
        if given or values:
            known = [f.name for f, _ in parameters(cls)]
            called = cls.name or cls.__qualname__
            if given:
                raise FoveateError(
                    f"{called} takes its parameters by name: write "
                    f"{cls.__qualname__}({known[0] if known else 'name'}={shown(given[0])})."
                )
            for key in values:
                if key not in known:
                    raise FoveateError(
                        f"{called} has no parameter {shown(key)}{nearest(key, known)}."
                    )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for f, hint in parameters(type(self)):
            value = getattr(self, f.name)
            self._bound(f.name, value)
            if isinstance(value, list):  # JSON knows no tuples
                value = _as_tuple(value)
                object.__setattr__(self, f.name, value)
            if isinstance(value, int) and not isinstance(value, bool) and _matches(1.5, hint):
                value = float(value)
                object.__setattr__(self, f.name, value)
            if not _matches(value, hint):
                raise FoveateError(
                    f"{self.name}: {f.name} must be {described(hint)}, got {shown(value)}."
                )
        self.check()

    def _bound(self, name: str, value: Any) -> None:
        """Refuse what no field may hold, whatever its type."""
        for count, part in enumerate(_parts(value), 1):
            self.require(count <= VALUES, f"{name} may have {VALUES:,} values")
            if isinstance(part, str):
                self.require(len(part) <= CHARACTERS, f"{name} may have {CHARACTERS:,} characters")
                half = any("\ud800" <= character <= "\udfff" for character in part)
                self.require(not half, f"{name} has half a character: write it out")
                self.require("\0" not in part, f"{name} has a null character: leave it out")
            elif isinstance(part, (int, float)):
                self.require(
                    abs(part) <= LARGEST,  # NaN is not
                    f"{name} must lie between -{LARGEST:,} and {LARGEST:,}, got {shown(part)}",
                )
                self.require(
                    part == 0 or abs(part) >= SMALLEST,
                    f"{name} must be 0 or {SMALLEST:g} or more in size, got {shown(part)}",
                )

    def check(self) -> None:
        """Raise `FoveateError` where parameter values make no sense (types are checked before)."""

    def require(self, condition: bool, what: str) -> None:
        """Raise ``<name>: <what>`` unless `condition` holds; for use in `check`."""
        if not condition:
            raise FoveateError(f"{self.name}: {what}.")

    def parameters(self) -> dict[str, Any]:
        """Field name -> value, in order."""
        return {f.name: getattr(self, f.name) for f, _ in parameters(type(self))}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f, _ in parameters(type(self))
            if getattr(self, f.name) != f.default
        ]
        cls = type(self)
        name = self.name or f"{cls.__module__}.{cls.__qualname__}"  # which no parser reads
        return f"{name}({', '.join(changed)})" if changed else name


class Registry:
    """The classes of one kind by name, and their text form.

    Args:
        kind: the word for one of them in messages.
        group: the entry-point group of plug-ins.
        example: a text form to show where one cannot be read.
        reserved: names that mean something else.
        package: the package whose modules define them, or the one module that does, where it is
            not called as the group is.
    """

    def __init__(
        self, kind: str, group: str, example: str, reserved: tuple[str, ...], package: str = ""
    ) -> None:
        self.kind, self.group, self.example, self.reserved = kind, group, example, reserved
        self.package = package or group
        self.classes: dict[str, type[Any]] = {}
        self.walked, self._walking = False, threading.RLock()

    def add(self, cls: type[Form]) -> None:
        """Register `cls` under its own name; one that inherits its name is not registered."""
        name = cls.__dict__.get("name", "")
        if not name:
            return
        if not name.isidentifier() or name in self.reserved:
            raise FoveateError(
                f"A {self.kind} cannot be called {name!r}: choose another identifier."
            )
        known = self.classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise FoveateError(
                f"The {self.kind} name {name!r} is taken by "
                f"{known.__module__}.{known.__qualname__}: choose another name."
            )
        self.classes[name] = cls

    def all(self) -> dict[str, type[Any]]:
        """Every class: this package's and installed plug-ins', searched once, and the user's."""
        with self._walking:
            if not self.walked:
                self.walked = True  # before: a plug-in may look for others while it is imported
                try:
                    package = importlib.import_module(self.package)
                    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                        importlib.import_module(f"{self.package}.{module.name}")
                except BaseException:
                    self.walked = False
                    raise
                load_plugins(self.group, self._admit)
        return dict(sorted(self.classes.items()))

    def _admit(self, plugin: Any) -> None:
        """Refuse a plug-in (a class, or a module with classes) that would fail at its first use."""
        if isinstance(plugin, type) and plugin not in self.classes.values():
            raise FoveateError(f"{plugin.__qualname__} is no {self.kind} with a name of its own")
        for name, cls in list(self.classes.items()):
            if cls is plugin or cls.__module__ == getattr(plugin, "__name__", None):
                try:
                    cls()
                except Exception:
                    del self.classes[name]
                    raise

    def get(self, name: str) -> type[Any]:
        """The class called `name`, in any case; others are refused with the nearest name."""
        known = self.all()
        if name in known:
            return known[name]
        if name.lower() in self.reserved:
            raise FoveateError(f"{name!r} cannot be used here: name one {self.kind}.")
        alike = [other for other in known if other.lower() == name.lower()]
        if len(alike) != 1:
            raise FoveateError(
                f"There is no {self.kind} {shown(name)}{nearest(name, [*known, *self.reserved])}."
            )
        return known[alike[0]]

    def build(self, name: str, values: dict[str, Any]) -> Any:
        """An instance of the class called `name`."""
        return self.get(name)(**values)

    def parse(self, text: str) -> tuple[Any, ...]:
        """Instances from ``"one(parameter=value)+another"``, in this order.

        Values are Python literals; a bare word is a string, so ``mode=add`` works.

        Raises:
            FoveateError: on malformed text, an unknown name or an unknown parameter; in at most
                `MESSAGE` characters.
        """
        try:
            return self._parse(text)
        except FoveateError as error:
            message = str(error)
            if len(message) <= MESSAGE:
                raise
            raise FoveateError(message[: MESSAGE - 4].rstrip() + " ...") from None

    def _parse(self, text: str) -> tuple[Any, ...]:
        if len(text) > LONGEST:
            raise FoveateError(
                f"The text of a {self.kind} may have {LONGEST:,} characters, and this has "
                f"{len(text):,}: make it shorter."
            )
        try:
            tree = ast.parse(text.strip(), SOURCE, mode="eval").body
        except UNREADABLE:
            raise self._unreadable(text) from None
        parts: list[ast.expr] = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
            parts.insert(0, tree.right)
            tree = tree.left
        parts.insert(0, tree)
        return tuple(self._parse_one(part, text) for part in parts)

    def _parse_one(self, node: ast.expr, text: str) -> Any:
        if isinstance(node, ast.Name):
            name, keywords = node.id, []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            name, keywords = node.func.id, node.keywords
        else:
            raise self._unreadable(text)
        values: dict[str, Any] = {}
        for keyword in keywords:
            value = keyword.value
            if keyword.arg is None:
                raise FoveateError(
                    f"Cannot read the {self.kind} {shown(text)}: ** is not allowed here."
                )
            if keyword.arg in values:
                raise FoveateError(f"{name}: {shown(keyword.arg)} is given twice: give it once.")
            if isinstance(value, ast.Name):
                values[keyword.arg] = {"true": True, "false": False, "none": None}.get(
                    value.id, value.id
                )
                continue
            try:
                values[keyword.arg] = ast.literal_eval(value)
            except UNREADABLE:
                given = ast.get_source_segment(text.strip(), value) or "its value"
                raise FoveateError(
                    f"Cannot read {_short(keyword.arg)}={_short(given)} in {shown(text)}: "
                    "give a number, a word, True, False, None, a tuple, or a path in quotes."
                ) from None
        return self.build(name, values)

    def _unreadable(self, text: str) -> FoveateError:
        quotes = ", with paths in quotes" if "/" in text or "\\" in text else ""
        return FoveateError(
            f"Cannot read the {self.kind} {shown(text)}: write it like {self.example}{quotes}."
        )


# what Python raises for a text that is no expression, too deep for it, or no literal: nulls, half
# characters, 5,000 digits, 10,000 brackets, a list as a key
UNREADABLE = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)


def load_plugins(group: str, admit: Callable[[Any], None]) -> None:
    """Load every plug-in of an entry-point group and hand it to `admit`.

    Where importing one or `admit` fails, a warning says so, and the plug-in is left out.
    """
    for point in importlib.metadata.entry_points(group=group):
        try:
            admit(point.load())
        except Exception as error:  # it is somebody else's code
            reason = " ".join(str(error).split()).rstrip(".")
            package = point.dist.name if point.dist else point.value
            warnings.warn(
                f"The plug-in {point.name!r} of {package} ({group}: {point.value}) is left out, it "
                f"raises {type(error).__name__}: {reason}. Upgrade {package}, or uninstall it.",
                stacklevel=2,
            )


def nearest(word: str, known: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest known one in any case, else all of them."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(_short(word).lower(), by_lower, n=1)
    if close:
        return f" (did you mean {by_lower[close[0]]!r}?)"
    return f"; there are {_short(', '.join(known), 180)}"


def shown(value: Any) -> str:
    """A value as a message shows it: `repr`, cut to 60 characters."""
    if isinstance(value, int) and abs(value) > 10**60:
        return "a whole number of more than 60 digits"  # which Python may refuse to write
    if isinstance(value, str):
        value = value[:61]  # what is cut anyway
    try:
        return _short(repr(value))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 4].rstrip() + " ..."


# -- what a field declares -------------------------------------------------------------------------


def file(default: Any = "") -> Any:
    """A field whose text, where it is not the default, names a file that the class opens."""
    return dataclasses.field(default=default, metadata={"file": True})


def costly(default: Any, limit: int | None) -> Any:
    """A field that multiplies passes, tokens, memory or time.

    Args:
        limit: the most that a stranger may ask for: the number itself, the values of a tuple, the
            characters of a text. None = nothing but the default.
    """
    return dataclasses.field(default=default, metadata={"limit": limit})


def permit(form: Form) -> None:
    """Check that a stranger, such as a server's client, may ask for this.

    Raises:
        FoveateError: a field names a file, or asks for more than its limit.
    """
    for f, _ in parameters(type(form)):
        value, limit = getattr(form, f.name), f.metadata.get("limit")
        if value == f.default:
            continue
        if "file" in f.metadata and isinstance(value, str):
            raise FoveateError(
                f"{form.name}: {f.name}={shown(value)} names a file, and requests name no files of "
                "the server: give values."
            )
        if "limit" not in f.metadata or value is None:
            continue
        if limit is None:
            raise FoveateError(f"{form.name}: a request may not set {f.name}: leave it out.")
        unit = " characters" if isinstance(value, str) else " values" * isinstance(value, tuple)
        if (len(value) if unit else value) > limit:
            raise FoveateError(
                f"{form.name}: {f.name}={shown(value)} is too much, a request may ask for "
                f"{limit}{unit} at most."
            )


# -- parameter types -------------------------------------------------------------------------------


def parameters(cls: type[Form]) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of `cls` with their resolved annotations, in the order they are shown."""
    hints = typing.get_type_hints(cls)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    fields.sort(key=lambda f: f.name == "layers")  # common to all methods: last
    return [(f, hints[f.name]) for f in fields]


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


def described(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, args))
    if origin is tuple:
        return f"a tuple of {described(args[0])}"
    if origin is Callable:
        return "a function"
    return {
        float: "a number",
        int: "a whole number",
        str: "a text",
        bool: "True or False",
        type(None): "None",
    }.get(hint, str(hint))


def _parts(value: Any) -> Iterator[Any]:
    """What is in a value that may be a tuple of tuples, or the value itself."""
    left = [iter((value,))]
    while left:
        for part in left[-1]:
            if isinstance(part, (tuple, list)):
                left.append(iter(part))
                break
            yield part
        else:
            left.pop()


def _as_tuple(value: Any, depth: int = 3) -> Any:
    """Lists as tuples, no deeper than fields go."""
    if not isinstance(value, list) or not depth:
        return value
    return tuple(_as_tuple(part, depth - 1) for part in value)
