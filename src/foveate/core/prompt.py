"""What a method sees of a prompt before the decoder reads it: its tokens and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..base.errors import FoveateError

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
        given: the prompt that the chats give a second stream, or None.
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
    given: Prompt | None
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

    def rewritten(
        self, mask: Tensor, visual: Tensor, ids: Tensor, per_token: dict[str, Tensor]
    ) -> Prompt:
        """The same pictures in other text: all (B, M), and the rest of what is said per token."""
        kept = {k: v for k, v in self.inputs.items() if not self._per_token(v)}
        return replace(self, mask=mask, visual=visual, ids=ids, inputs=kept | per_token)

    def inserted(self, after: Tensor, ids: tuple[int, ...]) -> Prompt:
        """The prompt with text tokens put in, the same ones into every sample.

        Args:
            after: (B,) int64, the column that they follow; -1 leaves a sample as it is.

        Raises:
            FoveateError: the prompt is given as embeddings.
        """
        if self.ids is None:
            raise FoveateError(
                "Token ids cannot be put into a prompt that is given as embeddings: pass input_ids."
            )
        width, new = self.mask.shape[1], len(ids)
        after = after.to(self.mask.device)[:, None]
        column = torch.arange(width + new, device=self.mask.device).expand(len(after), -1)
        put = (column > after) & (column <= after + new)
        source = torch.where(column > after + new, column - new, column).clamp(max=width - 1)
        real = put & (after >= 0)  # what a sample does not get is padding in front of it
        text = column.new_tensor([0, *ids])[(column - after).clamp(0, new) * real]

        def moved(value: Tensor, there: Tensor | int) -> Tensor:
            return torch.where(put, there, value.gather(1, source))

        return self.rewritten(
            mask=moved(self.mask, real.to(self.mask.dtype)),
            visual=moved(self.visual.long(), 0).bool(),
            ids=moved(self.ids, text),
            per_token={k: moved(v, 0) for k, v in self.inputs.items() if self._per_token(v)},
        )

    def _per_token(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == self.mask.shape

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
        states: k -> (images or tiles, patches, D_v), the output of block k - 1; (patches, D_v) of
            all images where the tower takes them so, as Qwen's does.
        visual: (B, N) bool, this piece's visual tokens. mask: (B, N) int64, 0 for padding.
        labels: (B, N) int64 in training, -100 where no loss counts; else None.
        video: whether the prompt holds a video.
        pack: (k, project) -> (visual tokens, D): `project(features, states)` with tiles, padding
            and newlines as the model packs its own features. `features` (..., tokens, D) is what
            the model's projector makes of layer k, and `states` (..., tokens, D_m) what enters it,
            one vector per token.
    """

    states: dict[int, Tensor]
    visual: Tensor
    mask: Tensor
    labels: Tensor | None
    video: bool
    pack: Callable[[int, Callable[[Tensor, Tensor], Tensor]], Tensor] = field(repr=False)
