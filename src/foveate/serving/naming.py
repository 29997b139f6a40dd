"""Which methods a request asks for: ``"method"`` in its body, or behind the model's name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..base.errors import FoveateError
from ..base.form import permit
from ..core.context import Stack
from ..core.method import Method, as_stack, methods
from ..vlm.vlm import VLM
from .errors import UnknownModel

LONGEST = 500  # characters of a method's text form


class Catalogue:
    """The model's name, and the methods it can be served with.

    Attributes:
        name: ``pocket``, ``llava-hf/llava-1.5-7b-hf``, or the last part of a folder's path.
        ids: what ``GET /v1/models`` lists: the name, and ``name:method`` for every method that
            works on this model with its default parameters, or with the server's own.

    Args:
        own: methods with the server's own parameters, each asked for by its name.

    Raises:
        FoveateError: where one of `own` does not exist or cannot serve this model.
    """

    def __init__(self, vlm: VLM, own: Sequence[str] = ()) -> None:
        self.own = {method.name: method for method in as_stack(*own)}
        for method in self.own.values():
            Stack(vlm.model, (method,))
        path = Path(vlm.name)
        self.vlm, self.name = vlm, path.name if path.is_dir() else vlm.name
        with warnings.catch_warnings(action="ignore"):  # nobody has asked for these yet
            works = [name for name in methods() if self._serves(name)]
        self.ids = [self.name, *(f"{self.name}:{method}" for method in works)]
        self._checked = functools.lru_cache(256)(self._check)

    def methods(self, model: str, method: str | None) -> tuple[Method, ...]:
        """The methods that a request names.

        Raises:
            UnknownModel: another model. FoveateError: methods that there are not, that the model
                cannot be served with, that would read a file, or that would cost too much.
        """
        name, suffix = model[: len(self.name)], model[len(self.name) :]
        if name != self.name or (suffix and suffix[0] != ":"):
            raise UnknownModel(f"There is no model {model[:200]!r} here: ask for {self.name!r}.")
        if suffix and method is not None:
            raise FoveateError("The method is given twice: in the model's name and as `method`.")
        return self._checked(suffix[1:] if suffix else method or "vanilla")

    def _check(self, text: str) -> tuple[Method, ...]:
        if len(text) > LONGEST:
            raise FoveateError(f"A method's text may have {LONGEST} characters.")
        asked = as_stack(text)
        stack = tuple(self.own.get(m.name, m) if m == type(m)() else m for m in asked)
        for method in stack:
            if method is not self.own.get(method.name):
                permit(method)
                self._check_texts(method)
        Stack(self.vlm.model, stack)  # refuses what does not work on this model
        return stack

    def _check_texts(self, method: Method) -> None:
        """Refuse texts that are no question's either."""
        mark = getattr(self.vlm.processor, "image_token", None)
        for name, value in method.parameters().items():
            if not isinstance(value, str):
                continue
            if mark and mark in value:
                raise FoveateError(
                    f"{method.name}: {name} contains {mark}, which stands for an image: leave it "
                    "out."
                )
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise FoveateError(f"{method.name}: {name} has half a character: write it out.")

    def _serves(self, name: str) -> bool:
        try:
            self._check(name)
        except FoveateError:
            return False
        return True
