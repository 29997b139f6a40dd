"""The Triton kernels compile for GPUs. No GPU is needed for that; none has run them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: make test-vllm")

from foveate.backends.vllm import kernels


def compiled(kernel: Any, capability: int, types: dict[str, str], fixed: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {name: types.get(name, "i32") for name in kernel.arg_names}
    given |= dict.fromkeys(fixed, "constexpr")
    source = ASTSource(fn=kernel, signature=given, constexprs=fixed)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    table = {"number": "*i64", "out": "*fp32", "scale": "fp32", "weights": "*fp32"}
    for dtype, half in (("fp32", False), ("bf16", True)):
        for group, width in ((1, 128), (7, 64)):
            fixed = {**kernels._shape(group, width, 16), "HALF": half, "HEADS": 4}
            types = table | dict.fromkeys(("query", "keys", "values"), f"*{dtype}")
            for kernel in (kernels._scores, kernels._summed):
                assert compiled(kernel, capability, types, fixed).asm["cubin"]
    names = kernels._edited.arg_names
    types = dict.fromkeys(names[names.index("times_0") :], "fp32")
    types |= dict.fromkeys(("x", "old", "new", "out"), "*fp32")
    types |= {"kinds": "*i8", "gates": "*i8"}
    for mixing in (False, True):
        fixed = {"HEADS": 28, "H": 32, "T": 64, "MEAN": False, "UPDATED": True}
        fixed |= {"MIXING": mixing, "GATED": mixing}
        assert compiled(kernels._edited, capability, types, fixed).asm["cubin"]
