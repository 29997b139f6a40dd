"""AD-HH: the fast path against slow full maps, its rows by hand, and where its heads come from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from foveate import FoveateError, Recorder, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.base.artifact import HEADS, Artifact
from foveate.methods import adhh
from foveate.methods.adhh import ADHH
from foveate.vlm.loading import outline
from tests import models
from tests.references import adhh as reference
from tests.references.full import disagreement

LISTED = ADHH(**ADHH.example)
VARIANTS = [
    LISTED,
    ADHH(threshold=0.5, heads=((0, 1), (0, 2), (1, 0), (2, 3), (3, 0), (3, 1))),
    ADHH(threshold=0.0, heads=((0, 0), (2, 1))),
    ADHH(threshold=0.2, heads=((0, 0), (1, 1), (1, 2), (3, 0)), layers=(1, 3)),
    ADHH(threshold=0.1, heads=((3, 0), (3, 1), (3, 2), (3, 3))),
]


def slow(model: Any, method: ADHH) -> reference.ADHH:
    return reference.ADHH(model, **method.resolve(anatomy(model)).parameters())


def rows(model: Any, inputs: dict[str, Tensor], layer: int, *stack: Any) -> Tensor:
    """(B, H, K): the weights of the prompt's last row in one layer."""
    with torch.no_grad(), enhance(model, *stack, Recorder(heads="all", layers=(layer,))):
        out = model(**inputs)
    return Recorder.read(out).values[0][:, 0]


# -- what it does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_prefill_and_decode_equal_the_reference_on_every_family(
    family: str, model: Any, kind: str
) -> None:
    full = anatomy(model).full_layers
    layer = 2 if 2 in full else full[-1]  # hybrids have other layers that see the image
    listed = dataclasses.replace(LISTED, heads=((layer, 0), (layer, 1), (layer, 3)))
    method = slow(model, listed)
    found = disagreement(listed, method, models.inputs(family, kind, batch=3))
    assert found < models.rounding(family) / 2
    assert method.cut > 0
    assert method.left > 0


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_parameter_equals_the_reference(name: str, method: ADHH) -> None:
    model, inputs = models.build(name), models.inputs(name, "images", batch=3)
    assert disagreement(method, slow(model, method), inputs) < 1e-5


def test_a_cut_row_loses_its_text_and_nothing_else() -> None:
    """By hand, in the first edited layer; the padded batch has pictures at three places."""
    model, inputs = models.build("llava"), models.inputs("llava", "images", batch=3)
    plain = rows(model, inputs, 2)
    visual = inputs["input_ids"] == models.IMAGE
    after = visual.flip(1).int().cumsum(1).flip(1) == 0
    text = plain.masked_fill(~after[:, None], 0).sum(-1)  # (B, H)
    listed = torch.tensor([True, True, False, True])
    for threshold in (0.0, float(text[0, 0]) - 1e-4, float(text[0, 0]) + 1e-4, 1.0):
        edited = rows(model, inputs, 2, dataclasses.replace(LISTED, threshold=threshold))
        cut = (text >= threshold) & listed
        want = plain.masked_fill(cut[:, :, None] & after[:, None], 0)
        assert torch.allclose(edited, want, atol=1e-6)
        assert torch.allclose(edited.sum(-1), torch.where(cut, 1 - text, 1), atol=1e-5)
        assert bool(cut[0, 0]) == (threshold < text[0, 0])


def test_layers_narrows_the_list() -> None:
    model = models.build("llava")
    pairs = ((0, 1), (1, 0), (2, 3))
    narrowed = ADHH(threshold=0.0, heads=pairs, layers=(0, 2, 4)).resolve(anatomy(model))
    assert narrowed == ADHH(threshold=0.0, heads=((0, 1), (2, 3)), layers=(0, 2))
    assert narrowed.resolve(anatomy(model)) == narrowed
    with pytest.raises(FoveateError, match=r"no listed head lies in layers=\(4,\)"):
        ADHH(threshold=0.0, heads=pairs, layers=(4,)).resolve(anatomy(model))


def test_without_heads_or_above_one_it_needs_no_list_and_is_the_plain_model() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    for method in (ADHH(threshold=1.01), ADHH(heads=()), ADHH(threshold=2.0, heads="none.json")):
        assert method.is_neutral
        with torch.no_grad():
            with enhance(model, method):
                edited = model(**inputs).logits
            assert torch.equal(edited, model(**inputs).logits)
    assert not ADHH(threshold=1.0).is_neutral


def test_only_listed_layers_leave_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, original = [], ADHH.weights

    def noted(self: ADHH, view: Any) -> Tensor:
        asked.append(view.layer)
        return original(self, view)

    monkeypatch.setattr(ADHH, "weights", noted)
    model = models.build("llava")
    with torch.no_grad(), enhance(model, ADHH(heads=((1, 0), (4, 2), (4, 3)))):
        model(**models.inputs("llava", batch=3))
    assert asked == [1, 4]


# -- published lists -------------------------------------------------------------------------------


def empty(model_type: str, text: Any, **extra: Any) -> Any:
    """A model of this configuration, without weights."""
    vision = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    cls, config = {
        "llava": (tf.LlavaForConditionalGeneration, tf.LlavaConfig),
        "llava_next": (tf.LlavaNextForConditionalGeneration, tf.LlavaNextConfig),
    }[model_type]
    config = config(text_config=text.to_dict(), vision_config=tf.CLIPVisionConfig(**vision))
    with torch.device("meta"):
        return cls(config)


def llama(width: int, layers: int, heads: int, grouped: int, vocabulary: int = 32064) -> Any:
    return tf.LlamaConfig(
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=grouped,
        vocab_size=vocabulary,
    )


@pytest.mark.parametrize(
    ("model_type", "sizes", "count", "layer_sum", "product_sum"),
    [
        ("llava", (4096, 32, 32, 32), 20, 409, 7531),
        ("llava", (5120, 40, 40, 40), 35, 746, 15262),
        ("llava_next", (7168, 60, 56, 8), 10, 425, 12859),
    ],
)
def test_published_lists_are_found_by_shape_and_complete(
    model_type: str, sizes: tuple[int, ...], count: int, layer_sum: int, product_sum: int
) -> None:
    model = empty(model_type, llama(*sizes))
    method = ADHH().resolve(anatomy(model))
    assert len(method.heads) == len(set(method.heads)) == count
    assert sum(layer for layer, _ in method.heads) == layer_sum
    assert sum(layer * head for layer, head in method.heads) == product_sum
    assert method.layers == tuple(sorted({layer for layer, _ in method.heads}))
    assert anatomy(model).shape == {
        "model_type": model_type,
        "text_model_type": "llama",
        "hidden_size": sizes[0],
        "layers": sizes[1],
        "attention_heads": sizes[2],
        "key_value_heads": sizes[3],
        "vocab_size": 32064,
    }


def test_the_first_of_each_list_is_the_authors_first() -> None:
    firsts = [entry["heads"][0] for entry in json.loads(adhh.PUBLISHED.read_text())]
    assert firsts == [[16, 29], [0, 8], [45, 34]]


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("llava_next", llama(4096, 32, 32, 32)),  # LLaVA-1.6 on Vicuna has no published list
        ("llava", llama(4096, 32, 32, 8, 128320)),  # on LLaMA-3
        ("llava", tf.MistralConfig(intermediate_size=256, num_key_value_heads=32)),
    ],
)
def test_other_models_are_refused_in_a_sentence_that_says_what_to_run(
    model_type: str, text: Any
) -> None:
    with pytest.raises(FoveateError, match=r"^adhh has no list .*`foveate heads MODEL`.*\.$"):
        ADHH().resolve(anatomy(empty(model_type, text)))


def test_the_refusal_reaches_enhance_and_leaves_the_model_alone() -> None:
    model = models.build("qwen2_5_vl")
    with pytest.raises(FoveateError, match="foveate heads MODEL"), enhance(model, "adhh"):
        pass
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_the_pocket_model_has_its_own_list() -> None:
    model = outline("pocket")
    kept = Artifact.from_pretrained(adhh.POCKET, HEADS)
    assert kept.model == anatomy(model).shape
    method = ADHH().resolve(anatomy(model))
    assert method.heads
    assert set(method.heads) == set(map(tuple, kept.tensors["heads"].tolist()))


def kept(model: Any, folder: Path, pairs: list[list[int]]) -> None:
    shape = anatomy(model).shape
    Artifact(HEADS, shape, {"heads": torch.tensor(pairs)}).save_pretrained(folder)


def test_what_foveate_heads_writes_is_read_and_belongs_to_its_model(tmp_path: Path) -> None:
    model = models.build("llava")
    kept(model, tmp_path, [[2, 3], [2, 0], [2, 1]])
    method = ADHH(threshold=0.3, heads=str(tmp_path))
    assert method.resolve(anatomy(model)) == LISTED.resolve(anatomy(model))
    with pytest.raises(FoveateError, match="belongs to another model: its model_type is llava"):
        method.resolve(anatomy(models.build("qwen2_5_vl")))
    Artifact(HEADS, anatomy(model).shape, {"heads": torch.ones(3)}).save_pretrained(tmp_path)
    with pytest.raises(FoveateError, match="is damaged: it has no heads"):
        method.resolve(anatomy(model))


def test_a_pocket_list_serves_the_pocket_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.build("llava")
    monkeypatch.setattr(adhh, "POCKET", tmp_path)
    kept(model, tmp_path, [[3, 1], [0, 2]])
    assert ADHH().resolve(anatomy(model)).heads == ((0, 2), (3, 1))
    with pytest.raises(FoveateError, match="has no list"):
        ADHH().resolve(anatomy(models.build("llava_next")))


# -- lists in files and in code --------------------------------------------------------------------


@pytest.mark.parametrize("bare", [True, False])
def test_a_file_holds_pairs_or_what_foveate_heads_writes(tmp_path: Path, bare: bool) -> None:
    model, file = models.build("llava"), tmp_path / "heads.json"
    pairs = [[2, 0], [2, 1], [2, 3]]
    whole = {"heads": pairs, "model": anatomy(model).shape, "scores": [0.3, 0.2, 0.1]}
    file.write_text(json.dumps(pairs if bare else whole))
    method = ADHH(threshold=0.3, heads=str(file))
    assert method.resolve(anatomy(model)) == LISTED.resolve(anatomy(model))
    inputs = models.inputs("llava")
    with torch.no_grad(), enhance(model, method):
        a = model(**inputs).logits
    with torch.no_grad(), enhance(model, LISTED):
        assert torch.equal(model(**inputs).logits, a)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2", "is not JSON"),
        ("3", "holds no list of \\[layer, head\\] pairs"),
        ('{"model": {}}', "holds no list"),
        ('{"heads": {"1": 2}}', "holds no list"),
        ("[[1, 2, 3]]", "holds no list"),
        ("[[1, 2.5]]", "holds no list"),
        ("[[1, true]]", "holds no list"),
        ("[[1, -1]]", "holds no list"),
        ('{"heads": [[1, 2]], "model": "llava"}', '"model" must be an object'),
        (
            '{"heads": [[1, 2]], "model": {"model_type": "llava", "hidden_size": 4096}}',
            "for another model \\(hidden_size 4096 instead of 64\\).*foveate heads MODEL",
        ),
        ("[[6, 0]]", "no head \\(6, 0\\), this model has layers 0 to 5 with heads 0 to 3"),
        ("[[0, 4]]", "no head \\(0, 4\\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "heads.json"
    file.write_text(content)
    with pytest.raises(FoveateError, match=message) as error:
        ADHH(heads=str(file)).resolve(anatomy(models.build("llava")))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path, says in (("atuo", "There is no folder 'atuo'"), (str(tmp_path), "no readable conf")):
        with pytest.raises(FoveateError, match=says):
            ADHH(heads=path).resolve(anatomy(models.build("llava")))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": -0.1}, "threshold must be 0 or more"),
        ({"heads": ((0, -1),)}, "counted from 0"),
        ({"heads": (0, 1)}, "heads must be a text or a tuple"),
        ({"heads": ((0, 1, 2),)}, "heads must be a text or a tuple"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        ADHH(**parameters)


def test_pairs_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(FoveateError, match=r"no head \(0, 9\)"):
        ADHH(heads=((0, 9),)).resolve(anatomy(models.build("llava")))
    with pytest.raises(FoveateError, match=r"layer 0 \(sliding_attention\) does not see"):
        ADHH(heads=((0, 1),)).resolve(anatomy(models.build("gemma3")))
    with pytest.raises(FoveateError, match="layer 9 does not exist"):
        ADHH(heads=((0, 1),), layers=(9,)).resolve(anatomy(models.build("llava")))


def test_a_model_without_grouped_heads_has_as_many_key_value_heads() -> None:
    text = SimpleNamespace(
        model_type="old", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model: Any = models.build("llava", fresh=True)
    model.get_decoder = lambda: SimpleNamespace(config=text)
    assert anatomy(model).shape["key_value_heads"] == 2
