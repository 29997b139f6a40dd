"""Generation by a method that searches: its beams are rows of one batch on the prompt's cache.

The prompt is read once, as one row. A beam's candidates are queries of ONE forward, all at the same
position: each sees the beam's past and itself. So the cache is not copied for candidates, and the
key and value of the one that is chosen are there already. Where a forward of several tokens would
mean something else (other methods beside this one, sliding windows, flash attention), every
candidate is tried by an ordinary decode step on a fork of the cache, which shares its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...base.errors import FoveateError
from ...core.rows import Sequences
from ...core.search import Beams
from ...core.sequence import Stack
from . import compat, compat_cache, compat_parts
from .cache import fork, keep_column
from .compat_cache import length


class Prompt:
    """A prompt that was read, as one row, and what `generate` prepared for its answer.

    Args:
        row: of the batch that `generate` was given. ids, mask: (N, P) of the batch.
        cache: of the batch; it is not changed. logits: (N, V).

    Attributes:
        together: whether all candidates may be tried in one forward.
        scores, raw: (B, V) of every step, log-probabilities after the processors and logits.
    """

    def __init__(
        self,
        row: int,
        ids: Tensor,
        mask: Tensor | None,
        cache: Any,
        logits: Tensor,
        together: bool,
        config: Any,
        processors: Any,
        criteria: Any,
    ) -> None:
        mine = torch.tensor([row], device=ids.device)
        if mask is None:
            mask = ids.new_ones(len(ids), length(cache))
        self.ids, self.mask, self.logits = ids[mine], mask[mine].bool(), logits[mine].float()
        self.cache = fork(cache)
        if len(ids) > 1:
            self.cache.batch_select_indices(mine)
        self.position = self.cache.foveate.positions.amax(-1, keepdim=True) + 1  # (C, 1, 1)
        self.together, self.config = together, config
        self.processors, self.criteria = processors, criteria
        self.scores: list[Tensor] = []
        self.raw: list[Tensor] = []


class CacheBeams(Beams):
    """`count` beams behind a prompt. i: the searching method's place in its stack."""

    cache: Any
    tried: tuple[list[list[int]], Tensor, Tensor] | None  # of `look`: tokens, logits, rows

    def __init__(self, model: Any, prompt: Prompt, i: int, count: int) -> None:
        config = prompt.config
        self.model, self.prompt, self.i, self.count = model, prompt, i, count
        self.most = config.max_length - prompt.ids.shape[1]
        self.spare = max(2, 1 + len(end_tokens(config)))
        self.length_penalty = 1.0 if config.length_penalty is None else config.length_penalty
        self.early_stopping = config.early_stopping or False
        self.restart(prompt.ids.new_zeros(count, 0))

    @property
    def seq(self) -> Sequences:
        return self.cache.foveate.seen_by(self.i)

    def look(self, tokens: Tensor) -> Tensor:
        past = length(self.cache)
        if self.prompt.together:
            alone = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
            logits = self.forward(tokens, alone, torch.zeros_like(tokens[0]))
            seen = self.rows()
            own = seen[..., past:].diagonal(dim1=1, dim2=2)[..., None]
            rows = torch.cat([seen[..., :past], own], 2)
            self.tried = tokens.tolist(), logits, rows
            return rows
        before, tries = self.cache, []
        for token in tokens.unbind(1):
            self.cache = fork(before)
            self.step(token)
            tries.append(self.rows())
        self.cache = before
        return torch.cat(tries, 1)

    def take(self, sources: list[int], tokens: list[int]) -> Tensor:
        tried, self.tried = self.tried, None
        beams = torch.tensor(sources, device=self.logits.device)
        if tried is None:
            self.cache.batch_select_indices(beams)
        else:
            known, logits, rows = tried
            past = length(self.cache) - len(known[0])
            if all(token in known[b] for b, token in zip(sources, tokens, strict=True)):
                places = [known[b].index(t) for b, t in zip(sources, tokens, strict=True)]
                place = torch.tensor(places, device=beams.device)
                keep_column(self.cache, sources, past + place, past)
                self.logits = logits[beams, place]
                return rows[beams, place]
            keep_column(self.cache, sources, None, past)
        self.logits = self.step(torch.tensor(tokens, device=beams.device))
        return self.rows()[:, 0]

    def restart(self, answers: Tensor) -> None:
        self.tried = None
        self.cache = fork(self.prompt.cache)
        self.cache.batch_repeat_interleave(self.count)
        logits = self.prompt.logits.expand(self.count, -1)
        if answers.shape[1] and self.prompt.together:
            place = torch.arange(answers.shape[1], device=answers.device)
            logits = self.forward(answers, place <= place[:, None], place, logits_to_keep=1)[:, -1]
        elif answers.shape[1]:
            for token in answers.unbind(1):
                logits = self.step(token)
        self.logits = logits

    def process(self, answers: Tensor, scores: Tensor) -> Tensor:
        scores = self.prompt.processors(self.whole(answers), scores)
        if self.prompt.config.output_scores:
            self.prompt.scores.append(scores.clone())
        if self.prompt.config.output_logits:
            self.prompt.raw.append(self.logits.clone())
        return scores

    def ended(self, answers: Tensor) -> Tensor:
        return self.prompt.criteria(self.whole(answers), None)

    def whole(self, answers: Tensor) -> Tensor:
        """Answers (N, n) behind the prompt's own ids."""
        return torch.cat([self.prompt.ids.expand(len(answers), -1), answers], 1)

    # -- forwards ----------------------------------------------------------------------------------

    def step(self, token: Tensor) -> Tensor:
        """An ordinary decode step with the beams' tokens (B,): next-token logits (B, V)."""
        mask = self.mask(1)[:, 0]
        out = self.model(
            input_ids=token[:, None],
            attention_mask=mask.long(),
            position_ids=self.positions(token.new_zeros(1)),
            **compat.passing(self.model, self.cache),
            use_cache=True,
        )
        return out.logits[:, -1].float()

    def forward(self, tokens: Tensor, among: Tensor, places: Tensor, **options: Any) -> Tensor:
        """Several tokens (B, n) of every beam in one forward, all of them rows that are read.

        Args:
            among: (n, n) bool, which of the tokens each of them sees, all see the beam's past.
            places: (n,), how far each stands from the next position.
        """
        ctx, new = self.cache.foveate, tokens.shape[1]
        ctx.renew()
        mask = self.mask(new).clone()
        mask[:, :, -new:] = among
        out = self.model(
            input_ids=tokens,
            attention_mask=mask[:, None],
            position_ids=self.positions(places),
            **compat.passing(self.model, self.cache),
            use_cache=True,
            foveate=ctx,
            **options,
        )
        return out.logits.float()

    def mask(self, new: int) -> Tensor:
        """(B, new, K) bool: new tokens see all that came before, but for padding."""
        whole = length(self.cache) + new
        mask = pad(self.prompt.mask, (0, whole - self.prompt.mask.shape[1]), value=True)
        return mask[:, None].expand(self.count, new, -1)

    def positions(self, places: Tensor) -> Tensor:
        """(B, n) or, under M-RoPE, (3, B, n): positions of tokens at `places` (n,) from here."""
        answered = length(self.cache) - self.prompt.mask.shape[1]
        found = (self.prompt.position.to(places.device) + answered + places).expand(
            -1, self.count, -1
        )
        return found if len(found) == 3 else found[0]

    def rows(self) -> Tensor:
        """What the method read in the latest forward, (B, n, K)."""
        return torch.cat(self.seq.scratch["rows"], 1).to(self.prompt.ids.device)


# -- inside generate -------------------------------------------------------------------------------


def end_tokens(config: Any) -> list[int]:
    """End tokens of a prepared generation configuration."""
    ends = config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def search_arguments(stack: Stack, flash: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` with which the stack's method searches.

    Args:
        flash: whether the attention's kernel takes no mask of its own for each token.
        kwargs: what the caller gave.

    Raises:
        FoveateError: the caller asks for something that a search cannot do.
    """
    (i,) = stack.at("search")
    method, config = stack.methods[i], kwargs.get("generation_config")
    beams = method.num_beams  # type: ignore[attr-defined]

    def asked(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(config, name, None) if value is None else value

    name = method.name
    if asked("num_beams") not in (None, 1, beams):
        raise FoveateError(
            f"{name} brings its own beams, {beams} of them: leave out num_beams, or set it in the "
            f"method, as in {name}(num_beams=N)."
        )
    for option, idle, what in (
        ("do_sample", (None, False), "it does not sample"),
        ("num_return_sequences", (None, 1), "it returns the best answer"),
        ("custom_generate", (None,), "it is a way to generate itself"),
        ("cache_implementation", (None, "dynamic"), "it forks a dynamic cache"),
        ("use_cache", (None, True), "it needs the cache"),
        ("output_attentions", (None, False), "the tokens it tries are not all answered"),
        ("output_hidden_states", (None, False), "the tokens it tries are not all answered"),
    ):
        if asked(option) not in idle:
            raise FoveateError(f"{name} searches with beams, and {what}: leave out {option}.")
    kwargs = dict(kwargs)
    run = functools.partial(_run, stack, i, flash, kwargs.pop("streamer", None))
    return kwargs | {"num_beams": 1, "do_sample": False, "custom_generate": _named(run)}


def _named(run: Callable[..., Any]) -> Callable[..., Any]:
    """With the signature that `generate` looks for."""

    def searched(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        given = logits_processor, stopping_criteria, generation_config
        return run(model, input_ids, *given, model_kwargs)

    return searched


def _run(
    stack: Stack,
    i: int,
    flash: bool,
    streamer: Any,
    model: Any,
    ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Read the prompts and search an answer to each; what `generate` returns."""
    method: Any = stack.methods[i]
    mask, single = kwargs.get("attention_mask"), len(ids) == 1
    if not single and (config.output_scores or config.output_logits):
        raise FoveateError(
            f"{method.name} takes a number of steps that differs from prompt to prompt: ask one "
            "prompt at a time for scores or logits."
        )
    out = compat_parts.read_prompt(model, ids, config, kwargs)
    cache, logits = compat.cache_of(out), out.logits[:, -1].to(ids.device)
    if not compat_cache.renews(cache):
        raise FoveateError(
            f"{method.name} tries tokens and takes them back, which the cache of "
            f"{type(model).__name__} cannot: its layers do not all keep keys and values."
        )
    alone = len(stack.methods) == 1 and not flash and compat_cache.keeps_all(cache)
    given = mask, cache, logits, alone, config, processors, criteria
    prompts = [Prompt(row, ids, *given) for row in range(len(ids))]
    found = [method.search(CacheBeams(model, prompt, i, method.num_beams)) for prompt in prompts]
    width = max(len(one.tokens) for one in found)
    filler = next((t for t in (config.pad_token_id, *end_tokens(config)) if t is not None), 0)
    answers = [pad(one.tokens, (0, width - len(one.tokens)), value=filler) for one in found]
    sequences = torch.cat([ids, torch.stack(answers)], 1)
    if streamer is not None:  # what was answered is known at the end only
        streamer.put(ids.cpu())
        streamer.put(answers[0].cpu())
        streamer.end()
    if not config.return_dict_in_generate:
        return sequences
    answered = None
    if single and len(stack.methods) > 1:  # they see the answer as if it had been decoded alone
        beams = CacheBeams(model, prompts[0], i, 1)
        beams.restart(found[0].tokens[None, :-1])
        answered = beams.cache
    return compat_parts.beam_output(
        answered,
        sequences=sequences,
        sequences_scores=torch.tensor([one.score for one in found]) if single else None,
        scores=tuple(prompts[0].scores) if config.output_scores else None,
        logits=tuple(prompts[0].raw) if config.output_logits else None,
    )
