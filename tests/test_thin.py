"""Products of a few rows: the same numbers, and a model that is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveate.backends.transformers.thin import thin_products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 1, 24), (2, 4, 24), (3, 5, 24), (8, 24)])
def test_products_are_those_of_the_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(*shape, requires_grad=True)
    want = layer(x)
    with thin_products(nn.Sequential(layer)) as switch:
        assert torch.equal(layer(x), want)
        switch.on = True
        got = layer(x)
        assert got.is_contiguous()
    assert torch.allclose(got, want, atol=1e-6)
    a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (want, got))
    assert torch.allclose(a, b, atol=1e-5)


def test_the_layers_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).half(), nn.Linear(4, 4))
    hooked = model[2].forward
    model[2].forward = hooked  # type: ignore[method-assign]  # as an offloading library does
    with pytest.raises(ValueError, match="mark"), thin_products(model):  # noqa: PT012
        assert "forward" in model[0].__dict__
        assert "forward" not in model[1].__dict__
        assert model[2].forward is hooked
        raise ValueError("mark")
    assert "forward" not in model[0].__dict__
    assert model[2].forward is hooked
