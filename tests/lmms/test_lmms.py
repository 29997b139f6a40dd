"""The real lmms-eval runs tasks of drawn scenes with foveate; `make test-lmms`, no network."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate import VLM, FoveateError
from foveate.scenes import questions, world

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import datasets
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.tasks import TaskManager

from foveate.bridges.lmms import Foveate, generation, until

METHOD = "clvs(smoothing=0.95,layers=(0,1,2,3,4,5))+pai(alpha=0.2,gamma=1.0)"
SUFFIX = "Please answer yes or no."
SCENES = 3
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function drawn.visual
doc_to_text: question
"""
ANSWERED = """
output_type: generate_until
doc_to_target: label
process_results: !function drawn.results
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
generation_kwargs: {max_new_tokens: 8, temperature: 0, image_aspect_ratio: pad}
"""
CHOSEN = """
output_type: multiple_choice
doc_to_choice: ["no", "yes"]
doc_to_target: "{{['no', 'yes'].index(label)}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]


def results(doc, answers):
    return {"right": float(answers[0].startswith(doc["label"]))}
"""

Row = dict[str, Any]


def scenes() -> list[Row]:
    """A question of each answer and a caption, per scene; the caption begins with "there"."""
    rows: list[Row] = []
    for seed in range(SCENES):
        scene = world.sample(seed, "against")
        image = world.draw(scene, 288)
        pair = questions.pairs(questions.look(scene), random.Random(seed), "existence")
        assert pair
        asked = [(f"{q.text} {SUFFIX}", q.label) for q in pair]
        for text, label in [*asked, ("Describe this image.", "there")]:
            rows.append({"image": image, "question": text, "label": label})
    return rows


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return scenes()


@pytest.fixture(scope="module")
def tasks(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --include_path with the tasks "drawn" and "chosen"."""
    folder = tmp_path_factory.mktemp("tasks")
    closed = [row for row in rows if row["label"] != "there"]
    for name, kind, kept in (("drawn", ANSWERED, rows), ("chosen", CHOSEN, closed)):
        data = folder / f"{name}.parquet"
        columns = {key: [row[key] for row in kept] for key in kept[0]}
        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(data)
        text = TASK.format(name=name, data=data) + kind
        (folder / f"{name}.yaml").write_text(text, "utf-8")
    (folder / "drawn.py").write_text(FUNCTIONS, "utf-8")
    return folder


@pytest.fixture(scope="module")
def manager(tasks: Path) -> TaskManager:
    return TaskManager(include_path=str(tasks), include_defaults=False, model_name="foveate")


def run(manager: TaskManager, task: str, arguments: str, **options: Any) -> Row:
    return simple_evaluate(
        "foveate",
        model_args=f"pretrained=pocket,device=cpu,{arguments}",
        tasks=[task],
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )


def answers(samples: list[Row]) -> list[str]:
    found = [s["filtered_resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]
    return [one if isinstance(one, str) else one[0] for one in found]  # files hold the bare text


def accuracy(found: list[str], rows: list[Row]) -> float:
    hits = [a.startswith(row["label"]) for a, row in zip(found, rows, strict=True)]
    return sum(hits) / len(hits)


@pytest.fixture(scope="module")
def expected(rows: list[Row]) -> dict[str, list[str]]:
    """What foveate itself says, one question at a time."""
    vlm = VLM.load("pocket", device="cpu")
    return {
        method: [
            vlm.ask(row["image"], row["question"], method, max_new_tokens=8).text for row in rows
        ]
        for method in ("vanilla", METHOD)
    }


def test_the_entry_point_names_the_class() -> None:
    assert get_model_manifest("foveate").model_id == "foveate"
    assert get_model("foveate") is Foveate


def test_listing_models_loads_neither_foveate_nor_transformers() -> None:
    code = (
        "import sys, importlib.metadata as m\n"
        "(point,) = [p for p in m.entry_points(group='lmms_eval.models') if p.name == 'foveate']\n"
        "point.load()\n"
        "print(sorted({'torch', 'transformers', 'foveate.vlm.vlm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_line_runs_a_task_with_a_method(
    tasks: Path,
    rows: list[Row],
    expected: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["lmms_eval", "--model", "foveate", "--tasks", "drawn"]
    command += ["--model_args", f"pretrained=pocket,device=cpu,method={METHOD}"]
    command += ["--include_path", str(tasks), "--batch_size", "4", "--log_samples"]
    command += ["--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (results,) = tmp_path.rglob("*results.json")
    (samples,) = tmp_path.rglob("*samples_drawn.jsonl")
    found = answers([json.loads(line) for line in samples.read_text("utf-8").splitlines()])
    assert found == expected[METHOD]
    score = json.loads(results.read_text("utf-8"))["results"]["drawn"]["right,none"]
    assert score == pytest.approx(accuracy(found, rows))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_foveate_and_the_method_acts(
    manager: TaskManager, rows: list[Row], expected: dict[str, list[str]], batch_size: int
) -> None:
    result = run(manager, "drawn", "method=vanilla", batch_size=batch_size)
    assert answers(result["samples"]["drawn"]) == expected["vanilla"] != expected[METHOD]
    score = result["results"]["drawn"]["right,none"]
    assert score == pytest.approx(accuracy(expected["vanilla"], rows))
    assert score != pytest.approx(accuracy(expected[METHOD], rows))


def test_settings_on_the_command_line_reach_the_model(
    manager: TaskManager, expected: dict[str, list[str]]
) -> None:
    result = run(manager, "drawn", "method=vanilla", gen_kwargs="max_new_tokens=1")
    short = answers(result["samples"]["drawn"])
    assert short == [answer.split()[0] for answer in expected["vanilla"]]


# -- choices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vanilla", METHOD])
def test_choices_are_rated_as_the_model_would_write_them(
    manager: TaskManager, rows: list[Row], method: str
) -> None:
    result = run(manager, "chosen", f"method={method}", batch_size=3)
    vlm = VLM.load("pocket", device="cpu")
    closed = [row for row in rows if row["label"] != "there"]
    right = 0
    samples = sorted(result["samples"]["chosen"], key=lambda s: s["doc_id"])
    for sample, row in zip(samples, closed, strict=True):
        answer = vlm.ask(row["image"], row["question"], method, max_new_tokens=1)
        rated = dict(zip(["no", "yes"], sample["filtered_resps"], strict=True))
        loss, greedy = rated.pop(answer.text)
        assert loss == pytest.approx(-math.log(answer.probabilities[0]), abs=1e-4)
        ((other, not_greedy),) = rated.values()
        assert greedy
        assert not not_greedy
        assert other > loss
        right += answer.text == row["label"]
    assert result["results"]["chosen"]["acc,none"] == pytest.approx(right / len(closed))


def instance(text: str, second: Any, image: Image.Image | None) -> Instance:
    arguments = (text, second, lambda _: image and [image], 0, "toy", "test")
    return Instance(
        "loglikelihood", arguments, 0, metadata={"task": "toy", "doc_id": 0, "repeats": 1}
    )


@pytest.fixture(scope="module")
def model() -> Foveate:
    found = Foveate(device="cpu", batch_size=2)
    found.task_dict = {"toy": {"test": [{}]}}
    return found


def test_a_long_answer_is_rated_token_by_token(
    model: Foveate, rows: list[Row], expected: dict[str, list[str]]
) -> None:
    """Against one teacher-forced pass, without a method; beside a shorter one in the batch."""
    row, answer = rows[2], expected["vanilla"][2]
    given = [answer, answer.split()[0], f"{answer.split()[0]} yes"]
    rated = model.loglikelihood([instance(row["question"], g, row["image"]) for g in given])
    (long, greedy), (_, other), (wrong, not_greedy) = (result.text for result in rated)
    vlm = model.vlm
    chat = vlm.chat([row["image"]], row["question"], None)
    inputs = vlm.inputs([chat])
    ids = vlm.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = torch.cat([inputs["input_ids"], ids], 1)
    with torch.no_grad():
        logits = vlm.model(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            pixel_values=inputs["pixel_values"],
        ).logits[:, -ids.shape[1] - 1 : -1]
    logs = logits.log_softmax(-1).gather(2, ids[..., None])
    assert ids.shape[1] > 3
    assert long == pytest.approx(-logs.mean().item(), abs=1e-4)
    assert greedy
    assert other
    assert not not_greedy
    assert wrong > long


def test_an_empty_choice_is_refused(model: Foveate, rows: list[Row]) -> None:
    with pytest.raises(FoveateError, match="give every choice some text"):
        model.loglikelihood([instance("Is it red?", "", rows[0]["image"])])


# -- requests --------------------------------------------------------------------------------------


def test_requests_with_other_settings_keep_their_order(model: Foveate, rows: list[Row]) -> None:
    short, long = {"max_new_tokens": 1}, {"max_new_tokens": 6, "until": ["small", "large", "big"]}
    asked = [instance("Describe this image.", k, rows[0]["image"]) for k in (short, long, short)]
    texts = [result.text for result in model.generate_until(asked)]
    assert texts[0] == texts[2] == "there"
    assert texts[1].startswith("there is")
    assert not {"small", "large", "big"} & set(texts[1].split())
    tokens = [result.token_counts.output_tokens for result in model.generate_until(asked)]
    assert tokens == [1, 6, 1]


def test_marks_before_the_text_and_questions_without_pictures(
    model: Foveate, rows: list[Row]
) -> None:
    limit = {"max_new_tokens": 4}
    question = rows[2]["question"]
    marked, plain, without = model.generate_until(
        [
            instance(f"<image>\n{question}", limit, rows[2]["image"]),
            instance(question, limit, rows[2]["image"]),
            instance(question, limit, None),
        ]
    )
    assert marked.text == plain.text
    assert without.text == model.vlm.ask([], question, max_new_tokens=4).text
    with pytest.raises(FoveateError, match="stands for an image"):
        model.generate_until([instance("What is in <image>?", limit, rows[0]["image"])])


def test_rounds_are_refused(model: Foveate) -> None:
    with pytest.raises(FoveateError, match="generate_until_multi_round"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("settings", "limit", "options"),
    [
        ({}, 1024, {"do_sample": False}),
        ({"until": ["\n"], "image_aspect_ratio": "pad"}, 1024, {"do_sample": False}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "do_sample": True},
            16,
            {"do_sample": False},
        ),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 2}, 1024, {"do_sample": False}),
        (
            {"temperature": 0.7, "top_p": 0.9},
            1024,
            {"temperature": 0.7, "top_p": 0.9, "do_sample": True},
        ),
    ],
)
def test_settings_of_tasks(settings: Row, limit: int, options: Row) -> None:
    if "num_beams" in settings:
        options = options | {"num_beams": settings["num_beams"]}
    assert generation(settings) == (limit, options)


def test_sampling_samples(model: Foveate, rows: list[Row]) -> None:
    settings = {"max_new_tokens": 6, "temperature": 5.0}
    asked = [instance("Describe this image.", settings, rows[0]["image"])] * 4
    assert len({result.text for result in model.generate_until(asked)}) > 1


def test_until() -> None:
    assert until("one. two\nthree", ["\n", "."]) == "one"
    assert until("one\n\ntwo", ["\n\n"]) == "one\n\ntwo"
    assert until("one", []) == "one"


# -- arguments -------------------------------------------------------------------------------------


def test_commas_in_parentheses_belong_to_the_method() -> None:
    made = Foveate.create_from_arg_string(
        "device=cpu, method=clvs(smoothing=0.7,top_k=5,layers=(1, 2)),pretrained=pocket",
        {"batch_size": 3, "device": None},
    )
    (clvs,) = made.methods
    assert (clvs.smoothing, clvs.top_k, clvs.layers) == (0.7, 5, (1, 2))
    assert made.batch_size == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("methods=clvs", "has no argument 'methods'"),
        ("pretrained=pocket,clvs", "has no argument 'clvs'"),
        ("batch_size=auto", "batch_size must be a number"),
        ("method=clvs(smoothin=0.7)", "did you mean 'smoothing'"),
        ("method=clvs(layers=(1,99))", "99"),
        ("pretrained=no/such/folder", "no/such/folder"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(arguments: str, sentence: str) -> None:
    with pytest.raises(FoveateError, match=sentence):
        Foveate.create_from_arg_string(arguments, {"device": "cpu"})
