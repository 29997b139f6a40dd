"""Sampled answers: the plain model at a temperature, as a row beside methods.

It is a trivial baseline: a method should do more than a higher or lower temperature does.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from ..core.method import Method
from ..vlm.answering import Decoding


@dataclass(frozen=True)
class Sampled(Method, register=False):
    """The plain model, whose tokens are drawn and not the likeliest ones.

    Attributes:
        temperature: of the softmax, above 0 and up to 10.
        seed: with the question it decides what is drawn.
    """

    temperature: float = 1.0
    seed: int = 0

    def check(self) -> None:
        self.require(0 < self.temperature <= 10, "the temperature must lie above 0 and up to 10")

    def __str__(self) -> str:
        return f"vanilla, temperature {self.temperature:g}"


class Drawing(Decoding):
    """Draws every token from the whole distribution.

    The generator is started anew for every batch, from the seed and the batch's questions: a run
    that goes on draws what an undisturbed one draws.
    """

    def __init__(self, method: Sampled, questions: list[str]) -> None:
        self.method, self.questions = method, questions

    def seeds(self, rows: list[int]) -> list[int]:
        return [self._seed([self.questions[row]]) for row in rows]

    def options(self, rows: list[int]) -> dict[str, Any]:
        torch.manual_seed(self._seed([self.questions[row] for row in rows]))
        temperature = self.method.temperature
        return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

    def _seed(self, questions: list[str]) -> int:
        asked = repr((self.method.seed, self.method.temperature, questions))
        return zlib.crc32(asked.encode())
