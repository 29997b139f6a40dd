"""What somebody meets who types the package's names for the first time."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

import foveate
from foveate import VLM, FoveateError, Recorder, enhance
from foveate.core.method import methods, parse
from foveate.scenes import world
from tests import tiny


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return VLM.load(tiny.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def picture() -> Any:
    return world.draw(world.sample(0), 96)


def test_dir_shows_the_public_names_and_no_others():
    assert dir(foveate) == sorted(foveate.__all__)
    for name in foveate.__all__:
        assert getattr(foveate, name) is not None


def test_methods_are_imported_by_their_class_names():
    from foveate.methods import CLVS, VCD

    assert CLVS is methods()["clvs"]
    assert VCD is methods()["vcd"]
    assert {"CLVS", "AdaptVis", "CLI"} <= set(dir(foveate.methods))
    with pytest.raises(ImportError):
        from foveate.methods import Clvz  # noqa: F401


def test_parameters_have_names():
    from foveate.methods import CLVS

    with pytest.raises(FoveateError, match=r"by name: write CLVS\(smoothing=0.7\)"):
        CLVS(0.7)
    with pytest.raises(FoveateError, match=r"no parameter 'smothing' \(did you mean 'smoothing'"):
        CLVS(smothing=0.7)
    with pytest.raises(FoveateError, match="smoothing must be a number, got 'much'"):
        CLVS(smoothing="much")
    method = CLVS(smoothing=0.7)
    assert replace(method, beta=0.5).smoothing == 0.7
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method


@pytest.mark.parametrize(("text", "name"), [("CLVS", "clvs"), ("Clvs(smoothing=0.7)", "clvs")])
def test_names_match_in_any_case(text, name):
    assert [method.name for method in parse(text)] == [name]
    assert parse("Vanilla") == ()
    with pytest.raises(FoveateError, match="did you mean 'clvs'"):
        parse("CLVZ")
    with pytest.raises(FoveateError, match="did you mean 'smoothing'"):
        parse("clvs(Smothing=1)")


def test_a_block_that_is_not_opened_says_so(vlm):
    with pytest.warns(UserWarning, match="write `with enhance"):
        enhance(vlm.model, "clvs")
    block = enhance(vlm.model, "clvs")
    assert "with enhance(...)" in repr(block)
    with block:
        pass
    del block  # no warning, which would be an error here


@pytest.mark.parametrize("ask", ["ask", "stream"])
def test_none_is_no_picture(vlm, ask):
    with pytest.raises(FoveateError, match=r"\[\] to ask without"):
        getattr(vlm, ask)(None, "Is there a cat?")
    with pytest.raises(FoveateError, match=r"\[\] to ask without"):
        vlm.batch([(None, "Is there a cat?")])
    assert vlm.ask([], "Is there a cat?", max_new_tokens=2).tokens


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"temperature": 0, "do_sample": True}, "greedy"),
        ({"temperature": 0.7, "do_sample": False}, "would do nothing"),
        ({"max_new_tokens": "5"}, "whole number"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_options_that_do_nothing_are_refused(vlm, picture, options, says):
    with pytest.raises(FoveateError, match=says):
        vlm.ask(picture, "red", **options)


def test_quantized_weights(tmp_path):
    with pytest.raises(FoveateError, match="use 4bit or 8bit"):
        VLM.load("pocket", quantization="2bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(FoveateError, match="pip install bitsandbytes"):
            VLM.load("pocket", quantization="4bit")


@pytest.mark.long
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_methods_act_on_quantized_weights(tmp_path, picture, bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    vlm = VLM.load("pocket", quantization=bits, device="cpu")
    layer = vlm.model.get_decoder().layers[0].self_attn.q_proj
    assert "bitsandbytes" in type(layer).__module__
    for method in ("vanilla", "clvs", "vcd", "vista"):
        answer = vlm.ask(picture, "Is there a car in the image?", method, max_new_tokens=2)
        assert answer.text.split()[0] in ("yes", "no")


def test_a_question_is_a_text(vlm, picture):
    with pytest.raises(FoveateError, match="A question is a text, got 5"):
        vlm.ask(picture, 5)


def test_a_temperature_samples(vlm, picture):
    def answers(**options: Any) -> set[str]:
        torch.manual_seed(0)
        asked = (vlm.ask(picture, "red", max_new_tokens=6, **options) for _ in range(4))
        return {answer.text for answer in asked}

    assert len(answers()) == len(answers(temperature=0)) == 1
    assert len(answers(temperature=5.0)) > 1
    assert len(answers(top_k=20, temperature=5.0, do_sample=True)) > 1


def test_an_answer_prints_its_words(vlm, picture):
    answer = vlm.ask(picture, "Is there a cat?", record=True, max_new_tokens=3)
    assert repr(answer) == f"Answer(text={answer.text!r}, yes={answer.yes!r})"
    assert repr(answer.record) == f"Record(layers={answer.record.layers!r})"


def test_visual_columns_are_those_of_the_prompt(vlm, picture):
    chats = [vlm.chat([picture], "red", None)]
    with enhance(vlm.model, Recorder()):
        out = vlm.model.generate(
            **vlm.inputs(chats), max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True
        )
    record = Recorder.read(out)
    prompt = record.visual.shape[1]
    assert [record.values[step].shape[-1] for step in range(3)] == [prompt, prompt + 1, prompt + 2]
    count = int(record.visual.sum())
    assert all(record.image(step)[0].shape[-1] == count for step in range(3))
