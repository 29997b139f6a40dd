"""The KV cache that carries the context of its sequences."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor

from ...base.errors import FoveateError
from .compat_cache import batch_of, length, sharing
from .context import Context


class ContextCache:
    """Mixed into the class of a cache that carries a context: calls on the cache reach it."""

    foveate: Context | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(self._rows(beam_idx))  # type: ignore[misc]
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().reorder_cache(_repeated(self, repeats))  # type: ignore[misc]
        if self.foveate is not None:
            index = torch.arange(self.foveate.visual.shape[0]).repeat_interleave(repeats)
            self._select(index)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self._rows(indices))  # type: ignore[misc]
        self._select(indices)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        if self.foveate is not None and self.foveate.phase != "prefix":
            raise FoveateError(
                "A cache that holds edited tokens cannot be cropped (assisted decoding does that): "
                "generate without an assistant, or crop a copy made right after prefill()."
            )
        if self.foveate is not None and self.foveate.other is not None:
            raise FoveateError(
                f"The second stream of {self.foveate.stack} has another length and cannot be "
                "cropped with this cache: fill a shorter prefix instead."
            )
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if self.foveate is not None:
            self.foveate.crop(length(self))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.foveate = None

    def _rows(self, index: Tensor) -> Tensor:
        """The cache's own rows behind the samples `index`."""
        if self.foveate is None or not self.foveate.paired:
            return index
        return torch.cat([index, index + len(self.foveate.visual)])

    def _select(self, index: Tensor) -> None:
        if self.foveate is not None:
            self.foveate = self.foveate.select(index)

    def pair(self) -> None:
        """Two rows per sample from now on: the second half of the batch is a second stream's."""
        assert self.foveate is not None
        # a cache that the model made inside its forward holds both streams already
        if length(self) > 0 and batch_of(self) == len(self.foveate.visual):
            rows = torch.arange(len(self.foveate.visual)).repeat(2)
            super().batch_select_indices(rows)  # type: ignore[misc]
        self.__class__ = _with(PairedCache, type(self).__mro__[2])


class SideBySide(ContextCache):
    """A cache whose context has another: the second half of a doubled batch goes there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> Any:
        plain, ctx = super().update, self.foveate  # type: ignore[misc]
        if ctx is None or not ctx.abreast:
            return plain(key_states, value_states, layer, *args, **kwargs)
        half = len(ctx.visual)
        theirs = key_states[half:], value_states[half:]
        ctx.other.seen[layer] = ctx.other.cache.update(*theirs, layer, *args, **kwargs)
        return plain(key_states[:half], value_states[:half], layer, *args, **kwargs)


class PairedCache(ContextCache):
    """A cache with two rows per sample, which only `enhance` knows how to fill."""

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.foveate is not None and len(key_states) != 2 * len(self.foveate.visual):
            raise FoveateError(
                f"This cache holds two streams of {self.foveate.stack}: go on with it inside "
                "enhance() with the same methods, or start from a fresh cache."
            )
        return super().update(key_states, *args, **kwargs)  # type: ignore[misc]


def repeat_rows(cache: Any, repeats: int) -> None:
    """Every row of a filled cache `repeats` times, those of linear attention, too."""
    if isinstance(cache, ContextCache):
        cache.batch_repeat_interleave(repeats)
    else:
        cache.reorder_cache(_repeated(cache, repeats))


def _repeated(cache: Any, repeats: int) -> Tensor:
    # transformers' own batch_repeat_interleave does not know layers of linear attention
    return torch.arange(batch_of(cache)).repeat_interleave(repeats)


def fork(cache: Any) -> Any:
    """A cache that goes its own way from here and shares the tensors so far."""
    new = sharing(cache)
    new.foveate = copy.deepcopy(cache.foveate)
    return new


def keep_column(cache: Any, rows: list[int], column: Tensor | None, length: int) -> None:
    """Of `rows` of a cache that keeps all, the first `length` columns and one more.

    The tensors of the latest update are changed in place where every row stays what it is.

    Args:
        column: (B,), each row's further column, which becomes its last; None for no further one.
    """
    same = rows == list(range(batch_of(cache)))
    for layer in cache.layers:
        index = torch.tensor(rows, device=layer.keys.device)
        for name in ("keys", "values"):
            whole = kept = getattr(layer, name)
            if not same:
                kept = whole[:, :, : length + 1].index_select(0, index)
            if column is not None:
                kept[:, :, length] = whole[index, :, column.to(index.device)]
            setattr(layer, name, kept[:, :, : length + (column is not None)])


@functools.cache
def _with(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {})


def adopt(cache: Any, ctx: Context) -> None:
    """Hang `ctx` on `cache`."""
    if not isinstance(cache, ContextCache):
        cache.__class__ = _with(ContextCache, cast(Any, type(cache)))
    cache.foveate = ctx
    if ctx.paired and not isinstance(cache, PairedCache):
        cache.pair()


def side_by_side(cache: Any) -> None:
    """From now on forwards of two rows per sample fill the second stream's cache, too."""
    if not isinstance(cache, SideBySide):
        cache.__class__ = _with(SideBySide, type(cache).__mro__[2])
