"""Heat maps, crops and traces on what the families' real image processors make of a picture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from foveate.core.visual import visual_mask, visual_token_ids
from foveate.families.probe import NEEDED, agreement, find
from foveate.insight.trace import trace
from foveate.vlm.chat import Chat
from foveate.vlm.probing import Looked
from foveate.vlm.vlm import VLM
from tests.vision.families import picture, vlm

pytest.importorskip("torchvision", reason="torchvision has an environment of its own: test-vision")

QUESTION = "Is there a cat?"
GEMMA = {"carve": "carve(layers=(2,5))"}  # layers of the small model that see the whole image


@pytest.mark.parametrize("method", ["carve", "laser", "vicrop"])
@pytest.mark.parametrize("size", [(160, 120), (30, 90)], ids=str)
def test_methods_look_again(model: VLM, method: str, size: tuple[int, int]) -> None:
    asked = GEMMA.get(method, method) if model.name == "gemma3" else method
    image = picture(*size)
    answer = model.ask(image, QUESTION, asked, max_new_tokens=3)
    assert answer.tokens
    panels = answer.chat.notes["chain"].panels
    assert panels[0].image.size == image.size
    assert any(panel.heat is not None for panel in panels)


def test_a_trace_draws_the_picture(model: VLM, tmp_path: Path) -> None:
    box = (0.25, 0.25, 0.75, 0.75)
    traced = trace(model, picture(160, 120), QUESTION, ["vanilla", "vaf"], object=box)
    for run in traced.runs:
        assert torch.isfinite(torch.as_tensor(run.on_object)).all()
    assert all(path.stat().st_size for path in traced.save(tmp_path))


@pytest.mark.parametrize("size", [(160, 120), (64, 200), (300, 60)], ids=str)
def test_layouts_say_what_looking_finds(family: str, size: tuple[int, int]) -> None:
    """The tower's tokens do not look at one another here, so looking is sure."""
    model = blind(family)
    grids = model.grids(Chat([picture(*size)], QUESTION))
    found = find(Looked(model)._features, size)
    same, compared = agreement(found, grids)
    assert found.confidence > NEEDED
    assert same == compared > 0


def blind(family: str) -> VLM:
    """A family whose vision tower has no attention."""
    usual = vlm(family)
    model = copy.deepcopy(usual.model)
    for name, weight in model.named_parameters():
        vision = not ("language" in name or "text" in name)
        if vision and ("attn" in name or "attention" in name):
            weight.data.zero_()
    return VLM(model, usual.processor, family)


def test_every_picture_of_a_prompt_has_its_own_grids(model: VLM) -> None:
    chat = Chat([picture(160, 120), picture(30, 90)], QUESTION)
    inputs, grids = model.processed(chat), model.grids(chat)
    assert {grid.image for grid in grids} == {0, 1}
    seen = visual_mask(visual_token_ids(model.model.config), inputs["input_ids"])
    ends = [grid.stop for grid in grids]
    assert ends == sorted(ends)
    newlines = 1 if model.name == "llava_onevision" else 0
    assert int(seen.sum()) - ends[-1] == newlines
