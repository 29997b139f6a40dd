"""CLI against its reference, the specification's self-checks, files and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError, enhance, prefill
from foveate.engine import attach
from foveate.injection import CrossLayerInjection, Summary
from foveate.methods.cli import CLI, SERVES
from foveate.shared import next_position, suffix_batch
from tests import models
from tests.references.cli import CLI as Reference

FAMILIES = [name for name in models.FAMILIES if name in SERVES]
SMALL: dict[str, Any] = {"seed": 0, "rank": 4, "heads": 4}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"gate": "tanh", "norm": "rms", "reduce": "mean"},
    {"gate": "vector", "place": "after", "layers": (0, 3)},
    {"gate": "token", "share": "pair"},
    {"gate": "static", "routes": "one-to-one", "vision_layers": (1, 2)},
    {"gate": "static", "routes": "one-to-many"},
    {"summary": "image", "vision_layers": (1, 2)},
]


def trained(model: Any, folder: Path, **settings: Any) -> CLI:
    """An injection whose every weight is alive, saved and named by its folder."""
    module = CLI(**SMALL, **settings).resolve(model).build(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator) / max(1, p.shape[-1]) ** 0.5
    module.save_pretrained(folder)
    return CLI(path=str(folder))


def reference(model: Any, method: CLI, gate: float | None = None) -> Reference:
    return Reference(model, CrossLayerInjection.from_pretrained(method.path), gate)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_reference(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Prompt and eight decode steps of a left-padded batch, against one prompt without a cache."""
    model = models.build(family)
    method = trained(model, tmp_path, **settings)
    for kind in ("image", "images") if not settings else ("image",):
        inputs = models.inputs(family, kind, batch=3)
        with torch.no_grad(), enhance(model, method):
            out = model.generate(
                **inputs, max_new_tokens=9, return_dict_in_generate=True, output_logits=True
            )
        gates = CLI.gates(out.past_key_values)
        assert gates.shape == (3, len(CLI_layers(method)), len(CLI_vision(method)))
        for row in range(3):
            slow = reference(model, method)
            written = out.sequences[row, inputs["input_ids"].shape[1] : -1]
            want = slow.logits(models.inputs(family, kind, row=row), written)[-9:]
            got = torch.stack(out.logits)[:, row]
            assert (got - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()) / 10)
            for (layer, k), gate in slow.found.items():
                if gate.numel() == 1 and settings.get("gate") != "token":
                    place = CLI_layers(method).index(layer), CLI_vision(method).index(k)
                    assert torch.allclose(gates[row][place], gate[0], atol=1e-5)


def CLI_layers(method: CLI) -> list[int]:
    return json.loads((Path(method.path) / "config.json").read_text())["layers"]


def CLI_vision(method: CLI) -> list[int]:
    return json.loads((Path(method.path) / "config.json").read_text())["vision_layers"]
