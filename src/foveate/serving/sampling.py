"""Every row of a batch decodes in its own way, inside one call of `generate`.

`Choose` sees the scores of a step and marks, in the rows that sample, the token drawn with the
row's own generator; greedy decoding then picks it. `Take` sees the new tokens, gives each to its
request and ends the rows that are done. So an answer does not depend on the rest of its batch.
An answer that a method searches is known at its end only: `Written` gives it to its request.
`Text` turns the tokens into text that can be sent at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from ..backends.transformers import compat_parts

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded.

    Attributes:
        max_tokens: tokens after which it ends.
        temperature: 0 is greedy.
        top_p: draw from the fewest tokens whose probabilities sum to it.
        seed: of the draws; None draws a seed.
        stop: strings that end it.
        top_logprobs: also return the log-probabilities of the chosen tokens and of this many of
            the likeliest; None returns none.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A token with its log-probability (nats), before temperature."""

    text: str
    logprob: float
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of an answer, with the tokens that begin in it, if they were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class End:
    """Why an answer ended, and its tokens (the end token does not count)."""

    reason: Reason
    prompt_tokens: int
    completion_tokens: int


Event = Piece | End | Exception

UNFINISHED = "\ufffd"  # what decoding makes of a character whose last bytes are still to come


class Text:
    """Text from tokens, given out as soon as no later token can change it.

    Held back: the bytes of an unfinished character, white space (an answer ends without), and
    whatever may become a stop string. Pieces joined are `complete` text: the decoded tokens up to
    the first stop string, stripped.

    Args:
        decode: token ids to text. stops: strings that end the answer and are cut off it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.restart()
        self.given = 0  # characters of `raw` that are out, stripped ones included

    def restart(self) -> None:
        """Forget the tokens. Text that was given out is not given out again."""
        self.ids: list[int] = []
        self.starts: list[int] = []  # where in `raw` each token's text begins
        self.raw = ""
        self.stopped = False

    def add(self, token: int) -> None:
        """Add a token. Sets `stopped` if it completes a stop string."""
        self.starts.append(len(self.raw))
        self.ids.append(token)
        self.raw = self.decode(self.ids)
        places = [at for at in map(self.raw.find, self.stops) if at >= 0]
        if places:
            self.raw, self.stopped = self.raw[: min(places)], True

    def take(self, complete: bool = False) -> str:
        """The text that can be given out now and was not before; all the rest if `complete`."""
        text = self.raw if complete else self.raw.rstrip(UNFINISHED)
        if not complete:
            text = text[: len(text) - max(map(self._overlap, self.stops), default=0)]
        end = len(text.rstrip())
        piece = self.raw[self.given : end]
        if not self.raw[: self.given].strip():
            piece = piece.lstrip()
        self.given = max(self.given, end)
        return piece

    def _overlap(self, stop: str) -> int:
        """How many characters at the end may be the beginning of `stop`."""
        text = self.raw.rstrip(UNFINISHED)
        lengths = range(min(len(stop) - 1, len(text)), 0, -1)
        return next((n for n in lengths if text.endswith(stop[:n])), 0)


class PartialAnswer:
    """One answer as it grows.

    Args:
        decode: token ids to text. spell: the same with special tokens in it, for single tokens.
        deliver: gets every `Piece` and in the end an `End`.
    """

    def __init__(
        self,
        sampling: Sampling,
        decode: Callable[[list[int]], str],
        spell: Callable[[list[int]], str],
        deliver: Callable[[Event], None],
    ) -> None:
        self.sampling, self.spell, self.deliver = sampling, spell, deliver
        self.text = Text(decode, sampling.stop)
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.done = False
        self.prompt_tokens = 0
        self.told = 0  # tokens that were delivered
        self.restart()

    def restart(self) -> None:
        """Start again after a failed attempt. Pieces already delivered are not delivered again."""
        self.text.restart()
        self.tokens: list[Token] = []
        self.logs: Tensor | None = None
        self.generator = torch.Generator().manual_seed(self.seed)

    def look(self, scores: Tensor) -> int | None:
        """The token drawn from scores (V,), or None where decoding is greedy."""
        if self.sampling.top_logprobs is not None:
            self.logs = scores.float().log_softmax(-1).cpu()
        if self.sampling.temperature == 0:
            return None
        draw = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        return sample(scores, self.sampling.temperature, self.sampling.top_p, draw)

    def add(self, token: int, ends: bool) -> None:
        """Take the chosen token in. ends: whether it is an end token."""
        if ends:
            self._finish("stop")
            return
        self.text.add(token)
        if self.logs is not None:
            self.tokens.append(self._token(token, self.logs))
        if self.text.stopped:
            self._finish("stop")
        elif len(self.text.ids) >= self.sampling.max_tokens:
            self._finish("length")
        else:
            self._give(complete=False)

    def _finish(self, reason: Reason) -> None:
        self._give(complete=True)
        self.done = True
        self.deliver(End(reason, self.prompt_tokens, len(self.text.ids)))

    def _give(self, complete: bool) -> None:
        text, starts = self.text.take(complete), self.text.starts
        whole = complete and not self.text.stopped
        known = len(self.tokens)
        count = known if whole else sum(start < self.text.given for start in starts[:known])
        tokens = tuple(self.tokens[self.told : count])
        self.told = max(self.told, count)
        if text or tokens:
            self.deliver(Piece(text, tokens))

    def _token(self, token: int, logs: Tensor) -> Token:
        top = logs.topk(self.sampling.top_logprobs or 0)
        likeliest = tuple(
            Token(self.spell([other]), value)
            for value, other in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        return Token(self.spell([token]), logs[token].item(), likeliest)


def sample(scores: Tensor, temperature: float, top_p: float, draw: float) -> int:
    """The token of `scores` (V,) at the point `draw`, in [0, 1), of the cumulated probabilities.

    Tokens stay in the order of the vocabulary. Rounding differs between batches, and so it moves
    a boundary only by its own size.
    """
    logits = scores.float().cpu().double()
    p = ((logits - logits.max()) / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= top_p
        p[order[beyond]] = 0
    cumulated = p.cumsum(0)
    token = torch.searchsorted(cumulated, draw * cumulated[-1], right=True)
    return min(int(token), len(p) - 1)


class Choose(LogitsProcessor):
    """Marks the drawn token in rows that sample, and counts prompt tokens. pad: padding token."""

    def __init__(self, rows: list[PartialAnswer], pad: int) -> None:
        self.rows, self.pad, self.begun = rows, pad, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if not self.begun:
            real = (input_ids != self.pad).cumsum(1) > 0  # padding is on the left
            for row, count in zip(self.rows, real.sum(1).tolist(), strict=True):
                row.prompt_tokens = count
            self.begun = True
        chosen = {i: row.look(scores[i]) for i, row in enumerate(self.rows) if not row.done}
        drawn = {i: token for i, token in chosen.items() if token is not None}
        if not drawn:
            return scores
        marked = scores.clone()
        for i, token in drawn.items():
            marked[i] = -torch.inf
            marked[i, token] = 0.0
        return marked


class Take(StoppingCriteria):
    """Gives the new tokens to their rows and ends those that are done. ends: ids of end tokens."""

    def __init__(self, rows: list[PartialAnswer], ends: set[int]) -> None:
        self.rows, self.ends = rows, ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.done:
                row.add(token, token in self.ends)
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)


class Written(compat_parts.Streamer):
    """Gives a whole answer to its row. pad: padding token. ends: ids of end tokens."""

    def __init__(self, row: PartialAnswer, pad: int, ends: set[int]) -> None:
        self.row, self.pad, self.ends, self.begun = row, pad, ends, False

    def put(self, value: Tensor) -> None:
        if not self.begun:  # the prompt comes first
            self.row.prompt_tokens = int(((value != self.pad).cumsum(-1) > 0).sum())
            self.begun = True
            return
        for token in value.flatten().tolist():
            if not self.row.done:
                self.row.add(token, token in self.ends)

    def end(self) -> None:
        pass


class Left(StoppingCriteria):
    """Ends a search whose row is done: nobody waits for it."""

    def __init__(self, row: PartialAnswer) -> None:
        self.row = row

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.row.done, device=input_ids.device)
