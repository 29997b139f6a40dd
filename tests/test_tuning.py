"""Injections and bases learn from conversations, however the work is divided or broken off."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from foveate import VLM, FoveateError
from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.compat_parts import image_encoder
from foveate.backends.transformers.enhance import attach
from foveate.base.files import owned
from foveate.methods.cli.method import CLI
from foveate.methods.cli.module import CrossLayerInjection
from foveate.pocket import build
from foveate.scenes.export import export
from foveate.training import loop as train
from foveate.training.conversations import read
from foveate.training.injection import NAME, tune
from foveate.training.lesson import Lesson, prepare
from foveate.training.recipe import Recipe
from foveate.training.writer import IGNORE, Writer
from tests import models, tiny
from tests.hostile.faults import files_of_at_most

pytest.importorskip("accelerate", reason="training needs the extra: train")
pytestmark = pytest.mark.long

SHORT = Recipe(steps=4, batch_size=4, max_length=512)
IMAGE = "cli(summary=image, start=0.0)"  # gates half open, so that mistakes show


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 questions about three scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    export(3, folder, size=96)
    path = folder / "conversations.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    ids = [json.loads(line)["image"] for line in lines]
    some = [line for name in sorted(set(ids)) for line in _first(lines, ids, name)]
    path.write_text("".join(some), "utf-8")
    return path


def _first(lines: list[str], ids: list[str], name: str) -> list[str]:
    return [line for line, own in zip(lines, ids, strict=True) if own == name][:8]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pocket model that has learnt nothing, small enough for tests."""
    folder = tmp_path_factory.mktemp("small")
    shape = {"vision_layers": 2, "vision_width": 64, "text_layers": 3, "text_width": 64}
    build.save_pocket(*build.build_pocket(**shape), folder)
    return str(folder)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def lesson_on(vlm: VLM, recipe: Recipe, method: str = IMAGE) -> tuple[Lesson, CLI]:
    """As `tune` makes it, without the loop."""
    asked = dataclasses.replace(CLI(), summary="image", start=0.0, seed=0).resolve(
        anatomy(vlm.model)
    )
    injection = asked.build(anatomy(vlm.model))
    prepare(vlm.model, recipe)
    lesson = Lesson(vlm.model, injection).train()
    image_encoder(vlm.model).eval()
    return lesson, asked


def loss_and_gradients(
    vlm: VLM, lesson: Lesson, method: CLI, *batches: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    lesson.zero_grad()
    with attach(vlm.model, (method,), plans={"cli": lesson.injection}):
        totals, counts = zip(*(lesson(dict(batch)) for batch in batches), strict=True)
        loss = sum(totals) / sum(counts)
        loss.backward()
    named = lesson.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


# -- a run -----------------------------------------------------------------------------------------


def test_an_injection_is_trained_saved_and_asked_with(
    data: Path, small: str, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(SHORT, method=IMAGE, steps=12, rate=1e-2, packed=True)
    said: list[str] = []
    tuned = tune(small, data, tmp_path, recipe, say=said.append)
    curve = losses(tmp_path)
    assert curve[-1] < curve[0]
    assert "the vision tower stays frozen" in said[0]
    assert tuned.injection is not None
    assert tuned.model is None
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock", "injection", "log.jsonl", "loss.png", "run.json", "units.json"
    }  # fmt: skip
    fresh = CLI(seed=0, summary="image", start=0.0)
    vlm = VLM.load(small)
    untrained = fresh.resolve(anatomy(vlm.model)).build(anatomy(vlm.model)).state_dict()
    trained = CrossLayerInjection.from_pretrained(tuned.injection).state_dict()
    assert any(not torch.equal(trained[k], untrained[k]) for k in trained)
    image = next((data.parent / "images").iterdir())
    answers = [vlm.ask(image, "What is there?", m).probabilities for m in (tuned.method, fresh)]
    assert answers[0] != answers[1]
    assert tune(small, data, tmp_path, recipe, say=said.append) == tuned
    assert "ended already" in said[-1]
    further = dataclasses.replace(recipe, method=tuned.method, steps=2)
    again = tune(small, data, tmp_path / "again", further)
    assert losses(tmp_path / "again")[0] < curve[0]
    assert again.injection == tmp_path / "again" / "injection"


@pytest.mark.parametrize("base", ["full", "lora"])
def test_the_baseline_learns_without_an_injection(
    base: str, data: Path, small: str, tmp_path: Path
) -> None:
    if base == "lora":
        pytest.importorskip("peft", reason="LoRA needs the extra: train")
    recipe = dataclasses.replace(SHORT, method="vanilla", base=base, base_rate=1e-2, lora_rank=4)
    tuned = tune(small, data, tmp_path, recipe)
    assert tuned.method == "vanilla"
    assert tuned.model is not None
    assert not (tmp_path / "injection").exists()
    assert (tmp_path / "adapter").exists() == (base == "lora")
    before, after = (VLM.load(str(name)).model.state_dict() for name in (small, tuned.model))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("q_proj" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed) == (base == "full")


def test_a_merged_adapter_answers_as_the_adapter_did(
    data: Path, small: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs the extra: train")
    recipe = dataclasses.replace(
        SHORT, method="vanilla", base="lora", base_rate=3e-2, lora_rank=4, steps=6
    )
    tuned = tune(small, data, tmp_path, recipe)
    merged, plain = VLM.load(str(tuned.model)), VLM.load(small)
    writer = Writer(plain.processor, plain.model.config)
    rows = read(data)[:3]
    batch = writer.batch([writer.example(row) for row in rows])  # type: ignore[arg-type]
    with torch.no_grad():
        before = plain.model(**batch).logits
        beside = peft.PeftModel.from_pretrained(plain.model, str(tmp_path / "adapter"))
        assert torch.allclose(merged.model(**batch).logits, beside(**batch).logits, atol=1e-4)
    assert not torch.allclose(merged.model(**batch).logits, before, atol=1e-2)


def test_lora_starts_from_the_seed(small: str) -> None:
    pytest.importorskip("peft", reason="LoRA needs the extra: train")

    def drawn(seed: int) -> dict[str, Tensor]:
        vlm = VLM.load(small)
        prepare(vlm.model, Recipe(base="lora", seed=seed, lora_rank=2))
        named = vlm.model.named_parameters()
        learns = {n: p for n, p in named if p.requires_grad}
        assert all("language_model" in n and "lora" in n for n in learns)
        return {n: p for n, p in learns.items() if "lora_A" in n}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


# -- equal however it is done ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pocket", "llava_next"])
def test_a_packed_step_is_the_step_of_its_rows(family: str, data: Path, small: str) -> None:
    vlm = VLM.load(small) if family == "pocket" else tiny.vlm(family)
    lesson, method = lesson_on(vlm, Recipe(base="full"))
    writer = Writer(vlm.processor, vlm.model.config)
    groups: dict[Any, list[Any]] = {}
    for row in read(data):
        groups.setdefault(row.images, []).append(writer.example(row))  # type: ignore[union-attr]
    picked = [examples[:n] for examples, n in zip(groups.values(), (5, 3, 1), strict=True)]
    packed = writer.packed(picked)
    assert packed["attention_mask"].dim() == 4
    rows = [writer.batch([example]) for examples in picked for example in examples]
    loss, gradients = loss_and_gradients(vlm, lesson, method, packed)
    alone, other = loss_and_gradients(vlm, lesson, method, *rows)
    assert torch.allclose(loss, alone, atol=1e-5)
    assert gradients.keys() == other.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(
            gradient, other[name], atol=1e-4 * float(other[name].abs().max()) + 1e-6
        ), name


@pytest.mark.parametrize("method", ["cli(summary=prompt)", IMAGE])
def test_checkpointing_changes_no_gradient(method: str, data: Path, small: str) -> None:
    found = []
    for checkpointing in (False, True):
        vlm = VLM.load(small)
        lesson, asked = lesson_on(vlm, Recipe(base="full", checkpointing=checkpointing))
        assert vlm.model.get_decoder().gradient_checkpointing == checkpointing
        writer = Writer(vlm.processor, vlm.model.config)
        batch = writer.batch([writer.example(row) for row in read(data)[:3]])  # type: ignore[arg-type]
        found.append(loss_and_gradients(vlm, lesson, asked, batch))
    (loss, gradients), (again, others) = found
    assert torch.equal(loss, again)
    assert gradients.keys() == others.keys()
    assert all(torch.allclose(gradients[n], others[n], atol=1e-7) for n in gradients)


def launched(arguments: list[str], processes: int = 1) -> subprocess.Popen[str]:
    """`foveate train cli` in processes of its own."""
    return started(["-m", "foveate.commands", "train", "cli", *arguments], processes)


def started(program: list[str], processes: int = 1) -> subprocess.Popen[str]:
    """A Python program as a process, or as several that torchrun starts."""
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += [f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *program],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell starts its background jobs deaf to Ctrl-C, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_two_processes_walk_the_curve_of_one(data: Path, small: str, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"  # one process gets only text in some steps
    text = {"conversations": [{"from": "human", "value": "Is red a color?"},
                              {"from": "gpt", "value": "yes"}]}  # fmt: skip
    mixed.write_text(data.read_text("utf-8") + (json.dumps(text) + "\n") * 24, "utf-8")
    common = ["--model", small, "--data", str(mixed), "--images", str(data.parent),
              "--base", "full", "--steps", "5", "--base-rate", "1e-3"]  # fmt: skip
    two = launched([*common, "--out", str(tmp_path / "two"), "--batch-size", "2"], processes=2)
    out, error = two.communicate(timeout=300)
    assert two.returncode == 0, error
    assert out.count("next: foveate ask") == 1, "one process speaks for both"
    recipe = Recipe(base="full", steps=5, base_rate=1e-3, batch_size=4)
    tune(small, mixed, tmp_path / "one", recipe, images=data.parent)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["settings"]["processes"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    one, other = (weights(tmp_path / name / "injection") for name in ("one", "two"))
    assert all(torch.allclose(one[k], other[k], atol=1e-5) for k in one)


def test_a_killed_run_walks_on_along_the_same_curve(data: Path, small: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT, steps=12, base="full", checkpoint_every=0.0)
    tune(small, data, tmp_path / "whole", recipe)
    cut = tmp_path / "cut"
    child = launched(
        ["--model", small, "--data", str(data), "--out", str(cut), "--steps", "12",
         "--batch-size", "4", "--base", "full", "--save-every", "0", "--max-length", "512"]
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while (found := train.latest(cut, NAME)) is None or int(found.name[-8:]) < 3:
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert not (cut / "injection").exists()
    state = load_file(train.latest(cut, NAME) / "rank-0.safetensors")
    assert not any("vision_tower" in name for name in state), "what is frozen is not saved"
    tune(small, data, cut, recipe)
    assert losses(cut) == losses(tmp_path / "whole")
    for part in ("injection", "model"):
        one, other = weights(tmp_path / "whole" / part), weights(cut / part)
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert not list(cut.glob("*.step-*"))


# Accelerate shards on GPUs only: on the CPU it would divide the batch and copy the rest (DDP).
SHARDED = """
import sys
from accelerate.state import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from foveate.training import injection as tuning

plain, drawn = tuning.start, tuning.drawn

def start(precision):
    accelerator = plain(precision)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT", reshard_after_forward=True,
    )
    kind = DistributedType.FSDP
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = kind
    return accelerator

def until(count, size, step, seed):
    if step == int(sys.argv[5]):
        raise SystemExit("power cut")
    return drawn(count, size, step, seed)

tuning.start, tuning.drawn = start, until
recipe = tuning.Recipe(
    base=sys.argv[4], steps=6, batch_size=2, base_rate=1e-3, lora_rank=4, checkpointing=True,
    checkpoint_every=0.0,
)
tuning.tune(*sys.argv[1:4], recipe)
"""


@pytest.mark.slow
@pytest.mark.parametrize("base", ["frozen", "lora", "full"])
def test_a_sharded_run_walks_the_same_curve_and_goes_on(
    base: str, data: Path, small: str, tmp_path: Path
) -> None:
    if base == "lora":
        pytest.importorskip("peft", reason="LoRA needs the extra: train")
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED, "utf-8")
    arguments = [small, str(data), str(tmp_path / "two"), base]
    for stop in ("4", "-1"):
        child = started([str(script), *arguments, stop], processes=2)
        _, error = child.communicate(timeout=240)
        assert (child.returncode == 0) == (stop == "-1"), error
        assert (train.latest(tmp_path / "two", NAME) is None) == (stop == "-1")
    recipe = Recipe(base=base, steps=6, batch_size=4, base_rate=1e-3, lora_rank=4)
    tune(small, data, tmp_path / "one", recipe)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    for part in ("injection", "model")[: 1 + (base != "frozen")]:
        one, other = (weights(tmp_path / name / part) for name in ("one", "two"))
        assert all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(data: Path, small: str, tmp_path: Path) -> None:
    child = launched(
        ["--model", small, "--data", str(data), "--out", str(tmp_path), "--minutes", "5"]
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "log.jsonl").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "the same command goes on from the last checkpoint" in error
    assert "Traceback" not in error


# -- real shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["frozen", "lora", "full"])
@pytest.mark.parametrize(
    "family",
    [
        "llava_onevision",
        "llava_next",
        "llava",
        "qwen2_5_vl",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3_vl", "internvl", "smolvlm", "gemma3", "glm4v")
            if name in models.FAMILIES
        ),
    ],
)
def test_the_families_that_cli_serves_learn_from_a_step(family: str, base: str) -> None:
    if base == "lora":
        pytest.importorskip("peft", reason="LoRA needs the extra: train")
    model = models.build(family, fresh=True)
    recipe = Recipe(base=base, checkpointing=True, lora_rank=2)
    method = CLI(seed=0).resolve(anatomy(model))
    injection = method.build(anatomy(model))
    prepare(model, recipe)
    lesson = Lesson(model, injection).train()
    batch = models.inputs(family, "mixed", batch=3)
    labels = batch["input_ids"].clone()
    labels[:, :-3] = IGNORE
    optimizer = torch.optim.AdamW([p for p in lesson.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    with attach(model, (method,), plans={"cli": injection}):
        for _ in range(3):
            total, count = lesson(batch | {"labels": labels})
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
            seen.append(float(total.detach() / count))
    assert int(count) == 9
    assert seen[-1] < seen[0]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "vanilla"}, "Nothing is left to train"),
        ({"method": "clvs"}, "cannot be trained"),
        ({"method": "cli+clvs"}, "cannot be trained"),
        ({"packed": True}, "summary=image"),
        ({"base": "half"}, "no base"),
        ({"precision": "int8"}, "no precision"),
        ({"epochs": 1.0}, "one budget"),
        ({"steps": None, "minutes": 0.0}, "more than nothing"),
        ({"batch_size": 0}, "at least 1"),
        ({"rate": 0.0}, "positive"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, Any], message: str, data: Path, small: str, tmp_path: Path
) -> None:
    with pytest.raises(FoveateError, match=message):
        tune(small, data, tmp_path, dataclasses.replace(SHORT, **options))


def test_broken_rows_are_refused_unless_they_may_be_skipped(
    data: Path, small: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text("utf-8") + "{\n", "utf-8")
    out = tmp_path / "out"
    with pytest.raises(
        FoveateError, match=r"1 of 25 rows are broken \(1 not a JSON object: line 25"
    ):
        tune(small, bad, out, SHORT, images=data.parent)
    row = json.loads((out / "broken.jsonl").read_text("utf-8"))
    assert (row["line"], row["kind"]) == (25, "not a JSON object")
    told: list[str] = []
    recipe = dataclasses.replace(SHORT, skip_broken=True, steps=1)
    tune(small, bad, tmp_path / "skipped", recipe, images=data.parent, say=told.append)
    assert "left out" in told[0]
    tune(small, data, out, recipe)  # mended, into the same folder
    assert len(losses(out)) == 1


def test_one_training_at_a_time_has_a_folder(data: Path, small: str, tmp_path: Path) -> None:
    second = pytest.raises(FoveateError, match="Another process is writing")
    with owned(tmp_path), second:
        tune(small, data, tmp_path, SHORT)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_and_damaged_files_of_a_run(data: Path, small: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT, steps=2, checkpoint_every=0.0)
    full = pytest.raises(
        FoveateError, match=r"tuning.step-00000001 cannot be written .* there is no checkpoint yet"
    )
    with files_of_at_most(100_000), full:
        tune(small, data, tmp_path, recipe)
    for name in ("units.json", "run.json"):
        for content in ("", "[1]", "{", "{}", "[" * 100_000):
            (tmp_path / name).write_text(content)
            with pytest.raises(FoveateError, match=rf"{name} is damaged"):
                tune(small, data, tmp_path, recipe)


def test_another_run_in_the_folder_is_refused(data: Path, small: str, tmp_path: Path) -> None:
    tune(small, data, tmp_path, dataclasses.replace(SHORT, steps=1))
    with pytest.raises(FoveateError, match=r"other settings \(rate: 0.0002, now 0.1\)"):
        tune(small, data, tmp_path, dataclasses.replace(SHORT, steps=1, rate=0.1))
    with pytest.raises(FoveateError, match="holds a run already"):
        tune(small, data, tmp_path, dataclasses.replace(SHORT, steps=1), resume=False)
