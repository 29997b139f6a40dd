"""Linear layers of one or two rows on the CPU: what decoding a single question is made of.

PyTorch multiplies one row by a matrix more slowly than the memory allows, and two rows take about
twice as long again, though both have to read the weights once. The transposed product of two rows,
weight times rows, is faster than either, so one row is multiplied twice.
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
def fast_rows(model: Any) -> Iterator[None]:
    """The language model's linear layers multiply one or two float32 rows as fast as a CPU can.

    Plain and with any method alike: `VLM` answers in this block. Layers elsewhere, or of another
    dtype, are left as they are, and pay nothing.
    """
    parts = [*compat.decoder_of(model).modules(), model.get_output_embeddings()]
    with ExitStack() as leaving:
        for part in parts:
            if type(part) is nn.Linear and "forward" not in vars(part):  # nobody else is in between
                if part.weight.device.type != "cpu" or part.weight.dtype != torch.float32:
                    continue
                forward = functools.partial(multiply, part)
                leaving.enter_context(compat.replaced(part, "forward", forward))
        yield


def multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    """What the linear layer gives for `x` (..., in)."""
    weight, bias = layer.weight, layer.bias
    few = 0 < x.numel() <= 2 * weight.shape[1] and x.dtype == weight.dtype == torch.float32
    if not few or x.device.type != "cpu" or torch.compiler.is_compiling():
        return linear(x, weight, bias)
    rows = x.reshape(-1, weight.shape[1])
    two = rows if len(rows) == 2 else rows.repeat(2, 1)
    out = (weight @ two.T).T[: len(rows)]
    out = out.contiguous().view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias
