"""lmms-eval runs its tasks on any model and method of foveate.

    lmms-eval --model foveate --model_args "pretrained=pocket,method=clvs(smoothing=0.7,top_k=5)" \
        --tasks mme,pope --batch_size 8

Written against lmms-eval 0.7.3 and its "simple" interface: pictures first, then the task's text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor

from ..backends.transformers.anatomy import anatomy
from ..base.errors import FoveateError
from ..base.images import decode_all
from ..core.method import as_stack
from ..vlm.chat import Chat
from ..vlm.vlm import VLM

DEFAULT_NEW_TOKENS = 1024
"""The limit where a task sets none, as in lmms-eval's own LLaVA model."""


class Foveate(lmms):
    """A vision-language model with a method, as lmms-eval wants it.

    Args:
        pretrained: "pocket", a folder of `save_pretrained` or a hub model.
        method: text form of one method or several, such as ``clvs(smoothing=0.7)+vcd``.
        dtype, device, device_map, attn_implementation, revision: see `VLM.load`. Under
            ``accelerate launch`` every process takes its own device and its share of the questions.
        batch_size: questions that go through the model together.

    Raises `FoveateError`: no such model, no such method, a method that does not suit the model.
    """

    def __init__(
        self,
        pretrained: str = "pocket",
        method: str = "vanilla",
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise FoveateError(f"batch_size must be a number from 1 on, got {batch_size}.")
        self.batch_size = int(batch_size)
        self.methods = as_stack(method)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.vlm = VLM.load(
            pretrained,
            dtype=dtype,
            device=device,
            device_map=device_map,
            attn=attn_implementation,
            revision=revision,
        )
        self.device = self.vlm.model.device  # where lmms-eval counts the requests of all processes
        for one in self.methods:
            one.resolve(anatomy(self.vlm.model))  # refusals come before the data is loaded

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Foveate:
        """A model from ``name=value,...``; commas inside parentheses belong to the value."""
        parts: list[str] = []
        for part in arg_string.split(","):
            if parts and parts[-1].count("(") > parts[-1].count(")"):
                parts[-1] += f",{part}"
            else:
                parts.append(part.strip())
        pairs = [part.partition("=") for part in parts if part]
        arguments: dict[str, Any] = {name.strip(): value.strip() for name, _, value in pairs}
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        known = list(Foveate.__init__.__annotations__)[:-1]
        for name in arguments | given:
            if name not in known:
                raise FoveateError(
                    f"The model foveate has no argument {name!r}: it takes {', '.join(known)}."
                )
        return cls(**(arguments | given))

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to every request, in order; those with the same settings are batched.

        The texts in ``until`` end an answer, except the blank line, which lmms-eval adds to tasks
        that name none and which its own models ignore, too. Settings that `generate` of
        transformers does not know are left out: they are meant for other models.
        """
        groups: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(row)
        answers: dict[int, GenerationResult] = {}
        for rows in self._batches(groups.values(), len(requests)):
            settings = requests[rows[0]].args[1]
            limit, options = generation(settings)
            ends = settings.get("until") or []
            ends = [ends] if isinstance(ends, str) else ends
            chats = []
            for row in rows:
                text, _, visuals, *where = requests[row].args
                chats.append(self._chat(text, visuals, where))
            written = self.vlm.answer(chats, self.methods, limit, **options)
            for row, answer in zip(rows, written, strict=True):
                tokens = TokenCounts(output_tokens=len(answer.tokens))
                answers[row] = GenerationResult(until(answer.text, ends), tokens)
        return [answers[row] for row in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For every request the mean negative log-likelihood of the given answer's tokens, and
        whether it is the greedy answer.

        lmms-eval takes the lowest number for the best choice. The answer's tokens are written one
        after the other, so that methods act on them as they do on an answer of the model's own.
        Each pair comes as the `text` of a `GenerationResult`, since lmms-eval 0.7.3 makes a string
        of a bare one and then fails.
        """
        if searching := [m.name for m in self.methods if m.wants("search") and not m.is_neutral]:
            raise FoveateError(
                f"{searching[0]} searches answers of its own and cannot score given ones: leave "
                "out tasks of the type loglikelihood."
            )
        results: list[GenerationResult] = []
        for rows in self._batches([list(range(len(requests)))], len(requests)):
            chats, answers = [], []
            for row in rows:
                text, target, visuals, *where = requests[row].args
                chats.append(self._chat(text, visuals, where))
                wanted = target if isinstance(target, str) else target(self._doc(*where))
                answers.append(self._tokens(chats[-1], str(wanted)))
            dictation = Dictation(answers)
            self.vlm.answer(
                chats,
                self.methods,
                max(map(len, answers)),
                logits_processor=[dictation],
                num_beams=1,
                repetition_penalty=1.0,
            )
            results += map(GenerationResult, dictation.results())
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise FoveateError(
            "foveate answers single questions: leave out tasks of the type "
            "generate_until_multi_round."
        )

    def _doc(self, index: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][index]

    def _chat(self, text: str, visuals: Any, where: list[Any]) -> Chat:
        """The question of a document, rewritten by the methods."""
        mark = getattr(self.vlm.processor, "image_token", None)
        if mark:  # pictures come first anyway
            text = re.sub(rf"\A(\s*{re.escape(mark)})+", "", text)
        pictures = decode_all(visuals(self._doc(*where)))
        return self.vlm.rewrite([self.vlm.chat(pictures, text, None)], self.methods)[0]

    def _tokens(self, chat: Chat, answer: str) -> list[int]:
        """Ids of an answer as it goes on from the prompt."""
        prompt, tokenizer = self.vlm.prompt(chat), self.vlm.tokenizer
        if prompt[-1:].isspace():
            answer = answer.lstrip()
        with self.vlm.tokenizing:
            start, whole, alone = tokenizer(
                [prompt, prompt + answer, answer], add_special_tokens=False
            )["input_ids"]
        ids = whole[len(start) :] if whole[: len(start)] == start else alone
        if not ids:
            raise FoveateError("The task rates an empty answer: give every choice some text.")
        return ids

    def _batches(self, groups: Iterable[list[int]], total: int) -> Iterator[list[int]]:
        """Rows of the same group, `batch_size` at a time, with a progress bar."""
        with tqdm(total=total, disable=self.rank != 0, desc="foveate") as bar:
            for group in groups:
                for start in range(0, len(group), self.batch_size):
                    rows = group[start : start + self.batch_size]
                    yield rows
                    bar.update(len(rows))


def generation(settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A task's `generation_kwargs` as a limit of new tokens and what `generate` is told.

    Sampling needs a temperature above 0 and no ``do_sample: false``; all else is greedy.
    """
    temperature = settings.get("temperature") or 0.0
    sampled = temperature > 0 and settings.get("do_sample", True)
    known = {k: v for k, v in settings.items() if hasattr(GenerationConfig(), k)}
    limit = known.pop("max_new_tokens", None) or DEFAULT_NEW_TOKENS
    if not sampled:
        known = {k: v for k, v in known.items() if k not in ("temperature", "top_p", "top_k")}
    return int(limit), known | {"do_sample": bool(sampled)}


def until(text: str, ends: list[str]) -> str:
    """`text` up to the first of `ends`."""
    marks = [re.escape(end) for end in ends if end and end != "\n\n"]
    return re.split("|".join(marks), text, maxsplit=1)[0].rstrip() if marks else text


class Dictation(LogitsProcessor):
    """Makes the model write given tokens, and notes how likely each of them was.

    Args:
        answers: token ids of every row, none empty; short rows repeat their last token.
    """

    def __init__(self, answers: list[list[int]]) -> None:
        self.lengths = torch.tensor([len(answer) for answer in answers])
        width = int(self.lengths.max())
        self.wanted = torch.tensor([a + a[-1:] * (width - len(a)) for a in answers])
        self.likely: list[Tensor] = []
        self.greedy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.wanted[:, len(self.likely), None].to(scores.device)
        self.likely.append(scores.float().log_softmax(-1).gather(1, token)[:, 0])
        self.greedy.append(scores.argmax(-1) == token[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    def results(self) -> list[tuple[float, bool]]:
        """Mean negative log-likelihood and greediness of every row."""
        likely, greedy = torch.stack(self.likely, 1).cpu(), torch.stack(self.greedy, 1).cpu()
        steps = torch.arange(likely.shape[1])
        real = steps < self.lengths[:, None]
        means = -(likely * real).sum(1) / self.lengths
        return list(zip(means.tolist(), (greedy | ~real).all(1).tolist(), strict=True))
