"""Qwen's dynamic resolution: one grid per image, as large as the image, rescaled to whole cells.

GLM-4V's models and those that take Qwen's vision tower prepare images in the same way.
"""

from __future__ import annotations

from .layout import Grid, Picture

serves = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm4v_moe",
    "glm46v",
    "glm_ocr",
    "glmga",
    "cosmos3_omni",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
)


def grid(picture: Picture) -> tuple[list[Grid], int] | None:
    """One grid; needs the input `image_grid_thw`, in patches before merging, nothing else."""
    patches = picture.row("image_grid_thw")
    if patches is None or patches[0] != 1:
        return None
    merge = picture.config.vision_config.spatial_merge_size
    whole = Grid(patches[1] // merge, patches[2] // merge)
    return [whole], whole.stop
