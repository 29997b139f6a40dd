"""Two streams of different length: one forward per token, each on its own cache and positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import enhance
from foveate.backends.transformers import compat_cache
from foveate.backends.transformers.compat import cache_of, passing
from foveate.backends.transformers.few_rows import multiply
from foveate.methods.pai import PAI
from tests import models
from tests.references.full import difference
from tests.test_pai import STRONG, generate, slow

ROUNDING = 1e-5


def decoding(model: Any, inputs: dict[str, Tensor], *stack: Any, **options: Any) -> list[int]:
    """How many rows each forward of the decoder had while five tokens were written."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        rows.append(len(out.last_hidden_state))

    hook = model.get_decoder().register_forward_hook(note, with_kwargs=True)
    try:
        generate(model, inputs, *stack, **options)
    finally:
        hook.remove()
    return rows


def test_a_token_of_both_streams_is_one_forward(family: str, model: Any) -> None:
    inputs = models.inputs(family, "image", batch=3)
    rows = decoding(model, inputs, PAI(**STRONG))
    assert rows == [3, 3, 6, 6, 6, 6], "both prompts, then both streams at once"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_static_cache_decodes_the_streams_one_after_the_other(name: str) -> None:
    rows = decoding(
        models.build(name), models.inputs(name), PAI(**STRONG), cache_implementation="static"
    )
    assert rows == [1] * 10


def test_a_cache_of_whole_windows_decodes_the_streams_one_after_the_other() -> None:
    """Gemma3's sliding layers then see less than the cache gives them."""
    model, inputs = models.build("gemma3"), models.inputs("gemma3")  # unpadded, as windows count
    usual = generate(model, inputs, PAI(**STRONG))
    with torch.no_grad(), enhance(model, PAI(**STRONG)):
        out, cache = model(**inputs, **passing(model, compat_cache.whole_cache())), None
        for step in range(1, 5):
            assert difference(out.logits[:, -1], usual.logits[step - 1]) < ROUNDING
            cache = cache_of(out)
            token = usual.sequences[:, inputs["input_ids"].shape[1] + step - 1][:, None]
            more = {"input_ids": token, "attention_mask": _grown(inputs, step)}
            more["position_ids"] = more["attention_mask"].sum(1, keepdim=True) - 1
            out = model(**more, **passing(model, cache))
    assert not compat_cache.grows(model.get_decoder(), cache)


def _grown(inputs: dict[str, Tensor], steps: int) -> Tensor:
    mask = inputs["attention_mask"]
    return torch.cat([mask, mask.new_ones(len(mask), steps)], 1)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_the_first_streams_cache_is_as_without_a_second(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, batch=3)
    plain = cache_of(generate(model, inputs, PAI(alpha=1.0, gamma=1.0)))
    both = cache_of(generate(model, inputs, PAI(alpha=1.0, gamma=1.0 + 1e-9, plausibility=0.0)))
    assert plain.get_seq_length() == both.get_seq_length()
    for one, other in zip(plain.layers, both.layers, strict=True):
        assert difference(one.keys, other.keys) < ROUNDING
    side = both.foveate.other
    tokens = (inputs["input_ids"] != models.IMAGE) & (inputs["attention_mask"] == 1)
    assert torch.equal(side.mask.sum(1), tokens.sum(1) + 4), "the last token was not read"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_beams_take_both_streams_with_them(name: str) -> None:
    model, method = models.build(name), PAI(alpha=0.5, gamma=1.3, plausibility=0.0)
    inputs = models.inputs(name, "image", batch=2)
    out = generate(model, inputs, method, num_beams=3, output_scores=True)
    assert (out.beam_indices.diff(dim=1) != 0).any(), "no beam took another's place"
    length = inputs["input_ids"].shape[1]
    for row in range(2):
        tokens, alone = out.sequences[row, length:], models.inputs(name, "image", row=row)
        steps = slow(model, method).run(alone, len(tokens), tokens=tokens[None, :-1])
        chances = [s.logits.log_softmax(-1)[0, t] for s, t in zip(steps, tokens, strict=True)]
        score = float(sum(chances) / len(tokens))
        assert score == pytest.approx(float(out.sequences_scores[row]), abs=ROUNDING)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_copies_and_chosen_rows_go_on_alone(name: str) -> None:
    model, inputs = models.build(name), models.inputs(name, "mixed", batch=3)
    out = generate(model, inputs, PAI(**STRONG))
    written = out.sequences[:, inputs["input_ids"].shape[1] :]

    def step(cache: Any, rows: list[int], number: int) -> Tensor:
        """The logits after token `number` of these rows."""
        mask = _grown(inputs, number + 1)[rows]
        place = start[rows] + number
        given = {"input_ids": written[rows, number : number + 1], "attention_mask": mask}
        given["position_ids"] = place[None].expand(3, -1, -1) if name == "qwen2_5_vl" else place
        return model(**given, **passing(model, cache)).logits[:, -1]

    with torch.no_grad(), enhance(model, PAI(**STRONG)):
        first = model(**inputs)
        cache, start = cache_of(first), cache_of(first).foveate.positions.amax((0, 2))[:, None] + 1
        assert difference(step(cache, [0, 1, 2], 0), out.logits[1]) < ROUNDING
        fork = copy.deepcopy(cache)
        fork.batch_select_indices(torch.tensor([2, 0]))
        for number in (1, 2):
            want = out.logits[number + 1]
            assert difference(step(fork, [2, 0], number), want[[2, 0]]) < ROUNDING
        assert difference(step(cache, [0, 1, 2], 1), out.logits[2]) < ROUNDING
        fork.batch_repeat_interleave(2)
        assert difference(step(fork, [2, 2, 0, 0], 3), out.logits[4][[2, 2, 0, 0]]) < ROUNDING


@pytest.mark.parametrize("bias", [True, False])
def test_two_rows_are_multiplied_as_ever(bias: bool) -> None:
    layer = torch.nn.Linear(48, 32, bias=bias)
    for shape in [(2, 1), (1, 2), (2,), (3, 1), (1,)]:
        for dtype in (torch.float32, torch.float64):
            x, own = torch.randn(*shape, 48, dtype=dtype), copy.deepcopy(layer).to(dtype)
            got = multiply(own, x)
            assert got.is_contiguous()
            assert got.shape == (*shape, 32)
            assert torch.allclose(got, own(x), atol=1e-6)


def test_an_interrupted_step_leaves_nothing_behind() -> None:
    model, inputs = models.build("qwen2_5_vl"), models.inputs("qwen2_5_vl")
    out = generate(model, inputs, PAI(**STRONG))

    def fail(*_: Any) -> None:
        raise ValueError("mark")

    with torch.no_grad(), enhance(model, PAI(**STRONG)):
        cache = cache_of(model(**inputs))
        handle = model.get_decoder().layers[-1].register_forward_hook(fail)
        with pytest.raises(ValueError, match="mark"):
            model(input_ids=torch.tensor([[40]]), **passing(model, cache))
        handle.remove()
    again = generate(model, inputs, PAI(**STRONG))
    assert torch.equal(torch.stack(again.logits), torch.stack(out.logits))
