"""A LoRA adapter beside a method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from tests.vllm import answers

METHODS = ["", "clvs", "pai(gamma=1.0)", "tarac(beta=1.5)"]
RANK, NAMES = 4, ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def adapt(folder: Path, adapter: Path, merged: Path) -> None:
    """Draw an adapter of the language model's layers; write it, and the model with it merged."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, drawn = load_file(folder / "model.safetensors"), {}
    torch.manual_seed(0)
    for name, weight in weights.items():
        bare = name.removesuffix(".weight")
        if "language_model" in name and bare.endswith(NAMES):
            down = torch.randn(RANK, weight.shape[1]) * weight.shape[1] ** -0.5
            up = torch.randn(weight.shape[0], RANK) * 0.05
            weights[name] = weight + up @ down
            drawn[f"base_model.model.{bare}.lora_A.weight"] = down
            drawn[f"base_model.model.{bare}.lora_B.weight"] = up
    assert drawn
    for new in (adapter, merged):
        new.mkdir()
    for file in folder.iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    save_file(drawn, adapter / "adapter_model.safetensors", {"format": "pt"})
    modules = [name.split(".")[1] for name in NAMES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_an_adapter_beside_a_method(tmp_path: Path) -> None:
    """The same requests with and without it in one batch; each is its own model's answer."""
    model = answers.pocket(tmp_path / "pocket")
    adapt(model, tmp_path / "adapter", tmp_path / "merged")
    asked = answers.requests(tmp_path, METHODS)
    reference = []
    for folder in (model, tmp_path / "merged"):
        job = {"model": str(folder), "requests": asked, "out": str(tmp_path / "reference")}
        reference += answers.run("transformers", job)[0]
    apart = (reference[1]["rows"] - reference[5]["rows"]).abs().max()
    assert apart > 0.1, "the adapter changes answers"
    both = asked + [one | {"lora": str(tmp_path / "adapter")} for one in asked]
    job = {"model": str(model), "requests": both, "out": str(tmp_path / "vllm"), "turns": 2}
    job |= {"options": {"enable_lora": True, "max_lora_rank": 8, "block_size": 32}}
    for turn in answers.run("vllm", job, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        for one, ours, theirs in zip(both, turn, reference, strict=True):
            assert ours["tokens"] == theirs["tokens"], one["method"]
            assert (ours["rows"] - theirs["rows"]).abs().max() < 2e-4, one["method"]
