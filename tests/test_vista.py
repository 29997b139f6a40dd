"""VISTA: directions from passes ahead, the turn of every row, and the late layers' logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, enhance, prefill
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import cache_of, passing
from foveate.core import turned
from foveate.methods.vista import VISTA
from tests import models
from tests.references import vista as reference
from tests.references.full import difference, disagreement, disagreement_in_beams

STRONG = VISTA(steering=0.5, logit_mix=0.3)
TURNING = VISTA(steering=0.5, logit_mix=0.0)
MIXING = VISTA(steering=0.0, logit_mix=0.5)


def alone(name: str, kind: str, batch: int = 3) -> list[dict[str, Tensor]]:
    return [models.inputs(name, kind, row=row) for row in range(batch)]


def slow(
    model: Any, method: VISTA, prompts: list[dict[str, Tensor]], kind: Any = reference.VISTA
) -> reference.VISTA:
    return kind(model, **method.resolve(anatomy(model)).parameters(), alone=prompts)


def compare(name: str, kind: str, method: VISTA, reading: Any = reference.VISTA) -> float:
    model = models.build(name)
    slowly = slow(model, method, alone(name, kind), reading)
    return disagreement(method, slowly, models.inputs(name, kind, batch=3))


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(family: str, kind: str) -> None:
    assert compare(family, kind, STRONG) < 1e-5


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"logit_mix": 0.0},
        {"steering": 0.0},
        {"logit_mix": 1.0},
        {"logit_layers": (0, 2)},
        {"logit_layers": (3,), "logit_mix": 0.9},
        {"steering": 2.0, "pca_offset": 1.0},
        {"steering": 0.7, "layers": (1, 3), "logit_mix": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    assert compare(name, "mixed", VISTA(**parameters)) < 1e-5


def test_the_last_layer_is_normed_and_others_are_not() -> None:
    last = VISTA(steering=0.0, logit_mix=1.0, logit_layers=(5,))
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1]
        with enhance(model, last):
            assert difference(model(**inputs).logits[:, -1], plain) < 1e-5


class Wrong:
    """Readings of the paper that the comparison must tell from the right one."""

    class NoCosine(reference.VISTA):
        def factor(self, x: Tensor, v: Tensor) -> float:
            return 1.0

    class Towards(reference.VISTA):
        def factor(self, x: Tensor, v: Tensor) -> float:
            return super().factor(x, -v)

    class LastRow(reference.VISTA):
        def steer(self, layer: int, out: Tensor) -> Tensor:
            return torch.cat([out[:, :-1], super().steer(layer, out)[:, -1:]], 1)

    class PromptOnly(reference.VISTA):
        def steer(self, layer: int, out: Tensor) -> Tensor:
            return out if self.phase == "decode" else super().steer(layer, out)

    class Entering(reference.VISTA):
        def direction(self, prompt: dict[str, Tensor]) -> list[Tensor] | None:
            v = super().direction(prompt)
            return v and [v[0], *v[:-1]]

    class Normed(reference.VISTA):
        def logits(self, logits: Tensor) -> Tensor:
            self.left = {j: self.decoder.norm(state) for j, state in self.left.items()}
            return super().logits(logits)


@pytest.mark.parametrize(
    "wrong", ["NoCosine", "Towards", "LastRow", "PromptOnly", "Entering", "Normed"]
)
def test_wrong_readings_are_told_apart(wrong: str) -> None:
    assert compare("llava", "image", STRONG, getattr(Wrong, wrong)) > 1e-2


# -- the direction ---------------------------------------------------------------------------------


def test_the_passes_ahead_are_plain_and_independent_of_the_steering() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "mixed", batch=3)
    states = []
    for method in (VISTA(steering=0.1), VISTA(steering=3.0, layers=(0,), logit_mix=0.0)):
        with torch.no_grad(), enhance(model, method):
            states.append(cache_of(model(**inputs)).foveate.ahead)
    assert [tuple(t.shape) for t in states[0]] == [(3, 6, 64)] * 2
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    for row, prompt in enumerate(alone("llava", "mixed")):
        for layer, want in enumerate(reference.leaving(model, prompt)):
            assert difference(states[0][0][row, layer], want) < 1e-5


def test_two_passes_go_ahead_of_the_prompt_and_none_of_a_step() -> None:
    model, calls = models.build("llava"), []
    handle = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    for method in (STRONG, MIXING):
        with torch.no_grad(), enhance(model, method):
            model.generate(**models.inputs("llava", batch=3), max_new_tokens=4)
    handle.remove()
    assert len(calls) == (2 + 4) + 4


def test_a_turn_keeps_the_length_of_every_row() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator) * torch.arange(5)[:, None]
    v = torch.randn(2, 1, 16, generator=generator)
    out = turned(x, v, 0.7)
    assert torch.allclose(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    before, after = (torch.cosine_similarity(t, v, -1)[:, 1:] for t in (x, out))
    assert (after > before).all()
    assert torch.allclose(turned(x, torch.zeros_like(v), 0.7), x, atol=1e-6)


def test_beams_keep_their_direction() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "image", batch=2)
    prompts = alone("llava", "image", 2)
    queue = iter([prompts[:1]] + [[p] for p in prompts])  # the first only names the model
    worst = disagreement_in_beams(STRONG, lambda: slow(model, STRONG, next(queue)), inputs, prompts)
    assert worst < 1e-5


# -- turns and prefixes ----------------------------------------------------------------------------


def in_turns(model: Any, pieces: list[dict[str, Tensor]], method: VISTA) -> list[Tensor]:
    rows, cache = [], None
    with torch.no_grad(), enhance(model, method):
        for piece in pieces:
            out = model(**piece, **passing(model, cache), use_cache=True)
            cache = cache_of(out)
            rows.append(out.logits[:, -1])
    return rows


@pytest.mark.filterwarnings("ignore:The prompt has no image")
def test_an_image_in_a_later_turn_begins_the_steering() -> None:
    """Nothing before it was steered, so its direction is that of the whole prompt."""
    model = models.build("llava")
    whole = models.inputs("llava", "image", row=1)  # seven words, then the picture
    text, rest = whole["input_ids"][:, :6], {**whole, "input_ids": whole["input_ids"][:, 6:]}
    del rest["attention_mask"]

    class Late(reference.VISTA):
        def steer(self, layer: int, out: Tensor) -> Tensor:
            return out if self.past == 0 else super().steer(layer, out)

    slowly = slow(model, TURNING, [whole], Late)
    want = [slowly.forward({"input_ids": text}).logits, slowly.forward(dict(rest)).logits]
    got = in_turns(model, [{"input_ids": text}, rest], TURNING)
    assert max(difference(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_a_later_turn_keeps_the_direction_of_the_first() -> None:
    model, first = models.build("llava"), models.inputs("llava", "image", row=0)
    more = models.inputs("llava", "image", row=1)
    del more["attention_mask"]
    slowly = slow(model, TURNING, [first])
    want = [slowly.forward(dict(piece)).logits for piece in (first, more)]
    got = in_turns(model, [first, more], TURNING)
    assert max(difference(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_a_shared_prefix_is_refused_with_steering_only() -> None:
    model, prefix = models.build("llava"), models.inputs("llava", "prefix")
    with enhance(model, STRONG), pytest.raises(FoveateError, match="ask without prefill"):
        prefill(model, prefix)
    with enhance(model, MIXING):
        prefill(model, prefix)
    assert MIXING.shares_prefix
    assert not STRONG.shares_prefix


def test_without_an_image_the_logits_are_mixed_and_nothing_is_steered() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "text", batch=3)
    with torch.no_grad():
        with enhance(model, STRONG):
            both = model(**inputs).logits
        with enhance(model, VISTA(steering=0.0, logit_mix=0.3)):
            assert torch.equal(model(**inputs).logits, both)
        assert not torch.equal(model(**inputs).logits, both)


def test_the_published_layers() -> None:
    found = VISTA().resolve(anatomy(models.build("llava")))
    assert (found.layers, found.logit_layers) == (tuple(range(6)), (4, 5))
    assert VISTA(logit_layers=(3, 1)).resolve(anatomy(models.build("llava"))).logit_layers == (1, 3)
    with pytest.raises(FoveateError, match="there is no layer 6 for logit_layers"):
        VISTA(logit_layers=(6,)).resolve(anatomy(models.build("llava")))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steering": -0.1}, "steering must be 0 or more"),
        ({"logit_mix": 1.1}, "logit_mix must lie between 0 and 1"),
        ({"logit_layers": ()}, "logit_layers must name at least one"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        VISTA(**parameters)
