"""The slow CLVS reference does what the paper says: checks that need no second implementation."""

import math
import sys

import pytest
import torch
from transformers import PreTrainedModel

from foveate.backends.transformers.rotary import rotary
from tests import models
from tests.references import clvs

KINDS = ["image", "images", "mixed"]
NEUTRAL = {"smoothing": 1.0, "unified_positions": False, "stop_threshold": 0.0}


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def line(*positions: int) -> torch.Tensor:
    return torch.tensor(positions)[None]


def mask(text: str) -> torch.Tensor:
    return torch.tensor([letter == "v" for letter in text])


def test_unified_positions_by_hand() -> None:
    one = clvs.unified(line(*range(7)), mask("ttvvvtt"))
    assert one.equal(line(0, 1, 2, 2, 2, 3, 4))
    two = clvs.unified(line(*range(9)), mask("tvvvtvvtt"))
    assert two.equal(line(0, 1, 1, 1, 2, 3, 3, 4, 5))
    padded = clvs.unified(line(0, 0, 0, 1, 2, 3), mask("tttvvt"))
    assert padded.equal(line(0, 0, 0, 1, 1, 2))
    # Qwen: a picture of 2 x 3 tokens at position 1 takes three positions; the next token has 4
    t, h, w = [0, *[1] * 6, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]
    grid = clvs.unified(torch.tensor([t, h, w]), mask("tvvvvvvtt"))
    assert grid.equal(line(0, *[1] * 6, 2, 3).expand(3, -1))


def test_one_visual_token_has_nothing_to_unify() -> None:
    assert clvs.unified(line(*range(5)), mask("ttvtt")).equal(line(*range(5)))
    assert clvs.unified(line(*range(5)), mask("tvtvt")).equal(line(*range(5)))


@pytest.mark.parametrize("kind", KINDS)
def test_neutral_parameters_are_plain_eager(model: PreTrainedModel, family: str, kind: str) -> None:
    inputs = models.inputs(family, kind, batch=3)
    steps = clvs.run(model, inputs, steps=5, **NEUTRAL)
    assert model.get_decoder().config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    plain = model.generate(
        **inputs, max_new_tokens=5, output_logits=True, return_dict_in_generate=True
    )
    for step, logits in zip(steps, plain.logits, strict=True):
        close(step.logits, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_are_distributions_and_equal_single_runs(
    model: PreTrainedModel, family: str, kind: str
) -> None:
    inputs = models.inputs(family, kind, batch=3)
    batch = clvs.run(model, inputs, steps=4, stop_from=0.25)
    tokens = torch.stack([step.logits.argmax(-1) for step in batch[:-1]], dim=1)
    for step in batch:
        for weights in step.rows.values():
            close(weights.sum(-1), torch.ones(weights.shape[:2]))
    padding = inputs["attention_mask"] == 0
    first = batch[0].rows[next(iter(batch[0].memory))]
    assert (first.transpose(1, 2)[padding] == 0).all()
    for row in range(3):
        alone = models.inputs(family, kind, row=row)
        steps = clvs.run(model, alone, steps=4, tokens=tokens[row : row + 1], stop_from=0.25)
        for step, other in zip(steps, batch, strict=True):
            close(step.logits[0], other.logits[row])
            assert step.stopped[0] == other.stopped[row]


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize(
    ("smoothing", "mode", "memory_norm"),
    [(0.7, "interpolate", False), (0.7, "interpolate", True), (1.3, "add", False)],
)
def test_second_edited_layer_by_hand(
    model: PreTrainedModel, family: str, pool: str, smoothing: float, mode: str, memory_norm: bool
) -> None:
    """Equations (4) to (7), from the plain model's own weights of its first two edited layers."""
    inputs = models.inputs(family, "images")
    visual = inputs["input_ids"][0] == models.IMAGE
    plain = clvs.run(model, inputs, **NEUTRAL)[0]
    options = {"mode": mode, "memory_norm": memory_norm, "pool": pool, "beta": 0.6}
    edited = clvs.run(model, inputs, **{**NEUTRAL, "smoothing": smoothing}, **options)[0]
    first, second = sorted(edited.memory)[:2]
    kept, a = plain.rows[first][0][:, visual], plain.rows[second][0]
    start = kept.amax(0) if pool == "max" else kept.mean(0)
    used = start / start.sum() if memory_norm else start
    expected = a.clone()
    if mode == "add":
        expected[:, visual] += (smoothing - 1) * used
    else:
        expected[:, visual] = smoothing * a[:, visual] + (1 - smoothing) * used
    expected = expected / expected.sum(-1, keepdim=True)
    close(edited.rows[second][0], expected, 1e-6)
    pooled = a[:, visual].amax(0) if pool == "max" else a[:, visual].mean(0)
    close(edited.memory[second][0], 0.6 * start + 0.4 * pooled, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_first_row_is_the_plain_models_at_unified_positions(
    model: PreTrainedModel, family: str, kind: str
) -> None:
    """Layer 0 sees only embeddings and positions: hand the plain model the unified positions."""
    inputs = models.inputs(family, kind, batch=3)
    reference = clvs.Reference(model, clvs.Parameters())
    if reference.layers[0] != 0:
        pytest.skip("the first full-attention layer of this family has sliding layers below it")
    steps = [reference.forward(inputs)]
    for _ in range(3):
        steps.append(reference.forward({"input_ids": steps[-1].logits.argmax(-1)[:, None]}))
    everything = dict(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in everything:
            everything[key] = reference.seen[key]
    rows = zip(reference.positions.unbind(1), reference.seen["visual"], strict=True)
    moved = torch.stack([clvs.unified(places, visual) for places, visual in rows], dim=1)
    everything["position_ids"] = moved if len(moved) == 3 else moved[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**everything, output_attentions=True).attentions[0]
    prompt = inputs["input_ids"].shape[1]
    for i, step in enumerate(steps):
        close(step.rows[0], maps[:, :, prompt - 1 + i, : prompt + i], 5e-6)


def test_rotations_compose(model: PreTrainedModel, family: str) -> None:
    """Turning a cached key on by the difference of positions equals turning the raw key once."""
    reference = clvs.Reference(model, clvs.Parameters())
    reference.forward(models.inputs(family, "images"))
    module, places = reference.given[0], reference.positions[:, 0]
    moved = clvs.unified(places, reference.seen["visual"][0])
    assert not moved.equal(places)
    with reference.installed():
        cached, once = (reference.placed(0, where)[1] for where in (places, moved))
    turn = rotary(reference.decoder, module, cached)
    twice = turn.rotate(cached, turn.rotation((moved - places)[:, None]))
    close(once, twice, 3e-5)  # fp32 angles: keys of size 5 at positions above 100


def test_only_the_last_row_is_edited(model: PreTrainedModel, family: str) -> None:
    inputs = models.inputs(family, "image")
    caches = []
    for parameters in (clvs.Parameters(), clvs.Parameters(**NEUTRAL)):
        reference = clvs.Reference(model, parameters)
        reference.forward(inputs)
        caches.append(reference.cache)
    for edited, plain in zip(caches[0].layers, caches[1].layers, strict=True):
        close(edited.keys[:, :, :-1], plain.keys[:, :, :-1], 0.0)
        close(edited.values[:, :, :-1], plain.values[:, :, :-1], 0.0)
    assert not caches[0].layers[-1].keys.equal(caches[1].layers[-1].keys)


def test_memory_and_stop(model: PreTrainedModel, family: str) -> None:
    inputs = models.inputs(family, "image", batch=3)
    depth = model.get_decoder().config.num_hidden_layers
    kept = clvs.run(model, inputs, beta=1.0, stop_threshold=0.0)[0]
    assert kept.stopped == [None] * 3
    for memories in kept.memory.values():
        for now, then in zip(memories, next(iter(kept.memory.values())), strict=True):
            close(now, then, 0.0)
    assert sorted(kept.uncertainty) == list(range(depth // 2 + 1, depth))

    stopped = clvs.run(model, inputs, stop_threshold=1.1, stop_from=0.25)[0]
    layer = math.floor(depth * 0.25) + 1
    assert stopped.stopped == [max(layer, min(kept.memory))] * 3
    assert all(at < layer or at == min(kept.memory) for at in stopped.memory)

    sparse = clvs.run(model, inputs, stop_threshold=0.0, stop_from=0.0, stop_every=2)[0]
    assert sorted(sparse.uncertainty) == [
        layer for layer in range(1, depth, 2) if layer >= min(sparse.memory)
    ]


def test_stopping_leaves_later_layers_plain(model: PreTrainedModel, family: str) -> None:
    inputs = models.inputs(family, "image")
    depth = model.get_decoder().config.num_hidden_layers
    a = clvs.run(model, inputs, stop_threshold=1.1, stop_from=0.25)[0]
    b = clvs.run(model, inputs, stop_threshold=0.0, layers=tuple(range(a.stopped[0] + 1)))[0]
    close(a.logits, b.logits, 0.0)
    assert a.stopped[0] < depth - 1


def test_uncertainty_of_the_last_layer_is_the_models_own(
    model: PreTrainedModel, family: str
) -> None:
    inputs = models.inputs(family, "image")
    step = clvs.run(model, inputs, stop_threshold=0.0, final_norm=True, top_k=7)[0]
    top = step.logits[0].topk(7).values.softmax(-1)
    entropy = -(top * top.log()).sum() / math.log(7)
    assert step.uncertainty[max(step.uncertainty)][0] == pytest.approx(entropy.item(), abs=1e-5)


def test_text_alone_is_plain(model: PreTrainedModel, family: str) -> None:
    inputs = models.inputs(family, "text", batch=3)
    steps = clvs.run(model, inputs, steps=3)
    plain = clvs.run(model, inputs, steps=3, **NEUTRAL)
    for step, other in zip(steps, plain, strict=True):
        assert step.logits.equal(other.logits)
        assert not step.memory


def test_unedited_prefix_then_question_is_the_whole_prompt(
    model: PreTrainedModel, family: str
) -> None:
    prefix, whole = models.inputs(family, "prefix"), models.inputs(family, "shared", row=1)
    question = {"input_ids": models.inputs(family, "suffix", row=1)["input_ids"]}
    parts = clvs.run(model, prefix, steps=3, turns=[question], prefix_only=True)
    once = clvs.run(model, whole, steps=3)
    for step, other in zip(parts[1:], once, strict=True):
        close(step.logits, other.logits)
    edited = clvs.run(model, prefix, turns=[question])
    assert (edited[1].logits - once[0].logits).abs().max() > 1e-3


def test_an_interrupted_run_leaves_the_model_as_it_was(model: PreTrainedModel, family: str) -> None:
    modeling = sys.modules[type(model.get_decoder().layers[0].self_attn).__module__]
    before, layers = dict(vars(modeling)), model.get_decoder().layers
    hooks = [len(layer._forward_hooks) for layer in layers]  # output_attentions leaves some behind
    with pytest.raises(RuntimeError):
        clvs.run(model, {"input_ids": torch.zeros(1, 3)})
    assert dict(vars(modeling)) == before
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert [len(layer._forward_hooks) for layer in layers] == hooks
