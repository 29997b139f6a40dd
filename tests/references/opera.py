"""OPERA (arXiv 2311.17911), slowly: every beam and every candidate is read whole, with full maps.

No cache: prompt, answer and candidate go through the model with eager attention for every step, and
the square map of the last layer, the maximum over heads, is all that is looked at. Beams, columns,
histories and the stack of states are lists; products are multiplied out number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Trace:
    """What a search did.

    Attributes:
        tokens: of the best answer. score: its log-probability over its length.
        scores: (beams, V) of every step, after the processors, before the sums are added.
        returns: (from, to) of every rollback, in tokens answered.
        exhausted: how often no place to return to was left. nearer: how often `window` cut.
        revived: how often a rejected token was chosen all the same.
    """

    tokens: list[int] = field(default_factory=list)
    score: float = 0.0
    scores: list[Tensor] = field(default_factory=list)
    returns: list[tuple[int, int]] = field(default_factory=list)
    exhausted: int = 0
    stepped: int = 0
    nearer: int = 0


def read(
    model: PreTrainedModel, prompt: dict[str, Tensor], answers: list[list[int]], layer: int
) -> tuple[Tensor, Tensor]:
    """Next-token logits (N, V) and the layer's head-max maps (N, Q, Q) of one prompt's answers."""
    count, length = len(answers), len(answers[0])
    more = torch.tensor(answers, dtype=torch.long).view(count, length)
    inputs: dict[str, Any] = {key: torch.cat([value] * count) for key, value in prompt.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in prompt:
            new = torch.full((count, length), int(key == "attention_mask"))
            inputs[key] = torch.cat([inputs[key], new], 1)
    before = model.get_decoder().config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            out = model(**inputs, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation({"text_config": before})
    return out.logits[:, -1].float(), out.attentions[layer].float().amax(1)


def mode(values: list[int]) -> int:
    """The smallest of the most frequent."""
    most = max(values.count(value) for value in values)
    return min(value for value in values if values.count(value) == most)


def columns(square: Tensor, start: int, scale: float, half: bool) -> Tensor:
    """The score of every column of a map (Q, Q) whose rows sum to 1, from `start` on."""
    found = []
    for j in range(start, len(square)):
        product = torch.ones(())
        for i in range(j, len(square)):
            product = product * (scale * square[i, j])
        found.append(1e-7 * product)
    scores = torch.stack(found)
    return scores.half() if half else scores


def run(
    model: PreTrainedModel,
    prompt: dict[str, Tensor],
    length: int,
    image: Tensor,
    layer: int = -1,
    processor: Processor = lambda ids, scores: scores,
    ends: tuple[int, ...] = (),
    num_beams: int = 5,
    candidates: int = 5,
    scale: float = 50.0,
    penalty: float = 1.0,
    threshold: float = 15,
    half_scores: bool = True,
    window: int = 512,
) -> Trace:
    """Search an answer of at most `length` tokens.

    Args:
        prompt: model inputs of one unpadded prompt. image: (P,) bool, its visual tokens.
        ends: end tokens.
    """
    trace, start = Trace(), prompt["input_ids"].shape[1]
    answers: list[list[int]] = [[] for _ in range(num_beams)]
    sums = torch.tensor([0.0] + [-1e9] * (num_beams - 1))
    finished: list[tuple[float, list[int]]] = []
    history: list[list[int]] = [[] for _ in range(num_beams)]
    states: list[dict[str, Any]] = []
    visits: dict[int, int] = {}
    rejected: dict[int, list[tuple[int, int]]] = {}
    came_by: list[tuple[int, int]] = []
    while True:
        n = len(answers[0]) + 1
        logits, _ = read(model, prompt, answers, layer)
        vocabulary = logits.shape[1]
        places: list[int] = []
        lowered = torch.full_like(logits, -999.0)
        for b in range(num_beams):
            z, tokens = logits[b].topk(min(candidates, vocabulary))
            longer = [[*answers[b], token] for token in tokens.tolist()]
            _, maps = read(model, prompt, longer, layer)
            mine = []
            for c, square in enumerate(maps):
                square = square / square.sum(-1, keepdim=True)
                scores = columns(square, start, scale, half_scores)
                best = scores.max()
                mine.append(scores.tolist().index(best.item()))
                seen = square[-1, :start][image].sum()
                lowered[b, tokens[c]] = z[c] - (penalty * best if n > 10 else -penalty * seen)
            places.append(mode(mine))
        for b in range(num_beams):
            history[b].append(places[b])
        states.append(
            {"answers": answers, "sums": sums, "finished": list(finished), "came_by": came_by}
        )

        logits_now, column = lowered, mode(places)
        if column >= 10 and all(h.count(column) > threshold for h in history):
            place = column + 1
            if visits.get(place, 0) >= candidates:
                place -= 1
                trace.stepped += 1
            if visits.get(place, 0) >= candidates:
                trace.exhausted += 1
            else:
                visits[place] = visits.get(place, 0) + 1
                if n - place > window + 1:
                    place = max(1, n - window - 1)
                    trace.nearer += 1
                for _ in range(n - place - 2):
                    states.pop()
                    for h in history:
                        h.pop()
                rejected.setdefault(place, [])
                rejected[place] += states.pop()["came_by"]
                for h in history:
                    h.pop()
                rejected[place + 1] = []
                state = states[-1]
                answers, sums, finished = state["answers"], state["sums"], state["finished"]
                logits_now, _ = read(model, prompt, answers, layer)
                for b in range(num_beams):
                    logits_now[b] -= logits_now[b].min() + 999
                for token, b in rejected[place]:
                    logits_now[b, token] = -999
                trace.returns.append((n - 1, place))

        ids = torch.cat(
            [prompt["input_ids"].expand(num_beams, -1), torch.tensor(answers).long()], 1
        )
        scores = processor(ids, logits_now.log_softmax(-1))
        trace.scores.append(scores)
        # which of equally unlikely tokens fill the places behind the candidates is topk's to say
        spare = num_beams * max(2, 1 + len(ends))
        best = (scores + sums[:, None]).flatten().topk(min(spare, scores.numel()))
        going = []
        for rank, (total, flat) in enumerate(zip(best.values, best.indices.tolist(), strict=True)):
            b, token = divmod(flat, vocabulary)
            longer = [*answers[b], token]
            if token not in ends and len(longer) < length:
                going.append((total, b, token))
            elif rank < num_beams:
                finished.append((float(total) / len(longer), longer))
        finished.sort(key=lambda f: -f[0])
        del finished[num_beams:]
        full = len(finished) == num_beams
        if not going or (full and float(going[0][0]) / n <= finished[-1][0]):
            trace.score, trace.tokens = finished[0]
            return trace
        assert len(going) >= num_beams
        going = going[:num_beams]
        answers = [[*answers[b], token] for _, b, token in going]
        sums = torch.stack([total for total, _, _ in going])
        came_by = [(token, b) for _, b, token in going]
