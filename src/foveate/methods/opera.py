"""OPERA: over-trust penalty and retrospection-allocation (arXiv 2311.17911).

An answer that hangs on one of its own tokens, instead of on the image, tends to invent. Such a
token shows as a column of the last layer's attention that all later rows keep looking at. Beams
whose next token strengthens it are penalised. Where it persists, the search goes back to that token
and chooses anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import Beams, Found, Method, Rows, costly
from ..core.search import NEVER, Hypotheses, choose

_TINY = 1e-7  # the factor of every column's score
_EARLY = 10  # tokens, the candidate among them, up to which attention to the image is rewarded
_LOWEST = -999.0  # logits of tokens that are no candidates


@dataclass(frozen=True)
class OPERA(Method):
    """Over-trust penalty and retrospection: beam search that looks at attention, and looks back.

    A method to generate: inside `enhance`, ``model.generate(max_new_tokens=...)`` runs it, with
    beams of its own. The row of a token is its attention in the last layer, the maximum over
    heads, divided by its sum. W holds the answer's rows and columns, times `scale`, with a
    candidate for token n as its last row.

    Penalty: column j scores 1e-7 times the product of W_ij over i >= j. A candidate's logit is
    lowered by `penalty` times its largest column score. Within the first ten tokens it is raised
    by `penalty` times the attention that its row gives to the image, and no column is looked at.
    Only the `candidates` likeliest tokens of each beam are candidates, all others get -999.

    Retrospection: at every token each beam notes where its candidates' largest column lies, the
    most frequent one. Where the most frequent of the beams' columns, from the eleventh token on,
    was noted more than `threshold` times in every beam, the search goes back to the token after
    it. What was chosen there becomes as unlikely as the least likely token, and the model's own
    probabilities choose among the rest, for this token without penalty. A token is returned to at
    most `candidates` times, then the one before it is.

    The published code is a fork of transformers 4.29.2, reproduced here but for three things.
    Finished answers are scored as today's beam search scores them, over the answer's length;
    there, over the length of prompt and answer. Attention to the image is that to all its tokens,
    of all images. An infinite score times an attention of 0 counts as 0.

    Batches are searched prompt by prompt. Other methods act as in any decoding, and OPERA reads
    the attention that they leave; it then runs one forward per candidate. Methods with a second
    stream are refused.

    Attributes:
        num_beams: how many beams, 1 or more. Published: 5.
        candidates: tokens tried for each beam, 1 or more. Published: 5; the fast setting: 1.
        scale: factor of the attention in W, above 0. Published: 50.
        penalty: factor of the penalty, 0 or more; 0 switches it off. Published: 1.
        threshold: how often a column may be noted, 0 or more; 1e9 never goes back. Published: 15;
            the fast setting: 25.
        half_scores: keep column scores in float16, as the published code does: below 3e-8 they
            are 0, above 65504 infinite. False keeps float32.
        window: how many tokens the search goes back at most, 1 or more. Published: 512.
        layers: whose attention is read. Published: the last.
    """

    num_beams: int = costly(5, limit=10)
    candidates: int = costly(5, limit=10)
    scale: float = 50.0
    penalty: float = 1.0
    threshold: float = costly(15, limit=None)  # low, and it goes back at every token
    half_scores: bool = True
    window: int = 512

    name: ClassVar[str] = "opera"
    paper: ClassVar[str] = "2311.17911"
    paper_layers = (-1,)
    needs_image: ClassVar[bool] = False
    passes: ClassVar[str] = "5 beams, 5 candidates of each in one forward per token"
    neutral: ClassVar[dict[str, Any]] = {
        "num_beams": 1,
        "candidates": 1,
        "penalty": 0.0,
        "threshold": 1e9,
    }
    example: ClassVar[dict[str, Any]] = {"num_beams": 3, "penalty": 1000.0, "threshold": 2}

    def check(self) -> None:
        self.require(self.num_beams >= 1, "num_beams must be 1 or more")
        self.require(self.candidates >= 1, "candidates must be 1 or more")
        self.require(self.scale > 0, "scale must be a number above 0")
        self.require(self.penalty >= 0, "penalty must be 0 or more")
        self.require(self.threshold >= 0, "threshold must be 0 or more")
        self.require(self.window >= 1, "window must be 1 or more")
        self.require(
            self.layers is None or len(self.layers) == 1, "layers must name one layer, or be None"
        )

    # -- what attention says -----------------------------------------------------------------------

    def weights(self, rows: Rows) -> Tensor:
        if rows.phase == "decode":
            pieces = rows.seq.scratch.setdefault("rows", [])
            pieces.append(rows.over_heads(rows.x, "max")[:, 0])
        return rows.x

    def column_scores(self, products: Tensor, shares: Tensor) -> Tensor:
        """Products (..., n) of every column of W, with one more row of it.

        Args:
            products: (..., n - 1), of the rows before. shares: (..., K), the row over its sum.
        """
        row = self.scale * shares[..., -products.shape[-1] - 1 :]
        longer = pad(products, (0, 1), value=1.0) * row
        return longer.nan_to_num(nan=0.0, posinf=math.inf)

    def penalties(self, products: Tensor, shares: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """What candidates' logits lose (B, C), and the column that each strengthens most (B, C).

        Args:
            products: (B, C, n). shares: (B, C, K). image: (P,) bool, the image's columns.
        """
        scores = _TINY * products
        if self.half_scores:
            scores = scores.half()
        # without a stable sort `max` may take any of equal columns, and the first is meant
        highest = scores.amax(-1)
        column = (scores == highest[..., None]).int().argmax(-1)
        if self.penalty == 0:
            return torch.zeros_like(shares[..., 0]), column
        if products.shape[-1] <= _EARLY:
            given = (shares[..., : len(image)] * image).sum(-1)
            return -self.penalty * given, column
        return (self.penalty * highest).float(), column

    # -- the search --------------------------------------------------------------------------------

    def search(self, beams: Beams) -> Found:
        count, image, past = self.num_beams, beams.seq.visual[0], Past(self)
        finished = Hypotheses(count, beams.length_penalty, beams.early_stopping)
        answers = beams.logits.new_zeros((count, 0), dtype=torch.long)
        sums = beams.logits.new_full((count,), NEVER)
        sums[0] = 0.0
        products, choices = beams.logits.new_zeros(count, 0), list[tuple[int, int]]()
        while True:
            logits = beams.logits
            z, tokens = logits.topk(min(self.candidates, logits.shape[1]))
            shares = _over_sum(beams.look(tokens))
            tried = self.column_scores(products[:, None].expand(-1, z.shape[1], -1), shares)
            less, columns = self.penalties(tried, shares, image)
            past.note(columns.tolist(), State(answers, sums, products, finished.copy(), choices))
            back = past.back()
            if back is None:
                logits = torch.full_like(logits, _LOWEST).scatter(1, tokens, z - less)
            else:
                answers, sums, products, finished = back.parts
                beams.restart(answers)
                logits = back.without_rejected(beams.logits)
            log_p = beams.process(answers, logits.log_softmax(-1))
            chosen = choose(beams, answers, sums[:, None] + log_p, finished)
            answers, sums = chosen.answers, chosen.scores
            if chosen.over or not finished.open:
                return finished.found[0]
            choices = list(zip(chosen.tokens, chosen.sources, strict=True))
            shares = _over_sum(beams.take(chosen.sources, chosen.tokens))
            products = self.column_scores(products[chosen.sources], shares)


@dataclass
class State:
    """The search before a choice.

    Attributes:
        answers: (B, n) int64. sums: (B,), of log-probabilities.
        products: (B, n), see `column_scores`.
        choices: the (token, beam) pairs that led here.
    """

    answers: Tensor
    sums: Tensor
    products: Tensor
    finished: Hypotheses
    choices: list[tuple[int, int]]


@dataclass
class Back:
    """Where the search goes on: a state, and the (token, beam) pairs that were chosen there."""

    state: State
    rejected: list[tuple[int, int]]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Hypotheses]:
        s = self.state
        return s.answers, s.sums, s.products, s.finished

    def without_rejected(self, logits: Tensor) -> Tensor:
        """Logits (B, V), the lowest of every beam -999, and so are the rejected ones."""
        least = logits.masked_fill(logits == -math.inf, math.inf).amin(-1, keepdim=True)
        logits = logits - (least - _LOWEST)
        tokens, beams = zip(*self.rejected, strict=True)
        logits[list(beams), list(tokens)] = _LOWEST
        return logits


class Past:
    """The states of a search, the columns noted at each, and how often it went back where."""

    def __init__(self, method: OPERA) -> None:
        self.method = method
        self.states: list[State] = []
        self.noted: list[list[int]] = [[] for _ in range(method.num_beams)]
        self.visits = Counter[int]()
        self.rejected: dict[int, list[tuple[int, int]]] = {}

    def note(self, columns: list[list[int]], state: State) -> None:
        """Each beam's candidates' columns, and the state before the choice."""
        for noted, mine in zip(self.noted, columns, strict=True):
            noted.append(_mode(mine))
        self.states.append(state)

    def back(self) -> Back | None:
        """Where to go back to; None to go on."""
        method, n = self.method, len(self.states)  # tokens, the candidate among them
        column = _mode(noted[-1] for noted in self.noted)
        if column < _EARLY or min(b.count(column) for b in self.noted) <= method.threshold:
            return None
        place = column + 1
        if self.visits[place] >= method.candidates:
            place -= 1
            if self.visits[place] >= method.candidates:
                return None
        self.visits[place] += 1
        if n - place > method.window + 1:
            place = max(1, n - method.window - 1)
        # the last state kept has place + 1 tokens; what it chose was chosen at `place`
        for _ in range(n - place - 2):
            self.forget()
        chosen = self.forget().choices
        self.rejected.setdefault(place, []).extend(chosen)
        self.rejected[place + 1] = []
        return Back(self.states[-1], self.rejected[place])

    def forget(self) -> State:
        """Take back the latest state, and what was noted there."""
        for noted in self.noted:
            noted.pop()
        return self.states.pop()


def _mode(values: Iterable[int]) -> int:
    """The most frequent, the smallest of several."""
    counted = Counter(values)
    return min(counted, key=lambda value: (-counted[value], value))


def _over_sum(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True)
