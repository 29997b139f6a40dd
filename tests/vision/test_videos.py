"""Videos through the families' real video processors and `enhance`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata

from foveate import FoveateError, Method, enhance
from foveate.core.method import methods
from foveate.core.visual import video_mask, visual_mask, visual_token_ids
from foveate.families.layout import grids
from foveate.vlm.vlm import VLM
from tests.vision.families import film, picture, vlm

pytest.importorskip("torchvision", reason="torchvision has an environment of its own: test-vision")

TOKENS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "glm4v")  # of their own
FAMILIES = (*TOKENS, "internvl", "smolvlm")
FRAMES, SIZE = 8, (40, 30)
ASKED = ["Is there a cat?", "What is in the picture?"]
# no head of the example passes its threshold or sees the video; gated attention has no such part
IDLE = {("qwen3_vl", "adhh"), ("qwen3_5", "adhh"), ("qwen3_5", "only")}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def batch(model: VLM, *kinds: str) -> dict[str, Tensor]:
    """One left-padded prompt per kind, "video" or "image"."""
    asked = [
        [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}]
        for kind, question in zip(kinds, ASKED, strict=False)
    ]
    times = {"total_num_frames": FRAMES, "fps": 2.0, "duration": FRAMES / 2.0}
    given: dict[str, Any] = {}
    nested = model.name == "smolvlm"

    def listed(values: list[Any]) -> list[Any]:
        return [[value] for value in values] if nested else values

    if videos := [film(FRAMES, *SIZE) for kind in kinds if kind == "video"]:
        meta = [VideoMetadata(**times, frames_indices=list(range(FRAMES))) for _ in videos]
        given |= {"videos": listed(videos), "video_metadata": listed(meta)}
        given["do_sample_frames"] = False
    if pictures := [[picture(*SIZE)] for kind in kinds if kind == "image"]:
        given["images"] = pictures
    texts = [model.processor.apply_chat_template(one, add_generation_prompt=True) for one in asked]
    made = model.processor(text=texts, **given, padding=True, return_tensors="pt")
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def logits(model: VLM, inputs: dict[str, Tensor], method: Method | str | None) -> Tensor:
    """What three steps of greedy decoding saw, (3, B, V)."""
    stack = (method,) if method else ()
    with torch.no_grad(), enhance(model.model, *stack):
        out = model.model.generate(
            **inputs, max_new_tokens=3, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(out.logits)


def acting() -> list[str]:
    """Methods that change a raw call of a model without anything beside their parameters."""
    found = methods()
    raw = [name for name, kind in found.items() if not kind(**kind.example).wants("rewrite")]
    return sorted(set(raw) - {"vti", "cli", "opera"})


def test_a_videos_tokens_are_visual(family: str) -> None:
    model = vlm(family)
    inputs = batch(model, "video")
    config, types = model.model.config, inputs.get("mm_token_type_ids")
    seen = visual_mask(visual_token_ids(config), inputs["input_ids"], types)
    if family.startswith(("qwen", "glm")):
        expected = int(inputs["video_grid_thw"].prod()) // 4
    elif family == "llava_onevision":
        expected = FRAMES * 2 * 2 + 1  # pooled from 4 x 4, and a newline behind all
    else:
        expected = FRAMES * 2 * 2
    assert int(seen.sum()) == expected
    told = video_mask(config, inputs["input_ids"], types)
    assert torch.equal(told, seen) if family in TOKENS else not told.any()


@pytest.mark.parametrize("method", acting())
def test_methods_act_on_a_video(family: str, method: str) -> None:
    if (family, method) in IDLE:
        return
    model, kind = vlm(family), methods()[method]
    inputs = batch(model, "video")
    plain = logits(model, inputs, None)
    edited = logits(model, inputs, kind(**kind.example))
    assert torch.isfinite(edited).all()
    assert not torch.allclose(plain, edited, atol=1e-3)
    assert torch.equal(logits(model, inputs, None), plain)
    if kind.neutral:
        idle = logits(model, inputs, kind(**kind.neutral))
        assert torch.allclose(idle, plain, atol=1e-4)


# vaf: rows; var: memory; vcd: other pixels; pai: other text; sid: fewer tokens; clvs: positions
@pytest.mark.parametrize("method", ["vaf", "var", "vcd", "pai", "sid", "clvs"])
@pytest.mark.parametrize("family", TOKENS[:-1])
def test_a_video_and_a_picture_share_a_batch(family: str, method: str) -> None:
    """Without GLM-V: in such a batch transformers takes its frames' tokens for the picture's."""
    model, asked = vlm(family), methods()[method](**methods()[method].example)
    one = logits(model, batch(model, "video"), asked)
    both = logits(model, batch(model, "video", "image"), asked)
    assert torch.allclose(both[0, :1], one[0], atol=1e-3)


@pytest.mark.parametrize("family", TOKENS)
def test_layouts_refuse_a_video(family: str) -> None:
    model = vlm(family)
    for kinds in (("video",), ("video", "image")):
        inputs = batch(model, *kinds)
        with pytest.raises(FoveateError, match=r"holds a video.*some of its frames"):
            grids(model.model, inputs, None, model.processor)


def test_frames_that_are_written_as_pictures_lie_as_pictures() -> None:
    model = vlm("internvl")
    laid = grids(model.model, batch(model, "video"), None, model.processor)[0]
    assert [(grid.rows, grid.cols, grid.image) for grid in laid] == [(2, 2, i) for i in range(8)]


@pytest.mark.parametrize("method", ["laser", "carve", "vicrop", "agla", "ritual"])
def test_methods_that_change_pictures_refuse_a_raw_call(method: str) -> None:
    model = vlm("qwen3_vl")
    with (
        pytest.raises(FoveateError, match="changes the prompt before the model sees it"),
        enhance(model.model, method),
    ):
        pass


def test_cross_layer_injection_refuses_a_video() -> None:
    model = vlm("llava_onevision")
    with pytest.raises(FoveateError, match="cli follows images, not videos"):
        logits(model, batch(model, "video"), "cli(seed=0)")


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_are_asked_about_as_pictures(family: str) -> None:
    model = vlm(family)
    frames: list[Any] = film(3, *SIZE)
    answer = model.ask(frames, ASKED[0], "vaf", max_new_tokens=2)
    assert answer.tokens
    assert {grid.image for grid in model.grids(answer.chat)} == {0, 1, 2}
