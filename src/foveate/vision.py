"""Which tokens are visual, and where on the image they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .method import FoveateError


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


def runs(visual: Tensor) -> Tensor:
    """Number the contiguous runs of visual tokens, (B, K) int64; 0 outside them, then 1, 2, ..."""
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    return starts.cumsum(1) * visual


@dataclass(frozen=True)
class Grid:
    """How a stretch of visual tokens lies on one image.

    Attributes:
        rows, cols: token rows and columns, read line by line.
        start: index of the first token among the sample's visual tokens.
        box: (left, top, right, bottom) that the grid covers, as fractions of the image.
    """

    rows: int
    cols: int
    start: int = 0
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def stop(self) -> int:
        """One past the index of the last token."""
        return self.start + self.rows * self.cols

    def heat(self, values: Tensor) -> Tensor:
        """(..., N_v) per visual token -> (..., rows, cols)."""
        return values[..., self.start : self.stop].unflatten(-1, (self.rows, self.cols))


def grids(
    model: Any,
    inputs: dict[str, Any],
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    processor: Any = None,
) -> list[list[Grid]]:
    """The grid of every image of every sample.

    Known layouts: one square grid per image (LLaVA-1.5 and its like, letting the processor's
    centre crop decide what of the image is covered) and dynamic resolution (Qwen).

    Args:
        model: the model whose configuration names the image token.
        inputs: what the processor returned, with `input_ids` (B, Q).
        sizes: per sample, the (width, height) of its original images; where given, a processor
            that crops is taken into account.
        processor: the model's processor, asked for its cropping.

    Raises:
        FoveateError: for a layout that is not known.
    """
    mask = visual_mask(
        visual_token_ids(model.config), inputs.get("input_ids"), inputs.get("mm_token_type_ids")
    )
    thw = inputs.get("image_grid_thw")
    if thw is not None:
        merge = model.config.vision_config.spatial_merge_size
        shapes = [(int(h) // merge, int(w) // merge) for t, h, w in thw.tolist() for _ in range(t)]
    else:
        side = _square_side(model.config)
        shapes = [(side, side)] * (int(mask.sum()) // side**2) if side else []
    counts = mask.sum(1).tolist()
    out: list[list[Grid]] = []
    rest = iter(shapes)
    for sample, count in enumerate(counts):
        found: list[Grid] = []
        while (start := found[-1].stop if found else 0) < count:
            shape = next(rest, None)
            if shape is None or start + shape[0] * shape[1] > count:
                raise FoveateError(
                    f"The spatial layout of {model.config.model_type}'s image tokens is not known: "
                    "attention is recorded all the same, but it cannot be drawn on the image."
                )
            box = (0.0, 0.0, 1.0, 1.0)
            if sizes is not None and thw is None and len(found) < len(sizes[sample]):
                box = _covered(processor, sizes[sample][len(found)])
            found.append(Grid(*shape, start=start, box=box))
        out.append(found)
    return out


def _square_side(config: Any) -> int | None:
    """Tokens along one side, where every image is one square grid; else None."""
    if getattr(config, "image_grid_pinpoints", None) is not None:
        return None  # tiles
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    fixed = getattr(config, "mm_tokens_per_image", None) or getattr(
        config, "image_seq_length", None
    )
    if isinstance(size, int) and isinstance(patch, int) and (fixed in (None, (size // patch) ** 2)):
        return size // patch
    if isinstance(fixed, int) and math.isqrt(fixed) ** 2 == fixed:
        return math.isqrt(fixed)
    return None


def _covered(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of an image of (width, height) that is left after the processor's centre crop."""
    image_processor: Any = getattr(processor, "image_processor", None)
    resize = getattr(image_processor, "size", None) or {}
    edge = resize.get("shortest_edge") if hasattr(resize, "get") else None
    if not edge or not getattr(image_processor, "do_center_crop", False):
        return (0.0, 0.0, 1.0, 1.0)
    crop = image_processor.crop_size
    width, height = (side * edge / min(size) for side in size)
    x = max(0.0, (width - crop["width"]) / 2) / width
    y = max(0.0, (height - crop["height"]) / 2) / height
    return (x, y, 1.0 - x, 1.0 - y)
