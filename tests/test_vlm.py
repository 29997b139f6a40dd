"""One door, four ways through it: ask, batch and stream say the same; loading fails in words."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.backends.transformers.record import Recorder
from foveate.base.errors import FoveateError
from foveate.core.method import Method, as_stack
from foveate.vlm import loading
from foveate.vlm.chat import Answer, Chat, Turn
from foveate.vlm.prefix import ask_together, prepare
from foveate.vlm.vlm import VLM
from tests import models as families
from tests import tiny

FLIP = Image.Transpose.FLIP_LEFT_RIGHT
METHODS = [None, "clvs", "clvs(smoothing=0.6,stop_threshold=0)"]


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


PAIRS = [
    (picture(0), "Is there a cat?"),
    (picture(1, 20, 50), "w40 w41 w42 w43 w44 w45 w46"),
    (picture(2), "red"),
    ([picture(0), picture(1)], "w50 w51"),
]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny.vlm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


def same(one: Answer, other: Answer) -> None:
    assert one.text == other.text
    assert one.tokens == other.tokens
    assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert one.yes == pytest.approx(other.yes, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_says_what_single_questions_say(vlm, method):
    together = vlm.batch(PAIRS, method, max_new_tokens=6)
    for (image, question), answer in zip(PAIRS, together, strict=True):
        same(answer, vlm.ask(image, question, method, max_new_tokens=6))


def test_a_batch_mixes_prompts_with_and_without_images(vlm):
    pairs = [PAIRS[0], ([], "w30 w31 w32"), PAIRS[1]]
    for (image, question), answer in zip(pairs, vlm.batch(pairs, max_new_tokens=4), strict=True):
        same(answer, vlm.ask(image, question, max_new_tokens=4))
    assert vlm.batch([]) == []


@pytest.mark.filterwarnings("ignore:The prompt has no image")
@pytest.mark.parametrize("family", tiny.PROCESSORS)
@pytest.mark.parametrize("method", [None, "clvs"])
def test_other_families_come_through_the_same_door(family, method):
    vlm = tiny.vlm(family)
    pairs = [*PAIRS, ([], "w30 w31")]
    for (image, question), answer in zip(
        pairs, vlm.batch(pairs, method, max_new_tokens=4), strict=True
    ):
        same(answer, vlm.ask(image, question, method, max_new_tokens=4))


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_says_what_ask_says(vlm, method):
    for image, question in PAIRS:
        pieces = list(vlm.stream(image, question, method, max_new_tokens=6))
        assert len(pieces) > 1
        assert "".join(pieces).strip() == vlm.ask(image, question, method, max_new_tokens=6).text


def test_a_method_changes_the_answer_and_leaves_no_trace(vlm):
    image, question = PAIRS[0]
    before = vlm.ask(image, question, max_new_tokens=6)
    edited = vlm.ask(image, question, "clvs(smoothing=0.3)", max_new_tokens=6)
    assert edited.probabilities != pytest.approx(before.probabilities, abs=1e-4)
    same(vlm.ask(image, question, max_new_tokens=6), before)


def test_probabilities_are_those_of_the_model(vlm):
    image, question = PAIRS[0]
    answer = vlm.ask(image, question, max_new_tokens=3)
    inputs = vlm.inputs([Chat([image], question)])
    out = vlm.model.generate(
        **inputs, max_new_tokens=3, output_logits=True, return_dict_in_generate=True
    )
    rows = [logits[0].softmax(-1) for logits in out.logits]
    assert answer.probabilities == pytest.approx([row.max().item() for row in rows], abs=1e-6)
    yes = sum(rows[0][vlm.tokenizer.convert_tokens_to_ids(w)].item() for w in ("yes", "Yes"))
    no = sum(rows[0][vlm.tokenizer.convert_tokens_to_ids(w)].item() for w in ("no", "NO"))
    assert answer.yes == pytest.approx(yes / (yes + no), abs=1e-6)
    assert answer.yes != pytest.approx(0.5, abs=1e-3)
    assert answer.seconds == pytest.approx(sum(answer.timings.values()))


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("Is there a cat?", True),
        ("Look closely. Does it fly?", True),
        ("Isn't it red?", True),
        ("There is a cat: answer yes or no", True),
        ("What is this?", False),
        ("Describe what is there.", False),
        ("Island names?", False),
    ],
)
def test_yes_is_given_where_it_is_the_question(vlm, question, asks):
    assert (vlm.ask(picture(0), question, max_new_tokens=1).yes is not None) == asks


def answer_of(text: str, probabilities: tuple[float, ...], yes: float | None) -> Answer:
    return Answer(text, (text,), probabilities, yes, {}, Chat([], ""))


def test_the_probability_of_an_answer():
    assert answer_of("yes", (0.5,), 0.9).probability == pytest.approx(0.9)
    assert answer_of("No, it is not.", (0.5,), 0.9).probability == pytest.approx(0.1)
    assert answer_of("nothing", (0.5, 0.125), 0.9).probability == pytest.approx(0.25)
    assert answer_of("", (), None).probability is None


def test_the_end_token_ends_an_answer(vlm, monkeypatch):
    image, question = PAIRS[0]
    ids = vlm.tokenizer.convert_tokens_to_ids
    tokens = vlm.ask(image, question, max_new_tokens=6).tokens
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [ids(tokens[3])])
    cut = vlm.batch(PAIRS, max_new_tokens=6)[0]
    assert cut.tokens == tokens[:3]
    assert len(cut.probabilities) == 3
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", None)
    one = vlm.ask(image, question, max_new_tokens=6, eos_token_id=ids(tokens[1]))
    assert one.tokens == tokens[:1]


def test_generation_options_reach_the_model(vlm):
    image, question = PAIRS[0]
    torch.manual_seed(0)
    drawn = {
        vlm.ask(image, question, max_new_tokens=6, do_sample=True, temperature=5.0).text
        for _ in range(4)
    }
    assert len(drawn) > 1
    beams = vlm.ask(image, question, max_new_tokens=4, num_beams=3)
    assert beams.text
    assert beams.probabilities == ()
    assert beams.probability is None


def test_several_answers_to_one_question_are_refused(vlm):
    with pytest.raises(FoveateError, match="num_return_sequences"):
        vlm.ask(*PAIRS[0], num_return_sequences=2, num_beams=2)


def test_a_system_prompt_comes_first(vlm, monkeypatch):
    chat = Chat([picture(0)], "red", system="w60 w61")
    assert vlm.prompt(chat).startswith("<s>system : w60 w61")
    plain, told = (vlm.ask(picture(0), "red", system=s, max_new_tokens=6) for s in (None, "w60"))
    assert plain.probabilities != pytest.approx(told.probabilities, abs=1e-4)
    monkeypatch.setattr(vlm.processor, "chat_template", "USER: {{ messages[-1].content[1].text }}")
    with pytest.raises(FoveateError, match="drops system prompts"):
        vlm.prompt(chat)
    monkeypatch.setattr(vlm.processor, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(FoveateError, match="no system role"):
        vlm.prompt(chat)
    monkeypatch.setattr(vlm.processor, "chat_template", None)
    with pytest.raises(FoveateError, match="no chat template"):
        vlm.prompt(chat)


CONVERSATIONS = [  # how many pictures each user turn has, the question's last
    (1, 0),
    (0, 1),
    (1, 1),
    (1, 0, 0),
    (0, 2, 0),
]


def conversation(counts: tuple[int, ...], system: str | None = None) -> Chat:
    turns = []
    for number, count in enumerate(counts[:-1]):
        turns += [Turn("user", f"w3{number} w4{number}", count), Turn("assistant", f"w5{number}")]
    images = [picture(number) for number in range(sum(counts))]
    return Chat(images, "red", system, earlier=tuple(turns))


def by_template(vlm: VLM, counts: tuple[int, ...], system: str | None = None) -> list[int]:
    """The same conversation through the processor's template and plain `generate`."""
    pictures = (picture(number) for number in range(sum(counts)))
    told = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for number, count in enumerate(counts):
        text = "red" if number == len(counts) - 1 else f"w3{number} w4{number}"
        parts = [{"type": "image", "image": next(pictures)} for _ in range(count)]
        told.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        if number < len(counts) - 1:
            said = [{"type": "text", "text": f"w5{number}"}]
            told.append({"role": "assistant", "content": said})
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = vlm.processor.apply_chat_template(told, add_generation_prompt=True, **options)
    out = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("counts", CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "w60 w61"])
def test_a_conversation_is_answered_as_plain_transformers_answers_it(vlm, counts, system):
    answer = vlm.answer([conversation(counts, system)], (), 6)[0]
    expected = by_template(vlm, counts, system)
    assert list(answer.tokens) == [vlm.tokenizer.decode([token]) for token in expected]
    bare = conversation(counts, system)
    alone = vlm.answer([Chat(bare.images, bare.text, system)], (), 6)[0]
    assert answer.probabilities != pytest.approx(alone.probabilities, abs=1e-4)


@pytest.mark.filterwarnings("ignore:The prompt has no image")
@pytest.mark.parametrize("method", ["clvs", "vcd"])
def test_conversations_share_a_batch(vlm, method):
    chats, stack = [conversation(counts) for counts in CONVERSATIONS], as_stack(method)
    chats = [chat for chat in chats if chat.kind == 1]
    assert len(chats) == 3
    for chat, answer in zip(chats, vlm.answer(chats, stack, 6), strict=True):
        same(answer, vlm.answer([chat], stack, 6)[0])


def test_a_template_without_earlier_turns_is_refused(vlm, monkeypatch):
    monkeypatch.setattr(vlm.processor, "chat_template", "USER: {{ messages[-1].content[0].text }}")
    with pytest.raises(FoveateError, match="drops earlier turns"):
        vlm.prompt(conversation((1, 0)))


def test_questions_in_one_conversation_share_its_prefix(vlm):
    first = conversation((1, 0, 0))
    chats = [replace(first, text=text) for text in ("red", "Is there a cat?", "w70 w71")]
    for chat, answer in zip(chats, ask_together(vlm, prepare(vlm, chats), (), 6), strict=True):
        same(answer, vlm.answer([chat], (), 6)[0])
    other = replace(first, earlier=(replace(first.earlier[0], text="w80"), *first.earlier[1:]))
    together = prepare(vlm, [first, other])  # the picture stands before what differs
    assert together.prefix["input_ids"].shape[1] < vlm.inputs([first])["input_ids"].shape[1] - 8
    for chat, answer in zip([first, other], ask_together(vlm, together, (), 6), strict=True):
        same(answer, vlm.answer([chat], (), 6)[0])
    later = Chat(first.images, first.text, earlier=(Turn("user", "w30"), Turn("assistant", "w50")))
    assert prepare(vlm, [first, later]) is None


def test_methods_that_look_again_do_so_within_the_conversation(vlm):
    seen = []

    class Beside(Method):
        def rewrite(self, vlm, chats):
            seen.append((dict(vlm.readings), chats[0].earlier))
            vlm.readings["kept"] = chats[0].earlier
            return [replace(c, images=[*c.images, c.images[0].transpose(FLIP)]) for c in chats]

    chat = conversation((1, 0))
    for earlier in (chat.earlier, (), chat.earlier, ()):
        (shown,) = vlm.rewrite([replace(chat, earlier=earlier)], (Beside(),))
        assert vlm.prompt(shown).count("<image>") == 2
    assert vlm.prompt(shown).endswith("user : <image> <image> red assistant :")
    # what was read about the picture alone says nothing about it in a conversation
    assert seen == [({}, chat.earlier), ({}, ()), ({}, chat.earlier), ({"kept": ()}, ())]
    (shown,) = vlm.rewrite([chat], (Beside(),))
    assert vlm.prompt(shown).endswith("user : <image> red assistant :")
    vlm.readings.clear()


def test_the_start_token_stands_once(vlm):
    ids = vlm.inputs([Chat([picture(0)], "red")])["input_ids"][0].tolist()
    assert ids.count(families.BOS) == 1
    assert ids.count(families.IMAGE) == 16


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(vlm, question):
    for call in (vlm.ask, vlm.stream):
        with pytest.raises(FoveateError, match="question is empty"):
            call(picture(0), question)


def test_bad_requests_are_refused_before_anything_runs(vlm):
    with pytest.raises(FoveateError, match="<image>"):
        vlm.ask(picture(0), "what is <image>?")
    with pytest.raises(FoveateError, match="<image>"):
        vlm.chat([], "red", None, [Turn("user", "<image>"), Turn("assistant", "w50")])
    with pytest.raises(FoveateError, match="max_new_tokens"):
        vlm.ask(picture(0), "red", max_new_tokens=0)
    with pytest.raises(FoveateError, match="no method 'clvz'"):
        vlm.stream(picture(0), "red", "clvz")
    with pytest.raises(FoveateError, match="no image"):
        vlm.stream("nowhere.png", "red")


def test_a_record_is_of_what_was_generated(vlm):
    answer = vlm.ask(picture(0), "red", "clvs", max_new_tokens=3, record=True)
    assert answer.record.layers == tuple(range(6))
    (weights,) = answer.record.image(0)
    (grid,) = vlm.grids(answer.chat)
    assert weights.shape == (6, 16)
    assert grid.heat(weights).shape == (6, 4, 4)
    every = vlm.ask(picture(0), "red", record=Recorder(heads="all", layers=(1,)))
    assert every.record.values[0].shape[:3] == (1, 1, 4)
    assert vlm.ask(picture(0), "red").record is None


def test_rewriting_methods_see_all_chats_of_an_image_at_once(vlm):
    seen = []

    class Mirror(Method):
        def rewrite(self, vlm, chats):
            seen.append([chat.text for chat in chats])
            return [
                Chat([chat.images[0].transpose(FLIP)], chat.text, notes={"by": "mirror"})
                for chat in chats
            ]

    one, two = picture(0), picture(1)
    pairs = [(one, "w20"), (two, "w21"), (one, "w22")]
    answers = vlm.batch(pairs, Mirror(), max_new_tokens=4)
    assert seen == [["w20", "w22"], ["w21"]]
    for (image, question), answer in zip(pairs, answers, strict=True):
        same(
            answer,
            vlm.ask(image.transpose(FLIP), question, max_new_tokens=4),
        )
        assert answer.chat.notes == {"by": "mirror"}


def test_leaving_a_stream_early_stops_the_model(vlm):
    threads = threading.active_count()
    stream = vlm.stream(picture(0), "red", "clvs", max_new_tokens=4000)
    assert next(stream)
    stream.close()
    assert threading.active_count() == threads
    same(vlm.ask(picture(0), "red"), vlm.ask(picture(0), "red"))
    assert not vlm.model._forward_hooks


def test_a_stream_hands_on_the_error_of_its_thread(vlm, monkeypatch):
    class Broken(Method):
        def before(self, stream, seq):
            if seq.phase == "decode" and stream.layer == 3:
                raise RuntimeError("broken in layer 3")
            return stream.x

    stream = vlm.stream(picture(0), "red", Broken(), max_new_tokens=5)
    with pytest.raises(RuntimeError, match="broken in layer 3"):
        list(stream)
    assert vlm.ask(picture(0), "red").text


def test_threads_wait_for_each_other(vlm):
    """A plain question asked during an edited one must not be edited with it."""
    plain = vlm.ask(picture(0), "red", max_new_tokens=8)
    edited = vlm.ask(picture(0), "red", "clvs(smoothing=0.3)", max_new_tokens=8)
    found: dict[int, Answer] = {}

    def work(number: int) -> None:
        method = "clvs(smoothing=0.3)" if number % 2 else None
        found[number] = vlm.ask(picture(0), "red", method, max_new_tokens=8)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for number, answer in found.items():
        same(answer, edited if number % 2 else plain)


@pytest.mark.parametrize("size", [(1, 1), (1, 80), (300, 2), (3, 3)])
def test_tiny_and_narrow_images_are_answered(vlm, size):
    assert vlm.ask(Image.new("RGB", size, "red"), "red", "clvs", max_new_tokens=3).text


# ---------------------------------------------------------------------------------- loading


def test_a_saved_folder_answers_as_the_model_did(vlm, folder):
    loaded = VLM.load(folder)
    assert loaded.model.dtype == torch.float32
    same(loaded.ask(*PAIRS[0], max_new_tokens=5), vlm.ask(*PAIRS[0], max_new_tokens=5))
    assert VLM.load(folder, dtype="bf16").ask(*PAIRS[0], "clvs", max_new_tokens=5).text


def refused(match: str, name: str | Path, **options) -> None:
    with pytest.raises(FoveateError, match=match) as error:
        VLM.load(name, **options)
    assert "\n" not in str(error.value)


def test_loading_refuses_what_cannot_be_had(folder):
    refused("no device 'cuda:99'", folder, device="cuda:99")
    refused("no device 'nonsense'", folder, device="nonsense")
    refused("no dtype 'int8'", folder, dtype="int8")
    refused("no dtype 'float99'", folder, dtype="float99")
    refused("either device or device_map", folder, device="cpu", device_map="auto")
    refused("could not be loaded", folder, attn="nonsense")


def test_names_that_lead_nowhere(tmp_path):
    refused("did you mean 'pocket'", "poket")
    refused("no model or folder", "a/b/c")
    refused("no model or folder", "/nowhere/at/all")
    (tmp_path / "file").touch()
    refused("is a file", tmp_path / "file")


def test_the_hub_is_asked_once(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    def unknown(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    def odd(*_, **__):
        raise HfHubHTTPError.__new__(HfHubHTTPError)

    monkeypatch.setattr(loading.HfApi, "model_info", unreachable)
    refused("hub cannot be reached", "nobody/nothing")
    monkeypatch.setattr(loading.HfApi, "model_info", unknown)
    refused("hub has no model", "nobody/nothing")
    monkeypatch.setattr(loading.HfApi, "model_info", odd)
    assert loading._locate("nobody/nothing") == ("nobody/nothing", False)


@pytest.mark.parametrize(
    "said",
    [
        "X requires the Torchvision library but it was not found in your environment. Check ...",
        "operator torchvision::nms does not exist",
    ],
)
def test_a_processor_without_its_torchvision(folder, monkeypatch, said):
    def missing(*args, **options):
        raise ImportError(said)

    monkeypatch.setattr(loading.transformers.AutoProcessor, "from_pretrained", missing)
    refused(r"belongs to your torch: pip install torchvision torch==[\d.]+, from the index", folder)


def test_incomplete_folders(folder, tmp_path):
    refused("no config.json", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("no weights", tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("could not be loaded|without a processor", tmp_path)
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    refused("could not be loaded", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("could not be loaded", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    refused("does not know its architecture", tmp_path)
    remote = {**config, "auto_map": {"AutoConfig": "c.C"}, "model_type": "own"}
    (tmp_path / "config.json").write_text(json.dumps(remote))
    refused("code of its own", tmp_path)


def test_a_model_without_eyes_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    refused("not a vision-language model", tmp_path)


def test_missing_tensors_are_said(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "q_proj" in name)
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="lack 1 tensors"):
        VLM.load(tmp_path)


def test_an_outline_has_the_shape_and_no_weights(folder):
    outline = loading.outline(str(folder))
    assert outline.get_decoder().config.num_hidden_layers == 6
    assert all(p.is_meta for p in outline.parameters())
