"""The front door: a model with its processor and chat template, asked about pictures.

vlm = VLM.load("pocket")                             # or a hub name, or a saved folder
vlm.ask("photo.jpg", "Is there a cup?", "clvs").text
vlm.batch([("a.jpg", "What is this?"), ("b.jpg", "Is it red?")], "clvs(smoothing=0.7)")
for piece in vlm.stream("photo.jpg", "Describe this image."): ...
"""

from __future__ import annotations

import copy
import functools
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import jinja2
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BatchFeature,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..backends.transformers.enhance import attach
from ..backends.transformers.record import Record, Recorder
from ..base.errors import FoveateError
from ..base.images import ImageLike, decode_all
from ..base.memory import Size
from ..core.method import Method, as_stack
from ..families.layout import Grid, grids
from .loading import commit, load

Methods = str | Method | Sequence[str | Method] | None
"""Nothing, one method, or several, as text ("clvs(smoothing=0.7)+vcd") or as objects."""

Role = Literal["user", "assistant"]

_ASKS_YES_OR_NO = re.compile(
    r"yes or no|(?:^|[.!?:\n])\s*"
    r"(?:is|are|am|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might|must)"
    r"(?:n['’]t)?\s[^.!?]*\?",
    re.IGNORECASE,
)


def _stack(method: Methods) -> tuple[Method, ...]:
    if method is None:
        return ()
    return as_stack(*([method] if isinstance(method, (str, Method)) else method))


def _text(text: str) -> dict[str, str]:
    """A part of a message, for chat templates."""
    return {"type": "text", "text": text}


@dataclass(frozen=True)
class Turn:
    """What was said before the question: by the user, pictures and then text, or by the model."""

    role: Role
    text: str
    images: int = 0
    """How many of `Chat.images` belong to it: each turn takes the next ones."""


@dataclass
class Chat:
    """A question: pictures, then text. What `Method.rewrite` receives and returns."""

    images: list[Image.Image]
    """Those of earlier turns first; what these leave over belongs to the question."""
    text: str
    system: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    """What a method found out on the way, such as the box it cropped; back on `Answer.chat`."""
    contrast: list[Image.Image] | None = None
    """Other pictures of the same sizes, which a method's second stream is to see instead."""
    earlier: tuple[Turn, ...] = ()
    """The conversation so far, oldest first: user and assistant in turn, the user first."""

    @property
    def kind(self) -> int:
        """Chats of one kind can share a padded batch: some models tile only lone pictures."""
        return len(self.images)


@dataclass(frozen=True)
class Answer:
    """What a model said to one chat."""

    text: str
    tokens: tuple[str, ...]
    """The produced tokens, without the end token."""
    probabilities: tuple[float, ...]
    """The probability of each token when it was chosen, before temperature; empty with beams."""
    yes: float | None
    """P(yes) / (P(yes) + P(no)), all spellings, at the first token; None for other questions."""
    timings: dict[str, float]
    """Wall-clock seconds spent on `rewrite`, `prepare` and `generate`; a batch's divided by its
    size."""
    chat: Chat
    """The prompt as the model saw it, after the methods' `rewrite`."""
    record: Record | None = None
    """What a `Recorder` among the methods kept."""

    @property
    def seconds(self) -> float:
        return sum(self.timings.values())

    @property
    def probability(self) -> float | None:
        """Of "yes" against "no" or the reverse, where the answer is one of them; else the
        geometric mean of the tokens' probabilities. None where there are none."""
        first = re.match(r"\W*(yes|no)\b", self.text, re.IGNORECASE)
        if self.yes is not None and first:
            return self.yes if first[1].lower() == "yes" else 1 - self.yes
        if not self.probabilities:
            return None
        logs = [math.log(max(p, 1e-45)) for p in self.probabilities]
        return math.exp(sum(logs) / len(logs))


class VLM:
    """A vision-language model of transformers with the processor that belongs to it.

    The tokenizer is set to pad on the left, as generation needs. One generation runs at a time:
    calls from other threads wait, because a method changes the model while it is at work.

    Attributes:
        name: as it was loaded. revision: of the hub's repository, as it was asked for.
        commit: of the hub's repository, which the weights are of. Both are None for models from
            elsewhere.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str = "",
        revision: str | None = None,
        commit: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.revision, self.commit = revision, commit
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._one_at_a_time = threading.Lock()
        self._using: int | None = None  # the thread that holds it
        self.tokenizing = threading.RLock()  # a tokenizer serves one thread at a time
        self.readings: OrderedDict[Any, Any] = OrderedDict()  # kept by `foveate.vlm.look`
        self.size = Size(64)  # questions at a time where nobody says how many

    @classmethod
    def load(
        cls,
        name: str | Path = "pocket",
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: Any = None,
        attn: str | None = None,
        revision: str | None = None,
    ) -> VLM:
        """Load "pocket" (ships with foveate), a folder of `save_pretrained`, or a hub model.

        `dtype`: a torch dtype or its name, "auto" for the checkpoint's; default bfloat16 on CUDA
        and float32 elsewhere. `device`: default CUDA where there is one. `device_map`: spread over
        devices instead (needs accelerate). `attn`: transformers' attention implementation.
        `revision`: a branch, tag or commit of a hub model; default: its main branch.

        Raises `FoveateError`: no such model, no weights, no vision, no such device, ...
        """
        model, processor = load(str(name), dtype, device, device_map, attn, revision)
        return cls(model, processor, str(name), revision, commit(str(name), revision))

    @property
    def source(self) -> dict[str, str | None]:
        """Which model this is, for files of results: "model", "revision" and "commit"."""
        return {"model": self.name, "revision": self.revision, "commit": self.commit}

    def ask(
        self,
        image: ImageLike | list[ImageLike] | None,
        question: str,
        method: Methods = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 64,
        record: bool | Recorder = False,
        **generation: Any,
    ) -> Answer:
        """One answer about one image, several (a list), or none.

        `record=True` keeps the attention of the last query row of every layer and step on
        `Answer.record`; pass a `Recorder` to choose. Decoding is greedy unless `generation`, which
        goes to `model.generate`, says otherwise.
        """
        methods = _stack(method)
        if record:
            methods += (record if isinstance(record, Recorder) else Recorder(),)
        chats = [self.chat(decode_all(image), question, system)]
        return self._answer([chats], methods, max_new_tokens, generation)[0]

    def batch(
        self,
        pairs: Sequence[tuple[ImageLike | list[ImageLike] | None, str]],
        method: Methods = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 64,
        **generation: Any,
    ) -> list[Answer]:
        """One answer per (image, question) pair, from one left-padded batch, in the same order."""
        groups: dict[Any, list[Chat]] = {}  # all chats of one image are rewritten together
        pictures: dict[Any, list[Image.Image]] = {}
        order = []
        for image, question in pairs:
            key = str(image) if isinstance(image, (str, Path)) else id(image)
            if key not in pictures:
                pictures[key] = decode_all(image)
            group = groups.setdefault(key, [])
            order.append((key, len(group)))
            group.append(self.chat(pictures[key], question, system))
        if not order:
            return []
        found = iter(
            self._answer(list(groups.values()), _stack(method), max_new_tokens, generation)
        )
        answers = {key: [next(found) for _ in group] for key, group in groups.items()}
        return [answers[key][index] for key, index in order]

    def stream(
        self,
        image: ImageLike | list[ImageLike] | None,
        question: str,
        method: Methods = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 64,
        **generation: Any,
    ) -> Iterator[str]:
        """The text of `ask`, piece by piece, as it is produced.

        Bad input raises here, not at the first piece. An error of the model is raised to whoever
        iterates; leaving the loop early stops the model and waits until it has stopped.
        """
        methods = _stack(method)
        chats = self.rewrite([self.chat(decode_all(image), question, system)], methods)
        options = self._options(max_new_tokens, generation)
        return self._pieces(chats, self.inputs(chats), methods, options)

    def inputs(self, chats: list[Chat]) -> BatchFeature:
        """Chats as one left-padded batch of tensors on the model's device: `model(**inputs)`."""
        texts = [self.prompt(chat) for chat in chats]
        images = [chat.images for chat in chats]
        bos = self.tokenizer.bos_token  # most templates write it themselves
        try:
            with self.tokenizing:
                batch = self.processor(
                    text=texts,
                    images=images if any(images) else None,
                    padding=True,
                    return_tensors="pt",
                    add_special_tokens=not (bos and texts[0].startswith(bos)),
                )
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise FoveateError(f"This model's processor refuses the input: {reason}.") from error
        return batch.to(self.model.device, dtype=self.model.dtype)

    def prompt(self, chat: Chat) -> str:
        """The chat in the model's own template, up to where the answer begins."""
        pictures = len(chat.images) - sum(turn.images for turn in chat.earlier)
        said = [*chat.earlier, Turn("user", chat.text, pictures)]
        turns: list[dict[str, Any]] = []
        for turn in said:
            content = [{"type": "image"} for _ in range(turn.images)]
            turns.append({"role": turn.role, "content": [*content, _text(turn.text)]})
        if chat.system:
            turns.insert(0, {"role": "system", "content": [_text(chat.system)]})
        if not (self.processor.chat_template or self.tokenizer.chat_template):
            raise FoveateError(
                f"The processor of {self.name} has no chat template: set "
                "`vlm.processor.chat_template` to one (a Jinja text)."
            )
        try:
            text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise FoveateError(f"The chat template of {self.name} objects: {error}.") from error
        if chat.system and chat.system.strip() not in text:
            raise FoveateError(
                f"The chat template of {self.name} drops system prompts: put it in the question."
            )
        asked = (turn.text for turn in chat.earlier if turn.role == "user")  # answers are shortened
        if not all(question.strip() in text for question in asked):
            raise FoveateError(
                f"The chat template of {self.name} drops earlier turns: put them in the question."
            )
        return text

    def grids(self, chat: Chat) -> list[Grid]:
        """Where each image's visual tokens lie on it; refused where the layout is not known."""
        sizes = [[image.size for image in chat.images]]
        return grids(self.model, self.inputs([chat]).data, sizes, self.processor)[0]

    def chat(
        self,
        images: list[Image.Image],
        question: str,
        system: str | None,
        earlier: Sequence[Turn] = (),
    ) -> Chat:
        """A question about decoded images; refused where it is empty or holds an image token.

        Args:
            earlier: the conversation so far, whose pictures are the first of `images`.
        """
        if not question.strip():
            raise FoveateError("The question is empty: ask something about the image.")
        said = [question, system or "", *(turn.text for turn in earlier)]
        mark = getattr(self.processor, "image_token", None)
        if mark and any(mark in text for text in said):
            raise FoveateError(
                f"The text contains {mark}, which stands for an image: leave it out."
            )
        turns = tuple(replace(turn, text=turn.text.strip()) for turn in earlier)
        return Chat(list(images), question.strip(), system, earlier=turns)

    def _answer(
        self,
        groups: list[list[Chat]],
        methods: tuple[Method, ...],
        max_new_tokens: int,
        generation: dict[str, Any],
    ) -> list[Answer]:
        """Answers to groups of chats, flattened; each group is about one image."""
        start = time.perf_counter()
        chats = [chat for group in groups for chat in self.rewrite(group, methods)]
        rewritten = time.perf_counter() - start
        return self.answer(chats, methods, max_new_tokens, rewritten=rewritten, **generation)

    def answer(
        self,
        chats: list[Chat],
        methods: tuple[Method, ...],
        max_new_tokens: int,
        *,
        rewritten: float = 0.0,
        inputs: BatchFeature | None = None,
        **generation: Any,
    ) -> list[Answer]:
        """Answers to chats as they are, from one left-padded batch.

        Args:
            methods: their `rewrite` has been run, which took `rewritten` seconds.
            inputs: what `inputs` made of these chats, where it has been called.
        """
        options = self._options(max_new_tokens, generation)
        start = time.perf_counter()
        inputs = self.inputs(chats) if inputs is None else inputs
        prepared = time.perf_counter()
        watch = Probabilities()
        if (options.get("num_beams") or self.model.generation_config.num_beams or 1) == 1:
            processors = [*options.get("logits_processor", []), watch]
            options["logits_processor"] = LogitsProcessorList(processors)
        with self.using(methods, chats):
            out = self.model.generate(**inputs, **options, return_dict_in_generate=True)
        timings = {
            "rewrite": rewritten,
            "prepare": prepared - start,
            "generate": time.perf_counter() - prepared,
        }
        recorded = any(isinstance(method, Recorder) for method in methods)
        record = Recorder.read(out) if recorded else None
        written = out.sequences[:, inputs["input_ids"].shape[1] :]
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        return self.answers(chats, written, watch, ends, timings, record)

    def answers(
        self,
        chats: list[Chat],
        written: Tensor,
        watch: Probabilities,
        ends: int | Sequence[int] | None,
        timings: dict[str, float],
        record: Record | None = None,
    ) -> list[Answer]:
        """What was produced, (B, tokens) int64, as answers.

        Args:
            watch: saw every step's scores. ends: ids of end tokens. timings: seconds of the batch.
        """
        chosen, ids = watch.finish(written), written.tolist()
        timings = {name: seconds / len(chats) for name, seconds in timings.items()}
        ends = ends if isinstance(ends, (list, tuple)) else [cast(int, ends)]
        answers = []
        for row, chat in enumerate(chats):
            length = next((i for i, t in enumerate(ids[row]) if t in ends), len(ids[row]))
            kept = ids[row][:length]
            answers.append(
                Answer(
                    text=self._decode(kept, skip_special_tokens=True).strip(),
                    tokens=tuple(self._decode([token]) for token in kept),
                    probabilities=tuple(chosen[row][:length]) if chosen else (),
                    yes=self._yes(watch, row) if _ASKS_YES_OR_NO.search(chat.text) else None,
                    timings=timings,
                    chat=chat,
                    record=record if record is None or len(chats) == 1 else record.row(row),
                )
            )
        return answers

    def rewrite(self, chats: list[Chat], methods: tuple[Method, ...]) -> list[Chat]:
        """Chats about one image, in one conversation, as the methods want them asked.

        Methods read with the whole conversation in front of the question. Its pictures keep their
        turns; what a method adds stands beside the question.
        """
        vlm = self
        if any(chat.earlier for chat in chats):  # readings are kept by image, which is not all here
            vlm = copy.copy(self)
            vlm.readings = OrderedDict()
        for method in methods:
            if method.wants("rewrite") and not method.is_neutral:
                chats = method.resolve(self.model).rewrite(vlm, chats)
        return chats

    def _options(self, max_new_tokens: int, generation: dict[str, Any]) -> dict[str, Any]:
        if max_new_tokens < 1:
            raise FoveateError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if generation.get("num_return_sequences", 1) != 1:
            raise FoveateError(
                "One answer per question: ask again instead of num_return_sequences."
            )
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation}
        if not options["do_sample"]:  # a checkpoint's sampling settings would only raise warnings
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        return {"pad_token_id": self.tokenizer.pad_token_id, **options}

    def _decode(self, ids: list[int], **options: Any) -> str:
        with self.tokenizing:
            return self.tokenizer.decode(ids, **options)

    @contextmanager
    def using(self, methods: tuple[Method, ...], chats: Sequence[Chat] = ()) -> Iterator[None]:
        """The model with methods whose `rewrite` has been run; other threads wait.

        Args:
            chats: the prompts, one per row, where methods may want their notes or contrast.

        Raises:
            FoveateError: in a thread that is inside such a block already.
        """
        if self._using == threading.get_ident():
            raise FoveateError(
                "This thread uses the model with methods already: leave vlm.using() before you ask "
                "again, or call vlm.model inside it."
            )
        views = None
        if any(chat.contrast for chat in chats):
            other = [replace(chat, images=chat.contrast or chat.images) for chat in chats]
            views = {k: v for k, v in self.inputs(other).items() if k.startswith("pixel_values")}
        notes = [chat.notes for chat in chats]
        with self._one_at_a_time:
            self._using = threading.get_ident()
            try:
                with attach(self.model, methods, notes=notes, contrast=views):
                    yield
            finally:
                self._using = None

    def _pieces(
        self,
        chats: list[Chat],
        inputs: BatchFeature,
        methods: tuple[Method, ...],
        options: dict[str, Any],
    ) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = _Stop()
        criteria = StoppingCriteriaList([*options.get("stopping_criteria", []), stop])
        options = {**options, "streamer": streamer, "stopping_criteria": criteria}
        failures: list[BaseException] = []

        def work() -> None:
            try:
                with self.using(methods, chats):
                    self.model.generate(**inputs, **options)
            except BaseException as error:  # handed to whoever iterates
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work, name="foveate-stream", daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.now = True
            thread.join()
        if failures:
            raise failures[0]

    @functools.cached_property
    def _spellings(self) -> tuple[list[int], list[int]]:
        """Ids of every single token that spells yes, and no."""
        vocabulary = self.tokenizer.get_vocab()
        yes, no = (
            [
                vocabulary[mark + spelling]
                for mark in ("", "▁", "Ġ")  # how tokenizers write a leading space
                for spelling in (word, word.capitalize(), word.upper())
                if mark + spelling in vocabulary
            ]
            for word in ("yes", "no")
        )
        return yes, no

    def _yes(self, watch: Probabilities, row: int) -> float | None:
        yes, no = self._spellings
        if watch.first is None or not yes or not no:
            return None
        logs = watch.first[row]
        return torch.sigmoid(logs[yes].logsumexp(0) - logs[no].logsumexp(0)).item()


class Probabilities(LogitsProcessor):
    """Keeps the probability of every token that was chosen, instead of all logits."""

    first: Tensor | None = None
    """Log-probabilities (B, V) of the first token."""

    def __init__(self) -> None:
        self.latest: Tensor | None = None
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.latest is not None:
            self.chosen.append(self.latest.gather(1, input_ids[:, -1:]))
        self.latest = scores.float().log_softmax(-1)
        if self.first is None:
            self.first = self.latest
        return scores

    def finish(self, sequences: Tensor) -> list[list[float]]:
        """Probabilities (B, produced tokens), or nothing where nobody asked."""
        if self.latest is None:
            return []
        last = self.latest.gather(1, sequences[:, -1:].to(self.latest.device))
        return torch.cat([*self.chosen, last], 1).exp().tolist()


class _Stop(StoppingCriteria):
    """Ends the generation after the current token once `now` is set."""

    now = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.now, device=input_ids.device)
