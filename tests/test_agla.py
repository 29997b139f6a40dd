"""AGLA: masks against dense matrices, maps against full attention, and both streams by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from foveate import FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.enhance import attach
from foveate.base.form import permit
from foveate.core.method import as_stack, parse
from foveate.families.layout import together
from foveate.methods.agla import AGLA, hidden, kept
from foveate.methods.ritual import RITUAL
from foveate.vlm import look, match
from foveate.vlm.chat import Chat
from foveate.vlm.prefix import prepare
from tests import models, tiny
from tests.references import agla as reference
from tests.references import laser
from tests.references import ritual as streams
from tests.references.full import difference
from tests.test_ritual import ROUNDING, SIZES, changed, disagreement, generate, picture

PIXELS = 384 * 384
ASKED = ["is there a cat ?", "w40 w41 w42", "red"]


def relevance(seed: int, rows: int = 24, cols: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.5, size=(rows, cols))


# -- the mask --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "shape", "score", "box"),
    [
        (0, (24, 24), 0.6, (0.0, 0.0, 1.0, 1.0)),
        (1, (24, 24), 1.0, (0.0, 0.0, 1.0, 1.0)),
        (2, (6, 9), 0.3, (0.125, 0.0, 0.875, 1.0)),
        (3, (4, 4), 0.8, (0.0, -0.25, 1.0, 1.25)),
    ],
)
def test_the_mask_equals_dense_matrices(
    seed: int, shape: tuple[int, int], score: float, box: tuple[float, float, float, float]
) -> None:
    """Another spline or another border changes 0.2 % of the pixels and more."""
    r = relevance(seed, *shape)
    fast, slow = kept(r, score, box), reference.mask(r, score, box)
    assert (fast != slow).sum() <= 2, "but for ties of rounding"
    assert fast.sum() == pytest.approx(int(PIXELS * (1 - score / 2)) + 1, abs=2)
    wrong = [np.flip(fast, 0), kept(r, score / 2, box), kept(r**2, score, box)]
    assert all((other != slow).mean() > 0.002 for other in wrong)


@pytest.mark.parametrize("score", [0.0, -0.3, -1.0])
def test_without_a_match_all_but_one_pixel_stay(score: float) -> None:
    assert kept(relevance(0), score).sum() == PIXELS - 1


def test_a_constant_map_keeps_everything() -> None:
    assert kept(np.full((24, 24), 0.3), 1.0).all()


def test_a_better_match_keeps_less() -> None:
    shares = [kept(relevance(0), c).mean() for c in (0.2, 0.5, 0.9)]
    assert shares == pytest.approx([0.9, 0.75, 0.55], abs=1e-4)


def test_hidden_pixels_are_black_and_the_others_stay() -> None:
    image, mask = picture(0, 60, 90), kept(relevance(1), 0.9)
    square = np.asarray(hidden(image, mask, square=True))
    assert np.array_equal(square, reference.masked(image, mask))
    own = hidden(image, mask, square=False)
    assert own.size == image.size
    black, before = (np.asarray(own) == 0).all(2), np.asarray(image)
    assert np.array_equal(np.asarray(own)[~black], before[~black])
    assert black.mean() == pytest.approx(1 - mask.mean(), abs=0.02)


# -- the model's own reading -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_own_maps_and_scores_equal_full_attention(name: str) -> None:
    vlm, image = tiny.vlm(name), picture(0, *SIZES[name])
    method: Any = AGLA().resolve(anatomy(vlm.model))
    where = vlm.grids(Chat([image], "red"))
    general = laser.attention(vlm, [image], look.GENERAL + look.SHORT, None)
    texts = [*ASKED, look.GENERAL + look.SHORT]
    found = vlm.rewrite([Chat([image], text) for text in texts], as_stack(AGLA()))
    shares = set()
    for chat in found:
        suffix = "" if chat.text.endswith(look.SHORT) else look.SHORT
        asked = laser.attention(vlm, [image], chat.text + suffix, None)
        maps = [
            together(where, torch.stack([full[i].mean(0) for i in method.layers]).mean(0))
            for full in (asked, general)
        ]
        (a, box), (g, _) = maps
        score = reference.moved(a.flatten().tolist(), g.flatten().tolist())
        (note,) = chat.notes["matches"]
        assert note["score"] == pytest.approx(score, abs=1e-4)
        mask = kept((a / g).double().numpy(), note["score"], box)
        if suffix:
            assert note["kept"] == pytest.approx(mask.mean(), abs=1e-4)
            assert chat.contrast is not None
            want = np.asarray(hidden(image, mask, name == "llava"))
            assert (np.asarray(chat.contrast[0]) != want).any(2).mean() < 1e-3
        else:
            assert (note["score"], note["kept"]) == (0, 1), "the instruction itself moves nothing"
        shares.add(note["kept"])
    assert len(shares) == len(texts), "questions keep different parts"
    panels = found[0].notes["chain"].panels
    assert [panel.title[:9] for panel in panels] == ["relevance", "what the "]


def test_each_of_several_pictures_is_masked_on_its_own() -> None:
    vlm, images = tiny.vlm(), [picture(0), picture(1)]
    (both,) = vlm.rewrite([Chat(images, "red")], as_stack("agla"))
    assert both.contrast is not None
    for i, image in enumerate(images):
        (alone,) = vlm.rewrite([Chat([image], "red")], as_stack("agla"))
        assert alone.contrast is not None
        assert alone.contrast[0].tobytes() == both.contrast[i].tobytes()
        assert alone.notes["matches"] == both.notes["matches"][i : i + 1]
    assert len({m["score"] for m in both.notes["matches"]}) == 2


def test_questions_do_not_share_a_prefix_but_a_batch() -> None:
    vlm, stack, images = tiny.vlm(), as_stack("agla(beta=0.0)"), [picture()]
    chats = vlm.rewrite([Chat(images, text) for text in ASKED], stack)
    assert prepare(vlm, chats, stack) is None
    batch = vlm.answer(chats, stack, 6)
    for chat, answer in zip(chats, batch, strict=True):
        alone = vlm.answer([chat], stack, 6)[0]
        assert answer.tokens == alone.tokens
        assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-4)


# -- matchers --------------------------------------------------------------------------------------


def test_a_function_is_a_matcher() -> None:
    vlm, calls = tiny.vlm(), []

    def matcher(image: Image.Image, question: str) -> tuple[list[list[int]], int]:
        calls.append((image, question))
        return [[0, 1], [2, len(question)]], 1

    image = picture()
    chats = [Chat([image], text) for text in ASKED]
    found = vlm.rewrite(chats, as_stack(AGLA(matcher=matcher)))
    assert calls == [(image, text) for text in ASKED]
    for chat in found:
        mask = reference.mask(np.array([[0, 1], [2, len(chat.text)]], float), 1.0)
        assert chat.notes["matches"] == [{"score": 1.0, "kept": round(float(mask.mean()), 6)}]
    layers = AGLA(matcher=matcher).resolve(replace(anatomy(vlm.model), placed=False)).layers
    assert layers is None, "a model whose image tokens have no known place will do"


@pytest.mark.parametrize("found", [([1.0, 2.0], 0.0), ([[1.0, np.nan]], 0.0), ([[1.0, 2.0]], 1.5)])
def test_a_matcher_that_returns_something_else_is_refused(found: Any) -> None:
    with pytest.raises(FoveateError, match="agla: the matcher must return a finite map"):
        tiny.vlm().ask(picture(), "red", AGLA(matcher=lambda image, question: found))


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def small_blip() -> match.BlipMatcher:
    config = tf.BlipConfig(
        text_config=SMALL
        | {"vocab_size": models.VOCAB, "num_hidden_layers": 3, "encoder_hidden_size": 32}
        | {"max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
        vision_config=SMALL | {"num_hidden_layers": 2, "image_size": 24, "patch_size": 4},
        image_text_hidden_size=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.randomise(tf.BlipForImageTextRetrieval(config))
    size = {"height": 24, "width": 24}
    return match.BlipMatcher(
        model, tiny.image_processor("Blip")(size=size), _marked(tiny.tokenizer()), layer=1
    )


def _marked(tokenizer: Any) -> Any:
    """A tokenizer that begins and ends a text as BERT's does."""

    def call(text: str, **options: Any) -> Any:
        return tokenizer(f"<s> {text} </s>", **options)

    return call


def test_blip_gives_its_gradcam_and_cosine() -> None:
    """The gradient of the match, by moving each attention weight a little."""
    blip = small_blip()
    r, c = blip(picture(), "red cat w40")
    assert r.shape == (6, 6)
    assert (r >= 0).all()
    assert r.max() > 0
    model, encoder = blip.model.double(), blip.model.text_encoder
    pixels = blip.image_processor(images=picture(), return_tensors="pt")["pixel_values"].double()
    text = blip.tokenizer("red cat w40", return_tensors="pt")
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        words = encoder(**text, return_dict=True).last_hidden_state
        pair = model.vision_proj(seen[:, 0]), model.text_proj(words[:, 0])
        assert c == pytest.approx(float(torch.cosine_similarity(*pair)), abs=1e-5)
    cross, kept_weights = encoder.encoder.layer[1].crossattention.self, []

    def matched(change: torch.Tensor | float) -> float:
        def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            kept_weights.append(out)
            return out + change

        handle = cross.dropout.register_forward_hook(hook)
        with torch.no_grad():
            out = encoder(
                **text,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones_like(seen[..., 0]),
            ).last_hidden_state
            match_logit = model.itm_head(out[:, 0])[0, 1]
        handle.remove()
        return float(match_logit)

    matched(0.0)
    weights = kept_weights[0]
    assert weights.shape == (1, 2, 5, 37)
    slow = np.zeros(36)
    for head in range(2):
        for token in (1, 2, 3):
            for patch in range(36):
                step = torch.zeros_like(weights)
                step[0, head, token, patch + 1] = 1e-4
                slope = (matched(step) - matched(-step)) / 2e-4
                slow[patch] += float(weights[0, head, token, patch + 1]) * max(slope, 0.0) / 6
    assert r.ravel() == pytest.approx(slow, abs=1e-4 * slow.max())


def small_siglip() -> match.SiglipMatcher:
    layers = {"num_hidden_layers": 2}
    config = tf.SiglipConfig(
        text_config=SMALL
        | layers
        | {"vocab_size": models.VOCAB, "max_position_embeddings": 8}
        | {"bos_token_id": models.BOS, "eos_token_id": models.EOS, "pad_token_id": models.PAD},
        vision_config=SMALL | layers | {"image_size": 16, "patch_size": 4},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.randomise(tf.SiglipModel(config))
    size = {"height": 16, "width": 16}
    return match.SiglipMatcher(model, tiny.image_processor("Siglip")(size=size), tiny.tokenizer())


def test_siglip_gives_what_each_patch_adds_to_the_cosine() -> None:
    """The gradient along each patch's state, by making the state a little longer."""
    siglip = small_siglip()
    r, c = siglip(picture(), "red cat")
    model = siglip.model.double()
    pixels = siglip.image_processor(images=picture(), return_tensors="pt")["pixel_values"].double()
    text = siglip.tokenizer("red cat", padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        words = model.text_model(input_ids=text["input_ids"]).pooler_output
        states = model.vision_model(pixel_values=pixels).last_hidden_state

        def cosine(scale: torch.Tensor) -> float:
            seen = model.vision_model.head(states * scale[None, :, None])
            return float(torch.cosine_similarity(seen, words))

        one = torch.ones(16, dtype=torch.double)
        assert c == pytest.approx(cosine(one), abs=1e-5)
        steps = torch.eye(16, dtype=torch.double) * 1e-4
        slow = [max(0.0, (cosine(one + s) - cosine(one - s)) / 2e-4) for s in steps]
    assert r.ravel() == pytest.approx(slow, abs=1e-4)
    assert max(slow) > 1e-3


@pytest.mark.parametrize("small", [small_blip, small_siglip])
def test_a_named_matcher_is_loaded_when_asked_for(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"small_blip": "blip-itm", "small_siglip": "siglip"}[small.__name__]
    loaded: list[str] = []

    def fake(name: str, device: torch.device) -> Any:
        loaded.append(name)
        return small()

    monkeypatch.setattr(match, "matcher", fake)
    vlm = tiny.vlm()
    vlm.ask(picture(), "red", "agla", max_new_tokens=1)
    assert not loaded
    (method,) = parse(f"agla(matcher='{name}')")
    answer = vlm.ask(picture(), "red", method, max_new_tokens=1)
    assert loaded == [name]
    assert len(answer.chat.notes["matches"]) == 1


def test_a_matcher_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: Any, **options: Any) -> Any:
        raise OSError("no such place\nand a long story")

    monkeypatch.setattr(tf.SiglipModel, "from_pretrained", lost)
    with pytest.raises(FoveateError, match=r"'siglip' .* cannot be loaded: no such") as told:
        tiny.vlm().ask(picture(), "red", "agla(matcher=siglip)")
    assert "\n" not in str(told.value)


def test_a_stranger_may_not_choose_a_matcher() -> None:
    permit(AGLA(alpha=1.0))
    with pytest.raises(FoveateError, match="may not set matcher"):
        permit(AGLA(matcher="siglip"))


# -- the second stream -----------------------------------------------------------------------------


@pytest.mark.parametrize("first_token_only", [False, True])
def test_streams_equal_plain_runs_on_every_family(family: str, first_token_only: bool) -> None:
    method = AGLA(first_token_only=first_token_only)
    reads = {"first_token_only": first_token_only}
    assert disagreement(family, "mixed", method, **reads) < ROUNDING


def test_the_released_quirk_shows_from_the_second_token_on() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    own = generate(model, inputs, AGLA(beta=0.0))
    quirk = generate(model, inputs, AGLA(beta=0.0, first_token_only=True))
    assert torch.equal(own.logits[0], quirk.logits[0])
    assert not torch.allclose(own.logits[1], quirk.logits[1], atol=0.1)
    tokens = quirk.sequences[0, inputs["input_ids"].shape[1] : -1]
    plain = streams.plain(model, inputs, tokens)
    assert difference(torch.cat(quirk.logits[1:]), 3 * plain[1:]) < ROUNDING


def test_it_is_ritual_on_another_picture() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=2)
    given = {"pixel_values": changed(inputs)["pixel_values"]}
    got = []
    for method in (AGLA(alpha=1.5, beta=0.2), RITUAL(alpha=1.5, beta=0.2)):
        with torch.no_grad(), attach(model, (method,), notes=[{}, {}], contrast=given):
            got.append(model(**inputs).logits[:, -1])
    assert torch.equal(*got)


def test_without_strength_there_is_no_second_look() -> None:
    vlm = tiny.vlm()
    answer = vlm.ask(picture(), "red", "agla(alpha=0)", max_new_tokens=4)
    assert answer.tokens == vlm.ask(picture(), "red", max_new_tokens=4).tokens
    assert answer.chat.contrast is None
    assert not vlm.readings
    assert AGLA(alpha=0.0, beta=0.0).is_neutral


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"beta": 2.0}, "beta must lie between 0 and 1"),
        ({"matcher": "clip"}, "matcher must be a function or 'siglip' or 'blip-itm' or None"),
        ({"matcher": "siglip", "layers": (1,)}, "layers are read only without a matcher"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        AGLA(**parameters)
