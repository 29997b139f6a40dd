"""From the body of a request to a question for the worker: its chat, methods and sampling.

What is wrong with a request is told in one sentence.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ..backends.transformers.anatomy import anatomy
from ..base.errors import FoveateError
from ..base.form import permit
from ..core.method import Method, as_stack, methods
from ..core.sequence import Stack
from ..vlm.chat import Chat, Role, Turn
from ..vlm.vlm import VLM
from . import wire
from .decoders import Decoders
from .pictures import read_pictures
from .sampling import Sampling
from .wire import Refusal, Settings

ORDER = (
    "After system messages, if any, user and assistant speak in turn, and the user speaks first "
    "and last: put the messages into this order."
)


def parse(body: bytes) -> wire.Completion:
    try:
        return wire.Completion.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(*wire.told(error)) from None


def chat(vlm: VLM, asked: wire.Completion, settings: Settings, decoders: Decoders) -> Chat:
    """The conversation with its pictures decoded; in each turn, pictures come first."""
    messages, most = asked.messages, settings.prompt_tokens
    parts = [part for message in messages for part in message.content]
    characters = sum(len(part.text) for part in parts if isinstance(part, wire.TextPart))
    if characters > 32 * most or len(messages) > most:  # before anything looks at it
        raise Refusal(f"The text of a request may have {most:,} tokens: make it shorter.")
    system, turns = _turns(messages)
    urls = [part.image_url.url for part in parts if isinstance(part, wire.ImagePart)]
    *earlier, last = turns
    pictures = read_pictures(urls, settings, decoders)
    made = vlm.chat(pictures, last.text, system, earlier)
    prompt = vlm.prompt(made)
    with vlm.tokenizing:
        length = len(vlm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if length > most:
        raise Refusal(
            f"The text of a request may have {most:,} tokens, and this has {length:,}: make it "
            "shorter."
        )
    return made


def _turns(messages: list[wire.Message]) -> tuple[str | None, list[Turn]]:
    """The system text, and what user and assistant said in turn, the question last."""
    system, turns = list[str](), list[Turn]()
    for message in messages:
        role: Role = "assistant" if len(turns) % 2 else "user"
        text = "\n".join(part.text for part in message.content if isinstance(part, wire.TextPart))
        images = sum(isinstance(part, wire.ImagePart) for part in message.content)
        if images and message.role != "user":
            raise Refusal("Images belong into user messages.", "messages")
        if message.role in ("system", "developer") and not turns:
            system.append(text)
        elif message.role == role:
            turns.append(Turn(role, text, images))
        else:
            raise Refusal(ORDER, "messages")
    if len(turns) % 2 == 0:
        raise Refusal(ORDER, "messages")
    if not all(turn.images or turn.text.strip() for turn in turns[:-1:2]):
        raise Refusal("A user message is empty: leave it out, and its answer.", "messages")
    return "\n".join(system) or None, turns


def sampling(
    asked: wire.Completion, settings: Settings, methods: tuple[Method, ...] = ()
) -> Sampling:
    tokens = asked.max_completion_tokens or asked.max_tokens or settings.tokens
    if tokens > settings.tokens:
        raise Refusal(
            f"An answer may have {settings.tokens:,} tokens: ask for fewer.", "max_tokens"
        )
    if not all(asked.stop):
        raise Refusal("A stop string is empty: leave it out.", "stop")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refusal("top_logprobs needs logprobs to be true.", "top_logprobs")
    for method in methods:
        if method.wants("search") and (asked.temperature or asked.logprobs):
            raise Refusal(
                f"{method.name} searches the answer with beams: leave out temperature and logprobs."
            )
    return Sampling(
        max_tokens=tokens,
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        stop=tuple(asked.stop),
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )


LONGEST = 500  # characters of a method's text form


class Catalogue:
    """The model's name, and the methods it can be served with.

    Attributes:
        name: ``pocket``, ``llava-hf/llava-1.5-7b-hf``, or the last part of a folder's path.
        ids: what ``GET /v1/models`` lists: the name, and ``name:method`` for every method that
            works on this model with its default parameters, or with those that the server sets.

    Args:
        offered: methods with parameters that the server sets; a request gives only the name.

    Raises:
        FoveateError: one of `offered` does not exist or does not work on this model.
    """

    def __init__(self, vlm: VLM, offered: Sequence[str] = ()) -> None:
        self.offered = {method.name: method for method in as_stack(*offered)}
        for method in self.offered.values():
            Stack(anatomy(vlm.model), (method,))
        path = Path(vlm.name)
        self.vlm, self.name = vlm, path.name if path.is_dir() else vlm.name
        with warnings.catch_warnings(action="ignore"):  # no request has named these yet
            works = [name for name in methods() if self._serves(name)]
        self.ids = [self.name, *(f"{self.name}:{method}" for method in works)]
        self._checked = functools.lru_cache(256)(self._check)

    def methods(self, model: str, method: str | None) -> tuple[Method, ...]:
        """The methods that a request names.

        Raises:
            Refusal: another model. FoveateError: a method that does not exist, does not work on
                the model, would read a file, or would cost too much.
        """
        name, suffix = model[: len(self.name)], model[len(self.name) :]
        if name != self.name or (suffix and suffix[0] != ":"):
            reason = f"There is no model {model[:200]!r} here: ask for {self.name!r}."
            raise Refusal(reason, status=404, code="model_not_found")
        if suffix and method is not None:
            raise FoveateError("The method is given twice: in the model's name and as `method`.")
        return self._checked(suffix[1:] if suffix else method or "vanilla")

    def _check(self, text: str) -> tuple[Method, ...]:
        if len(text) > LONGEST:
            raise FoveateError(f"A method's text may have {LONGEST} characters.")
        asked = as_stack(text)
        stack = tuple(self.offered.get(m.name, m) if m == type(m)() else m for m in asked)
        for method in stack:
            if method is not self.offered.get(method.name):
                permit(method)
                self._check_texts(method)
        Stack(anatomy(self.vlm.model), stack)  # refuses what does not work on this model
        return stack

    def _check_texts(self, method: Method) -> None:
        """Refuse texts that are not allowed in questions either."""
        mark = getattr(self.vlm.processor, "image_token", None)
        for name, value in method.parameters().items():
            if mark and isinstance(value, str) and mark in value:
                raise FoveateError(
                    f"{method.name}: {name} contains {mark}, which stands for an image: leave it "
                    "out."
                )

    def _serves(self, name: str) -> bool:
        try:
            self._check(name)
        except FoveateError:
            return False
        return True
