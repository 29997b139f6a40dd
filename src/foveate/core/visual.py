"""Which tokens of a prompt are visual, and parts of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.errors import FoveateError

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of an image's width and height."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

Pixels = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of an image, the last two exclusive."""


def visual_token_ids(config: Any, image_token_id: int | None = None) -> tuple[int, ...]:
    """Ids of the placeholder tokens that stand for image and video features in a prompt.

    Args:
        config: the model's top configuration.
        image_token_id: overrides what the configuration says.
    """
    if image_token_id is not None:
        return (image_token_id,)
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int)))


def visual_mask(
    ids: tuple[int, ...], input_ids: Tensor | None, mm_token_type_ids: Tensor | None = None
) -> Tensor:
    """Visual tokens of a prompt, (B, Q) bool.

    Args:
        ids: from `visual_token_ids`.
        input_ids: (B, Q) integer, or None where the prompt is given as embeddings.
        mm_token_type_ids: (B, Q) integer, 0 for text; used where there are no ids to compare.

    Raises:
        FoveateError: where neither tells the visual tokens.
    """
    if input_ids is not None and ids:
        return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
    if mm_token_type_ids is not None:
        return mm_token_type_ids != 0
    if input_ids is None:
        raise FoveateError(
            "A prompt given as embeddings does not tell which tokens are visual: "
            "pass input_ids, or mm_token_type_ids beside the embeddings."
        )
    raise FoveateError(
        "This model's configuration names no image token: pass image_token_id=N to enhance(), the "
        "id of the placeholder that stands for the image in input_ids."
    )


def video_mask(config: Any, input_ids: Tensor, mm_token_type_ids: Tensor | None = None) -> Tensor:
    """Which visual tokens of a prompt are a video's, (B, Q) bool, where the prompt tells.

    InternVL and SmolVLM write frames as pictures, and their prompts do not tell.

    Args:
        config: the model's top configuration. The others: as `visual_mask` takes them.
    """
    names = ("video_token_id", "video_token_index")
    found = [getattr(config, name, None) for name in names]
    ids = [i for i in found if isinstance(i, int)]
    mask = torch.isin(input_ids, torch.tensor(ids, device=input_ids.device, dtype=input_ids.dtype))
    if mm_token_type_ids is None:
        return mask
    return mask | (mm_token_type_ids == 2)  # GLM-V's frames have the image's token


def runs(visual: Tensor) -> Tensor:
    """Number the contiguous runs of visual tokens, (B, K) int64; 0 outside them, then 1, 2, ..."""
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    return starts.cumsum(1) * visual
