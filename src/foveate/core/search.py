"""Generation of a method's own: beams on an engine's cache, and the answers they have finished.

A method with a stage `search` writes the answer itself. The engine reads the prompt, hands the
method `Beams`, and takes back the `Found` answer. All arithmetic of the model, its cache and its
positions stays with the engine; all choices are the method's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .rows import Sequences

NEVER = -1e9  # the score of a beam that must not win


@dataclass(frozen=True)
class Found:
    """An answer: its tokens (n,) int64, without the prompt's, and its score."""

    tokens: Tensor
    score: float


class Beams(ABC):
    """Beams of one prompt, as a method that searches sees them: rows of one batch on one cache.

    What the method wants to know of attention its stage `weights` leaves in the scratch, as a list
    ``seq.scratch["rows"]`` of (B, R, K) tensors, a piece of the forward's query rows each. `look`
    and `take` hand it back.

    Attributes:
        seq: what the method sees of these beams.
        logits: (B, V) float32, next-token logits of every beam.
        most: tokens that an answer may have.
        spare: continuations that are looked at for every beam, so that enough of them go on where
            others end.
        length_penalty, early_stopping: of finished answers, as in transformers' beam search.
    """

    logits: Tensor
    most: int
    spare: int
    length_penalty: float
    early_stopping: bool | Literal["never"]

    @property
    @abstractmethod
    def seq(self) -> Sequences: ...

    @abstractmethod
    def look(self, tokens: Tensor) -> Tensor:
        """Try tokens (B, C) int64 as every beam's next one; nothing is kept but what was read.

        Returns:
            (B, C, K), what the method read of each token's row. Columns are those of the prompt,
            of the beam's answer so far and, last, of the token itself.
        """

    @abstractmethod
    def take(self, sources: list[int], tokens: list[int]) -> Tensor:
        """Go on: new beam b is the old beam ``sources[b]`` followed by ``tokens[b]``.

        Costs no forward where every token was among those of the latest `look` at its beam.

        Returns:
            (B, K), what the method read of the new tokens' rows.
        """

    @abstractmethod
    def restart(self, answers: Tensor) -> None:
        """Beams that have answered (B, n) int64, read again from the end of the prompt."""

    @abstractmethod
    def process(self, answers: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities (B, V) after the caller's logits processors."""

    @abstractmethod
    def ended(self, answers: Tensor) -> Tensor:
        """Which of the answers (N, n) have reached an end token or another stop, (N,) bool."""


@dataclass
class Hypotheses:
    """Finished answers of one prompt, scored as transformers' beam search scores them.

    An answer's score is the sum of its log-probabilities over ``length ** length_penalty``.

    Attributes:
        count: how many are kept. improving: whether a running beam may still beat them.
    """

    count: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    found: list[Found] = field(default_factory=list)  # the best first
    improving: bool = True

    @property
    def full(self) -> bool:
        return len(self.found) == self.count

    @property
    def open(self) -> bool:
        """Whether the search should go on."""
        return self.improving and not (self.full and self.early_stopping is True)

    def copy(self) -> Hypotheses:
        mine = self.count, self.length_penalty, self.early_stopping
        return Hypotheses(*mine, list(self.found), self.improving)

    def add(self, tokens: Tensor, total: float) -> None:
        """Take in a finished answer (n,) with the sum of its log-probabilities."""
        if self.open:
            found = Found(tokens, total / len(tokens) ** self.length_penalty)
            self.found = sorted([*self.found, found], key=lambda f: -f.score)[: self.count]

    def compare(self, running: float, length: int, most: int) -> None:
        """Note whether the best running beam, with its sum and length, may still win."""
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = most
        if self.full:
            best = running / length**self.length_penalty
            self.improving &= best > self.found[-1].score


@dataclass
class Choice:
    """What a step of beam search chose: (B,) each, and the answers (B, n) with the new tokens.

    Attributes:
        scores: (B,) float32, sums of log-probabilities.
        sources: the beam that each new one continues. tokens: what each adds.
        over: whether no continuation is left.
    """

    answers: Tensor
    scores: Tensor
    sources: list[int]
    tokens: list[int]
    over: bool


def choose(beams: Beams, answers: Tensor, totals: Tensor, finished: Hypotheses) -> Choice:
    """One step of beam search, as transformers does it.

    The best ``spare`` x B continuations are looked at. Of the first B those that end go to
    `finished`; the best B of all that go on become the new beams.

    Args:
        answers: (B, n) int64. totals: (B, V), sums of log-probabilities with every next token.
    """
    count, vocabulary = totals.shape
    best = totals.flatten().topk(min(beams.spare * count, totals.numel()))
    sources, tokens = best.indices // vocabulary, best.indices % vocabulary
    longer = torch.cat([answers[sources], tokens[:, None]], 1)
    ends = beams.ended(longer).to(totals.device)
    running = best.values + ends.float() * NEVER
    order = running.sort(descending=True, stable=True).indices[:count]  # equal ones in their order
    ending, sums = ends.tolist(), best.values.tolist()
    for place in range(count):
        if ending[place]:
            finished.add(longer[place], sums[place])
    scores = running[order]
    finished.compare(scores[0].item(), longer.shape[1], beams.most)
    beam, token = torch.stack([sources[order], tokens[order]]).tolist()
    return Choice(longer[order], scores, beam, token, over=all(ending))
