"""DeCo against the plain model's own states, one prompt at a time."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from foveate import FoveateError, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.methods.deco import DeCo
from tests import models
from tests.references import deco as reference
from tests.references.full import difference, generate


def compare(name: str, kind: str, method: DeCo) -> tuple[float, set[tuple[int, int]]]:
    """A padded batch of three against the reference; what the reference chose."""
    model, inputs = models.build(name), models.inputs(name, kind, batch=3)
    out = generate(model, inputs, method)
    tokens, logits = out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)
    values = method.resolve(anatomy(model)).parameters()
    if values["layers"] is None:
        values["layers"] = ()
    worst, choices = 0.0, set()
    for row in range(3):
        prompt = models.inputs(name, kind, row=row)
        expected, chosen = reference.run(model, prompt, tokens[row, :-1], **values)
        worst = max(worst, difference(logits[row], expected))
        choices |= set(chosen)
    return worst, choices


@pytest.mark.parametrize("kind", ["image", "images", "mixed", "text"])
def test_prefill_and_decode_equal_the_reference_on_every_family(family: str, kind: str) -> None:
    depth = models.build(family).get_decoder().config.num_hidden_layers
    worst, choices = compare(family, kind, DeCo(layers=tuple(range(1, depth)), top_p=0.2))
    assert worst < models.rounding(family) / 2
    assert len({layer for layer, _ in choices}) > 1, "samples and steps choose for themselves"
    assert len({count for _, count in choices}) > 1


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"alpha": 0.0},
        {"alpha": 3.0, "layers": (2,)},
        {"top_p": 0.0},
        {"top_p": 1.0, "top_k": 0},
        {"top_k": 1},
        {"top_k": 5, "layers": (3, 0, 1)},
        {"top_k": 1000, "top_p": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    assert compare(name, "mixed", DeCo(**parameters))[0] < 1e-5


def fake(depth: int) -> Any:
    """What `resolve` asks of a model."""
    return SimpleNamespace(depth=depth, kind="fake", layer_kinds=("full_attention",) * depth)


@pytest.mark.filterwarnings("error")
def test_the_published_layers_are_numbers_of_what_enters() -> None:
    assert DeCo().resolve(fake(32)).layers == tuple(range(20, 29))
    assert DeCo().resolve(fake(28)).layers == tuple(range(20, 29)), "28 enters the final norm"
    assert DeCo().resolve(fake(16)).layers == tuple(range(10, 15))
    assert DeCo(layers=(6, 2)).resolve(anatomy(models.build("llava"))).layers == (2, 6)
    with pytest.raises(FoveateError, match=r"layer 7 does not exist, this model has layers 0 to 6"):
        DeCo(layers=(7,)).resolve(anatomy(models.build("llava")))


def test_the_final_norms_input_gives_back_the_models_own_logits(family: str, model: Any) -> None:
    """With it alone the logits are (1 + alpha p*) l on the candidates."""
    depth = model.get_decoder().config.num_hidden_layers
    inputs = models.inputs(family, batch=3)
    with torch.no_grad():
        own = model(**inputs).logits[:, -1]
        with enhance(model, DeCo(alpha=0.7, layers=(depth,), top_p=2.0, top_k=0)):
            got = model(**inputs).logits[:, -1]
    assert difference(got, (1 + 0.7 * own.softmax(-1).amax(-1, keepdim=True)) * own) < 1e-5


def test_states_without_the_norm_would_be_seen() -> None:
    model, prompt = models.build("llava"), models.inputs("llava")
    values = {"layers": (3, 4), "alpha": 2.0, "top_p": 2.0, "top_k": 0}
    right, wrong = (
        reference.run(model, prompt, torch.tensor([]).long(), **values, norm=norm)[0]
        for norm in (True, False)
    )
    assert difference(right, wrong) > 1e-2


def test_at_least_one_token_is_left() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    with torch.no_grad(), enhance(model, DeCo(top_p=0.0)):
        left = model(**inputs).logits[:, -1].isfinite().sum(-1)
    assert left.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -1.0}, "alpha must lie between 0 and 100"),
        ({"top_p": 2.5}, "top_p must lie between 0 and 2"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"layers": ()}, "layers is empty"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        DeCo(**parameters).resolve(anatomy(models.build("llava")))


# -- what models do behind their unembedding -------------------------------------------------------


class Changed(tf.LlavaForConditionalGeneration):
    """A LLaVA whose logits are changed at the end, as Gemma 3n, Granite or others do."""

    change: Any = None

    @functools.wraps(tf.LlavaForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


def changed(change: Any, cap: float | None = None) -> Any:
    model: Any = models.build("llava", fresh=True)
    model.__class__, model.change = Changed, change
    model.config.text_config.final_logit_softcapping = cap
    return model


@pytest.mark.parametrize(
    ("change", "cap"),
    [
        (lambda x: 2.0 * torch.tanh(x / 2.0), 2.0),
        (lambda x: x / 8, None),
        (lambda x: x * 0.25, 30.0),
        (lambda x: x, 30.0),
    ],
    ids=["cap", "divided", "multiplied", "named but not done"],
)
def test_the_models_scaling_or_cap_belongs_to_its_head(change: Any, cap: float | None) -> None:
    model, inputs = changed(change, cap), models.inputs("llava", batch=3)
    with torch.no_grad():
        own = model(**inputs).logits[:, -1]
        with enhance(model, DeCo(alpha=0.7, layers=(6,), top_p=2.0, top_k=0)):
            got = model(**inputs).logits[:, -1]
    assert difference(got, (1 + 0.7 * own.softmax(-1).amax(-1, keepdim=True)) * own) < 1e-5


def test_logits_changed_in_another_way_are_refused() -> None:
    model = changed(lambda x: x.abs())
    with (
        pytest.raises(FoveateError, match=r"^Changed changes its logits .* no inner states\.$"),
        enhance(model, "deco"),
    ):
        pass
