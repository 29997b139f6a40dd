"""Half precision: edited rows are computed in float32 from the first product on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from foveate import Method, enhance
from foveate.core import edit as kernels
from tests import models

HALF = [torch.bfloat16, torch.float16]
WEIGHTS = 1e-5  # relative error of an edited weight, of which a model in bfloat16 alone has 4e-3
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of the output, once


@dataclass(frozen=True)
class Watch(Method, register=False):
    """Keeps what it sees and changes nothing."""

    kept: ClassVar[list[tuple[int, Tensor, Tensor, Tensor, Tensor, float]]] = []
    name: ClassVar[str] = "watch"

    def weights(self, rows: Any) -> Tensor:
        found = rows.x.clone(), rows.query, rows.key.clone(), rows.valid
        self.kept.append((rows.layer, *found, rows.scale))
        return rows.x


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", HALF)
def test_weights_of_a_half_precision_model_are_float32(family: str, dtype: torch.dtype) -> None:
    """Against weights in float64 from the same queries and cached keys."""
    model = models.build(family, dtype=dtype)
    inputs = models.inputs(family, batch=3, dtype=dtype)
    Watch.kept.clear()
    with torch.no_grad(), enhance(model, Watch()):
        model.generate(**inputs, max_new_tokens=3)
    assert len(Watch.kept) == 6 * 3
    for layer, got, query, key, valid, scaling in Watch.kept:
        wide = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query.double() @ wide.transpose(2, 3) * scaling
        want = scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
        error = (got - want).abs() / want.clamp(min=1e-6)
        assert error.max() < WEIGHTS, (layer, float(error.max()))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_outputs_are_rounded_once(
    dtype: torch.dtype, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`narrow` is the route on CUDA, with a stand-in for its product of half precision matrices."""
    if narrow:

        def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
            assert a.dtype == b.dtype == dtype, "the kernel takes one dtype"
            return torch.einsum("nij,njk->nik", a.to(out_dtype), b.to(out_dtype))

        monkeypatch.setattr(kernels, "_narrow", lambda a, b: b.dtype == dtype)
        monkeypatch.setattr(torch, "bmm", bmm)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 3, 16, generator=generator).to(dtype)
    key = torch.randn(2, 2, 50, 16, generator=generator).to(dtype)
    value = torch.randn(2, 2, 50, 16, generator=generator).to(dtype)
    scores = kernels.products(query, key, 0.25)
    wide = key.double().repeat_interleave(4, 1)
    want = query.double() @ wide.transpose(2, 3) * 0.25
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), want, atol=1e-5, rtol=1e-6)
    weights = scores.softmax(-1)
    out = kernels.weighted(weights, value)
    want = want.softmax(-1) @ value.double().repeat_interleave(4, 1)
    assert out.dtype == torch.float32
    # the sum of two halves has twice the digits of one
    assert torch.allclose(out.double(), want, atol=4 * ROUNDING[dtype] ** 2, rtol=0)
    error = (out.to(dtype).double() - want).abs()
    assert (error <= ROUNDING[dtype] * want.abs() + 1e-6).all()
