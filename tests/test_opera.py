"""OPERA against whole passes with full maps, and against transformers' own beam search."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from foveate import FoveateError, Recorder, enhance, prefill, trace
from foveate.base.images import decode_all
from foveate.core.method import as_stack, from_json, parse, text, to_json
from foveate.methods.opera import OPERA, Back, Past, State
from foveate.vlm.answering import answer_all
from foveate.vlm.chat import Answer
from foveate.vlm.prefix import prepare
from tests import models, tiny
from tests.references import opera as reference
from tests.test_engine import beam_error

NEVER = 1e9
PLAIN = {"penalty": 0.0, "candidates": models.VOCAB, "threshold": NEVER}
TIRED = {"num_beams": 2, "candidates": 2, "threshold": 2, "scale": 20.0, "half_scores": False}


def generate(model: Any, inputs: dict[str, Tensor], *stack: Any, **options: Any) -> Any:
    given = {"max_new_tokens": 9, "return_dict_in_generate": True, **options}
    with enhance(model, *stack):
        return model.generate(**inputs, **given)


def compare(
    name: str,
    kind: str,
    row: int,
    length: int,
    method: OPERA,
    processors: Callable[[], list[Any]] = list,
    ends: tuple[int, ...] = (),
    tolerance: float = 1e-5,
) -> reference.Trace:
    """One prompt, against the reference: tokens, score, and the scores of every step."""
    model, inputs = models.build(name), models.inputs(name, kind, row=row)
    out = generate(
        model,
        inputs,
        method,
        max_new_tokens=length,
        output_scores=True,
        eos_token_id=list(ends) or None,
        logits_processor=LogitsProcessorList(processors()),
    )
    slow = reference.run(
        model,
        inputs,
        length,
        inputs["input_ids"][0] == models.IMAGE,
        processor=LogitsProcessorList(processors()),
        ends=ends,
        layer=-1 if method.layers is None else method.layers[0],
        **{k: v for k, v in method.parameters().items() if k != "layers"},
    )
    assert out.sequences[0, inputs["input_ids"].shape[1] :].tolist() == slow.tokens
    assert abs(out.sequences_scores.item() - slow.score) < tolerance
    assert len(out.scores) == len(slow.scores)
    for fast, other in zip(out.scores, slow.scores, strict=True):  # the least are about -1000
        assert torch.allclose(fast, other, rtol=1e-6, atol=tolerance)
    return slow


# A return lifts all logits by about 1000, whose float32 neighbours are 6e-5 apart, and a score next
# to a rounding boundary of float16 moves by as much.
ROUNDED = 1e-4


def test_answers_equal_the_reference_on_every_family(family: str) -> None:
    compare(family, "images", 1, 11, OPERA(num_beams=2, candidates=2, half_scores=False))


@pytest.mark.parametrize(
    ("row", "parameters", "returns"),
    [
        (0, {}, 0),
        (0, {"num_beams": 3, "candidates": 3, "penalty": 100.0, "layers": (2,)}, 0),
        (1, {"num_beams": 2, "candidates": 1, "scale": 5.0}, 0),
        (1, TIRED, 1),
        (1, TIRED | {"half_scores": True}, 1),
        (1, TIRED | {"threshold": 1}, 3),
        (2, TIRED | {"num_beams": 1, "candidates": 1, "scale": 10.0}, 3),
        (1, TIRED | {"window": 1}, 3),
        (1, TIRED | {"threshold": NEVER, "candidates": 1}, 0),
    ],
    ids=str,
)
def test_every_parameter_equals_the_reference(
    row: int, parameters: dict[str, Any], returns: int
) -> None:
    method, length = OPERA(**parameters), 24 if returns or "threshold" in parameters else 12
    tolerance = ROUNDED * max(1, method.penalty)
    slow = compare("qwen2_5_vl", "image", row, length, method, tolerance=tolerance)
    assert len(slow.returns) >= returns
    if not returns:
        assert not slow.returns
    if parameters.get("window"):
        assert slow.nearer
    if returns == 3 and "window" not in parameters:
        assert slow.stepped, "no place was returned to as often as it may be"


def test_processors_and_end_tokens_act_behind_the_penalty() -> None:
    def penalty() -> list[Any]:
        return [RepetitionPenaltyLogitsProcessor(1.3)]

    method = OPERA(num_beams=2, candidates=6, half_scores=False)
    plain = compare("llava", "image", 0, 12, method)
    processed = compare("llava", "image", 0, 12, method, penalty)
    assert processed.tokens != plain.tokens
    ended = compare("llava", "image", 0, 12, method, ends=tuple(range(10, 60)))
    assert len(ended.tokens) < 12


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_without_penalty_and_return_it_is_plain_beam_search(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    if beam_error(model, inputs, None) > 5e-5:
        pytest.skip("this transformers mixes the pictures of a prompt among its beams, without us")
    plain = model.generate(**inputs, max_new_tokens=6, num_beams=5)
    assert torch.equal(generate(model, inputs, OPERA(**PLAIN), max_new_tokens=6).sequences, plain)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_finished_answers_are_scored_as_in_transformers(
    early_stopping: Any, length_penalty: float
) -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    options = {
        "early_stopping": early_stopping,
        "length_penalty": length_penalty,
        "eos_token_id": list(range(10, 60)),
        "pad_token_id": models.PAD,
        "output_scores": True,
        "return_dict_in_generate": True,
        "max_new_tokens": 8,
    }
    plain = model.generate(**inputs, num_beams=3, **options)
    ours = generate(model, inputs, OPERA(num_beams=3, **PLAIN), **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.allclose(ours.sequences_scores, plain.sequences_scores, atol=1e-5)
    if length_penalty == 0:
        assert ours.sequences.shape[1] < inputs["input_ids"].shape[1] + 8, "none ended early"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_a_batch_is_searched_prompt_by_prompt(name: str) -> None:
    model, method = models.build(name), OPERA(**TIRED)
    batch = models.inputs(name, "mixed", batch=3)
    out = generate(model, batch, method, max_new_tokens=11).sequences[:, -11:]
    for row in range(3):
        single = models.inputs(name, "mixed", row=row)
        alone = generate(model, single, method, max_new_tokens=11)
        assert torch.equal(out[row], alone.sequences[0, -11:])


def test_nothing_of_one_prompt_reaches_the_next() -> None:
    first, second = models.inputs("llava", "images"), models.inputs("llava", "image", row=1)
    used, fresh = models.build("llava", fresh=True), models.build("llava", fresh=True)
    method = OPERA(**TIRED)
    plain = used(**second).logits
    with enhance(used, method):
        used.generate(**first, max_new_tokens=16)
        again = used.generate(**second, max_new_tokens=16)
    assert torch.equal(again, generate(fresh, second, method, max_new_tokens=16).sequences)
    assert torch.equal(used(**second).logits, plain)
    assert not used._forward_hooks
    assert "generate" not in vars(used)


def test_neutral_parameters_are_the_plain_model() -> None:
    model, inputs = models.build("llava"), models.inputs("llava", batch=3)
    neutral = OPERA(**OPERA.neutral)
    assert neutral.is_neutral
    plain = model.generate(**inputs, max_new_tokens=6, output_logits=True, **_DICT)
    ours = generate(model, inputs, neutral, max_new_tokens=6, output_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))
    searched = generate(model, inputs, OPERA(**OPERA.neutral | {"threshold": 1e8}))
    assert torch.equal(searched.sequences[:, :-3], plain.sequences)


_DICT = {"return_dict_in_generate": True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_no_nan(dtype: torch.dtype) -> None:
    model = models.build("qwen2_5_vl", dtype=dtype)
    inputs = models.inputs("qwen2_5_vl", "mixed", row=2, dtype=dtype)
    out = generate(model, inputs, OPERA(**TIRED), max_new_tokens=20, output_scores=True)
    assert all(not scores.isnan().any() for scores in out.scores)


# -- what it costs, and what stands beside it ------------------------------------------------------


def test_a_token_costs_one_forward_and_the_prompt_is_read_once() -> None:
    model, inputs, shapes = models.build("llava"), models.inputs("llava"), []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    try:
        generate(model, inputs, OPERA(), max_new_tokens=7)
    finally:
        handle.remove()
    assert shapes == [tuple(inputs["input_ids"].shape)] + [(5, 5)] * 7


class Restricted(LogitsProcessor):
    """Beam search among the likeliest tokens of each beam."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        best = scores.topk(3)
        return torch.full_like(scores, -999.0).scatter(1, *best[::-1]).log_softmax(-1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("other", ["clvs(smoothing=0.3)", "tarac", "dola"])
def test_other_methods_act_as_in_any_decoding(name: str, other: str) -> None:
    model, inputs = models.build(name), models.inputs(name, "images")
    if beam_error(model, inputs, None) > 5e-5:
        pytest.skip("this transformers mixes the pictures of a prompt among its beams, without us")
    beams = {"num_beams": 3, "logits_processor": LogitsProcessorList([Restricted()])}
    plain = generate(model, inputs, other, **beams, output_scores=True)
    method = OPERA(num_beams=3, candidates=3, penalty=0.0, threshold=NEVER)
    ours = generate(model, inputs, other, method, output_scores=True)
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.allclose(ours.sequences_scores, plain.sequences_scores, atol=1e-5)


def test_candidates_tried_one_by_one_are_those_tried_together() -> None:
    """A recorder beside it changes nothing, and records the answer as if decoded alone."""
    model, inputs = models.build("qwen2_5_vl"), models.inputs("qwen2_5_vl", row=1)
    alone = generate(model, inputs, OPERA(**TIRED), max_new_tokens=20, output_scores=True)
    both = generate(
        model, inputs, OPERA(**TIRED), Recorder(), max_new_tokens=20, output_scores=True
    )
    assert len(alone.scores) == len(both.scores) > 20, "no return took place"
    for fast, slow in zip(alone.scores, both.scores, strict=True):
        assert torch.allclose(fast, slow, rtol=1e-6, atol=ROUNDED)
    record = Recorder.read(both)
    answer = both.sequences[0, inputs["input_ids"].shape[1] :]
    forced = generate(
        model,
        inputs,
        Recorder(),
        max_new_tokens=20,
        prefix_allowed_tokens_fn=lambda i, ids: [answer[len(ids) - inputs["input_ids"].shape[1]]],
    )
    expected = Recorder.read(forced)
    assert record.values.keys() == expected.values.keys()
    for step, rows in record.values.items():
        assert torch.allclose(rows, expected.values[step], atol=1e-5)


def test_a_lone_forward_is_refused_and_a_prefix_is_not() -> None:
    model, inputs = models.build("llava"), models.inputs("llava")
    with enhance(model, OPERA()):
        with pytest.raises(FoveateError, match="opera chooses tokens by a search of its own"):
            model(**inputs)
        prefill(model, models.inputs("llava", "prefix"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 3}, "opera brings its own beams, 5 of them: leave out num_beams"),
        ({"do_sample": True}, "it does not sample: leave out do_sample"),
        ({"num_return_sequences": 2}, "it returns the best answer"),
        ({"cache_implementation": "static"}, "it forks a dynamic cache"),
        ({"use_cache": False}, "it needs the cache"),
        ({"output_attentions": True}, "the tokens it tries are not all answered"),
        ({"assistant_model": object()}, "Assisted decoding"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_search_cannot_do_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FoveateError, match=sentence):
        generate(models.build("llava"), models.inputs("llava"), OPERA(), **options)


def test_scores_of_a_batch_are_refused() -> None:
    with pytest.raises(FoveateError, match="ask one prompt at a time for scores"):
        generate(
            models.build("llava"), models.inputs("llava", batch=2), OPERA(), output_scores=True
        )


@pytest.mark.parametrize("other", ["vcd", "pai"])
def test_a_second_stream_is_refused(other: str) -> None:
    with pytest.raises(FoveateError, match=f"opera and {other} cannot be used together"):
        as_stack("opera", other)
    assert as_stack("opera", "pai(gamma=1.0)")


# -- parts -----------------------------------------------------------------------------------------


def test_a_rejected_token_is_as_unlikely_as_the_least_and_not_impossible() -> None:
    empty = torch.zeros(2, 0)
    state = State(empty, empty, empty, None, [])  # type: ignore[arg-type]
    logits = torch.tensor([[1.0, 5.0, 3.0, -math.inf], [2.0, 4.0, 8.0, 0.0]])
    out = Back(state, [(1, 0), (2, 1)]).without_rejected(logits)
    assert out.tolist() == [[-999.0, -999.0, -997.0, -math.inf], [-997.0, -995.0, -999.0, -999.0]]


def test_a_place_is_left_alone_when_it_and_the_one_before_were_tried_often_enough() -> None:
    past = Past(OPERA(num_beams=1, candidates=2, threshold=2))

    def steps(columns: list[int]) -> list[int | None]:
        found = []
        for column in columns:
            n = len(past.states)
            state = State(torch.zeros(1, n), *[torch.zeros(1)] * 2, None, [(n, 0)])  # type: ignore[arg-type]
            past.note([[column]], state)
            back = past.back()
            found.append(back.state.answers.shape[1] if back else None)
        return found

    assert steps([0] * 11 + [10] * 2) == [None] * 13
    # returns to 11, forgets what was noted since, then to 11, to 10 twice, and no more
    returns = [back for back in steps([10] * 12) if back is not None]
    assert returns == [11, 11, 10, 10]
    assert past.visits == {11: 2, 10: 2}


def test_scores_in_half_precision_vanish_and_overflow() -> None:
    products = torch.tensor([[[0.2, 1e13, 1e3]]])
    shares, image = torch.full((1, 1, 20), 0.05), torch.ones(4, dtype=torch.bool)
    later = torch.cat([torch.zeros(1, 1, 8), products], 2)
    lost, column = OPERA().penalties(later, shares, image)
    assert lost.item() == math.inf
    assert column.item() == 9
    lost, column = OPERA(half_scores=False).penalties(later, shares, image)
    assert lost.item() == pytest.approx(1e6)
    lost, column = OPERA(penalty=2.0).penalties(products[..., :1], shares, image)
    assert lost.item() == pytest.approx(-0.4), "among the first ten, the image's share"
    assert column.item() == 0, "of columns that all vanish, the first"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_beams": 0}, "num_beams must be 1 or more"),
        ({"candidates": 0}, "candidates must be 1 or more"),
        ({"scale": 0.0}, "scale must be a number above 0"),
        ({"threshold": -1}, "threshold must be 0 or more"),
        ({"window": 0}, "window must be 1 or more"),
        ({"layers": (0, 1)}, "layers must name one layer"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        OPERA(**parameters)


def test_text_and_json_round_trips() -> None:
    assert str(OPERA(threshold=15)) == "opera"
    method = OPERA(**OPERA.example)
    assert parse(text([method])) == (method,)
    assert from_json(json.loads(json.dumps(to_json([method])))) == (method,)


# -- through the front door ------------------------------------------------------------------------


def test_it_answers_through_the_front_door() -> None:
    vlm, picture = tiny.vlm(), torch.zeros(16, 16, 3).byte().numpy()
    said = vlm.ask(picture, "is there a cat", "opera", max_new_tokens=12)
    assert len(said.tokens) == 12
    assert said.probabilities == ()
    pieces = list(vlm.stream(picture, "is there a cat", "opera", max_new_tokens=12))
    assert "".join(pieces).strip() == said.text
    pairs = [(picture, "is there a cat"), ([picture] * 2, "a red cat ?"), ([], "is there")]
    batch = vlm.batch(pairs, "opera", max_new_tokens=12)
    assert [a.text for a in batch] == [
        vlm.ask(*pair, "opera", max_new_tokens=12).text for pair in pairs
    ]
    recorded = vlm.ask(picture, "is there a cat", "opera", max_new_tokens=5, record=True)
    assert recorded.record is not None
    assert len(recorded.record.values) == 5


def test_questions_about_one_image_are_each_searched() -> None:
    vlm = tiny.vlm()
    images = decode_all(torch.zeros(16, 16, 3).byte().numpy())
    chats = [vlm.chat(images, q, None) for q in ("is there a cat", "is there a red cat")]
    for chat in chats:
        chat.images = images
    stack = as_stack("opera")
    assert prepare(vlm, chats, stack) is None
    found = answer_all(vlm, chats, stack, 8)
    for chat, answer in zip(chats, found, strict=True):
        assert isinstance(answer, Answer)
        assert answer.tokens == vlm.answer([chat], stack, 8)[0].tokens


def test_a_trace_reads_the_answer_and_not_the_tokens_tried() -> None:
    vlm, picture = tiny.vlm(), decode_all(torch.zeros(16, 16, 3).byte().numpy())
    plain, searched = trace(
        vlm, picture[0], "is there a cat", ["vanilla", "opera"], max_new_tokens=4
    ).runs
    assert searched.uncertainty.shape == plain.uncertainty.shape == (4, 6)
    assert searched.uncertainty[0] == pytest.approx(plain.uncertainty[0], abs=1e-5)
    assert searched.attention.shape == plain.attention.shape
