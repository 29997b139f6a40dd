"""From the body of a request to a question for the worker, or one sentence about what is wrong."""

from __future__ import annotations

from pydantic import ValidationError

from ..vlm.chat import Chat, Role, Turn
from ..vlm.vlm import VLM
from . import wire
from .errors import Refusal
from .pictures import read_pictures
from .sampling import Sampling
from .settings import Settings

ORDER = (
    "After system messages, if any, user and assistant speak in turn, and the user speaks first "
    "and last: put the messages into this order."
)


def parse(body: bytes) -> wire.Completion:
    try:
        return wire.Completion.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(*wire.told(error)) from None


def chat(vlm: VLM, asked: wire.Completion, settings: Settings) -> Chat:
    """The conversation with its pictures decoded; in each turn, pictures come first."""
    messages, most = asked.messages, settings.prompt_tokens
    parts = [part for message in messages for part in message.content]
    characters = sum(len(part.text) for part in parts if isinstance(part, wire.TextPart))
    if characters > 32 * most or len(messages) > most:  # before anything looks at it
        raise Refusal(f"The text of a request may have {most:,} tokens: make it shorter.")
    system, turns = _turns(messages)
    urls = [part.image_url.url for part in parts if isinstance(part, wire.ImagePart)]
    *earlier, last = turns
    made = vlm.chat(read_pictures(urls, settings), last.text, system, earlier)
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


def sampling(asked: wire.Completion, settings: Settings) -> Sampling:
    tokens = asked.max_completion_tokens or asked.max_tokens or settings.tokens
    if tokens > settings.tokens:
        raise Refusal(
            f"An answer may have {settings.tokens:,} tokens: ask for fewer.", "max_tokens"
        )
    if not all(asked.stop):
        raise Refusal("A stop string is empty: leave it out.", "stop")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refusal("top_logprobs needs logprobs to be true.", "top_logprobs")
    return Sampling(
        max_tokens=tokens,
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        stop=tuple(asked.stop),
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )
