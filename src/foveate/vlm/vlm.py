"""The front door: a model with its processor and chat template, asked about pictures.

vlm = VLM.load("pocket")                             # or a hub name, or a saved folder
vlm.ask("photo.jpg", "Is there a cup?", "clvs").text
vlm.batch([("a.jpg", "What is this?"), ("b.jpg", "Is it red?")], "clvs(smoothing=0.7)")
for piece in vlm.stream("photo.jpg", "Describe this image."): ...
"""

from __future__ import annotations

import copy
import functools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, LogitsProcessorList

from ..backends.transformers.anatomy import anatomy, has_weights
from ..backends.transformers.enhance import attach
from ..backends.transformers.few_rows import fast_rows
from ..backends.transformers.record import Record, Recorder
from ..base.errors import FoveateError
from ..base.form import shown
from ..base.images import ImageLike, decode_all
from ..base.interrupts import taken, whole
from ..base.memory import Size
from ..core.method import Method, as_stack
from ..families.layout import Grid, Layout, grids, layout_of
from .chat import Answer, Chat, Turn, render
from .generation import generation_options
from .loading import commit, load
from .probing import Looked
from .streaming import pieces
from .watch import Probabilities

Methods = str | Method | Sequence[str | Method] | None
"""Nothing, one method, or several, as text ("clvs(smoothing=0.7)+vcd") or as objects."""

T = TypeVar("T")
R = TypeVar("R")

_PROCESSED = 8  # chats whose `inputs` are kept


def _stack(method: Methods) -> tuple[Method, ...]:
    if method is None:
        return ()
    return as_stack(*([method] if isinstance(method, (str, Method)) else method))


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
        self._processed: OrderedDict[Any, BatchFeature] = OrderedDict()  # the latest used last
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
        quantization: str | None = None,
    ) -> VLM:
        """Load "pocket" (ships with foveate), a folder of `save_pretrained`, or a hub model.

        `dtype`: a torch dtype or its name, "auto" for the checkpoint's; default bfloat16 on CUDA
        and float32 elsewhere. `device`: default CUDA where there is one. `device_map`: spread over
        devices instead (needs accelerate). `attn`: transformers' attention. `revision`: a branch,
        tag or commit of a hub model. `quantization`: "4bit" or "8bit" weights, by bitsandbytes.

        Raises `FoveateError`: no such model, no weights, no vision, no such device, ...
        """
        model, processor = load(str(name), dtype, device, device_map, attn, revision, quantization)
        return cls(model, processor, str(name), revision, commit(str(name), revision))

    @property
    def source(self) -> dict[str, Any]:
        """Which model this is, for files of results: "model", "revision" and "commit"."""
        return {"model": self.name, "revision": self.revision, "commit": self.commit}

    @property
    def versions(self) -> dict[str, str]:
        """Of what answers, beside foveate and transformers."""
        return {}

    def ask(
        self,
        image: ImageLike | list[ImageLike],
        question: str,
        method: Methods = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 64,
        record: bool | Recorder = False,
        **generation: Any,
    ) -> Answer:
        """One answer about one image, several (a list), or none (an empty list).

        `record=True` keeps the attention of the last query row of every layer and step on
        `Answer.record`; pass a `Recorder` to choose. `generation` goes to `model.generate`: greedy,
        unless it holds ``do_sample=True``, a temperature above 0, top_p or top_k.
        """
        methods = _stack(method)
        if record:
            methods += (record if isinstance(record, Recorder) else Recorder(),)
        return self._ask([(image, question)], methods, system, max_new_tokens, generation)[0]

    def batch(
        self,
        pairs: Sequence[tuple[ImageLike | list[ImageLike], str]],
        method: Methods = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 64,
        **generation: Any,
    ) -> list[Answer]:
        """One answer per (image, question) pair, from one left-padded batch, in the same order."""
        return self._ask(pairs, _stack(method), system, max_new_tokens, generation)

    def stream(
        self,
        image: ImageLike | list[ImageLike],
        question: str,
        method: Methods = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 64,
        **generation: Any,
    ) -> Iterator[str]:
        """The text of `ask`, piece by piece, as it is produced.

        Bad input raises here, not at the first piece. A method that searches may take tokens back,
        so its answer comes at the end. An error of the model is raised to whoever
        iterates; leaving the loop early stops the model and waits until it has stopped.
        """
        methods = _stack(method)
        chats = self.rewrite([self.chat(decode_all(image), question, system)], methods)
        options = generation_options(self.model, self.tokenizer, max_new_tokens, generation)
        using = functools.partial(self.using, methods, chats)
        return pieces(self.model, self.tokenizer, self.inputs(chats), options, using)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    def inputs(self, chats: list[Chat]) -> BatchFeature:
        """Chats as one left-padded batch of tensors on the model's device: `model(**inputs)`."""
        return self._tensors(chats).to(self.model.device, dtype=self.model.dtype)

    def _tensors(self, chats: list[Chat]) -> BatchFeature:
        texts = [self.prompt(chat) for chat in chats]
        images = [chat.images for chat in chats]
        bos = self.tokenizer.bos_token  # most templates write it themselves
        try:
            with self.tokenizing:
                return self.processor(
                    text=texts,
                    images=images if any(images) else None,
                    padding=True,
                    return_tensors="pt",
                    add_special_tokens=not (bos and texts[0].startswith(bos)),
                )
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise FoveateError(f"This model's processor refuses the input: {reason}.") from error

    def prompt(self, chat: Chat) -> str:
        """The chat in the model's own template, up to where the answer begins."""
        return render(chat, self.processor, self.name)

    def processed(self, chat: Chat) -> BatchFeature:
        """`inputs` of one chat. Those of the latest chats are kept for as long as these exist, so
        that methods and reading passes which start from the same chat process its images once."""
        key = id(chat), self.prompt(chat), *map(id, chat.images)
        with self.tokenizing:
            if key not in self._processed:
                self._processed[key] = self.inputs([chat])
                weakref.finalize(chat, self._processed.pop, key, None)
                while len(self._processed) > _PROCESSED:
                    self._processed.popitem(last=False)
            self._processed.move_to_end(key)
            return self._processed[key]

    def grids(self, chat: Chat, inputs: BatchFeature | None = None) -> list[Grid]:
        """Where each image's visual tokens lie on it; refused where that is not known.

        Args:
            inputs: what `inputs` made of the chat, where it has been called.
        """
        given = self.processed(chat) if inputs is None else inputs
        sizes = [[image.size for image in chat.images]]
        return grids(self.model, given.data, sizes, self.processor, self.layout)[0]

    @functools.cached_property
    def layout(self) -> Layout | None:
        """From a file of `foveate.families`, else found by looking, which needs weights."""
        known = layout_of(self.model.config)
        return Looked(self) if known is None and has_weights(self.model) else known

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
        if not isinstance(question, str):
            raise FoveateError(f"A question is a text, got {shown(question)}.")
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

    def _ask(
        self,
        pairs: Sequence[tuple[ImageLike | list[ImageLike], str]],
        methods: tuple[Method, ...],
        system: str | None,
        max_new_tokens: int,
        generation: dict[str, Any],
    ) -> list[Answer]:
        """One answer per pair, in order; methods rewrite all chats about one image together."""
        pictures: dict[Any, list[Image.Image]] = {}
        groups: dict[Any, list[Chat]] = {}
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
        start = time.perf_counter()
        new = self.each(lambda group: self.rewrite(group, methods), list(groups.values()))
        groups = dict(zip(groups, new, strict=True))
        rewritten = time.perf_counter() - start
        chats = [groups[key][index] for key, index in order]
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
        options = generation_options(self.model, self.tokenizer, max_new_tokens, generation)
        start = time.perf_counter()
        inputs = self.inputs(chats) if inputs is None else inputs
        prepared = time.perf_counter()
        watch = Probabilities()
        beams = options.get("num_beams") or self.model.generation_config.num_beams or 1
        if beams == 1 and not any(m.wants("search") and not m.is_neutral for m in methods):
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
                    yes=self._yes(watch, row) if chat.asks_yes_or_no else None,
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
                chats = method.resolve(anatomy(self.model)).rewrite(vlm, chats)
        return chats

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`work`, which may ask this model, on every item, in order."""
        return [work(item) for item in items]

    def _decode(self, ids: list[int], **options: Any) -> str:
        with self.tokenizing:
            return self.tokenizer.decode(ids, **options)

    @whole
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
        views = self._second(chats) if any(chat.contrast for chat in chats) else None
        notes = [chat.notes for chat in chats]
        with taken(self._one_at_a_time):
            self._using = threading.get_ident()
            try:
                with (
                    fast_rows(self.model),
                    attach(self.model, methods, notes=notes, contrast=views),
                ):
                    yield
            finally:
                self._using = None

    def _second(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        """What is different in the second stream's prompts: their pixels or their tokens."""
        inputs: dict[str, Any] = dict(self.inputs([chat.second for chat in chats]))
        if not any(isinstance(chat.contrast, Chat) for chat in chats):
            return {k: v for k, v in inputs.items() if k.startswith("pixel_values")}
        shape = inputs["input_ids"].shape
        return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.shape == shape}

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
