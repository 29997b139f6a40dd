"""MemVR against a slow reference: what fires, what is mixed in, and over which rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate import FoveateError, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.methods.memvr import MemVR
from tests import models
from tests.references import memvr as reference
from tests.references.full import (
    disagreement,
    disagreement_in_beams,
    disagreement_in_turns,
)


def slow(model: Any, method: MemVR, kind: Any = reference.MemVR) -> reference.MemVR:
    return kind(model, **method.resolve(anatomy(model)).parameters())


def every(model: Any, threshold: float) -> MemVR:
    """Tests after all layers but the last."""
    return MemVR(ratio=0.6, threshold=threshold, layers=tuple(range(anatomy(model).depth - 1)))


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    method = every(model, 0.85)
    slowly = slow(model, method)
    assert disagreement(method, slowly, models.inputs(family, kind, batch=3)) < 1e-5
    assert any(layer is not None for fired in slowly.firing for layer in fired)


def test_samples_and_steps_fire_in_layers_of_their_own() -> None:
    model = models.build("llava")
    method = every(model, 0.97)
    slowly = slow(model, method)
    assert disagreement(method, slowly, models.inputs("llava", "images", batch=3)) < 1e-5
    assert len({layer for fired in slowly.firing for layer in fired}) > 2
    assert any(len(set(fired)) > 1 for fired in slowly.firing)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"threshold": 0.0},
        {"ratio": 1.0, "threshold": 0.5},
        {"ratio": 0.5, "threshold": 0.5, "layers": (0,)},
        {"ratio": 0.5, "threshold": 0.9, "layers": (2, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    model, method = models.build(name), MemVR(**parameters)
    assert disagreement(method, slow(model, method), models.inputs(name, "mixed", batch=3)) < 1e-5


class Wrong:
    """Readings of the paper that the comparison must tell from the right one."""

    class LastRow(reference.MemVR):
        def edited(self, layer: int, module: Any, x: Any, out: Any) -> Any:
            new = out.clone()
            new[:, -1] = super().edited(layer, module, x, out)[:, -1]
            return new

    class Unnormed(reference.MemVR):
        def uncertainty(self, state: Any) -> float:
            norm, self.decoder.norm = self.decoder.norm, torch.nn.Identity()
            try:
                return super().uncertainty(state)
            finally:
                self.decoder.norm = norm

    class SameLayer(reference.MemVR):
        def entering(self, layer: int, hidden: Any) -> None:
            super().entering(layer + 1 if layer else 0, hidden)

    class Everywhere(reference.MemVR):
        def edited(self, layer: int, module: Any, x: Any, out: Any) -> Any:
            fired, self.fired = self.fired, [layer - 1 if f is not None else f for f in self.fired]
            new = super().edited(layer, module, x, out)
            self.fired = fired
            return new


@pytest.mark.parametrize(
    "wrong", [Wrong.LastRow, Wrong.Unnormed, Wrong.SameLayer, Wrong.Everywhere]
)
def test_wrong_readings_are_told_apart(wrong: Any) -> None:
    model = models.build("llava")
    method = every(model, 0.97)
    inputs = models.inputs("llava", "images", batch=3)
    assert disagreement(method, slow(model, method, wrong), inputs) > 1e-2


@pytest.mark.parametrize("second", ["suffix", "image"])
def test_a_second_turn_equals_the_reference(second: str) -> None:
    model = models.build("llava")
    method = every(model, 0.85)
    talk = models.conversation("llava", second)
    assert disagreement_in_turns(method, slow(model, method), talk)[0] < 1e-5


def test_beams_keep_their_image(family: str, model: Any) -> None:
    if family not in ("llava", "qwen2_5_vl"):
        pytest.skip("two families are enough")
    method = every(model, 0.85)
    inputs = models.inputs(family, "image", batch=2)
    alone = [models.inputs(family, "image", row=row) for row in range(2)]
    assert disagreement_in_beams(method, lambda: slow(model, method), inputs, alone) < 1e-5


def test_a_bar_that_none_passes_is_the_plain_model_bit_for_bit() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    for method in (MemVR(threshold=1.0), MemVR(ratio=0.0), MemVR(ratio=0.5, threshold=0.999)):
        with torch.no_grad():
            with enhance(model, method):
                edited = model(**inputs).logits
            assert torch.equal(edited, model(**inputs).logits)
    assert MemVR(threshold=1.0).is_neutral


def test_the_published_layers_and_the_layer_above_them() -> None:
    assert MemVR().resolve(anatomy(models.build("llava"))).layers == (1, 2)
    assert MemVR().resolve(anatomy(models.build("llava"))).mlp_layers == (2, 3)
    with pytest.raises(FoveateError, match=r"5 is the last: leave it out of layers"):
        MemVR(layers=(0, 5)).resolve(anatomy(models.build("llava")))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": 1.1}, "ratio must lie between 0 and 1"),
        ({"threshold": -0.1}, "threshold must be 0 or more"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        MemVR(**parameters)
