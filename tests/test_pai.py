"""PAI: the boost against full maps, the guidance against whole runs without the picture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, Recorder, enhance, prefill
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat import passing
from foveate.methods.clvs import CLVS
from foveate.methods.pai import PAI
from foveate.methods.vcd import VCD
from tests import models
from tests.references import clvs, vcd
from tests.references import pai as reference
from tests.references.full import difference, disagreement, disagreement_in_turns

STRONG = {"alpha": 1.0, "gamma": 1.3}


def slow(model: Any, method: PAI) -> reference.PAI:
    return reference.PAI(model, **method.resolve(anatomy(model)).parameters())


def generate(model: Any, inputs: dict[str, Tensor], *stack: Any, **options: Any) -> Any:
    with torch.no_grad(), enhance(model, *stack):
        return model.generate(
            **inputs,
            max_new_tokens=5,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    method = PAI(**STRONG)
    found = disagreement(method, slow(model, method), models.inputs(family, kind, batch=3))
    # weighted sums of experts
    assert found < (4e-5 if family.endswith("_moe") else models.rounding(family) / 2)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"alpha": 0.0},
        {"gamma": 1.0},
        {"boost_first_token": False},
        {"gamma": 1.0, "boost_first_token": False},
        {"plausibility": 0.0},
        {"plausibility": 1.0},
        {"gamma": 0.5, "layers": (0, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, parameters: dict[str, Any]) -> None:
    model, method = models.build(name), PAI(**parameters)
    inputs = models.inputs(name, "mixed", batch=3)
    assert disagreement(method, slow(model, method), inputs) < 1e-5


# -- the boost -------------------------------------------------------------------------------------


def test_the_published_layers_are_boosted() -> None:
    assert PAI().resolve(anatomy(models.build("internvl"))).layers == (0, 1, 2, 3)
    assert PAI().resolve(anatomy(models.build("gemma3"))).layers == (2, 5), "no sliding ones"
    assert PAI(layers=(1,)).resolve(anatomy(models.build("llava"))).layers == (1,)


def test_the_boost_raises_the_image_share_of_every_head() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    rows = []
    for method in ("vanilla", PAI(gamma=1.0, layers=(0,))):
        with torch.no_grad(), enhance(model, method, Recorder(heads="all", layers=(0,))):
            rows.append(Recorder.read(model(**inputs)).values[0])
    visual = (inputs["input_ids"] == models.IMAGE)[:, None, None]
    before, after = ((row * visual).sum(-1) for row in rows)
    assert (after > before).all()


def test_without_the_first_token_the_prompt_is_plain_and_decoding_is_not() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    plain = generate(model, inputs)
    late = generate(model, inputs, PAI(alpha=2.0, gamma=1.0, boost_first_token=False))
    assert difference(late.logits[0], plain.logits[0]) < 1e-5
    assert difference(late.logits[1], plain.logits[1]) > 1e-2


# -- the guidance ----------------------------------------------------------------------------------


def seen(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the second stream of a prompt is given."""
    given: dict[str, Any] = {}

    class Spy(PAI, register=False):
        def contrast(self, prompt: Any, seq: Any) -> Any:
            other = super().contrast(prompt, seq)
            if other is not None:
                given.update(models.as_inputs(other))
            return other

    with torch.no_grad(), enhance(model, Spy()):
        model(**inputs)
    return given


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_the_second_prompt_is_the_text_left_padded_again(
    family: str, model: Any, kind: str
) -> None:
    given = seen(model, models.inputs(family, kind, batch=3))
    assert set(given) == {"input_ids", "attention_mask"}
    ids, mask, texts = given["input_ids"], given["attention_mask"], []
    for row in range(3):
        tokens = models.inputs(family, kind, row=row)["input_ids"][0]
        texts.append(tokens[tokens != models.IMAGE])
        assert torch.equal(ids[row][mask[row] == 1], texts[-1])
        assert bool((mask[row].diff() >= 0).all()), "padding comes first"
    assert ids.shape == mask.shape == (3, max(map(len, texts)))
    assert mask.dtype == torch.long
    assert not (ids == models.IMAGE).any()


def test_embedded_prompts_lose_their_image_tokens_alike() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.get_input_embeddings()(ids)
    kinds = (ids == models.IMAGE).long()
    with torch.no_grad(), enhance(model, PAI(**STRONG)):
        got = model(inputs_embeds=embeds, attention_mask=mask, mm_token_type_ids=kinds).logits
    with torch.no_grad(), enhance(model, PAI(alpha=1.0, gamma=1.0)):
        own = model(inputs_embeds=embeds, attention_mask=mask, mm_token_type_ids=kinds).logits
    for row in range(3):
        text = ids[row][(mask[row] == 1) & (ids[row] != models.IMAGE)]
        with torch.no_grad():
            unseen = model(input_ids=text[None]).logits[0, -1].log_softmax(-1)
        p = own[row, -1].log_softmax(-1)
        expected = (1.3 * p - 0.3 * unseen).masked_fill(p.exp() < 0.1 * p.exp().max(), -torch.inf)
        assert difference(got[row, -1], expected) < 1e-5


def test_guidance_off_has_no_second_stream() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    calls: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(lambda module, args: calls.append(1))
    generate(model, inputs, PAI(gamma=1.0))
    once = len(calls)
    generate(model, inputs, PAI(alpha=0.0))
    hook.remove()
    assert (once, len(calls) - once) == (5, 6), "one more for the second prompt, none per token"


@pytest.mark.parametrize("pieces", [["wide"], [2, "wide"]], ids=["image", "text and image"])
def test_a_shared_prefix_of_image_tokens_leaves_the_second_stream_nothing(pieces: Any) -> None:
    """Also of a prefix that is nothing but a picture, without even a start token."""
    model, method = models.build("llava"), PAI(**STRONG)
    ids, tensors = models._picture("llava", "wide", True)
    start = [20, 21] if len(pieces) > 1 else []
    prefix = {"input_ids": torch.tensor([start + ids]), **tensors}
    prefix["attention_mask"] = torch.ones_like(prefix["input_ids"])
    suffix = torch.tensor([[30, 31, 32]])
    with torch.no_grad(), enhance(model, method):
        cache = prefill(model, prefix)
        fork = copy.deepcopy(cache)
        got = [model(input_ids=suffix, **passing(model, fork)).logits[:, -1]]
        for token in (40, 41):
            one = torch.tensor([[token]])
            got.append(model(input_ids=one, **passing(model, fork)).logits[:, -1])
    whole = dict(prefix, input_ids=torch.cat([prefix["input_ids"], suffix], 1))
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    steps = slow(model, method).run(whole, steps=3, tokens=torch.tensor([[40, 41]]))
    for a, b in zip(got, steps, strict=True):
        assert difference(a, b.logits) < 1e-5


@pytest.mark.parametrize("second", ["suffix", "image"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_a_second_turn_equals_the_reference(name: str, second: str) -> None:
    method = PAI(**STRONG)
    # the sliding windows of Gemma3 count padding between turns, of which one stream has less
    talk = models.conversation(name, second, alone=name == "gemma3")
    assert disagreement_in_turns(method, slow(models.build(name), method), talk)[0] < 1e-5


# -- with others -----------------------------------------------------------------------------------


def test_two_owners_of_the_second_stream_are_refused_and_one_is_not() -> None:
    model = models.build("llava")
    with (
        pytest.raises(FoveateError, match="both want the second stream"),
        enhance(model, "vcd+pai"),
    ):
        pass
    with enhance(model, "vcd+pai(gamma=1)"), torch.no_grad():
        model(**models.inputs("llava"))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_vcd_contrasts_the_boosted_stream_with_a_plain_noised_one(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, "image", row=0)
    boost = PAI(alpha=1.0, gamma=1.0)
    with torch.no_grad(), enhance(model, boost):
        true = model(**inputs).logits[0, -1]
    _, picture = models._picture(name, "wide", True)
    noisy = inputs | vcd.noised(picture, 500, 0, False)
    expected = vcd.contrasted(true, vcd.plain(model, noisy, torch.tensor([]).long()), 1.0, 0.1)
    for stack in ((VCD(), boost), (boost, VCD())):
        with torch.no_grad(), enhance(model, *stack):
            assert difference(model(**inputs).logits[0, -1], expected) < 1e-5


@pytest.mark.parametrize("kind", ["images", "mixed"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_clvs_smooths_what_pai_boosted(name: str, kind: str) -> None:
    """On full maps: scores at unified positions, then the boost, then the memory of weights."""

    class Both(clvs.Reference):
        def scores(self, layer: int, sample: int, z: Tensor) -> Tensor:
            z, image = super().scores(layer, sample, z), self.image[sample]
            z[:, :, image] += z[:, :, image].abs()
            return z

    model, inputs = models.build(name), models.inputs(name, kind, batch=3)
    smooth = CLVS(smoothing=0.5, beta=0.7, stop_threshold=0.0)
    out = generate(model, inputs, smooth, PAI(alpha=1.0, gamma=1.0))
    slowly = Both(model, clvs.Parameters(smoothing=0.5, beta=0.7, stop_threshold=0.0))
    steps = slowly.run(inputs, 5, tokens=out.sequences[:, inputs["input_ids"].shape[1] : -1])
    for got, want in zip(out.logits, steps, strict=True):
        assert difference(got, want.logits) < 1e-5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -0.1}, "alpha must be 0 or more"),
        ({"gamma": -1.0}, "gamma must be 0 or more"),
        ({"plausibility": 2.0}, "plausibility must lie between 0 and 1"),
        ({"boost_first_token": "no"}, "boost_first_token must be True or False"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        PAI(**parameters)
