"""LASER: maps, crops and both streams against full maps, painted pixels and two runs by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from foveate import VLM, FoveateError, Method, enhance
from foveate.backends.transformers.anatomy import anatomy
from foveate.benchmarks import pocket as pocket_bench
from foveate.core.method import as_stack, from_json, parse, to_json
from foveate.evaluation.ask import Plan, evaluate
from foveate.evaluation.run import RECORDS
from foveate.families.layout import together
from foveate.methods.laser import LASER, _Heat
from foveate.scenes import questions, world
from foveate.vlm import look
from foveate.vlm.chat import Answer, Chat
from tests import tiny
from tests.references import laser as reference
from tests.references.full import difference

SUFFIX = " Answer the question using a single word or phrase."
ASKED = ["w40 w41 w42", "red", "Is there a cat?", "w60 w61 w62 w63 w64"]
SIZES = {"llava": (80, 64), "llava_next": (128, 64), "gemma3": (90, 60), "idefics3": (64, 64)}
SMALL = "laser(heads=2,floor=10)"
ROUNDING = 2e-5  # (1 + alpha) l - alpha l' triples that of l and l', each below 1e-5
STEPS = 9  # the prompt's row and eight decode steps


def picture(seed: int, width: int = 80, height: int = 64) -> Image.Image:
    """Four by four flat squares, so that places on it differ."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)


def about(image: Image.Image, texts: list[str]) -> list[Chat]:
    images = [image]
    return [Chat(images, text) for text in texts]


def scene(seed: int, size: int = 768) -> list[Chat]:
    """Questions about a scene of the pocket world that the pocket model has not seen."""
    found = world.sample(questions.FIRST_HELD_OUT + seed)
    texts = [q.text for q in questions.exam(found, random.Random(seed))]
    return about(world.draw(found, size), list(dict.fromkeys(texts))[:4])


@pytest.fixture(scope="module")
def small() -> VLM:
    return tiny.vlm()


@pytest.fixture(scope="module")
def pocket() -> VLM:
    return VLM.load("pocket", device="cpu")


class Scores(LogitsProcessor):
    """Keeps every step's logits, and what was written before it."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.read: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.kept.append(scores.float().clone())
        self.read.append(input_ids)
        return scores

    @property
    def logits(self) -> Tensor:
        """(B, steps, V)"""
        return torch.stack(self.kept, 1)

    @property
    def tokens(self) -> list[list[int]]:
        """Of every prompt, those that the steps after the first have read."""
        return self.read[-1][:, self.read[0].shape[1] :].tolist()


def answers(
    vlm: VLM, chats: list[Chat], method: str | Method, tokens: int = STEPS
) -> tuple[list[Answer], Scores]:
    """To chats that were rewritten, from one batch, without an end."""
    spy = Scores()
    options = {"logits_processor": LogitsProcessorList([spy]), "eos_token_id": None}
    return vlm.answer(chats, as_stack(method), tokens, **options), spy


def rewritten(vlm: VLM, chats: list[Chat], method: str) -> list[Chat]:
    return vlm.rewrite(chats, as_stack(method))


# -- VAQ and the map -------------------------------------------------------------------------------


def compared(vlm: VLM, chats: list[Chat], method: str, heads: int) -> list[int]:
    """The layers chosen for `chats`, after all is compared with full maps."""
    instance: Any = as_stack(method)[0].resolve(anatomy(vlm.model))
    suffix = SUFFIX if instance.suffix is None else instance.suffix
    empty = suffix.strip() if instance.noq == "instruction_only" else ""
    layers = []
    for chat, (asked, unasked) in zip(chats, instance.readings(vlm, chats), strict=True):
        full = [
            reference.attention(vlm, chat.images, text, chat.system)
            for text in (chat.text + suffix, empty)
        ]
        for reading, slow in zip((asked, unasked), full, strict=True):
            rows = torch.stack([slow[layer] for layer in reading.layers])
            assert difference(reading.weights[0], rows) < 1e-5
        read = [[slow[layer] for layer in asked.layers] for slow in full]
        found, slow = instance.evidence(asked, unasked), reference.evidence(*read, heads)
        assert found.vaq.tolist() == pytest.approx(slow.vaq, abs=1e-5)
        assert found.layer == asked.layers[slow.layer]
        for fast_map, slow_map in [
            (found.a_q, slow.asked), (found.a_0, slow.unasked), (found.c, slow.added)
        ]:  # fmt: skip
            assert difference(fast_map, slow_map) < 1e-5
        layers.append(found.layer)
    return layers


@pytest.mark.parametrize("name", SIZES)
def test_readings_and_vaq_equal_full_maps_on_every_family(name: str) -> None:
    vlm = tiny.vlm(name)
    compared(vlm, about(picture(0, *SIZES[name]), ASKED), "laser(heads=2)", heads=2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "heads"),
    [
        ("laser(heads=1)", 1),
        ("laser(heads=all)", 4),
        ("laser(heads=8)", 4),
        ("laser(heads=2,noq=instruction_only)", 2),
        ("laser(heads=2,suffix=' w77')", 2),
        ("laser(heads=2,suffix='')", 2),
    ],
)
def test_every_parameter_of_the_reading_equals_the_reference(
    small: VLM, method: str, heads: int
) -> None:
    compared(small, about(picture(0), ASKED), method, heads)


def test_layers_before_the_first_are_read_but_not_chosen(small: VLM) -> None:
    method: Any = LASER(heads=2).resolve(anatomy(small.model))
    ((asked, unasked),) = method.readings(small, about(picture(0), ["red"]))
    weights = asked.weights.clone()
    weights[:, 1] *= 10
    asked = replace(asked, weights=weights)
    assert method.evidence(asked, unasked).layer == 1
    found = replace(method, first_layer=2).evidence(asked, unasked)
    slow = reference.evidence([*weights[0]], [*unasked.weights[0]], 2, first_layer=2)
    assert found.layer == slow.layer >= 2
    assert found.vaq.tolist() == pytest.approx(slow.vaq, abs=1e-5)
    assert difference(found.c, slow.added) < 1e-5


@pytest.mark.long
def test_the_pocket_model_chooses_different_layers_for_different_questions(pocket: VLM) -> None:
    assert len(set(compared(pocket, scene(2, 96), "laser(heads=4)", heads=4))) > 1


# -- the crop and the masked view ------------------------------------------------------------------

PLACEMENTS = ("slide_max_sum", "topk_bbox", "centroid")
BOXES = [(0.0, 0.0, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0), (0.0, -0.5, 1.0, 1.5)]  # and letterboxed


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seed", range(12))
def test_crops_equal_trying_every_pixel(placement: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    box, size = BOXES[seed % 3], [(48, 48), (96, 48), (48, 120)][seed % 4 % 3]
    shape = [(4, 4), (6, 3), (12, 12), (2, 6)][seed % 4]
    values = rng.gamma(0.3, size=shape) * (rng.random(shape) < 0.7)
    method = LASER(placement=placement, floor=20, share=0.45, patches=[0.05, 0.2][seed % 2])
    slow = reference.crop(values, box, size, placement, 0.45, 20, method.patches)
    assert method.crop(_Heat(values, box, size)) == slow


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_crops_keep_to_the_image_and_to_their_size(placement: str) -> None:
    rng = random.Random(0)
    for seed in range(80):
        size = rng.choice([(800, 100), (101, 807), (300, 225), (1000, 999), (5, 4000), (30, 20)])
        values = np.random.default_rng(seed).random(rng.choice([(24, 24), (3, 24), (1, 1)]))
        method = LASER(placement=placement, floor=rng.choice([1, 224]), share=rng.choice([0.2, 1]))
        heat = _Heat(values, rng.choice(BOXES), size)
        left, top, right, bottom = method.crop(heat)
        most = [min(s, max(method.floor, round(method.share * s))) for s in size]
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        for side, limit, whole in zip((right - left, bottom - top), most, size, strict=True):
            assert min(method.floor, whole) <= side <= limit
            assert side == limit or placement == "topk_bbox"
        if placement == "slide_max_sum":
            held = held_by(heat, (left, top, right, bottom))
            starts = [
                range(0, s - m + 1, max(1, (s - m) // 7)) for s, m in zip(size, most, strict=True)
            ]
            others = [(x, y, x + most[0], y + most[1]) for x in starts[0] for y in starts[1]]
            lost = heat.cells.sum(0).max() + heat.cells.sum(1).max()  # by whole pixels
            assert held >= max(held_by(heat, other) for other in others) - lost


def held_by(heat: _Heat, window: tuple[int, ...]) -> float:
    x = np.interp(window[::2], heat.x, range(len(heat.x)))
    y = np.interp(window[1::2], heat.y, range(len(heat.y)))
    across = np.clip(x[1] - np.arange(len(heat.x) - 1), 0, 1)
    across -= np.clip(x[0] - np.arange(len(heat.x) - 1), 0, 1)
    down = np.clip(y[1] - np.arange(len(heat.y) - 1), 0, 1)
    down -= np.clip(y[0] - np.arange(len(heat.y) - 1), 0, 1)
    return float(down @ heat.cells @ across)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_all_attention_in_one_place(placement: str) -> None:
    values = np.zeros((12, 12))
    values[11, 0] = 1.0
    method = LASER(placement=placement, floor=100)
    side = 100 if placement == "topk_bbox" else 384
    corner = _Heat(values, BOXES[0], (768, 768))
    assert method.crop(corner) == (0, 768 - side, side, 768)
    middle = _Heat(values[::-1, ::-1][[*range(6, 12), *range(6)]], BOXES[0], (768, 768))
    left, top, right, bottom = method.crop(middle)
    assert (left + right) / 2 == 768 - side / 2
    assert (top + bottom) / 2 == 6.5 * 64, "of equal windows the one around it"


@pytest.mark.parametrize("fill", ["mean", "grey", "black"])
@pytest.mark.parametrize("share", [1e-9, 32 / 576, 0.3, 1.0])
def test_the_masked_view_equals_painting_pixels(fill: str, share: float) -> None:
    values = np.random.default_rng(1).random((6, 4)) * (np.arange(24).reshape(6, 4) > 7)
    image = picture(3, 48, 60)
    method = LASER(fill=fill, patches=share)
    for box in [BOXES[0], (0.25, 0.2, 0.75, 0.8), (0.0, -0.4, 1.0, 1.4)]:
        got = method.masked(image, _Heat(values, box, image.size))
        assert np.array_equal(got, reference.masked(image, values, box, share, fill))
    changed = (np.asarray(got) != np.asarray(image)).any(2).mean()
    assert changed < 0.81, "cells that the question added nothing to stay"
    assert image.tobytes() == picture(3, 48, 60).tobytes(), "on a copy"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", SIZES)
def test_crops_and_masked_views_of_models_equal_the_reference(name: str, placement: str) -> None:
    vlm, image = tiny.vlm(name), picture(0, *SIZES[name])
    method = f"laser(heads=2,floor=10,placement={placement},fill=black)"
    instance: Any = as_stack(method)[0].resolve(anatomy(vlm.model))
    where, crops = vlm.grids(Chat([image], "red")), set()
    for chat in rewritten(vlm, about(image, ASKED), method):
        full = [reference.attention(vlm, [image], text, None) for text in (chat.text + SUFFIX, "")]
        read = [[slow[layer] for layer in instance.layers] for slow in full]
        heat, box = together(where, reference.evidence(*read, 2).added)
        options = (heat.double().numpy(), box, image.size)
        crop = reference.crop(*options, placement, 0.5, 10, instance.patches)
        assert chat.notes["crop"] == list(crop)
        assert [np.asarray(i).tolist() for i in chat.images] == [
            np.asarray(image.crop(crop)).tolist()
        ]
        hidden = reference.masked(image, *options[:2], instance.patches, "black").crop(crop)
        assert chat.contrast is not None
        assert np.array_equal(chat.contrast[0], hidden)
        crops.add(crop)
    assert len(crops) > 1, "questions look at different places"


# -- the second stream -----------------------------------------------------------------------------


def views(vlm: VLM, image: Image.Image, method: str, texts: list[str]) -> list[Chat]:
    found = rewritten(vlm, about(image, texts), method)
    assert len({tuple(chat.notes["crop"]) for chat in found}) > 1
    assert all(chat.notes["vat"] for chat in found)
    return found


def streams(vlm: VLM, chat: Chat, tokens: list[int]) -> tuple[Tensor, Tensor]:
    assert chat.contrast is not None
    own = reference.stream(vlm, chat.images, chat, tokens)
    return own, reference.stream(vlm, chat.contrast, chat, tokens)


@pytest.mark.long
@pytest.mark.parametrize("method", [SMALL, "laser(heads=2,floor=10,answer_input=both)"])
def test_prompt_and_decode_steps_equal_two_streams_by_hand(small: VLM, method: str) -> None:
    chats = views(small, picture(0), method, ASKED[:3])
    _, spy = answers(small, chats, method)
    for chat, tokens, fast in zip(chats, spy.tokens, spy.logits, strict=True):
        own, other = streams(small, chat, tokens)
        assert len(own) == STEPS
        assert difference(fast, reference.contrasted(own, other)) < ROUNDING
        assert difference(fast[-1], own[-1]) > 0.01, "the hidden patches matter"


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.3}, {"alpha": 2.0, "plausibility": 0.1}, {"plausibility": 1.0}],
    ids=str,
)
def test_strength_and_plausibility_equal_the_reference(
    small: VLM, options: dict[str, float]
) -> None:
    chats = views(small, picture(0), SMALL, ASKED[:2])
    method = str(LASER(heads=2, floor=10, **options))  # type: ignore[arg-type]
    _, spy = answers(small, chats, method, tokens=3)
    for chat, tokens, fast in zip(chats, spy.tokens, spy.logits, strict=True):
        slow = reference.contrasted(*streams(small, chat, tokens), **options)
        assert difference(fast, slow) < ROUNDING


@pytest.mark.parametrize("name", ["llava_next", "gemma3", "idefics3"])
def test_other_families_decode_as_two_streams_by_hand(name: str) -> None:
    vlm = tiny.vlm(name)
    chats = views(vlm, picture(0, *SIZES[name]), SMALL, ASKED)
    _, spy = answers(vlm, chats, SMALL, tokens=2)
    for chat, tokens, fast in zip(chats, spy.tokens, spy.logits, strict=True):
        slow = reference.contrasted(*streams(vlm, chat, tokens))
        assert difference(fast, slow) < ROUNDING


class Watched(LASER, register=False):
    """Keeps what goes through the stage `logits`."""

    seen: ClassVar[list[tuple[Tensor, Tensor | None, Tensor, bool]]] = []

    def logits(self, logits: Tensor, other: Tensor | None, seq: Any) -> Tensor:
        out = super().logits(logits, other, seq)
        self.seen.append((logits, other, out, seq._state.paired))
        return out


@pytest.mark.long
@pytest.mark.parametrize("plausibility", [0.0, 0.1])
def test_a_batch_with_and_without_vat_is_its_single_prompts(
    small: VLM, plausibility: float
) -> None:
    chats = views(small, picture(0), "laser(heads=2,floor=10)", ASKED)
    for chat in chats[::2]:
        chat.contrast, chat.notes["vat"] = None, False
    Watched.seen.clear()
    found, spy = answers(small, chats, Watched(plausibility=plausibility), tokens=4)
    assert len(Watched.seen) == 4
    for plain, other, out, paired in Watched.seen:
        assert paired, "only pixels differ: two rows of one batch"
        assert torch.equal(out[::2], plain[::2]), "to the bit"
        assert (out[1::2] - plain[1::2]).abs().amax(1).min() > 1e-3
        assert other is not None
    for row, (chat, answer) in enumerate(zip(chats, found, strict=True)):
        (alone,), single = answers(small, [chat], LASER(plausibility=plausibility), tokens=4)
        assert alone.tokens == answer.tokens
        assert alone.probabilities == pytest.approx(answer.probabilities, abs=1e-5)
        assert difference(single.logits[0], spy.logits[row]) < ROUNDING


def test_no_second_stream_runs_where_no_prompt_wants_one(small: VLM) -> None:
    chats = rewritten(small, about(picture(0), ASKED), "laser(heads=2,floor=10,vat=never)")
    Watched.seen.clear()
    small.answer(chats, (Watched(heads=2, floor=10),), 2)
    assert len(Watched.seen) == 2
    for plain, other, out, paired in Watched.seen:
        assert other is None
        assert not paired
        assert torch.equal(out, plain)


def beams(vlm: VLM, chat: Chat, tokens: int) -> list[int]:
    """Two beams over the logits of two streams by hand, no end token."""
    kept = [(0.0, list[int]())]
    for _ in range(tokens):
        grown = []
        for score, written in kept:
            logits = reference.stream(vlm, chat.images, chat, written)[-1:]
            if chat.contrast:
                other = reference.stream(vlm, chat.contrast, chat, written)[-1:]
                logits = reference.contrasted(logits, other)
            best = logits[0].log_softmax(0).topk(2)
            grown += [
                (score + s, [*written, t])
                for s, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        kept = sorted(grown, key=lambda entry: -entry[0])[:2]
    return kept[0][1]


@pytest.mark.long
def test_beams_equal_a_search_by_hand(small: VLM) -> None:
    chats = views(small, picture(0), SMALL, ASKED[:3])
    chats[1].contrast, chats[1].notes["vat"] = None, False
    found = small.answer(chats, as_stack(SMALL), 4, num_beams=2, eos_token_id=None)
    greedy, _ = answers(small, chats, SMALL, tokens=4)
    assert [a.tokens for a in found] != [a.tokens for a in greedy], "beams find something else"
    for chat, answer in zip(chats, found, strict=True):
        expected = [small.tokenizer.decode([token]) for token in beams(small, chat, 4)]
        assert list(answer.tokens) == expected


@pytest.mark.long
def test_the_pocket_model_equals_two_streams_by_hand() -> None:
    """In double precision: its logits are ten times as large as those of the tiny models."""
    vlm = VLM.load("pocket", device="cpu", dtype=torch.float64)
    chats = rewritten(vlm, scene(5, 300)[:2], "laser(heads=4)")
    Watched.seen.clear()
    _, spy = answers(vlm, chats, Watched(heads=4), tokens=3)
    assert len(Watched.seen) == 3
    assert all(paired and other is not None for _, other, _, paired in Watched.seen)
    for chat, tokens, fast in zip(chats, spy.tokens, spy.logits, strict=True):
        slow = reference.contrasted(*streams(vlm, chat, tokens))
        assert difference(fast, slow) < 1e-5


def test_streams_say_what_ask_says(small: VLM) -> None:
    image, text = picture(0), ASKED[0]
    pieces = list(small.stream(image, text, SMALL, max_new_tokens=8))
    answer = small.ask(image, text, SMALL, max_new_tokens=8)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer.text
    plain = small.ask(image, text, f"{SMALL[:-1]},vat=never)", max_new_tokens=8)
    assert answer.tokens != plain.tokens


# -- with other methods, and in evaluation ---------------------------------------------------------


def test_another_method_edits_the_crop_and_not_the_second_stream(small: VLM) -> None:
    clvs = "clvs(smoothing=0.3,stop_threshold=0)"
    chats = views(small, picture(0), SMALL, ASKED[:3])
    _, spy = answers(small, chats, f"{SMALL}+{clvs}", tokens=1)
    for chat, fast in zip(chats, spy.logits, strict=True):
        with torch.no_grad(), enhance(small.model, clvs):
            own = small.model(**small.inputs([chat])).logits[0, -1:].float()
        other = reference.stream(small, chat.contrast or [], chat, [])
        assert difference(fast, reference.contrasted(own, other)) < ROUNDING
        assert difference(own, reference.stream(small, chat.images, chat, [])) > 0.01
    apart = small.ask(picture(0), ASKED[0], f"{SMALL[:-1]},vat=never)+{clvs}", max_new_tokens=6)
    crop = picture(0).crop(tuple(apart.chat.notes["crop"]))
    assert apart.tokens == small.ask(crop, ASKED[0], clvs, max_new_tokens=6).tokens


def test_its_second_stream_is_free_for_another_method_without_vat() -> None:
    for idle in ("vat=never", "alpha=0", "patches=0"):
        method = parse(f"laser({idle})")[0]
        assert [method.wants(s) for s in ("rewrite", "contrast", "logits", "begin")] == [
            True, False, False, False
        ]  # fmt: skip
        as_stack(f"laser({idle})+vcd")
    with pytest.raises(FoveateError, match="both want the second stream"):
        as_stack("laser+vcd")


def test_laser_without_vat_runs_with_vcd(small: VLM) -> None:
    stack = "laser(heads=2,floor=10,vat=never)+vcd"
    answer = small.ask(picture(0), ASKED[0], stack, max_new_tokens=6)
    crop = picture(0).crop(tuple(answer.chat.notes["crop"]))
    assert answer.tokens == small.ask(crop, ASKED[0], "vcd", max_new_tokens=6).tokens


@pytest.mark.long
def test_evaluation_in_groups_is_one_by_one(
    pocket: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pocket_bench, "SIZE", 300)
    benchmark = pocket_bench.PocketBench(categories=("print",), questions=2)
    records = []
    for share in (True, False):
        folder = tmp_path / str(share)
        evaluate(Plan([benchmark], ["laser(vat=auto,auto_depth=5)"], folder, share=share), pocket)
        found = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
        records.append({(r["split"], r["line"]): r for r in found})
    assert len(records[0]) == len(records[1]) == 4
    for place, one in records[0].items():
        other = records[1][place]
        assert one["error"] is None
        assert one["answer"] == other["answer"]
        for name in ("crop", "layer", "layers", "vat"):
            assert one["notes"][name] == other["notes"][name]
        assert one["notes"]["vaq"] == pytest.approx(other["notes"]["vaq"], abs=1e-5)
        assert one["notes"]["vat"] == (one["notes"]["layer"] > 5)
    assert {r["notes"]["vat"] for r in records[0].values()} == {True, False}


def test_the_automatic_rule_is_depth(small: VLM) -> None:
    depth = small.model.get_decoder().config.num_hidden_layers
    chats = about(picture(0), ASKED)
    for limit in (None, 0, 1, depth - 1):
        method = LASER(vat="auto", auto_depth=limit, heads=2, floor=10)
        for chat in rewritten(small, chats, str(method)):
            deep = chat.notes["layer"] > (depth / 2 + 2 if limit is None else limit)
            assert chat.notes["vat"] == deep == (chat.contrast is not None)


# -- what the model is shown, and degenerate input -------------------------------------------------


def test_equal_crops_are_one_picture_and_share_its_prefix(small: VLM) -> None:
    chats = about(picture(0), ["w40 w41", "w40 w41", "red"])
    one, same, other = rewritten(small, chats, "laser(heads=2,floor=10,vat=never)")
    assert one.images is same.images
    assert one.images[0] is not other.images[0]
    assert [chat.text for chat in (one, same, other)] == [chat.text for chat in chats]


def test_notes_and_chain(small: VLM) -> None:
    image = picture(0)
    for vat, count in (("always", 5), ("never", 4)):
        method = f"laser(heads=2,floor=10,vat={vat})"
        chat = small.ask(image, ASKED[0], method, max_new_tokens=2).chat
        panels = chat.notes.pop("chain").panels
        notes = json.loads(json.dumps(chat.notes))
        assert notes == chat.notes
        assert list(notes) == ["crop", "layers", "vaq", "layer", "vat"]
        assert notes["layer"] == notes["layers"][int(np.argmax(notes["vaq"]))]
        assert len(panels) == count
        assert panels[0].title == f"attention with the question, layer {notes['layer']}"
        instance: Any = as_stack(method)[0].resolve(anatomy(small.model))
        (pair,) = instance.readings(small, about(image, ASKED[:1]))
        found = instance.evidence(*pair)
        for panel, values in zip(panels, (found.a_q, found.a_0, found.c), strict=False):
            assert np.abs(panel.heat - values.reshape(4, 4).numpy()).max() < 1e-6
        (frame,) = panels[2].frames
        assert [round(f * s) for f, s in zip(frame, (80, 64) * 2, strict=True)] == notes["crop"]
        assert panels[-1].image is chat.images[0]
        if vat == "always":
            assert (
                panels[3].image.crop(tuple(notes["crop"])).tobytes() == chat.contrast[0].tobytes()
            )


def test_alpha_zero_and_no_patches_decode_plainly_on_the_crop(small: VLM) -> None:
    expected = None
    for idle in ("alpha=0", "patches=0", "vat=never"):
        answer = small.ask(picture(0), ASKED[0], f"{SMALL[:-1]},{idle})", max_new_tokens=6)
        assert not answer.chat.notes["vat"]
        assert answer.chat.contrast is None
        crop = picture(0).crop(tuple(answer.chat.notes["crop"]))
        expected = small.ask(crop, ASKED[0], max_new_tokens=6)
        assert answer.tokens == expected.tokens
        assert answer.probabilities == expected.probabilities


def test_neutral_parameters_leave_the_prompt_alone(small: VLM) -> None:
    neutral = LASER(**LASER.neutral)
    assert neutral.is_neutral
    chats = about(picture(0), ASKED)
    assert small.rewrite(chats, (neutral,)) is chats


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("laser(suffix='')", ""),
        ("laser(noq=instruction_only)", SUFFIX.strip()),
        ("laser(noq=instruction_only,suffix=' w77')", "w77"),
    ],
)
def test_a_question_that_changes_nothing_leaves_the_whole_image(
    small: VLM, method: str, text: str
) -> None:
    chats = about(picture(0), [text, "red"])
    for floor in (10, 224):
        whole, other = rewritten(small, chats, f"{method[:-1]},heads=2,floor={floor})")
        assert whole.images is chats[0].images
        assert whole.contrast is None
        assert whole.notes["crop"] == [0, 0, 80, 64]
        assert whole.notes["vaq"] == [0.0] * len(whole.notes["layers"])
        assert whole.notes["layer"] is None
        assert not whole.notes["vat"]
        assert len(whole.notes["chain"].panels) == 1
        assert other.notes["vat"]


def test_the_suffix_is_read_once(small: VLM) -> None:
    chats = about(picture(0), ["red", "red" + SUFFIX, "Why?" + SUFFIX + " w40"])
    with mock.patch.object(look, "read", wraps=look.read) as read:
        found = rewritten(small, chats, SMALL)
    (_, plain, _), _ = read.call_args
    assert sorted(chat.text for chat in plain) == sorted(
        ["red" + SUFFIX, "", "Why?" + SUFFIX + " w40" + SUFFIX]
    )
    assert [chat.text for chat in found] == [chat.text for chat in chats]
    assert found[0].notes["vaq"] == found[1].notes["vaq"]


def test_the_shared_prefix_reads_what_single_prompts_read(pocket: VLM) -> None:
    chats = scene(3, 96)
    method: Any = LASER().resolve(anatomy(pocket.model))
    together = method.readings(pocket, chats)
    assert all(unasked is together[0][1] for _, unasked in together), "once per image"
    for chat, pair in zip(chats, together, strict=True):
        (alone,) = method.readings(pocket, [chat])
        for one, other in zip(pair, alone, strict=True):
            assert one.grids == other.grids
            assert one.weights.shape == (1, 12, 6, 144)
            assert difference(one.weights, other.weights) < 1e-5


def test_chats_with_different_system_texts_are_each_read_with_their_own(pocket: VLM) -> None:
    images, method = scene(3, 96)[0].images, LASER().resolve(anatomy(pocket.model))
    chats = [Chat(images, "What color is the cup?", system) for system in (None, "red cup")]
    pairs = method.readings(pocket, chats)
    assert difference(pairs[0][1].weights, pairs[1][1].weights) > 0.01
    for chat, pair in zip(chats, pairs, strict=True):
        for one, other in zip(pair, method.readings(pocket, [chat])[0], strict=True):
            assert difference(one.weights, other.weights) < 1e-5


def test_small_images_are_asked_about_whole(pocket: VLM) -> None:
    chats = scene(4, 200)
    for answer_input in ("crop", "both"):
        for before, chat in zip(
            chats, rewritten(pocket, chats, f"laser(answer_input={answer_input})"), strict=True
        ):
            assert chat.images is before.images
            assert chat.notes["crop"] == [0, 0, 200, 200]
            assert chat.notes["vat"]
            assert [i.size for i in chat.contrast or []] == [(200, 200)]


def test_both_shows_the_image_beside_the_crop_in_either_stream(small: VLM) -> None:
    image = picture(0)
    for chat in rewritten(small, about(image, ASKED), f"{SMALL[:-1]},answer_input=both)"):
        assert chat.contrast is not None
        assert chat.images[0] is image
        assert chat.contrast[0] is image
        assert chat.images[1].size == chat.contrast[1].size
        assert chat.images[1].tobytes() != chat.contrast[1].tobytes()


def test_a_uniform_image_and_panoramas_get_a_defined_crop(small: VLM) -> None:
    for image in (Image.new("RGB", (64, 48), "gray"), picture(6, 160, 20), picture(7, 20, 160)):
        for placement in PLACEMENTS:
            method = f"laser(floor=12,patches=1.0,placement={placement})"
            (chat,) = rewritten(small, about(image, ["red"]), method)
            left, top, right, bottom = chat.notes["crop"]
            sides = tuple(max(12, s // 2) for s in image.size)
            assert right - left <= sides[0]
            assert bottom - top <= sides[1]
            assert chat.images[0].size == (right - left, bottom - top)


def test_no_image_and_several(small: VLM) -> None:
    with pytest.warns(UserWarning, match="no image, so laser does nothing"):
        assert small.ask([], "red", "laser").text == small.ask([], "red").text
    with pytest.raises(FoveateError, match="one image, and this prompt has 2"):
        small.ask([picture(0), picture(1)], "red", "laser")


@pytest.mark.filterwarnings("ignore:The prompt has no image")
def test_a_batch_mixes_prompts_with_and_without_images(small: VLM) -> None:
    pairs = [(picture(0), ASKED[0]), ([], "w30 w31"), (picture(1), "red")]
    together = small.batch(pairs, SMALL, max_new_tokens=5)
    for (image, question), answer in zip(pairs, together, strict=True):
        assert answer.tokens == small.ask(image, question, SMALL, max_new_tokens=5).tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads=0", "heads must be 1 or more"),
        ("share=0", "share must lie above 0"),
        ("share=1.5", "share must lie above 0 and up to 1"),
        ("floor=0", "floor must be 1 or more"),
        ("alpha=-1", "alpha must be 0 or more"),
        ("patches=2", "patches must lie between 0 and 1"),
        ("patches=0,placement=topk_bbox", "patches must be more than 0"),
        ("plausibility=2", "plausibility must lie between 0 and 1"),
        ("first_layer=-1", "first_layer must be 0 or more"),
        ("first_layer=4,layers=(1,2)", "first_layer must leave a layer to choose"),
        ("placement=middle", "placement must be 'slide_max_sum' or"),
    ],
)
def test_values_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        parse(f"laser({text})")


def test_a_first_layer_behind_the_last_is_refused(small: VLM) -> None:
    with pytest.raises(FoveateError, match="leave a layer to choose"):
        rewritten(small, about(picture(0), ["red"]), "laser(first_layer=99)")


def test_the_text_and_json_forms_are_read_back() -> None:
    for text in ("laser", "laser(heads='all', vat='auto')", "laser(patches=0.1, suffix='')"):
        stack = parse(text)
        assert str(stack[0]) == text
        assert from_json(json.loads(json.dumps(to_json(stack)))) == stack
