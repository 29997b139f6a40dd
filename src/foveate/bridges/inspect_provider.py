"""The provider of inspect-ai: its messages become chats, and waiting samples share a batch.

Written against inspect-ai 0.3.285. The server's worker answers, so samples with other lengths,
temperatures and stop sequences go through the model together.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import httpx
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from inspect_ai._util.error import PrerequisiteError
from inspect_ai._util.images import file_as_data
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentImage,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.model._model_info import MODEL_INFO_LOOKUP_API_KEY
from inspect_ai.tool import ToolChoice, ToolInfo
from PIL import Image

from ..backends.transformers.anatomy import anatomy
from ..base.errors import FoveateError
from ..base.form import nearest
from ..base.images import decode
from ..core.method import Method, as_stack, text
from ..core.sequence import Stack
from ..serving.queue import Request, Worker
from ..serving.sampling import End, Event, Piece, Sampling
from ..serving.wire import Settings
from ..vlm.chat import Chat, Role, Turn
from ..vlm.vlm import VLM

LOADING = ("dtype", "device", "device_map", "attn", "revision", "quantization")
ARGUMENTS = ("method", *LOADING)
MAX_TOKENS = 1024
"""The limit where a task sets none, as of the server."""
BATCH = 16  # samples at a time, unless --max-connections says otherwise
UNKNOWN = (  # settings of inspect-ai that would change an answer, and that foveate does not have
    *("top_k", "frequency_penalty", "presence_penalty", "logit_bias", "best_of"),
    *("logprobs", "prompt_logprobs", "response_schema"),
)

ORDER = (
    "foveate takes system messages, then user and assistant in turn, with pictures in the user's: "
    "the task sends another order."
)


class Foveate(ModelAPI):
    """A vision-language model with a method, as inspect-ai wants it.

    Args:
        model_name: what follows ``foveate/``: "pocket", a hub model, or a folder of
            `save_pretrained`.
        method: text form of one method or several, such as ``clvs(smoothing=0.7)+vcd``.
        dtype, device, device_map, attn, revision, quantization: see `VLM.load`.

    Raises `PrerequisiteError`, which inspect-ai prints as one sentence: no such model or method, a
    method that does not suit the model, an argument that does not exist.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        method: Any = "vanilla",
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.batch = config.max_connections or BATCH
        self.worker: Worker | None = None
        if api_key == MODEL_INFO_LOOKUP_API_KEY:  # asks for the name, and never for an answer
            return
        try:
            if base_url is not None:
                raise FoveateError("foveate answers in this process: leave out the base URL.")
            for name in model_args:
                if name not in LOADING:
                    raise FoveateError(
                        f"The provider foveate has no argument {name!r}{nearest(name, ARGUMENTS)}."
                    )
            self.methods = as_stack(_whole(method))
            self.vlm = VLM.load(model_name, **model_args)
            Stack(anatomy(self.vlm.model), self.methods)  # refuses what does not work on it
        except FoveateError as error:
            raise PrerequisiteError(str(error)) from None
        self.worker = Worker(self.vlm, Settings(batch=self.batch, queue=1_000_000))
        self.worker.start()

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One answer. Decoding is greedy, except with a temperature above 0 or top_p.

        Raises:
            FoveateError: tools, messages or settings that foveate cannot answer.
        """
        if tools:
            raise FoveateError("foveate calls no tools: use a task or a solver without them.")
        sampling = decoding(config, self.methods)
        system, turns, sources = conversation(input)
        pictures = [await _picture(source) for source in sources]
        *earlier, last = turns
        said, end = await self._answer(
            self.vlm.chat(pictures, last.text, system, earlier), sampling
        )
        message = ChatMessageAssistant(content=said, model=self.model_name, source="generate")
        usage = ModelUsage(
            input_tokens=end.prompt_tokens,
            output_tokens=end.completion_tokens,
            total_tokens=end.prompt_tokens + end.completion_tokens,
        )
        reason: StopReason = "stop" if end.reason == "stop" else "max_tokens"
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=usage,
            metadata={"method": text(self.methods)},
        )

    async def _answer(self, chat: Chat, sampling: Sampling) -> tuple[str, End]:
        pieces, ended = list[str](), Future[End]()

        def deliver(event: Event) -> None:  # on the worker's thread
            if isinstance(event, Piece):
                pieces.append(event.text)
            elif isinstance(event, End):
                ended.set_result(event)
            else:
                ended.set_exception(event)

        request = Request(chat, self.methods, sampling)
        assert self.worker is not None
        self.worker.submit(request, deliver)
        try:
            end = await run_sync(ended.result, abandon_on_cancel=True, limiter=CapacityLimiter(1))
        finally:
            self.worker.cancel(request)  # nothing, where it has ended
        return "".join(pieces), end

    def close(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker.join()

    def max_connections(self) -> int:
        return self.batch

    def connection_key(self) -> str:
        return self.model_name

    def collapse_user_messages(self) -> bool:
        return True

    def collapse_assistant_messages(self) -> bool:
        return True


def _whole(method: Any) -> str:
    """The method's text, which inspect-ai has split at its commas."""
    return ",".join(map(str, method)) if isinstance(method, list) else str(method)


def decoding(config: GenerateConfig, methods: tuple[Method, ...]) -> Sampling:
    """How a task wants its answers decoded.

    Raises:
        FoveateError: a setting that foveate would have to ignore.
    """
    given = {name: getattr(config, name) for name in UNKNOWN}
    if refused := [name for name, value in given.items() if value]:
        raise FoveateError(f"foveate does not have {' and '.join(refused)}: leave it out.")
    if (config.num_choices or 1) > 1:
        raise FoveateError("foveate gives one answer per sample: use epochs, not num_choices.")
    temperature = config.temperature
    if temperature is None:
        temperature = 0.0 if config.top_p is None else 1.0
    for method in methods:
        if temperature and method.wants("search"):
            raise FoveateError(f"{method.name} searches the answer: leave out the temperature.")
    return Sampling(
        max_tokens=config.max_tokens or MAX_TOKENS,
        temperature=temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        seed=config.seed,
        stop=tuple(filter(None, config.stop_seqs or ())),
    )


def conversation(messages: list[ChatMessage]) -> tuple[str | None, list[Turn], list[str]]:
    """The system text, what user and assistant said in turn, and where the pictures are.

    Raises:
        FoveateError: another order, or anything but text and pictures.
    """
    system, turns, pictures = list[str](), list[Turn](), list[str]()
    for message in messages:
        parts = message.content
        parts = [ContentText(text=parts)] if isinstance(parts, str) else parts
        words = "\n".join(part.text for part in parts if isinstance(part, ContentText))
        images = [part.image for part in parts if isinstance(part, ContentImage)]
        for part in parts:
            if not isinstance(part, (ContentText, ContentImage)):
                raise FoveateError(f"foveate reads text and pictures, and no {part.type}.")
        role: Role = "assistant" if len(turns) % 2 else "user"
        if message.role == "system" and not turns:
            system.append(words)
        elif message.role == role and not (images and role == "assistant"):
            turns.append(Turn(role, words, len(images)))
            pictures += images
        else:
            raise FoveateError(ORDER)
    if len(turns) % 2 == 0:
        raise FoveateError(ORDER)
    return "\n".join(system) or None, turns, pictures


async def _picture(source: str) -> Image.Image:
    """A picture from a data URI, a file or an address."""
    try:
        data, _ = await file_as_data(source)
    except (OSError, ValueError, httpx.HTTPError) as error:
        name = source if len(source) < 200 else f"{source[:60]}..."
        raise FoveateError(f"Cannot read the picture {name}: {error}.") from error
    return decode(data)
