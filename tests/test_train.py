"""The loop survives being killed, packing changes no number, and bad input is refused."""

import errno
import os
import random
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
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate.base.errors import FoveateError
from foveate.pocket import build
from foveate.pocket import train as training
from foveate.pocket.exam import evaluate_pocket, format_report
from foveate.pocket.packed import LanguageLesson
from foveate.pocket.recipes import RECIPES
from foveate.pocket.tower import normalised
from foveate.scenes import lessons, questions
from foveate.training import checkpoints
from foveate.training import loop as train

pytest.importorskip("accelerate", reason="training needs the extra: train")
pytestmark = pytest.mark.long

TINY = {"vision_layers": 1, "vision_width": 64, "text_layers": 1, "text_width": 64}


def short(recipe: str) -> dict[str, Any]:
    """A run of three steps of two pictures per stage."""
    names = [stage.name for stage in RECIPES[recipe]]
    settings = [f"{name}.{number}" for name in names for number in ("steps=3", "batch=2")]
    return {
        "recipe": recipe, "settings": settings, "scenes": 12, "windows": 6, "shape": TINY,
        "precision": "no",
    }  # fmt: skip


RUN = short("pictures-first")


class Line(nn.Module):
    """A small regression with a matrix (Muon) and a bias (AdamW)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses = (self.drop(self.layer(batch["x"])) - batch["y"]).square()
        return losses.sum(), torch.tensor(losses.numel())


def line_batches(step: int) -> dict[str, Tensor]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x.flip(1)}


def fitted(folder: Path, batches=line_batches, **options) -> dict[str, Tensor]:
    lesson = Line()
    made = train.start("no"), training.make_optimizers(lesson, 2e-3)
    train.fit(lesson, batches, *made, folder=folder, name="line", steps=8, **options)
    return {k: v.clone() for k, v in lesson.state_dict().items()}


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole")

    def failing(step: int) -> dict[str, Tensor]:
        if step == 6:
            raise InterruptedError("power cut")
        return line_batches(step)

    with pytest.raises(InterruptedError):
        fitted(tmp_path / "cut", failing, checkpoint_every=0)
    assert train.latest(tmp_path / "cut", "line") is not None
    resumed = fitted(tmp_path / "cut")
    fresh = fitted(tmp_path / "fresh", seed=1)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not all(torch.equal(whole[k], fresh[k]) for k in whole)


def test_ctrl_c_saves_what_was_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, run = fitted(tmp_path / "whole"), tmp_path / "run"

    def interrupted(step: int) -> dict[str, Tensor]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return line_batches(step)

    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fitted(run, interrupted)
    assert signal.getsignal(signal.SIGINT) is usual
    assert "saving after this step" in capsys.readouterr().err
    assert train.latest(run, "line") is not None
    resumed = fitted(run)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("at", ["safetensors", "json", "rename"])
def test_a_disk_that_fills_up_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    whole, run = fitted(tmp_path / "whole"), tmp_path / "run"
    place, name = {
        "safetensors": (checkpoints, "save_file"),
        "json": (checkpoints, "write_text"),
        "rename": (checkpoints, "install"),
    }[at]
    usual, calls = getattr(place, name), []

    def full(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(*given)

    monkeypatch.setattr(place, name, full)
    told = r"step-00000003 cannot be written \(No space left on device\): the checkpoint "
    told += r"line.step-00000002 is safe; make room and give the same command again"
    with pytest.raises(FoveateError, match=told):
        fitted(run, checkpoint_every=0)
    assert not list(run.glob(".*.part"))
    resumed = fitted(run, checkpoint_every=0)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for name in ("line.step-00000003", ".line.step-00000005.part"):
        (tmp_path / name).mkdir()
    found = train.latest(tmp_path, "line")
    assert found is not None
    assert found.name == "line.step-00000003"


def test_the_rate_warms_up_and_ends_at_nothing() -> None:
    assert train.rate_at(0, 0.0) < 0.1
    assert train.rate_at(100, 0.5) == 1
    assert train.rate_at(100, 0.85) == pytest.approx(0.5)
    assert train.rate_at(100, 1.0) == 0


def test_a_budget_is_one_thing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either minutes or steps"):
        train.fit(Line(), line_batches, None, [], folder=tmp_path, name="line")


def test_every_item_comes_once_per_epoch() -> None:
    seen = [i for step in range(5) for i in train.drawn(10, 4, step, seed=0)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]


@pytest.mark.parametrize(
    ("recipe", "first", "last"),
    [
        ("pictures-first", "tower", "caption"),
        pytest.param("language-first", "language", "tuning", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_as_if_nothing_had_happened(
    tmp_path: Path, recipe: str, first: str, last: str
) -> None:
    options = short(recipe) | {"until": last}
    whole = training.train_pocket(tmp_path / "whole", **options)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from foveate.pocket.train import train_pocket\n"
        f"train_pocket(sys.argv[1], checkpoint_every=0, **{options!r})"
    )
    cut = tmp_path / "cut"
    child = subprocess.Popen([sys.executable, "-c", code, str(cut)])
    deadline = time.monotonic() + 600
    while train.latest(cut, first) is None and not (cut / f"{first}.safetensors").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (cut / f"{last}.safetensors").exists()
    training.train_pocket(cut, **options)
    one, other = (load_file(f / f"{last}.safetensors") for f in (whole.parent, cut))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert not list(cut.glob("*.step-*"))


def test_until_and_reuse(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="Unknown stage"):
        training.train_pocket(tmp_path, until="sleep")
    folder = training.train_pocket(tmp_path / "run", until="open", **RUN)
    assert folder.name == "open"
    model, processor = build.load_pocket(folder)
    assert model.config.text_config.num_hidden_layers == 1
    assert not (tmp_path / "run" / "yesno").exists()
    with pytest.raises(FoveateError, match="resume"):
        training.train_pocket(tmp_path / "run", until="open", resume=False, **RUN)
    rows = evaluate_pocket(folder, n=1)
    assert set(rows) == {"with", "against"}
    assert {"existence", "existence, popular", "attribute", "open"} <= set(rows["with"])
    table = format_report(rows)
    assert "| existence |" in table
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("both", [False, True])
def test_packed_questions_equal_single_prompts(tmp_path: Path, both: bool) -> None:
    model, processor = build.build_pocket(
        vision_layers=2, vision_width=96, text_layers=3, text_width=96
    )
    pool = lessons.Pool(tmp_path, 4, 2).build(workers=1)
    packer = lessons.Packer(processor)
    one = packer.item(pool, 4, "yesno", random.Random(5), both)
    pixels = torch.from_numpy(np.stack([pool.pixels[i] for i in one.images]))
    lesson = LanguageLesson(model, packer.image)
    with torch.no_grad():
        tower = model.model.vision_tower(normalised(pixels)).last_hidden_state[:, 1:]
        batch = {k: torch.from_numpy(v) for k, v in lessons.collate([one]).items()}
        logits = model.lm_head(lesson.hidden(batch | {"features": tower}))[0]
    asked = {int(one.segments[at]): (question, at) for question, at in reversed(one.asked)}
    assert len(asked) > 8
    for question, at in asked.values():
        content = [{"type": "image"}] * len(one.images) + [{"type": "text", "text": question.text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [Image.fromarray(np.array(pool.pixels[i])) for i in one.images]
        inputs = processor(images=images, text=text, return_tensors="pt")
        with torch.no_grad():
            single = model(**inputs).logits[0, -1]
        assert torch.allclose(single, logits[at], atol=1e-5), question.text
        answer = build.encode(processor, question.answer)
        assert one.labels[at] == answer[0]
        assert one.weights[at] > 0
    assert model.config.text_config._attn_implementation == "sdpa"


def test_two_turns_in_a_row_are_packed_as_the_template_writes_them() -> None:
    _, processor = build.build_pocket(**TINY)
    packer = lessons.Packer(processor)
    turns = [
        questions.Question("Is it red?", "yes", "attribute", "color", "yes"),
        questions.Question("What color is it?", "red", "attribute", "color"),
    ]
    packed = packer.pack((0,), [turns])
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0].text}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": turns[1].text},
        {"role": "assistant", "content": "red"},
    ]
    text = processor.apply_chat_template(chat)
    ids = processor(images=Image.new("RGB", (8, 8)), text=text, return_tensors="np")["input_ids"][0]
    assert packed.ids[packed.segments >= 0].tolist() == ids.tolist()
    learnt = packed.labels[packed.labels != lessons.IGNORE].tolist()
    end = processor.tokenizer.eos_token_id
    assert learnt == [*build.encode(processor, "yes"), end, *build.encode(processor, "red"), end]


def test_yes_and_no_change_all_but_the_tower(tmp_path: Path) -> None:
    folder = training.train_pocket(tmp_path, **RUN)
    before = build.load_pocket(tmp_path / "open")[0].state_dict()
    after = build.load_pocket(folder)[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("vision_tower" in name for name in changed)


def test_padding_teaches_nothing() -> None:
    _, processor = build.build_pocket(**TINY)
    packed = lessons.Packer(processor).pack((0,), [])
    assert (packed.labels == lessons.IGNORE).all()
    assert (packed.weights == 0).all()
    assert (packed.segments == -1).sum() == lessons.CHUNK * lessons.CHUNKS[1]
