"""VTI: the turn of every row, the tower's tokens, and where directions come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate import FoveateError, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.base.artifact import DIRECTIONS, Artifact
from foveate.methods.vcd import VCD
from foveate.methods.vti import VTI
from tests import models
from tests.references import vti as reference
from tests.references.full import difference, disagreement

BOTH = {"alpha_text": 5.0, "alpha_image": 4.0}


def slow(name: str, method: VTI, kind: Any = reference.VTI) -> reference.VTI:
    found = load_file(models.directions(name))
    return kind(models.build(name), method.layers, method.alpha_text, method.alpha_image, found)


def compare(name: str, kind: str, method: VTI, reading: Any = reference.VTI) -> float:
    method = models.ready(method, name)
    return disagreement(method, slow(name, method, reading), models.inputs(name, kind, batch=3))


@pytest.mark.parametrize("kind", ["images", "mixed", "text"])
def test_prefill_and_decode_equal_the_reference_on_every_family(family: str, kind: str) -> None:
    assert compare(family, kind, VTI(alpha_text=6.0)) < 1e-5


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        BOTH,
        {"alpha_text": 0.0, "alpha_image": 4.0},
        {"alpha_text": -5.0, "alpha_image": -4.0},
        {"alpha_text": 5.0, "layers": (1, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    assert compare(name, "images", VTI(**parameters)) < 1e-5


class Wrong:
    """Readings of the paper that the comparison must tell from the right one."""

    class Longer(reference.VTI):
        def rows(self, out: Tensor, direction: Tensor, strength: float) -> Tensor:
            return out + 0.1 * strength * direction

    class LastRow(reference.VTI):
        def rows(self, out: Tensor, direction: Tensor, strength: float) -> Tensor:
            return torch.cat([out[:, :-1], super().rows(out, direction, strength)[:, -1:]], 1)

    class OneForAllTokens(reference.VTI):
        def rows(self, out: Tensor, direction: Tensor, strength: float) -> Tensor:
            mean = direction if direction.dim() == 1 else direction.mean(0)
            return super().rows(out, mean, strength)

    class Backwards(reference.VTI):
        def rows(self, out: Tensor, direction: Tensor, strength: float) -> Tensor:
            return super().rows(out, -direction, strength)


@pytest.mark.parametrize("wrong", ["Longer", "LastRow", "OneForAllTokens", "Backwards"])
def test_wrong_readings_are_told_apart(wrong: str) -> None:
    assert compare("llava", "image", VTI(**BOTH), getattr(Wrong, wrong)) > 1e-2


def test_of_two_streams_only_the_first_ones_images_are_turned() -> None:
    """VCD's noised picture, alone in a batch of its own, is encoded plain."""
    model, inputs = models.build("llava"), models.inputs("llava", "image", batch=3)
    method = models.ready(VTI(alpha_text=0.0, alpha_image=6.0), "llava")
    logits = []
    for stack in ((), (VCD(beta=0.0),), (method,), (VCD(beta=0.0), method)):
        with torch.no_grad(), enhance(model, *stack):
            logits.append(model(**inputs).logits[:, -1])
    plain, contrasted, turned, both = logits
    noised = 2 * plain - contrasted
    assert difference(both, 2 * turned - noised) < 5e-5


def test_the_tower_has_to_run() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    method = models.ready(VTI(**BOTH), "llava")
    with torch.no_grad(), enhance(model, method):
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        with pytest.raises(FoveateError, match="edits the vision tower, which did not run"):
            model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                mm_encoder_outputs={"image": features},
            )


def test_a_block_that_is_not_reached_is_an_error() -> None:
    model, inputs = models.build("llava", fresh=True), models.inputs("llava")
    method = models.ready(VTI(**BOTH), "llava")
    mlp = reference.blocks_of(model)[0].mlp
    call = mlp.forward
    mlp.__class__ = type("Renamed", (type(mlp),), {"__call__": lambda self, x: call(x)})
    with (
        torch.no_grad(),
        enhance(model, method),
        pytest.raises(FoveateError, match="the feed-forward of vision block 0 was never reached"),
    ):
        model(**inputs)


# -- where directions come from --------------------------------------------------------------------


def test_an_artifact_gives_what_a_plain_file_gives(tmp_path: Path) -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    found = load_file(models.directions("llava"))
    Artifact(DIRECTIONS, anatomy(model).shape, found).save_pretrained(tmp_path)
    logits = []
    for path in (models.directions("llava"), str(tmp_path)):
        with torch.no_grad(), enhance(model, VTI(**BOTH, path=path)):
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)
    with pytest.raises(FoveateError, match="belongs to another model: its model_type is llava"):
        VTI(path=str(tmp_path)).resolve(anatomy(models.build("qwen2_5_vl")))


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "says"),
    [
        ("llava", {}, {"image": (2, 17, 32)}, "holds no text directions"),
        ("llava", BOTH, {"text": (6, 64)}, "holds no image directions"),
        ("llava", {}, {"text": (7, 64)}, r"its text is \(7, 64\), this model needs \(6, 64\)"),
        ("llava", BOTH, {"text": (6, 64), "image": (2, 32)}, r"model needs \(2, tokens, 32\)"),
        ("qwen2_5_vl", BOTH, {"text": (6, 64)}, "cannot steer the vision tower of qwen2_5_vl"),
        ("llava", {}, None, "is no safetensors file"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_sentence(
    tmp_path: Path, name: str, parameters: dict[str, Any], tensors: Any, says: str
) -> None:
    path = tmp_path / "some.safetensors"
    if tensors is None:
        path.write_bytes(b"nothing")
    else:
        save_file({k: torch.ones(size) for k, size in tensors.items()}, path)
    with pytest.raises(FoveateError, match=says) as error:
        VTI(**parameters, path=str(path)).resolve(anatomy(models.build(name)))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    model, path = models.build("llava"), tmp_path / "some.safetensors"
    save_file({"text": torch.ones(6, 64), "image": torch.ones(2, 9, 32)}, path)
    with (
        torch.no_grad(),
        enhance(model, VTI(**BOTH, path=str(path))),
        pytest.raises(FoveateError, match="has directions for 9 tokens of an image"),
    ):
        model(**models.inputs("llava"))


def test_without_a_path_only_the_pocket_model_has_directions() -> None:
    with pytest.raises(FoveateError, match="vti has no directions for this model"):
        VTI().resolve(anatomy(models.build("llava")))
