"""LoRA adapters beside methods: answers are those of the model with the adapter merged in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from foveate.backends.vllm import compat
from foveate.base.errors import FoveateError
from foveate.core.method import as_stack
from tests.vllm import answers
from tests.vllm.test_equality import NEAR, apart

METHODS = [
    "",
    "clvs(stop_threshold=0)",
    "pai(gamma=1.0)",
    "tarac(beta=1.5, alpha=0.8)",
    "vaf(enhance=1.8, suppress=0.4)",
    "vcd(beta=0)",
    "m3id(forgetting=0.1, beta=0)",
]
RANK, PARTS = 4, ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def adapt(folder: Path, adapter: Path, merged: Path, seed: int) -> None:
    """Draw an adapter of the language model's layers; write it, and the model with it merged."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, drawn = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        bare = name.removesuffix(".weight")
        if "language_model" in name and bare.endswith(PARTS):
            down = torch.randn(RANK, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            up = torch.randn(weight.shape[0], RANK, generator=generator) * 0.05
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
    modules = [name.split(".")[1] for name in PARTS]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_two_adapters_beside_methods(tmp_path: Path) -> None:
    """The same requests with each of them in one batch, twice: the second from the prefix cache."""
    model = answers.pocket(tmp_path / "pocket")
    asked, both, reference = answers.requests(tmp_path, METHODS), [], []
    for seed in (0, 1):
        adapter, merged = tmp_path / f"adapter{seed}", tmp_path / f"merged{seed}"
        adapt(model, adapter, merged, seed)
        both += [one | {"lora": str(adapter)} for one in asked]
        job = {"model": str(merged), "requests": asked, "out": str(tmp_path / "reference")}
        reference += answers.run("transformers", job)[0]
    for one, two in zip(reference[: len(asked)], reference[len(asked) :], strict=True):
        assert apart(one, two) > 0.1, "the adapters change answers"
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "block_size": 32}
    job = {"model": str(model), "requests": both, "out": str(tmp_path / "vllm"), "turns": 2}
    job |= {"options": options}
    for turn in answers.run("vllm", job, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        for one, ours, theirs in zip(both, turn, reference, strict=True):
            assert ours["tokens"] == theirs["tokens"], one["method"]
            assert apart(ours, theirs) < NEAR, one["method"]


@pytest.mark.parametrize(
    ("method", "adapter", "reason"),
    [
        ("clvs(stop_threshold=0)", None, "requests without an adapter"),
        ("clvs", object(), "clvs asks what layers would say"),
        ("dola", object(), "dola asks what layers would say"),
    ],
)
def test_what_is_not_exact_beside_adapters_is_refused(
    method: str, adapter: Any, reason: str
) -> None:
    stack = SimpleNamespace(methods=as_stack(method))
    serving = SimpleNamespace(lora_config=object())
    compat.refuse_adapters(SimpleNamespace(lora_config=None), stack, adapter)
    compat.refuse_adapters(serving, SimpleNamespace(methods=as_stack("pai(gamma=1)")), object())
    with pytest.raises(FoveateError, match=reason):
        compat.refuse_adapters(serving, stack, adapter)
