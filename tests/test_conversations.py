"""Conversations become what the model reads and no more than the answers is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from foveate import VLM, FoveateError
from foveate.training.check import check
from foveate.training.conversations import Broken, Conversation, read
from foveate.training.writer import IGNORE, Writer
from tests import tiny


@pytest.fixture(scope="module")
def pocket() -> VLM:
    return VLM.load("pocket")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, size in (("red", (40, 30)), ("blue", (24, 60)), ("green", (16, 16))):
        Image.new("RGB", size, name).save(folder / f"{name}.png")
    return folder


def said(*turns: str) -> list[dict[str, str]]:
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)]


ONE = {"id": "a", "image": "red.png", "conversations": said("<image>\nIs it red?", "yes")}
TWO = {
    "id": "b",
    "image": "red.png",
    "conversations": said("<image>\nWhat color is it?", "red", "Is there a tree?", "no"),
}
TEXT = {"id": "c", "conversations": said("Is red a color?", "yes")}
PAIR = {
    "id": "d",
    "image": ["red.png", "blue.png"],
    "conversations": said("<image>\n<image>\nIs the first picture red?", "yes"),
}


def written(folder: Path, *rows: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return path


def rows_of(folder: Path, *rows: object) -> list[Conversation]:
    found = read(written(folder, *rows))
    assert all(isinstance(row, Conversation) for row in found), found
    return found  # type: ignore[return-value]


def writer_of(vlm: VLM) -> Writer:
    return Writer(vlm.processor, vlm.model.config)


def learnt(vlm: VLM, ids: torch.Tensor, labels: torch.Tensor) -> str:
    assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE])
    return vlm.tokenizer.decode(labels[labels != IGNORE])


def test_lines_and_a_list_are_read_alike(folder: Path) -> None:
    lines = read(written(folder, ONE, TEXT, PAIR))
    path = folder / "list.json"
    path.write_text(json.dumps([ONE, TEXT, PAIR]), "utf-8")
    assert lines == read(path)
    assert [row.line for row in lines] == [1, 2, 3]
    elsewhere = read(written(folder / "..", ONE, name="data2.jsonl"), folder)
    assert isinstance(elsewhere[0], Conversation)
    assert elsewhere[0].images == (folder / "red.png",)


def test_answers_and_their_ends_are_learnt_and_nothing_else(pocket: VLM, folder: Path) -> None:
    writer = writer_of(pocket)
    rows = rows_of(folder, ONE, TWO, TEXT, PAIR)
    batch = writer.batch([writer.example(row) for row in rows])
    texts = [
        learnt(pocket, *pair) for pair in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert [t.replace(" ", "") for t in texts] == ["yes</s>", "red</s>no</s>", "yes</s>", "yes</s>"]
    assert len(batch["pixel_values"]) == 4
    assert batch["attention_mask"][:, -1].all(), "padding is on the left"


@pytest.mark.parametrize("family", ["pocket", "llava", "llava_next"])
def test_a_prompt_is_what_the_model_is_asked_with(family: str, pocket: VLM, folder: Path) -> None:
    vlm = pocket if family == "pocket" else tiny.vlm(family)
    row = {"image": "blue.png", "conversations": said("<image>\nis there a cat ?", "yes")}
    writer = writer_of(vlm)
    batch = writer.batch([writer.example(rows_of(folder, row)[0])])
    image = Image.open(folder / "blue.png").convert("RGB")
    asked = vlm.inputs([vlm.chat([image], "is there a cat ?", None)])
    first = int((batch["labels"][0] != IGNORE).nonzero()[0])
    assert torch.equal(batch["input_ids"][:, :first], asked["input_ids"])
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


def test_an_end_is_added_where_the_template_writes_none(folder: Path) -> None:
    vlm = tiny.vlm("llava")  # its template ends an answer with a space
    row = {
        "image": "red.png",
        "conversations": said("<image>\nis there a cat ?", "yes", "red ?", "no"),
    }
    writer = writer_of(vlm)
    example = writer.example(rows_of(folder, row)[0])
    assert example.text.count("</s>") == 2
    batch = writer.batch([example])
    assert learnt(vlm, batch["input_ids"][0], batch["labels"][0]).split() == [
        "yes",
        "</s>",
        "no",
        "</s>",
    ]


BROKEN = {
    "not a JSON object": "{",
    "without conversations": {"image": "red.png"},
    "image is neither a path nor a list of paths": {**ONE, "image": 3},
    "roles that do not alternate between human and gpt": {**TEXT, "conversations": said("a")},
    "empty answer": {**ONE, "conversations": said("<image>\nIs it red?", " ")},
    "empty question": {**TEXT, "conversations": said("", "yes")},
    "<image> marks unlike images": {**ONE, "conversations": said("Is it red?", "yes")},
    "<image> outside a question": {**ONE, "conversations": said("Is it red?", "<image>")},
    "images that cannot be read": {**ONE, "image": "no.png"},
    "texts with a special token of the model": {**TEXT, "conversations": said("a </s>?", "it")},
    "longer than 220 tokens": {**TEXT, "conversations": said("is it red? " * 100, "yes")},
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_rows_are_found_with_their_lines(kind: str, pocket: VLM, folder: Path) -> None:
    (folder / "no.png").write_bytes(b"no picture")
    rows = read(written(folder, ONE, BROKEN[kind], TEXT))
    checked = check(rows, writer_of(pocket), 220)
    assert checked.units == [[0], [2]]
    assert [(row.line, row.kind) for row in checked.broken] == [(2, kind)]
    assert f"1 {kind}: line 2" in checked.problems.lines()[0]


def test_a_file_that_is_no_data_is_one_sentence(folder: Path) -> None:
    with pytest.raises(FoveateError, match="has no rows"):
        read(written(folder, ""))
    with pytest.raises(FoveateError, match="not valid JSON"):
        read(written(folder, '[{"id": 1},'))
    with pytest.raises(FoveateError, match="cannot be read: No such file"):
        read(folder / "nowhere.jsonl")
    with pytest.raises(FoveateError, match="no folder of images"):
        read(written(folder, ONE), folder / "nowhere")


def test_the_look_counts_tokens_as_batches_have_them(folder: Path) -> None:
    vlm = tiny.vlm("llava_next")  # visual tokens by the picture's shape
    rows = rows_of(folder, ONE, {**ONE, "image": "blue.png"}, TEXT)
    writer = writer_of(vlm)
    lengths = [int(writer.batch([writer.example(row)])["attention_mask"].sum()) for row in rows]
    assert check(rows, writer, 10_000).tokens == max(lengths)
    assert len(check(rows, writer, max(lengths)).units) == 3
    short = check(rows, writer, max(lengths) - 1)
    assert [row.kind for row in short.broken] == [f"longer than {max(lengths) - 1} tokens"]


def test_rows_about_one_picture_share_a_sequence_as_long_as_it_lasts(
    pocket: VLM, folder: Path
) -> None:
    other = {**ONE, "image": "green.png"}
    rows = rows_of(folder, ONE, other, TWO, TEXT, ONE, PAIR)
    writer = writer_of(pocket)
    assert check(rows, writer, 1000, pack=True).units == [[0, 2, 4], [1], [3], [5]]
    examples = [writer.example(row) for row in rows]
    one = len(examples[0].ids) - 1 + 144
    rest = len(examples[2].ids) - examples[2].start
    narrow = check(rows[:5], writer, one + rest, pack=True)
    assert narrow.units == [[0, 2], [1], [3], [4]]
    assert narrow.tokens == one + rest
    batch = writer.packed([[examples[i] for i in unit] for unit in narrow.units])
    assert (
        int((batch["position_ids"][0] > 0).sum()) + 1 + (batch["input_ids"] == 0)[0].sum()
        == (batch["input_ids"].shape[1])
    )
    assert int((batch["input_ids"][0] != pocket.tokenizer.pad_token_id).sum()) == narrow.tokens


@pytest.mark.parametrize("family", ["pocket", "llava_next"])
def test_packed_conversations_read_as_alone(family: str, pocket: VLM, folder: Path) -> None:
    vlm = pocket if family == "pocket" else tiny.vlm(family)
    rows = rows_of(folder, ONE, TWO, {**ONE, "conversations": said("<image>\nIs it a cat?", "no")})
    writer = writer_of(vlm)
    examples = [writer.example(row) for row in rows]
    with torch.no_grad():
        packed = writer.packed([examples, [writer.example(rows_of(folder, TEXT)[0])]])
        labels = packed.pop("labels")
        together = vlm.model(**packed).logits[0]
        at = [int(i) for i in (labels[0] != IGNORE).nonzero().flatten()]
        for example in examples:
            batch = writer.batch([example])
            mine = batch.pop("labels")[0]
            alone = vlm.model(**batch).logits[0]
            for i in (mine != IGNORE).nonzero().flatten().tolist():
                there = at.pop(0)
                assert labels[0, there] == mine[i]
                assert torch.allclose(together[there - 1], alone[i - 1], atol=1e-4)
    assert not at


def test_a_model_that_cannot_be_written_for_is_refused(pocket: VLM) -> None:
    vlm = tiny.vlm("llava")
    vlm.processor.chat_template = vlm.tokenizer.chat_template = None
    with pytest.raises(FoveateError, match="no chat template"):
        writer_of(vlm)
    vlm = tiny.vlm("llava")
    vlm.tokenizer.eos_token = None
    with pytest.raises(FoveateError, match="no end token"):
        writer_of(vlm)


def test_a_template_that_rewrites_earlier_turns_is_a_broken_row(folder: Path) -> None:
    vlm = tiny.vlm("llava")
    vlm.processor.chat_template = "{{ messages | length }}" + tiny.template()
    row = rows_of(folder, TWO)
    checked = check(row, writer_of(vlm), 1000)
    assert isinstance(checked.broken[0], Broken)
    assert "changes what it wrote" in checked.broken[0].detail
