"""Requests at the door of vLLM: whatever a client sends is admitted whole, or is one sentence."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.backends.vllm.admission import admit, check_text, shape
from foveate.backends.vllm.asked import (
    IMAGES,
    KEY,
    LIVES,
    POSITIONS,
    acting,
    asked,
    first_edited,
    visual,
)
from foveate.backends.vllm.blocks import with_method
from foveate.backends.vllm.plan import Live, plan
from foveate.base.errors import FoveateError
from foveate.base.form import MESSAGE
from foveate.core.sequence import Stack
from tests.hostile import MANY, tries
from tests.hostile.test_texts import NAUGHTY, texts

LENGTH = 40
SERVED = [
    "clvs",
    "devils",
    "spin",
    "scalingvis",
    "vaf",
    "tarac",
    "adhh(heads=((0,1),))",
    "pai(gamma=1)",
]
values = st.one_of(
    texts,
    st.lists(st.sampled_from(SERVED), min_size=1, max_size=3).map("+".join),
    st.sampled_from(NAUGHTY).map(lambda value: f"clvs(stop_threshold={value})"),
    st.none(),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.binary(max_size=5),
    st.lists(st.sampled_from(SERVED), max_size=3),
    st.dictionaries(st.sampled_from([KEY, "method"]), st.sampled_from(SERVED)),
)
places = st.lists(
    st.tuples(st.sampled_from(["image", "video", "audio"]), st.integers(0, 30), st.integers(0, 9)),
    max_size=3,
)


@functools.cache
def config() -> Any:
    import transformers

    from foveate.vlm.loading import WEIGHTS

    return transformers.AutoConfig.from_pretrained(WEIGHTS)


def request(value: Any, images: Any, **more: Any) -> Any:
    """What vLLM's front end has made of a client's request."""
    features = [
        SimpleNamespace(
            modality=kind,
            mm_position=SimpleNamespace(offset=first, length=count, is_embed=None),
        )
        for kind, first, count in images
    ]
    return SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={KEY: value} | more, n=1),
        prompt_token_ids=[0] * LENGTH,
        num_prompt_tokens=LENGTH,
        mm_features=features,
    )


def enter(value: Any, images: Any) -> None:
    """What is admitted can be run, and the scheduler and the worker mean the same by it."""
    # the last two are not for clients to say
    one = request(value, images, **{POSITIONS: [1], LIVES: [[1, 2]]})
    params = one.sampling_params
    try:
        check_text(params)
        admit(config(), one)
    except FoveateError as error:
        message = str(error)
        assert len(message) <= MESSAGE
        assert message.isprintable()
        assert message.endswith((".", " ...")), message
        return
    text = asked(params)
    keys = with_method(None, one, LENGTH)
    if not text:
        assert keys is None
        return
    assert set(params.extra_args) == {KEY, IMAGES}
    assert params.extra_args[KEY] == text == asked(SimpleNamespace(extra_args={KEY: text}))
    stack = stacks(text)
    assert str(stack)
    assert keys is not None
    assert text in str(keys[0])
    live = Live(text, LENGTH, visual(params, LENGTH), None)
    assert live.visual.any()
    first = first_edited(text, LENGTH, params.extra_args[IMAGES])
    groups = plan({0: live}, lambda _: stack, [0, LENGTH], [LENGTH], table(), 16)
    if stack.methods and any(stack.edits.values()):
        rows = [row for group in groups for row in group.rows.tolist()]
        assert min(rows) == min(first, LENGTH - 1)


@functools.cache
def table() -> Any:
    import torch

    return torch.arange(4)[None]


@functools.lru_cache(64)
def stacks(text: str) -> Stack:
    return Stack(shape(config()).anatomy, acting(text))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@tries(40)
@given(values, places)
def test_requests_at_admission(value: Any, images: Any) -> None:
    enter(value, images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@MANY
@given(values, places)
def test_many_requests_at_admission(value: Any, images: Any) -> None:
    enter(value, images)
