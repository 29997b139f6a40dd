"""AvisC against a plain and a filled pass on full maps, and what its second stream is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, enhance, prefill
from foveate.backends.transformers.anatomy import anatomy
from foveate.methods.avisc import AvisC
from tests import models
from tests.references import avisc as reference
from tests.references.full import (
    difference,
    disagreement,
    disagreement_in_turns,
    generate,
)

ROUNDING = 2e-5  # the contrast multiplies that of l and l'
STRONG = AvisC(**AvisC.example)


def slow(model: Any, method: AvisC, **wrong: Any) -> reference.AvisC:
    return reference.AvisC(model, **method.resolve(anatomy(model)).parameters(), **wrong)


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    method = slow(model, STRONG)
    assert disagreement(STRONG, method, models.inputs(family, kind, batch=3)) < ROUNDING
    assert len(set(method.counts)) > 1, "samples choose for themselves"


@pytest.mark.parametrize(
    "method",
    [
        AvisC(),
        AvisC(layer_mass=0.0, fill="ones"),
        AvisC(layer_mass=1.0, deviation=0.3, fill="noise"),
        AvisC(deviation=-0.5, alpha=2.5, beta=0.01),
        AvisC(layers=(1, 4), layer_mass=0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, method: AvisC) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    assert disagreement(method, slow(model, method), inputs) < ROUNDING


def test_filling_the_blind_tokens_instead_would_be_seen() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    assert disagreement(STRONG, slow(model, STRONG, wrong="blind"), inputs) > 1e-2


def seen(name: str, inputs: dict[str, Tensor], method: AvisC) -> tuple[Tensor, Tensor]:
    """What enters layer 0 in the two streams, (B, N, D) each."""
    model, entering = models.build(name), []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: entering.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
    )
    try:
        with torch.no_grad(), enhance(model, method):
            model(**inputs)
    finally:
        hook.remove()
    first, second = entering
    return first, second


def test_the_deviation_runs_from_no_token_to_every_image_token() -> None:
    inputs = models.inputs("llava", "images", batch=3)
    image = (inputs["input_ids"] == models.IMAGE)[..., None]
    first, second = seen("llava", inputs, AvisC(deviation=-1000.0))
    assert torch.equal(first, second)
    for fill, value in (("zeros", 0.0), ("ones", 1.0)):
        first, second = seen("llava", inputs, AvisC(deviation=1000.0, fill=fill))  # type: ignore[arg-type]
        assert torch.equal(second, torch.where(image, value, first))
    first, second = seen("llava", inputs, AvisC())
    kept = (first == second).all(-1, keepdim=True)
    assert bool((kept | image).all()), "text stays"
    assert 0 < int((kept & image).sum()) < int(image.sum()) / 2, "few tokens are blind"


def test_noise_is_the_samples_own() -> None:
    inputs = models.inputs("llava", "image", batch=3)
    _, together = seen("llava", inputs, AvisC(fill="noise", deviation=1000.0))
    for row in range(3):
        alone = models.inputs("llava", "image", row=row)
        _, single = seen("llava", alone, AvisC(fill="noise", deviation=1000.0))
        assert torch.equal(together[row, -single.shape[1] :], single[0])


def test_keeping_every_token_is_the_plain_model_under_the_cut() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    with torch.no_grad():
        own = model(**inputs).logits[:, -1]
        p = own.softmax(-1)
        cut = own.masked_fill(p < 0.1 * p.amax(-1, keepdim=True), -torch.inf)
        for method in (AvisC(deviation=-1000.0), AvisC(alpha=0.0)):
            with enhance(model, method):
                assert difference(model(**inputs).logits[:, -1], cut) < ROUNDING


def test_a_second_stream_that_breaks_down_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    with torch.no_grad():
        own = model(**inputs).logits[:, -1]
        with enhance(model, STRONG):
            usual = model(**inputs).logits[:, -1]
        fill = AvisC.other_embeds

        def broken(self: AvisC, embeds: Tensor, seq: Any) -> Tensor:
            embeds = fill(self, embeds, seq).clone()
            embeds[1] = torch.nan
            return embeds

        monkeypatch.setattr(AvisC, "other_embeds", broken)
        with enhance(model, STRONG):
            got = model(**inputs).logits[:, -1]
    assert difference(got[[0, 2]], usual[[0, 2]]) < ROUNDING
    assert difference(got[1], own[1]) < ROUNDING


def test_added_features_of_filled_tokens_go_with_them() -> None:
    """Qwen3-VL would bring the picture back in its first layers."""
    name, method = "qwen3_vl", AvisC(deviation=1000.0, beta=0.0)
    model, inputs = models.build(name), models.inputs(name, row=0)
    logits = []
    for scale in (1.0, -2.0):
        other = inputs | {"pixel_values": inputs["pixel_values"] * scale}
        with torch.no_grad():
            own = model(**other).logits[:, -1]
            with enhance(model, method):
                logits.append(2 * own - model(**other).logits[:, -1])
    assert difference(*logits) < 1e-4


def test_the_main_prompt_is_read_once_and_the_second_after_it() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    sizes: list[tuple[int, ...]] = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(
                (args or [kwargs["hidden_states"]])[0].shape[:2]
            ),
            with_kwargs=True,
        )
    )
    generate(model, inputs, STRONG, max_new_tokens=3)
    hook.remove()
    width = inputs["input_ids"].shape[1]
    assert sizes == [(3, width), (3, width), (6, 1), (6, 1)], "both decode in one batch"


@pytest.mark.parametrize("second", ["suffix", "image"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_second_turn_equals_the_reference(name: str, second: str) -> None:
    """A turn without an image chooses nothing; one with an image fills among its own tokens."""
    talk = models.conversation(name, second)
    assert disagreement_in_turns(STRONG, slow(models.build(name), STRONG), talk)[0] < ROUNDING


def test_a_prefix_cannot_be_filled_ahead() -> None:
    model = models.build("llava")
    with (
        torch.no_grad(),
        enhance(model, STRONG),
        pytest.raises(FoveateError, match=r"^avisc fills .* give whole prompts\.$"),
    ):
        prefill(model, models.inputs("llava", "prefix"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"layer_mass": 1.1}, "layer_mass must lie between 0 and 1"),
        ({"deviation": float("inf")}, "deviation"),
        ({"alpha": -1.0}, "alpha must lie between 0 and 100"),
        ({"beta": 2.0}, "beta must lie between 0 and 1"),
        ({"fill": "grey"}, "fill must be 'zeros' or 'ones' or 'noise'"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        AvisC(**parameters)
