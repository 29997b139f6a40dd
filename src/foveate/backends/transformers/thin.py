"""Products of a few rows on a CPU, at the speed that they should have.

MKL multiplies two to eight float32 rows with a large matrix several times slower than it multiplies
that matrix with as many columns, and then two rows cost more than two single ones. Two streams
decoded as rows of one batch are such a product in every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_FEW = range(2, 9)


class Switch:
    on = False


@contextmanager
def thin_products(model: nn.Module) -> Iterator[Switch]:
    """Inside, while the switch is on, float32 linear layers on a CPU turn thin products around."""
    switch = Switch()
    changed = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in module.__dict__  # somebody else's, such as an offloading hook
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    ]
    for module in changed:
        module.forward = functools.partial(_product, module, switch)  # type: ignore[method-assign]
    try:
        yield switch
    finally:
        for module in changed:
            del module.forward


def _product(module: Any, switch: Switch, x: Tensor) -> Tensor:
    rows = x.shape[:-1].numel()
    if not switch.on or rows not in _FEW:
        return linear(x, module.weight, module.bias)
    out = (module.weight @ x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
    return out if module.bias is None else out + module.bias
