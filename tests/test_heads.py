"""Removing many heads per forward equals removing one at a time; words, records, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from foveate import VLM, FoveateError, commands
from foveate.backends.transformers.anatomy import anatomy
from foveate.base.artifact import HEADS, Artifact
from foveate.evaluation.vocabulary import Mention, Vocabulary
from foveate.insight import heads
from foveate.insight.ablation import Ablation, Caption
from foveate.insight.heads import LabelledImage
from foveate.methods import adhh
from tests import models, tiny

SYNONYMS = Path(__file__).parents[2] / "shared" / "benchdata" / "chair" / "synonyms.txt"


# --------------------------------------------------------------------------------- removal


def one_by_one(model: Any, batch: dict[str, Tensor], caption: Caption, place: int) -> Tensor:
    """(layers, heads) influences: the whole prompt, no cache, one head removed per forward."""
    length = caption.prompt + place
    inputs = dict(batch)
    inputs["input_ids"] = caption.ids[None, :length]
    inputs["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = pad(inputs[key], (0, place))

    def probability() -> Tensor:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, -1]
        return logits.double().softmax(-1)[caption.ids[length]]

    decoder, usual = model.get_decoder(), probability()
    count = decoder.config.num_attention_heads
    found = torch.zeros(len(decoder.layers), count)
    for i, layer in enumerate(decoder.layers):
        for head in range(count):

            def remove(module: Any, args: tuple[Tensor], head: int = head) -> tuple[Tensor]:
                x = args[0].clone()
                width = x.shape[-1] // count
                x[:, -1, head * width : (head + 1) * width] = 0
                return (x,)

            handle = layer.self_attn.o_proj.register_forward_pre_hook(remove)
            found[i, head] = usual - probability()
            handle.remove()
    return found


def test_removing_many_heads_at_once_equals_one_at_a_time(family, model):
    """Grouped heads, M-RoPE, sliding layers; the first and the last token of the caption too."""
    batch, places = models.inputs(family, "image", row=1), [0, 4, 8]
    ablation = Ablation(model)
    caption = ablation.describe(batch, max_new_tokens=9)
    assert torch.equal(caption.ids, model.generate(**batch, max_new_tokens=9)[0])
    found = ablation.influence(caption, places, rows=17)  # of 3 tokens, in one forward
    wanted = torch.stack([one_by_one(model, batch, caption, place) for place in places])
    assert (found - wanted).abs().max() < 1e-5
    assert (wanted.abs().amax(0) > 1e-4).all()  # every head matters, so a mixed-up one would show
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_rows_change_speed_and_nothing_else():
    model, batch = models.build("llava"), models.inputs("llava", "image", row=1)
    ablation = Ablation(model)
    caption = ablation.describe(batch, max_new_tokens=6)
    some = ablation.influence(caption, [1, 5], rows=3)
    torch.testing.assert_close(some, ablation.influence(caption, [1, 5], rows=1000))
    assert caption.cache.get_seq_length() == len(caption.ids) - 1  # as it was
    assert ablation.influence(caption, []).shape == (0, 6, 4)


def test_models_that_hide_their_heads_are_refused():
    with pytest.raises(FoveateError, match=r"without `self_attn.o_proj`"):
        Ablation(models.remote_like())


def test_layers_that_neither_see_everything_nor_slide_are_refused():
    model = models.build("llava", fresh=True)
    model.get_decoder().config.layer_types = ["full_attention"] * 5 + ["chunked_attention"]
    with pytest.raises(FoveateError, match="chunked_attention"):
        Ablation(model)


# ----------------------------------------------------------------------------------- words


def categories(vocabulary: Vocabulary, text: str) -> list[str]:
    return [mention.category for mention in vocabulary.find(text)]


def test_words_are_found_by_synonym_plural_and_part():
    vocabulary = Vocabulary(
        {
            "person": ("man", "woman", "child", "firefighter"),
            "dog": ("puppy",),
            "hot dog": (),
            "wine glass": (),
            "bus": (),
            "knife": (),
            "giraffe": (),
            "potato": (),
            "sheep": (),
        }
    )
    assert (
        categories(vocabulary, "A man and two women, with people and children.") == ["person"] * 4
    )
    assert categories(vocabulary, "Puppies and a DOG beside hot dogs, one hot-dog.") == [
        "dog", "dog", "hot dog", "hot dog",
    ]  # fmt: skip
    assert categories(vocabulary, "wine glasses, buses, knives, giraffes, potatoes, sheep") == [
        "wine glass", "bus", "knife", "giraffe", "potato", "sheep",
    ]  # fmt: skip
    assert categories(vocabulary, "doggy, busy, a glass of wine, mankind") == []
    found = vocabulary.find("The dog is\nnext to the dog's hot dog.")
    assert [(m.start, m.word) for m in found] == [(4, "dog"), (23, "dog"), (29, "hot dog")]
    assert vocabulary.category("Hot Dogs") == "hot dog"


def test_a_listed_word_wins_over_a_plural_and_the_first_category_over_the_second():
    vocabulary = Vocabulary({"glass": (), "spectacles": ("glasses",), "goggles": ("glasses",)})
    assert categories(vocabulary, "glasses, glass, goggles") == ["spectacles", "glass", "goggles"]


def test_synonyms_come_from_a_file(tmp_path: Path):
    path = tmp_path / "synonyms.txt"
    path.write_text("person, man, woman\n\n car , sports car,\nperson, rider\n", "utf-8")
    vocabulary = Vocabulary.read(path)
    assert categories(vocabulary, "two riders, a man, a sports car") == ["person", "person", "car"]
    path.write_text(" , \n\n", "utf-8")
    with pytest.raises(FoveateError, match="lists no words"):
        Vocabulary.read(path)
    with pytest.raises(FoveateError, match="cannot be read"):
        Vocabulary.read(tmp_path / "none.txt")


@pytest.mark.skipif(not SYNONYMS.is_file(), reason="CHAIR's synonyms.txt is not at hand")
def test_the_synonyms_of_chair_are_read():
    vocabulary = Vocabulary.read(SYNONYMS)
    text = "Two policemen on motorbikes pass a hot dog stand, traffic lights and a stop sign."
    assert categories(vocabulary, text) == [
        "person", "motorcycle", "hot dog", "traffic light", "stop sign",
    ]  # fmt: skip


class Pieces:
    """A tokenizer of given pieces."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(self.pieces[i] for i in ids)


def test_the_token_that_begins_a_word():
    pieces = Pieces("A", " hot", " d", "og", ",", " ", "umb", "rellas", " by a", " dog", ".")
    ids = list(range(11))
    mentions = Vocabulary({"hot dog": (), "umbrella": (), "dog": ()}).find(pieces.decode(ids))
    assert mentions == [
        Mention(2, "hot dog", "hot dog"),
        Mention(11, "umbrellas", "umbrella"),
        Mention(26, "dog", "dog"),
    ]
    assert heads.beginnings(pieces, ids, mentions) == [1, 6, 9]


# ----------------------------------------------------------------- the search, tiny models


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny.vlm()


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8))


@pytest.fixture(scope="module")
def samples() -> list[LabelledImage]:
    """Two images; every other word is there."""
    there = frozenset(f"w{i}" for i in range(0, models.VOCAB, 2))
    return [LabelledImage(str(i), there, lambda i=i: image(i)) for i in range(2)]


WORDS = Vocabulary({f"w{i}": () for i in range(models.VOCAB)})


@pytest.mark.long
def test_scores_are_means_over_hallucinated_less_means_over_real(vlm, samples, tmp_path: Path):
    out = tmp_path / "list"
    options = {"max_new_tokens": 5, "prompt": "is there a cat", "top_k": 4}
    found = heads.find_heads(vlm, samples, WORDS, out, **options)
    kept = Artifact.from_pretrained(out, HEADS)
    assert (kept.model, kept.made) == (found.model, found.made)

    ablation, parts = Ablation(vlm.model), {True: [], False: []}
    for sample in samples:
        inputs = vlm.inputs([heads.Chat([sample.load()], "is there a cat")])
        caption = ablation.describe(inputs, max_new_tokens=5)
        words = [vlm.tokenizer.decode([i]) for i in caption.ids[caption.prompt :].tolist()]
        for place, word in enumerate(words):
            if word[0] == "w":
                there = word in sample.objects
                parts[there].append(one_by_one(vlm.model, inputs, caption, place))
    wanted = torch.stack(parts[False]).mean(0) - torch.stack(parts[True]).mean(0)
    assert (found.made["hallucinated"], found.made["real"]) == (len(parts[False]), len(parts[True]))
    assert (found.tensors["scores"] - wanted).abs().max() < 1e-5
    best = wanted.flatten().argsort(descending=True)[:4].tolist()
    assert found.tensors["heads"].tolist() == [[i // 4, i % 4] for i in best]
    assert found.made["images"] == 2
    assert found.model == anatomy(vlm.model).shape


def test_at_most_a_tenth_of_all_heads_and_only_those_that_favour_hallucinations(
    vlm, samples, tmp_path: Path
):
    """A model of 24 heads."""
    options = {"max_new_tokens": 8, "prompt": "is there a cat"}
    found = heads.find_heads(vlm, samples, WORDS, tmp_path / "list", **options)
    assert len(found.tensors["heads"]) == 3
    all_heads = heads.find_heads(vlm, samples, WORDS, tmp_path / "list", **options, top_k=24)
    scores, listed = all_heads.tensors["scores"], all_heads.tensors["heads"].tolist()
    assert (scores < 0).any()
    assert all(scores[layer, head] >= 0 for layer, head in listed)


@pytest.mark.parametrize("there", [frozenset(), frozenset(f"w{i}" for i in range(models.VOCAB))])
def test_nothing_hallucinated_or_nothing_real_gives_a_sentence_and_no_list(vlm, there, tmp_path):
    out = tmp_path / "list"
    with pytest.raises(FoveateError, match=f"No {'hallucinated' if there else 'real'} object word"):
        heads.find_heads(
            vlm, [LabelledImage("a", there, lambda: image(0))], WORDS, out, max_new_tokens=4
        )
    assert not out.exists()


def test_records_of_other_settings_and_damaged_ones_are_refused(vlm, samples, tmp_path: Path):
    out = tmp_path / "list"
    heads.find_heads(vlm, samples, WORDS, out, max_new_tokens=4)
    with pytest.raises(FoveateError, match=r"other settings \(max_new_tokens: 4, now 5\)"):
        heads.find_heads(vlm, samples, WORDS, out, max_new_tokens=5)
    with pytest.raises(FoveateError, match=r"other settings \(words: "):
        heads.find_heads(vlm, samples, Vocabulary({"w30": ()}), out, max_new_tokens=4)
    records = tmp_path / "list.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text(lines[0] + lines[1][:50] + "\n" + lines[2])
    with pytest.raises(FoveateError, match=r"Line 2 of .*list.jsonl is damaged"):
        heads.find_heads(vlm, samples, WORDS, out, max_new_tokens=4)
    with pytest.raises(FoveateError, match="cannot be used, a folder is written"):
        heads.find_heads(vlm, samples, WORDS, records, max_new_tokens=4)
    with pytest.raises(FoveateError, match=r"nowhere.* cannot be used"):
        heads.find_heads(vlm, samples, WORDS, tmp_path / "nowhere" / "list")


def test_an_image_that_now_shows_something_else_is_labelled_again(vlm, samples, tmp_path: Path):
    out = tmp_path / "list"
    first = heads.find_heads(vlm, samples, WORDS, out, max_new_tokens=6)
    less = [samples[0], LabelledImage("1", frozenset(), samples[1].load)]
    second = heads.find_heads(vlm, less, WORDS, out, max_new_tokens=6)
    assert second.made["real"] < first.made["real"]
    fresh = heads.find_heads(vlm, less, WORDS, tmp_path / "fresh", max_new_tokens=6)
    assert second.made == fresh.made
    for name, tensor in fresh.tensors.items():
        assert torch.equal(second.tensors[name], tensor)


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run `foveate heads` in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            commands.main(["heads", *map(str, arguments)])
        captured = capsys.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


def sentence(result: tuple[int, str, str]) -> str:
    """The only thing said, on stderr."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("foveate: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        image(i).save(photos / f"{i}.png")
    (photos / "damaged.png").write_bytes((photos / "0.png").read_bytes()[:100])
    return photos


def test_other_models_need_images_and_what_they_show(run, folder, photos, tmp_path: Path):
    assert "--images FOLDER --objects FILE.jsonl" in sentence(run(folder))
    assert "--images FOLDER --objects FILE.jsonl" in sentence(run("--images", photos))
    given = (folder, "--images", photos, "--objects", tmp_path / "objects.jsonl")
    assert "cannot be read" in sentence(run(*given))
    (tmp_path / "objects.jsonl").write_text('nonsense\n{"image": 3, "objects": []}\n')
    assert "no usable line" in sentence(run(*given))
    assert "no folder" in sentence(
        run(folder, "--images", tmp_path / "no", "--objects", tmp_path / "objects.jsonl")
    )


def test_broken_lines_and_images_are_counted_and_left_out(run, folder, photos, tmp_path: Path):
    objects, out = tmp_path / "objects.jsonl", tmp_path / "list"
    words = [f"w{i}" for i in range(100, models.VOCAB)]
    rows = [
        {"image": "0.png", "objects": words},
        {"image": "1.png", "objects": []},
        {"image": "damaged.png", "objects": words},
        {"image": "missing.png", "objects": ["w7"]},
        {"image": "0.png"},
        {"image": "1.png", "objects": "w7 w8"},
    ]
    objects.write_text("{half\n" + "".join(json.dumps(row) + "\n" for row in rows))
    options = ("--images", photos, "--objects", objects, "--out", out, "--max-new-tokens", 8)
    code, printed, err = run(folder, *options)
    assert code == 0
    assert "2 captions: " in printed
    assert "3 of 7 lines" in err
    assert "the first is line 1" in err
    assert "2 of 4 images were left out" in err
    assert Artifact.from_pretrained(out, HEADS).made["images"] == 2

    synonyms = tmp_path / "synonyms.txt"
    synonyms.write_text("thing, " + ", ".join(words) + "\n")
    options = ("--images", photos, "--objects", objects, "--out", tmp_path / "other")
    code, printed, err = run(folder, *options, "--synonyms", synonyms, "--max-new-tokens", 8)
    assert code == 0
    assert "1 objects of" in err  # w7, which no category lists


def test_where_no_image_can_be_used_one_sentence_says_why(run, folder, photos, tmp_path: Path):
    objects = tmp_path / "objects.jsonl"
    objects.write_text('{"image": "missing.png", "objects": ["w7"]}\n')
    result = run(folder, "--images", photos, "--objects", objects, "--out", tmp_path / "list")
    assert "No image could be used (There is no image" in sentence(result)


@pytest.mark.long
def test_the_pocket_models_list_is_one_that_adhh_takes(run, tmp_path: Path):
    out = tmp_path / "list"
    code, printed, err = run("--scenes", 3, "--max-new-tokens", 24, "--out", out)
    assert (code, err) == (0, "")
    assert "3 captions: " in printed
    assert "next: foveate eval" in printed
    found = Artifact.from_pretrained(out, HEADS)
    assert found.made["hallucinated"] > 0 < found.made["real"]
    assert found.made["command"] == "foveate heads pocket --limit 3 --max-new-tokens 24"
    vlm = VLM.load("pocket")
    method = adhh.ADHH(threshold=0.0, heads=str(out))
    assert method.resolve(anatomy(vlm.model)).heads == tuple(
        sorted(map(tuple, found.tensors["heads"].tolist()))
    )
    picture = heads.pocket_samples(1)[0][0].load()
    answers = [vlm.ask(picture, heads.PROMPT, m, max_new_tokens=2) for m in (None, method)]
    assert answers[0].probabilities != answers[1].probabilities


@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(run, folder, tmp_path: Path):
    with (tmp_path / "objects.jsonl").open("w") as file:
        for i in range(40):
            image(i).save(tmp_path / f"{i}.png")
            words = [f"w{n}" for n in range(i % 2, models.VOCAB, 2)]
            file.write(json.dumps({"image": f"{i}.png", "objects": words}) + "\n")
    command = [folder, "--images", tmp_path, "--objects", tmp_path / "objects.jsonl"]
    command = list(map(str, [*command, "--max-new-tokens", 8, "--out"]))
    whole, out = tmp_path / "whole", tmp_path / "list"
    assert run(*command, whole)[0] == 0

    records = heads.records_beside(out)
    process = subprocess.Popen(
        [sys.executable, "-m", "foveate.commands", "heads", *command, str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    patience = time.monotonic() + 120
    while not records.exists() or records.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < patience
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = records.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    records.write_bytes(kept + b'{"image": "7.p')  # as if killed within a line

    assert run(*command, out)[0] == 0
    for file in ("config.json", "model.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    assert records.read_bytes().startswith(kept)
    assert records.read_text() == heads.records_beside(whole).read_text()


def test_the_shipped_list_is_the_top_of_its_own_scores_and_belongs_to_the_pocket_model():
    found = Artifact.from_pretrained(adhh.POCKET, HEADS)
    scores, pairs = found.tensors["scores"], found.tensors["heads"].tolist()
    best = scores.flatten().argsort(descending=True)[: len(pairs)].tolist()
    assert pairs == [[i // scores.shape[1], i % scores.shape[1]] for i in best]
    assert found.model == anatomy(VLM.load("pocket").model).shape
    assert found.made["hallucinated"] >= 300
