"""Linear layers of two rows on the CPU, where one token of two streams is decoded.

PyTorch takes about twice as long for two rows as for one, though both have to read the weights
once, which is what takes the time. The transposed product, weight times rows, takes little longer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import compat


@contextmanager
def fast_pairs(model: Any) -> Iterator[None]:
    """The language model's linear layers multiply two float32 rows on the CPU as fast as one."""
    parts = [*model.get_decoder().modules(), model.get_output_embeddings()]
    with ExitStack() as leaving:
        for part in parts:
            if type(part) is nn.Linear and "forward" not in vars(part):  # nobody else is in between
                forward = functools.partial(multiply, part)
                leaving.enter_context(compat.replaced(part, "forward", forward))
        yield


def multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    """What the linear layer gives for `x` (..., in)."""
    weight, bias = layer.weight, layer.bias
    two = x.dtype == weight.dtype == torch.float32 and x.numel() == 2 * weight.shape[1]
    if not two or x.device.type != "cpu" or torch.compiler.is_compiling():
        return linear(x, weight, bias)
    out = (weight @ x.reshape(2, -1).T).T.contiguous().view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias
