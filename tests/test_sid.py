"""SID against a second stream on full maps, and the wrong variants that this would show."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, enhance, prefill
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.attention import _hiding
from foveate.backends.transformers.compat import cache_of, passing
from foveate.methods.pai import PAI
from foveate.methods.sid import SID
from tests import models
from tests.references import sid as reference
from tests.references.full import (
    difference,
    disagreement,
    disagreement_in_turns,
    generate,
)
from tests.test_engine import beam_error

ROUNDING = 2e-5  # the contrast multiplies that of l and l'
STRONG = SID(**SID.example)


def slow(model: Any, method: SID, **wrong: Any) -> reference.SID:
    return reference.SID(model, **method.resolve(anatomy(model)).parameters(), **wrong)


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    method = slow(model, STRONG)
    assert disagreement(STRONG, method, models.inputs(family, kind, batch=3)) < ROUNDING
    assert any(a != b for a, b in zip(method.choices, method.choices[1:], strict=False))


@pytest.mark.parametrize(
    "method",
    [
        SID(),
        SID(keep=1, alpha=2.0, beta=0.01),
        SID(keep=0.3, beta=0.0),
        SID(keep=0.01, beta=0.0),
        SID(keep=5, layers=(3,)),
        SID(alpha=0.0, beta=0.4),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, method: SID) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    found = slow(model, SID(keep=1) if method.alpha == 0 else method)
    found.alpha, found.beta = method.alpha, method.beta
    assert disagreement(method, found, inputs) < ROUNDING


@pytest.mark.parametrize("wrong", ["once", "last row", "largest"])
def test_the_wrong_variants_would_be_seen(wrong: Any) -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    assert disagreement(STRONG, slow(model, STRONG, wrong=wrong), inputs) > 1e-2


def test_who_keeps_every_token_is_the_plain_model_under_the_cut() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", "mixed", batch=3)
    with torch.no_grad():
        own = model(**inputs).logits[:, -1]
        for method in (SID(keep=1000), SID(alpha=0.0)):
            with enhance(model, method):
                got = model(**inputs).logits[:, -1]
            p = own.softmax(-1)
            cut = own.masked_fill(p < 0.1 * p.amax(-1, keepdim=True), -torch.inf)
            cut[1] = own[1]  # without an image
            assert difference(got, cut) < ROUNDING


def test_keys_up_to_the_first_hiding_layer_are_those_of_the_main_stream() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    method = SID(keep=2, layers=(3,))
    with torch.no_grad(), enhance(model, method):
        cache = cache_of(model(**inputs))
    real, same = inputs["attention_mask"].bool()[:, None, :, None], []
    for mine, other in zip(cache.layers, cache.foveate.other.cache.layers, strict=True):
        same.append(bool(torch.where(real, mine.keys - other.keys, 0).abs().max() < 1e-5))
    assert same == [True] * 4 + [False] * 2


def test_the_lowest_layer_decides() -> None:
    llava = anatomy(models.build("llava"))
    assert SID().resolve(llava).layers == (1, 2, 3, 4, 5), "below the first there is none"
    assert SID(layers=(3,)).resolve(llava).layers == (3, 4, 5)
    assert SID(layers=(5, 3)).resolve(llava) == SID(layers=(3,)).resolve(llava)
    resolved = SID(layers=(3,)).resolve(llava)
    assert resolved.resolve(llava) == resolved
    with pytest.raises(FoveateError, match=r"below layer 0 no layer .* layers=\(N,\)"):
        SID(layers=(0, 1)).resolve(llava)
    gemma = anatomy(models.build("gemma3"))
    with pytest.warns(UserWarning, match="only 2, 5 see the whole image"):
        found = SID().resolve(gemma)
    assert found.layers == (5,)
    assert found.other_layers(gemma) == ((2,), (5,))


def test_the_second_stream_is_read_once_and_hidden_in_every_layer_above(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the prompt, and in decode steps that both streams share."""
    calls: Counter[str] = Counter()
    for stage in ("other_row", "other_hidden"):
        original = getattr(SID, stage)

        def counted(self: SID, *args: Any, _stage: str = stage, _call: Any = original) -> Any:
            calls[_stage] += 1
            return _call(self, *args)

        monkeypatch.setattr(SID, stage, counted)
    model, inputs = models.build("llava"), models.inputs("llava", "mixed", batch=3)
    generate(model, inputs, SID(keep=2, layers=(3,)), max_new_tokens=4)
    assert calls == {"other_row": 4, "other_hidden": 3 * 4}


def test_hiding_leaves_every_row_something_to_see() -> None:
    hidden = torch.tensor([[True, False, True], [False, False, False]])[:, None, None]
    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    first, second = _hiding(causal, hidden)[:, 0]
    assert torch.equal(second, causal[0, 0])
    assert torch.equal(first, torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0]]).bool())
    assert torch.equal(_hiding(None, hidden), ~hidden)
    added = torch.zeros(1, 1, 1, 3)
    assert torch.equal(_hiding(added, hidden) == 0, ~hidden)


def test_a_prefix_cannot_be_filled_ahead() -> None:
    model = models.build("llava")
    with (
        torch.no_grad(),
        enhance(model, STRONG),
        pytest.raises(FoveateError, match=r"^sid hides .* give whole prompts\.$"),
    ):
        prefill(model, models.inputs("llava", "prefix"))


@pytest.mark.parametrize("second", ["suffix", "image"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_second_turn_equals_the_reference(name: str, second: str) -> None:
    talk = models.conversation(name, second)
    assert disagreement_in_turns(STRONG, slow(models.build(name), STRONG), talk)[0] < ROUNDING


def test_beams_are_those_of_a_reference_fed_their_tokens() -> None:
    """The best beam's score is what a greedy reference gives its tokens."""
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    if beam_error(model, inputs, None) > 5e-5:
        pytest.skip("this transformers mixes the pictures of a prompt among its beams, without us")
    with torch.no_grad(), enhance(model, STRONG):
        out = model.generate(
            **inputs,
            max_new_tokens=5,
            num_beams=3,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    steps = slow(model, STRONG).run(inputs, steps=5, tokens=tokens[:, :-1])
    logs = torch.stack([step.logits.log_softmax(-1) for step in steps], 1)
    total = logs.gather(2, tokens[..., None])[..., 0].sum(1)
    assert torch.allclose(out.sequences_scores * 5, total, atol=1e-4)


def test_a_fork_goes_on_by_itself() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    tokens = torch.tensor([[40], [50], [60]])
    with torch.no_grad(), enhance(model, STRONG):
        cache = cache_of(model(**inputs))
        fork = copy.deepcopy(cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": tokens, "attention_mask": mask}
        a, b = (model(**step, **passing(model, side)).logits[:, -1] for side in (cache, fork))
    want = slow(model, STRONG).run(inputs, steps=2, tokens=tokens)[1].logits
    assert torch.equal(a, b)
    assert difference(a, want) < ROUNDING


def test_pai_boosts_the_main_stream_alone() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    boost = PAI(alpha=1.0, gamma=1.0)
    logits = [generate(model, inputs, *stack, max_new_tokens=1).logits[0] for stack in (
        (), (boost,), (STRONG,), (boost, STRONG),
    )]  # fmt: skip
    plain, boosted, contrasted, both = logits
    other = 2 * plain - contrasted  # alpha is 1 and nothing is cut
    assert difference(both, 2 * boosted - other) < 1e-4


def test_a_static_cache_hides_the_same() -> None:
    model, inputs = models.build("qwen2_5_vl"), models.inputs("qwen2_5_vl", "mixed", batch=3)
    out = generate(model, inputs, STRONG, cache_implementation="static")
    tokens = out.sequences[:, inputs["input_ids"].shape[1] : -1]
    steps = slow(model, STRONG).run(inputs, len(out.logits), tokens=tokens)
    for got, want in zip(out.logits, steps, strict=True):
        assert difference(got, want.logits) < ROUNDING


def test_an_image_with_nothing_before_it_leaves_no_row_blind() -> None:
    """The first image token would see only itself; where it is hidden it still does."""
    model = models.build("llava")
    ids, tensors = models._picture("llava", "square", True)
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([[*ids, 30, 31, 32]]), **tensors}
    with torch.no_grad(), enhance(model, STRONG):
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -0.1}, "alpha must lie between 0 and 100"),
        ({"beta": 1.5}, "beta must lie between 0 and 1"),
        ({"keep": 0}, "keep must be a number of tokens, or a share"),
        ({"keep": 2.5}, "keep must be a number of tokens, or a share"),
        ({"keep": float("nan")}, "keep"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        SID(**parameters)
