"""Cross-layer injection is trained, and answers, through the families' real processors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from foveate.backends.transformers.anatomy import anatomy
from foveate.backends.transformers.enhance import attach
from foveate.base.errors import FoveateError
from foveate.methods.cli.method import CLI
from foveate.training.conversations import read
from foveate.training.lesson import Lesson, prepare
from foveate.training.recipe import Recipe
from foveate.training.writer import IGNORE, Writer
from foveate.vlm.vlm import VLM
from tests.vision.families import picture

pytest.importorskip("torchvision", reason="torchvision has an environment of its own: test-vision")


def test_a_step_is_learnt_and_what_was_learnt_answers(model: VLM, tmp_path: Path) -> None:
    model = VLM(copy.deepcopy(model.model), model.processor, model.name)
    rows = []
    for number, (size, answer) in enumerate([((40, 30), "Yes"), ((30, 90), "No cat")]):
        picture(*size, number).save(tmp_path / f"{number}.png")
        said = [
            {"from": "human", "value": "<image>\nIs there a cat?"},
            {"from": "gpt", "value": answer},
        ]
        rows.append(json.dumps({"id": number, "image": f"{number}.png", "conversations": said}))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    writer = Writer(model.processor, model.model.config)
    examples = [writer.example(row) for row in read(tmp_path / "data.jsonl", None)]
    if model.name == "gemma3":  # line breaks around its picture join those of the template
        with pytest.raises(FoveateError, match=r"by itself.*cannot be trained"):
            writer.batch(examples)
        return
    batch = writer.batch(examples)
    learnt = [
        model.tokenizer.decode(row[row != IGNORE], skip_special_tokens=True).split()
        for row in batch["labels"]
    ]
    assert learnt == [["Yes"], ["No", "cat"]]

    method = CLI(seed=0, rank=4, heads=4, start=0.0).resolve(anatomy(model.model))
    injection = method.build(anatomy(model.model))
    prepare(model.model, Recipe(base="frozen"))
    lesson = Lesson(model.model, injection).train()
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-2)
    losses = []
    with attach(model.model, (method,), plans={"cli": injection}):
        for _ in range(3):
            total, count = lesson(batch)
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
            losses.append(float(total.detach() / count))
    assert losses[-1] < losses[0]
    injection.save_pretrained(tmp_path / "injection")
    model.model.eval()
    asked = picture(40, 30), "Is there a cat?"
    path = str(tmp_path / "injection")
    plain = model.ask(*asked, max_new_tokens=2)
    answer = model.ask(*asked, CLI(path=path), max_new_tokens=2)
    assert answer.probabilities != plain.probabilities
