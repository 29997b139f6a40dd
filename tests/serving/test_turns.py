"""Whole conversations: the answer is that of plain transformers, or of the method offline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate import FoveateError
from foveate.core.method import as_stack, methods
from foveate.vlm.chat import Chat, Turn
from tests.serving.conftest import question, scene

DESCRIBE = "Please describe this image in detail."
FIRST, SAID, SECOND = "Is there a car in the image?", "no", DESCRIBE
# how many pictures the first and the second question have
COUNTS = [(1, 0), (0, 1), (1, 1), (2, 0)]


def messages(counts: tuple[int, int], system: str | None = None) -> list[dict[str, Any]]:
    """What the client sends; `assistant` comes back with all of its fields."""
    first, second = ([scene(10 * turn + i) for i in range(n)] for turn, n in enumerate(counts))
    answer = {"role": "assistant", "content": SAID, "refusal": None, "audio": None}
    told = [{"role": "system", "content": system}] if system else []
    return [*told, *question(FIRST, *first), answer, *question(SECOND, *second)]


def chat(counts: tuple[int, int]) -> Chat:
    images = [scene(10 * turn + i) for turn, n in enumerate(counts) for i in range(n)]
    earlier = (Turn("user", FIRST, counts[0]), Turn("assistant", SAID))
    return Chat(images, SECOND, earlier=earlier)


def plain(vlm: Any, counts: tuple[int, int], system: str | None, tokens: int) -> str:
    """The conversation through the processor's template and `generate`, without foveate."""
    told: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn, (text, count) in enumerate(zip((FIRST, SECOND), counts, strict=True)):
        parts: list[dict[str, Any]] = [
            {"type": "image", "image": scene(10 * turn + i)} for i in range(count)
        ]
        told.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        if not turn:
            told.append({"role": "assistant", "content": [{"type": "text", "text": SAID}]})
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = vlm.processor.apply_chat_template(told, add_generation_prompt=True, **options)
    with torch.no_grad():
        out = vlm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return vlm.tokenizer.decode(new, skip_special_tokens=True).strip()


def ask(client: Any, counts: tuple[int, int], system: str | None = None, **options: Any) -> Any:
    return client.chat.completions.create(
        model="pocket", messages=messages(counts, system), **options
    )


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("system", [None, "small car"])
def test_the_answer_is_that_of_plain_transformers(client, vlm, counts, system):
    answer = ask(client, counts, system, max_tokens=16)
    assert answer.choices[0].message.content == plain(vlm, counts, system, 16)


def test_earlier_turns_matter_and_a_stream_says_the_same(client):
    options = {"max_tokens": 16, "logprobs": True}
    whole = ask(client, (1, 0), **options).choices[0]
    other = client.chat.completions.create(
        model="pocket", messages=question(SECOND, scene(0)), **options
    ).choices[0]
    assert whole.logprobs.content[0].logprob != pytest.approx(
        other.logprobs.content[0].logprob, abs=1e-3
    )
    chunks = ask(client, (1, 0), stream=True, **options)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.message.content


def test_an_answer_can_be_sent_back(client):
    told = question(FIRST, scene(3))
    answer = client.chat.completions.create(model="pocket", messages=told, max_tokens=8)
    again = [*told, answer.choices[0].message.model_dump(), *question("Is it red?")]
    second = client.chat.completions.create(model="pocket", messages=again, max_tokens=8)
    assert second.choices[0].message.content
    assert second.usage.prompt_tokens > answer.usage.prompt_tokens


def offline(vlm: Any, method: str, counts: tuple[int, int]) -> str:
    stack = as_stack(method)
    return vlm.answer(vlm.rewrite([chat(counts)], stack), stack, 6)[0].text


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:var does nothing")
@pytest.mark.parametrize("counts", [(1, 0), (2, 0)])
@pytest.mark.parametrize("method", ["clvs+vcd", *methods()])
def test_every_method_answers_or_refuses_in_one_sentence(server, client, vlm, method, counts):
    if f"pocket:{method}" not in server.service.catalogue.ids and "+" not in method:
        pytest.skip("needs parameters, or another model")
    try:
        expected = offline(vlm, method, counts)
    except FoveateError as error:
        expected = str(error)
        assert "\n" not in expected
        with pytest.raises(Exception, match="looks again at one image") as refused:
            ask(client, counts, max_tokens=6, extra_body={"method": method})
        assert refused.value.status_code == 400
        assert refused.value.body["message"] == expected
        assert counts == (2, 0)
    else:
        answer = ask(client, counts, max_tokens=6, extra_body={"method": method})
        assert answer.choices[0].message.content == expected


def test_a_crop_is_shown_beside_the_question(vlm):
    stack = as_stack("vicrop(window=64)")
    for counts in ((1, 0), (0, 1)):
        (shown,) = vlm.rewrite([chat(counts)], stack)
        assert shown.images[0] is scene(0 if counts[0] else 10)
        assert len(shown.images) == 2, "a crop was found"
        turns = vlm.prompt(shown).split("USER: ")[1:]
        assert [turn.count("<image>") for turn in turns] == ([1, 1] if counts[0] else [0, 2])
