"""Rows of a paged cache, as vLLM keeps one: the plan of a step, and columns with one for the rest.

Needs no vLLM. ``make test-vllm`` holds the whole engine against transformers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError
from foveate.backends.vllm import compat, watch
from foveate.backends.vllm import rows as paged
from foveate.backends.vllm.admission import check_text
from foveate.backends.vllm.asked import IMAGES, KEY, asked, first_edited, visual
from foveate.backends.vllm.blocks import readable, with_method
from foveate.backends.vllm.cache import Packed
from foveate.backends.vllm.plan import Blocks, Live, plan
from foveate.core.edit import Acting, edit_rows, products, weighted
from foveate.core.method import parse
from foveate.core.rows import Rows
from foveate.core.sequence import Stack, State

H, HKV, D, SIZE, DEPTH, SCALE = 4, 2, 8, 16, 3, 0.3
BLOCKS = 80
ANATOMY: Any = SimpleNamespace(
    depth=DEPTH,
    kind="llava",
    layer_kinds=("full_attention",) * DEPTH,
    full_layers=tuple(range(DEPTH)),
    placed=True,
    heads=H,
    width=16,
    tower=None,
    shape={"model_type": "llava", "layers": DEPTH, "attention_heads": H},
    layer_device=lambda layer: torch.device("cpu"),
    turns=lambda layer: True,
)
# prompt's length, tokens after this step, new tokens of this step, images as (first, length)
REQUESTS = [
    (50, 50, 50, [(5, 20)]),  # a whole prompt
    (50, 53, 1, [(5, 20)]),  # the fourth token of an answer
    (90, 90, 20, [(3, 30), (40, 33)]),  # the last chunk of a prompt with two pictures
    (90, 70, 30, [(3, 30)]),  # a chunk that does not end its prompt
    (31, 35, 6, [(8, 16)]),  # a prompt's last row and five tokens, computed again
    (170, 170, 9, [(5, 20)]),  # long texts, of which the image is a small part
    (160, 163, 1, [(70, 20)]),
]


def stacks(text: str) -> Stack:
    return Stack(ANATOMY, parse(text))


def lives(text: str) -> dict[int, Live]:
    made = {}
    for n, (prompt, _, _, images) in enumerate(REQUESTS):
        params = SimpleNamespace(extra_args={KEY: text, IMAGES: images})
        made[n] = Live(text, prompt, visual(params, prompt), None)
    return made


class Cache:
    """Keys and values of every request, and the same in blocks."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.lengths = [length for _, length, _, _ in REQUESTS]
        self.starts = [0]
        for _, _, new, _ in REQUESTS:
            self.starts.append(self.starts[-1] + new)
        self.keys = [[draw(HKV, n, D) for _ in range(DEPTH)] for n in self.lengths]
        self.values = [[draw(HKV, n, D) for _ in range(DEPTH)] for n in self.lengths]
        self.queries = [draw(self.starts[-1], H, D) for _ in range(DEPTH)]
        widest = -(-max(self.lengths) // SIZE)
        free = torch.randperm(BLOCKS, generator=generator).tolist()
        self.table = torch.zeros(len(REQUESTS), widest, dtype=torch.int32)
        # what no request wrote must not matter
        self.blocks = [draw(2, BLOCKS, HKV, SIZE, D) * 50 for _ in range(DEPTH)]
        for n, length in enumerate(self.lengths):
            for k in range(-(-length // SIZE)):
                block = free.pop()
                self.table[n, k] = block
                part = slice(k * SIZE, min((k + 1) * SIZE, length))
                for layer in range(DEPTH):
                    both = self.keys[n][layer][:, part], self.values[n][layer][:, part]
                    for half, x in enumerate(both):
                        self.blocks[layer][half, block, :, : x.shape[1]] = x

    def layer(self, layer: int) -> Packed:
        """A layer's blocks, as the kernel of CPUs packs them."""
        keys, values = self.blocks[layer]
        halves = [keys.transpose(2, 3).flatten(2), values.flatten(2)]
        return Packed(torch.cat(halves, 2).view(BLOCKS, HKV, SIZE, 2 * D))

    def row(self, n: int, position: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values that one token sees, each (1, ...)."""
        number = self.starts[n] + position - (self.lengths[n] - REQUESTS[n][2])
        past = slice(0, position + 1)
        query = self.queries[layer][number][None, :, None]
        return query, self.keys[n][layer][None, :, past], self.values[n][layer][None, :, past]


def plain(cache: Cache, layer: int) -> Tensor:
    """The kernel's output, (tokens, H, D)."""
    out = torch.zeros(cache.starts[-1], H, D)
    for n, (_, length, new, _) in enumerate(REQUESTS):
        for position in range(length - new, length):
            query, key, value = cache.row(n, position, layer)
            weights = products(query, key, SCALE).softmax(-1)
            repeated = value.repeat_interleave(H // HKV, 1)
            out[cache.starts[n] + position - (length - new)] = (weights @ repeated)[0, :, 0]
    return out


def slow(cache: Cache, text: str) -> list[Tensor]:
    """Per layer the output with every row edited by itself, on all its columns."""
    stack, outs = stacks(text), [plain(cache, layer) for layer in range(DEPTH)]
    for n, (prompt, length, new, images) in enumerate(REQUESTS):
        mask = torch.zeros(1, prompt, dtype=torch.bool)
        for first, count in images:
            mask[0, first : first + count] = True
        last = max(first + count for first, count in images) - 1
        kept: State | None = None
        for position in range(length - new, length):
            phase: Any = "prompt" if position < prompt else "decode"
            acting = [
                i
                for i, m in enumerate(stack.methods)
                if position > (last if m.rows == "text" else prompt - 2)
                and (m.rows != "prompt" or position == prompt - 1)
            ]
            if not acting:
                continue
            remembers = any(m.remembers for m in stack.methods)
            if kept is None or phase == "prompt" or not remembers:
                kept = State(stack, mask, phase)
            else:
                kept.phase = phase
                kept.renew()
            for layer in range(DEPTH):
                here = [i for i in stack.edits[layer] if i in acting]
                if here:
                    query, key, value = cache.row(n, position, layer)
                    x = products(query, key, SCALE)
                    given = x, layer, query, key, value, None, SCALE, kept.seen_by(here[0])
                    edits = [Acting(stack.methods[i], kept.seen_by(i), 1) for i in here]
                    number = cache.starts[n] + position - (length - new)
                    outs[layer][number] = edit_rows(Rows(*given), edits)[0, :, 0]
    return outs


@pytest.mark.parametrize(
    "text",
    [
        "pai(alpha=1.0, gamma=1.0)",
        "pai(alpha=1.0, gamma=1.0, boost_first_token=False)",
        "devils(alpha=1.0)",
        "spin(keep=0.5, scale=0.2)",
        "scalingvis(weight=2.0)",
        "scalingvis(weight=0.3)",
        "vaf(enhance=1.8, suppress=0.4, layers=(0, 1))",
        "adhh(threshold=0.1, heads=((0, 1), (1, 0), (1, 3)))",
        "tarac(beta=1.5, alpha=0.8, layers=(0, 2))",
        "clvs(stop_threshold=0, unified_positions=False, smoothing=0.4)",
        "clvs(stop_threshold=0, unified_positions=False)+pai(gamma=1.0, layers=(1,))",
        "vaf(enhance=1.8, layers=(1,))+devils(alpha=1.0, layers=(1, 2))",
    ],
)
def test_rows_of_blocks_equal_rows_of_all_columns(text: str) -> None:
    cache = Cache()
    expected = slow(cache, text)
    where = cache.starts, cache.lengths, cache.table, SIZE
    made = lives(text)
    for n, (prompt, length, new, _) in enumerate(REQUESTS):
        if length - new >= prompt:  # its prompt's end was a step of its own
            plan({n: made[n]}, stacks, [0] * (n + 1) + [1], [0] * n + [prompt], cache.table, SIZE)
    groups = plan(made, stacks, *where)
    changed = False
    for layer in range(DEPTH):
        out = before = plain(cache, layer)
        out = out.clone()
        for group in groups:
            if layer in group.layers:
                if group.rest is None and group.at_work(layer):
                    out[group.at] = torch.nan  # the kernel may be left out
                given = cache.queries[layer], cache.layer(layer), out, SCALE
                paged.edit(group, layer, *given, lambda like: None)
        assert (out - expected[layer]).abs().max() < 2e-5
        changed |= bool((out - before).abs().max() > 1e-2)
    assert changed
    assert all(group.done == group.layers for group in groups)


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        ([[3, 7, 1], [3, 7, 5], [3, 7, 3]], [(1, 0, 2), (3, 2, 3)]),
        ([[3, 7, 1], [4, 7, 1]], [(2, 0, 3)]),
        ([[3, 7], [3, 7]], [(1, 0, 2)]),
    ],
)
def test_blocks_that_rows_begin_with_are_read_once(
    number: list[list[int]], parts: list[tuple[int, int, int]]
) -> None:
    cache, blocks = Cache(), Blocks(torch.tensor(number))
    packed, draw = cache.layer(0), torch.Generator().manual_seed(2)
    keys, values = (half[blocks.number].transpose(1, 2).flatten(2, 3) for half in cache.blocks[0])
    assert torch.equal(packed.keys(blocks), keys)
    assert torch.equal(packed.values(blocks), values)
    query = torch.randn(len(number), H, 1, D, generator=draw)
    weights = torch.rand(len(number), H, 1, keys.shape[2], generator=draw)
    near = {"rtol": 1e-5, "atol": 1e-3}  # what no request wrote is large
    expected = products(query, keys, SCALE)
    torch.testing.assert_close(packed.scores(query, blocks, SCALE), expected, **near)
    torch.testing.assert_close(packed.weighted(weights, blocks), weighted(weights, values), **near)
    assert [(part.sets, part.start, part.end) for part in blocks.places] == parts


def test_an_answer_whose_memory_is_lost_stops_the_engine() -> None:
    cache = Cache()
    where = cache.starts, cache.lengths, cache.table, SIZE
    with pytest.raises(RuntimeError, match=r"what tarac.* remembers of this answer is lost"):
        plan({1: lives("tarac")[1]}, stacks, *where)
    assert plan({1: lives("clvs")[1]}, stacks, *where)


def test_a_request_without_a_method_is_in_no_group() -> None:
    cache = Cache()
    some = {1: lives("devils")[1]}
    groups = plan(some, stacks, cache.starts, cache.lengths, cache.table, SIZE)
    assert [group.rows.tolist() for group in groups] == [[50]]


@pytest.mark.parametrize(
    ("text", "first"), [("clvs", 99), ("devils+pai(gamma=1.0)", 99), ("vaf", 40), ("clvs+vaf", 40)]
)
def test_blocks_from_the_first_edited_row_on_are_keyed_by_the_method(text: str, first: int) -> None:
    images = [(3, 10), (20, 20)]
    assert first_edited(asked(params(text)), 100, images) == first
    request = SimpleNamespace(sampling_params=params(text), num_prompt_tokens=100)
    request.sampling_params.extra_args[IMAGES] = images
    assert with_method((1,), request, first) == (1,), "up to it the block is the plain model's"
    assert with_method(None, request, first) is None
    keys = with_method((1,), request, first + 1)
    assert keys is not None
    assert keys[0] == 1
    assert text.split("+")[0] in str(keys[1])


@pytest.mark.parametrize(
    ("text", "count"),
    [("tarac", 6), ("tarac+vaf", 2), ("clvs", None), ("", None), ("tarac+var", None)],
)
def test_what_remembers_reads_the_blocks_before_its_first_row(text: str, count: int | None) -> None:
    request = SimpleNamespace(sampling_params=params(text), num_prompt_tokens=113)  # 112 is edited
    request.sampling_params.extra_args[IMAGES] = [(3, 10), (20, 26)]
    assert readable(request, 16 if count == 2 else 17) == count


def test_a_plain_request_keeps_its_keys() -> None:
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None))
    assert with_method((1,), request, 10**6) == (1,)


def params(text: Any) -> Any:
    return SimpleNamespace(extra_args={KEY: text})


def test_one_text_stands_for_all_spellings() -> None:
    assert asked(params("clvs(beta=0.8,smoothing=.7)")) == asked(
        params("clvs( smoothing = 0.7, beta=0.8 )")
    )
    assert asked(params("vanilla")) == asked(params("devils(alpha=0)")) == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (7, "is a method's text"),
        ("clvz", "clvs"),
        ("clvs(smoothing=7)", "between 0 and 1"),
        ("sid", "to read the attention of its second stream"),
        ("avisc", "to change what its second stream embeds"),
        ("ritual", "to change the chat"),
        ("icd", "to change the chat"),
        ("laser", "before it answers"),
        ("adhh(heads='heads.json')", "name no files"),
        ("cli", "vision tower"),
        ("memvr", "feed-forward"),
        ("opera", "search"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(text: Any, sentence: str) -> None:
    with pytest.raises(FoveateError, match=sentence):
        check_text(params(text))


def test_methods_are_refused_beside_adapters() -> None:
    compat.refuse_adapters(SimpleNamespace(lora_config=None))
    with pytest.raises(FoveateError, match="adapter merged into the model"):
        compat.refuse_adapters(SimpleNamespace(lora_config=object()))


def test_a_step_that_was_not_edited_stops_the_engine() -> None:
    cache = Cache()
    (group,) = plan({1: lives("devils")[1]}, stacks, cache.starts, cache.lengths, cache.table, SIZE)
    watch.expect([group])
    with pytest.raises(RuntimeError, match=r"devils.* was not applied in layers \[0, 1\]"):
        watch.verify(True)
    with pytest.raises(RuntimeError, match="was not planned"):
        watch.verify(True)
    watch.verify(False)
    group.done |= group.layers
    watch.expect([group])
    watch.verify(True)
