"""VISTA: visual information steering with token-logit augmentation (arXiv 2502.03628).

Two parts, each of them usable alone: what the image adds to the prompt's last state is kept in view
by steering every feed-forward towards it, and late layers have a say in the next token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import (
    Anatomy,
    FeedForward,
    FoveateError,
    Method,
    Prompt,
    Sequences,
    Stream,
    costly,
    published_layers,
    turned,
)

LOGIT_LAYERS = (25, ..., 30)


@dataclass(frozen=True)
class VISTA(Method):
    """Steering by what the image adds, and logits of late layers mixed into the last one's.

    Steering: two plain passes read the prompt ahead, one of them without its image tokens. The
    direction of layer l is the difference of what leaves it at the last rows, v_l = with - without,
    fixed for the sequence. Every row x that a feed-forward returns, in the prompt and at every
    decode step, keeps its norm and is turned:

        x <- |x| n(n(x) + steering s n(v_l)),   s = 1 + max(0, cos(x, -v_l)),   n(x) = x / |x|

    Logits: those of what leaves each of `logit_layers` at the last row, without the final norm (the
    last layer's with it, as in the authors' code), are averaged and mixed in:
    (1 - logit_mix) l + logit_mix mean. This part needs no image.

    The direction depends on the question, so with steering questions share no prefix, and `prefill`
    is refused. On one cache a later turn goes on with the direction of the first turn that shows an
    image.

    Attributes:
        steering: strength, 0 or more; 0 switches it off. Published for LLaVA-1.5: 0.17 (CHAIR), 0.1
            (MMHal), 0.01 (POPE); to be calibrated for other models.
        logit_mix: share of the late layers, 0 to 1; 0 switches it off. Published: 0.3.
        logit_layers: those whose output gives logits. None: the published 25 to 30.
        layers: those whose feed-forwards are steered. None: all.
        pca_offset: any number, added to component 0 of layer 0's direction. The paper has none
            (0); the authors' code takes the principal component of one sample, which adds 1.
    """

    steering: float = 0.17
    logit_mix: float = 0.3
    logit_layers: tuple[int, ...] | None = costly(None, limit=20)  # unembedded for every token
    pca_offset: float = 0.0

    name: ClassVar[str] = "vista"
    paper: ClassVar[str] = "2502.03628"
    passes: ClassVar[str] = "the prompt twice more, once without its image"
    neutral: ClassVar[dict[str, Any]] = {"steering": 0.0, "logit_mix": 0.0}
    example: ClassVar[dict[str, Any]] = {"steering": 0.5, "logit_mix": 0.3}

    def check(self) -> None:
        self.require(self.steering >= 0, "steering must be 0 or more")
        self.require(0 <= self.logit_mix <= 1, "logit_mix must lie between 0 and 1")
        self.require(self.logit_layers != (), "logit_layers must name at least one, or be None")

    def wants(self, stage: str) -> bool:
        idle = {
            **dict.fromkeys(("contrast", "mlp"), self.steering == 0),
            **dict.fromkeys(("before", "logits"), self.logit_mix == 0),
        }
        return super().wants(stage) and not idle.get(stage, False)

    @property
    def needs_image(self) -> bool:  # type: ignore[override]
        """Whether it does nothing without one: the logits are mixed anyway."""
        return self.logit_mix == 0

    @property
    def shares_prefix(self) -> bool:  # type: ignore[override]
        return self.steering == 0

    def resolve(self, anatomy: Anatomy) -> Method:
        late, depth = self.logit_layers, anatomy.depth
        for layer in late or ():
            if not 0 <= layer < depth:
                raise FoveateError(
                    f"vista: there is no layer {layer} for logit_layers, this model has 0 to "
                    f"{depth - 1}."
                )
        late = tuple(sorted(published_layers(LOGIT_LAYERS, depth) if late is None else set(late)))
        return Method.resolve(dataclasses.replace(self, logit_layers=late), anatomy)

    def setup(self, anatomy: Anatomy) -> tuple[Anatomy, Callable[[Tensor], Tensor]] | None:
        return (anatomy, anatomy.readout()) if self.wants("logits") else None

    # -- the steering ------------------------------------------------------------------------------

    def contrast(self, prompt: Prompt, seq: Sequences) -> tuple[Prompt, ...] | None:
        if seq.phase == "prefix":
            raise FoveateError(
                "vista steers all rows by the whole prompt, which a shared prefix does not know: "
                "ask without prefill(), or with steering=0."
            )
        shows, known = prompt.visual.any(1), seq.memory.get("known")
        first = shows if known is None else shows & ~known
        seq.memory["first"], seq.memory["known"] = first, shows if known is None else shows | known
        if not bool(first.any()):
            return None
        text = prompt.only(~prompt.visual)
        if not bool(text.mask.any(1).all()):
            raise FoveateError("vista compares a prompt with its text, and one has none: add some.")
        return tuple(dataclasses.replace(p, ahead=True, states=True) for p in (prompt, text))

    def mlp(self, fed: FeedForward, seq: Sequences) -> Tensor:
        if seq.phase == "prompt" and fed.layer == self.mlp_layers[0] and seq.ahead is not None:
            seq.memory["v"] = self.directions(seq)
        if "v" not in seq.memory:
            return fed.out
        x, v = fed.out.float(), seq.memory["v"][:, fed.layer, None].to(fed.out.device)
        s = 1 + torch.cosine_similarity(x, -v, dim=-1, eps=1e-8).clamp(min=0)
        steered = turned(x, v, self.steering * s[..., None]).to(fed.out.dtype)
        known = seq.memory["known"].to(x.device)[:, None, None]
        return torch.where(known, steered, fed.out)

    def directions(self, seq: Sequences) -> Tensor:
        """v (B, L, D) float32: new for samples that show their first image, else as it was."""
        shown, unseen = seq.ahead
        v = shown.float() - unseen.float()
        v[:, 0, 0] += self.pca_offset
        old = seq.memory.get("v")
        return v if old is None else torch.where(seq.memory["first"][:, None, None], v, old)

    # -- the logits --------------------------------------------------------------------------------

    def before(self, stream: Stream, seq: Sequences) -> Tensor:
        left = stream.layer - 1
        if left in (self.logit_layers or ()) and seq.phase != "prefix":
            last, (anatomy, _) = stream.last, seq.plan
            is_last = left == anatomy.depth - 1
            seq.memory[f"leaving {left}"] = anatomy.norm(last) if is_last else last
        return stream.x

    def logits(self, logits: Tensor, other: Tensor | None, seq: Sequences) -> Tensor:
        _, readout = seq.plan
        states = [seq.memory[f"leaving {j}"].to(logits.device) for j in self.logit_layers or ()]
        late = readout(torch.stack(states)).to(logits.device).mean(0)
        return (1 - self.logit_mix) * logits.float() + self.logit_mix * late
