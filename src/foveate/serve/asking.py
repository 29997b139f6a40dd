"""From the body of a request to a question for the worker, or one sentence about what is wrong."""

from __future__ import annotations

from pydantic import ValidationError

from ..vlm import VLM, Chat
from . import wire
from .errors import Refusal
from .pictures import read_pictures
from .sampling import Sampling
from .settings import Settings


def parse(body: bytes) -> wire.Completion:
    try:
        return wire.Completion.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(*wire.told(error)) from None


def chat(vlm: VLM, asked: wire.Completion, settings: Settings) -> Chat:
    """The question with its pictures decoded; in the prompt, pictures come first."""
    system, parts = _turn(asked.messages)
    texts = [part.text for part in parts if isinstance(part, wire.TextPart)]
    urls = [part.image_url.url for part in parts if isinstance(part, wire.ImagePart)]
    most = settings.prompt_tokens
    if sum(map(len, texts)) + len(system or "") > 32 * most:  # before anything looks at it
        raise Refusal(f"The text of a request may have {most:,} tokens: make it shorter.")
    made = vlm.chat(read_pictures(urls, settings), "\n".join(texts), system)
    prompt = vlm.prompt(made)
    with vlm.tokenizing:
        length = len(vlm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if length > most:
        raise Refusal(
            f"The text of a request may have {most:,} tokens, and this has {length:,}: make it "
            "shorter."
        )
    return made


def _turn(messages: list[wire.Message]) -> tuple[str | None, list[wire.Part]]:
    """The system text, and the parts of the one user message."""
    *leading, last = messages
    if last.role != "user" or any(m.role not in ("system", "developer") for m in leading):
        raise Refusal(
            "This server answers one user message, after system messages if there are any: leave "
            "out earlier turns.",
            "messages",
        )
    parts = [part for message in leading for part in message.content]
    if any(isinstance(part, wire.ImagePart) for part in parts):
        raise Refusal("Images belong into the user message.", "messages")
    system = "\n".join(part.text for part in parts if isinstance(part, wire.TextPart))
    return system or None, last.content


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
