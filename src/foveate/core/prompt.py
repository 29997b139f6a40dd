"""What a method sees of a prompt before the decoder reads it: its tokens and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

Pictures = Callable[[dict[str, Tensor]], Iterator[list[Tensor]]]
"""From pixel tensors, by name, to the pictures in them: each a list of its tiles, every tile a
view (copies, ...) into a pixel tensor. Copies along the first dimension show the same, such as the
two frames that Qwen makes of a still image."""


@dataclass(frozen=True)
class Prompt:
    """One piece of prompt of a batch, as the model will read it.

    Attributes:
        mask: (B, N) int64, 0 for padding.
        visual: (B, N) bool.
        ids: (B, N) int64, or None where the prompt is given as embeddings.
        embeds: (B, N, D), or None.
        pixels: pixel tensors by name; empty where images were encoded before.
        given: pixel tensors that the chat gives for a second stream, or None.
        ahead: set it to have this prompt read before the main pass, once and plain: its next-token
            logits are then `Sequences.ahead`. Otherwise it is a second stream that reads the
            answer, too.
        states: of a prompt that goes ahead keep, instead of the logits, what leaves every decoder
            layer at the last row.
        after: set it to have the second stream read this prompt by itself, when the main pass
            over it is done: then the stages for the second stream act, such as
            `Method.other_embeds`.
        inputs: what else the engine hands to the model.
    """

    mask: Tensor
    visual: Tensor
    ids: Tensor | None
    embeds: Tensor | None
    pixels: dict[str, Tensor]
    given: dict[str, Tensor] | None
    pictures: Pictures = field(repr=False)
    inputs: dict[str, Any] = field(repr=False)
    ahead: bool = False
    after: bool = False
    states: bool = False

    def repainted(self, paint: Callable[[list[Tensor]], None]) -> Prompt:
        """The same prompt with other pixels: `paint` changes the tiles of a picture in place."""
        pixels = {name: value.clone() for name, value in self.pixels.items()}
        for tiles in self.pictures(pixels):
            paint(tiles)
        return replace(self, pixels=pixels)

    def only(self, tokens: Tensor) -> Prompt:
        """The prompt with no other tokens than `tokens` (B, N) bool, padded on the left again.

        Pixels go, and what else belongs to pictures.
        """
        tokens = tokens & self.mask.bool()
        width = int(tokens.sum(1).max())
        order = tokens.int().argsort(dim=1, stable=True)[:, self.mask.shape[1] - width :]
        tokens = tokens.gather(1, order)
        ids, embeds = self.ids, self.embeds
        if ids is not None:
            ids = ids.gather(1, order).masked_fill(~tokens, 0)
        if embeds is not None:
            embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
        plain = {k: v for k, v in self.inputs.items() if isinstance(v, bool | int | float | str)}
        return Prompt(
            mask=tokens.to(self.mask.dtype),
            visual=self.visual.gather(1, order) & tokens,
            ids=ids,
            embeds=embeds,
            pixels={},
            given=None,
            pictures=self.pictures,
            inputs=plain,
        )


@dataclass(frozen=True)
class Vision:
    """What the vision tower gave for the images of a piece of prompt.

    Attributes:
        states: k -> (images or tiles, patches, D_v), the output of block k - 1.
        visual: (B, N) bool, this piece's visual tokens. mask: (B, N) int64, 0 for padding.
        labels: (B, N) int64 in training, -100 where no loss counts; else None.
        video: whether the prompt holds a video.
        pack: (k, project) -> (visual tokens, D): `project(the model's projector, states)` with
            tiles, padding and newlines as the model packs its own features.
    """

    states: dict[int, Tensor]
    visual: Tensor
    mask: Tensor
    labels: Tensor | None
    video: bool
    pack: Callable[[int, Callable[[Any, Tensor], Tensor]], Tensor] = field(repr=False)
