"""Which pixels of a processor's output belong to which picture, and which to one tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...core.visual import runs


def pixels_in(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The pixel tensors among a model's inputs, by name."""
    return {
        k: v
        for k, v in inputs.items()
        if k.startswith("pixel_values") and isinstance(v, Tensor) and v.is_floating_point()
    }


def pictures(
    config: Any, inputs: dict[str, Any], visual: Tensor, pixels: dict[str, Tensor]
) -> Iterator[list[Tensor]]:
    """The pictures in pixel tensors, each a list of its tiles.

    Idefics2 and 3, SmolVLM, Llama 4 and MiniCPM-V do not say which tiles belong together: there
    every tile is a picture.

    Args:
        config: the model's. inputs: what the processor gave beside the pixels.
        visual: (B, N) bool, the prompt's visual tokens. pixels: by name, such as "pixel_values".

    Yields:
        Tiles as views (copies, ...) into the pixels, whose copies along the first dimension show
        the same: the frames that Qwen makes of a still image, otherwise one. Padding is left out
        where it can be told. Values are those that the tower is given: a tower that normalises
        them itself gets what was painted, taken back.
    """
    for name, value in pixels.items():
        video = name.endswith("videos")
        grid = inputs.get("video_grid_thw" if video else "image_grid_thw")
        if value.dim() == 2 and grid is not None:  # (patches, C * frames * P * P), Qwen
            vision = config.vision_config
            frames, side = vision.temporal_patch_size, vision.patch_size
            patches = value.view(len(value), -1, frames, side * side)
            for image, n in zip(patches.split(grid.prod(-1).tolist()), grid[:, 0], strict=True):
                yield [image[None] if n > 1 else image.permute(2, 0, 1, 3)]
        elif value.dim() == 4 and grid is not None:  # (patches, 3, P, P), Kimi K2.5
            for image in value.split(grid.prod(-1).tolist()):
                yield [image[None]]
        elif value.dim() == 3:  # (images or crops, patches, C * P * P)
            yield from _in_patches(config, inputs, value)
        elif value.shape[0] == 1 and "target_sizes" in inputs:  # (1, 3, P, patches * P), MiniCPM-V
            widths = inputs["target_sizes"].prod(-1) * value.shape[2]
            for image in value.split(widths.tolist(), -1):
                yield [image]
        elif value.dim() == 5 and (video or "image_sizes" in inputs):
            for image in value:  # (images, tiles, 3, H, W), LLaVA-NeXT and OneVision
                yield [tile[None] for tile in image]
        elif value.dim() == 5:  # (prompts, tiles, 3, H, W), Idefics3
            for tile in value.flatten(0, 1):
                yield [tile[None]]
        elif "image_sizes" in inputs:  # (images, 3, H, W), padded to the largest: Mistral3
            for image, (height, width) in zip(value, inputs["image_sizes"].tolist(), strict=True):
                padded = image[:, height:].any() or image[:, :, width:].any()
                yield [image[None] if padded else image[None, :, :height, :width]]
        else:  # (images, 3, H, W), or flat tiles (tiles, 3, H, W), InternVL
            tiles = iter(value)
            for count in _tile_counts(len(value), visual):
                yield [next(tiles)[None] for _ in range(count)]


def stackable(inputs: dict[str, Any]) -> bool:
    """Whether inputs of two batches, put one behind the other, are those of one batch of both.

    Not Molmo 2's, which number all patches of a batch, nor MiniCPM-V's, whose pictures are one.
    """
    return not {"image_token_pooling", "video_token_pooling", "target_sizes"} & {*inputs}


def _in_patches(config: Any, inputs: dict[str, Any], value: Tensor) -> Iterator[list[Tensor]]:
    """Pictures that are given as patches (N, patches, C * P * P)."""
    crops = inputs.get("image_num_crops")
    if crops is not None:  # of every picture, Molmo 2
        for image in value.split(crops.tolist()):
            yield [crop[None] for crop in image]
        return
    sizes, places = inputs.get("spatial_shapes"), inputs.get("image_position_ids")
    for i, image in enumerate(value):
        if sizes is not None:  # LFM2-VL, height and width in patches
            yield [image[None, : int(sizes[i].prod())]]
        elif places is not None:  # Gemma 4, -1 for padding; it brings 0..1 to -1..1 by itself
            shown = image[: int((places[i] >= 0).all(-1).sum())]
            shown.mul_(2).sub_(1)
            yield [shown[None]]
            shown.add_(1).div_(2)
        else:
            yield [image[None]]


def _tile_counts(tiles: int, visual: Tensor) -> list[int]:
    """Tiles of every image: its run of visual tokens is cut into tiles of equal length.

    All ones where the runs do not divide so, as with models that mark each row of an image.
    """
    lengths = [n for row in runs(visual) for n in row.bincount()[1:].tolist()]
    each = max(1, sum(lengths) // tiles)
    if sum(lengths) != each * tiles or any(n % each for n in lengths):
        return [1] * tiles
    return [n // each for n in lengths]
