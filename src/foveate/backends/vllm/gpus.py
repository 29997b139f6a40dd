"""vLLM's attention backends of GPUs, with the rows that methods edit put into their output.

`FLASH_ATTN`, `FLASHINFER` and `TRITON_ATTN` are vLLM's own classes, extended. Each is made when it
is asked for, as a backend may need packages that are not there. Written from vLLM's source and
tested against stand-ins of its classes; not run on a GPU.

All three keep keys and values side by side, (blocks, Hkv, size, 2 D), whichever of heads and tokens
come first in memory. What they could give of the log-sum-exp differs: FlashAttention's function
returns it, FlashInfer's wrappers do, in base 2, but its decode kernels from TensorRT do not, and
Triton's unified attention does not. So it is not asked for: a row that is edited is read whole, or
the keys of its rest are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from ...base.errors import FoveateError
from .compat import _OTHERWISE, version
from .requests import ROWS
from .settings import check
from .step import edit_layer, number_of, planned
from .strided import Strided

PLACES = {  # the backend's name in vLLM -> module and class
    "FLASH_ATTN": ("flash_attn", "FlashAttentionBackend"),
    "FLASHINFER": ("flashinfer", "FlashInferBackend"),
    "TRITON_ATTN": ("triton_attn", "TritonAttentionBackend"),
}
_FORWARD = (
    "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
)
_BUILD = "self common_prefix_len common_attn_metadata fast_build"


class Building:
    """Beside a builder of metadata: adds the step's groups to what every layer gets."""

    supports_update_block_table = False  # another table would leave the groups with this one's

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, *args: Any, **more: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **more)  # type: ignore[call-arg]
        self.size = kv_cache_spec.block_size
        self.edits = check(vllm_config, kv_cache_spec, layer_names)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """A graph of a whole step would leave out what is edited; pieces of one are kept."""
        from vllm.v1.attention.backend import AttentionCGSupport

        if vllm_config.model_config.is_multimodal_model:
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        given = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        given.foveate = None
        if self.edits:
            table = common_attn_metadata.block_table_tensor
            given.foveate = planned(common_attn_metadata, table, self.size, ROWS)
        return given


class Editing:
    """Beside what computes attention: the kernel, then the rows that methods edit."""

    edits_rows = True
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        given = layer, query, key, value, kv_cache, attn_metadata, output
        out: Tensor = super().forward(*given, output_scale, output_block_scale)  # type: ignore[misc]
        groups = getattr(attn_metadata, "foveate", None)
        if groups is None:
            return out
        number = number_of(layer.layer_name)
        groups = [group for group in groups if number in group.layers]
        if groups:
            cache = self._cache(kv_cache, query, output)
            edit_layer(self, number, groups, query, cache, output)
        return out

    def _cache(self, cache: Tensor, query: Tensor, output: Tensor) -> Strided:
        """A layer's keys and values.

        Raises:
            RuntimeError: they do not lie as in the vLLM that this was written for.
        """
        wanted = self.num_kv_heads, 2 * self.head_size
        shape = (cache.shape[1], cache.shape[3]) if cache.dim() == 4 else None
        if shape != wanted or cache.stride(3) != 1 or {cache.dtype, output.dtype} != {query.dtype}:
            raise RuntimeError(
                f"foveate: this vLLM keeps keys and values as {cache.dtype} {tuple(cache.shape)}, "
                f"which foveate does not know, so no row was edited: {_OTHERWISE}."
            )
        return Strided(cache, _kernels() if cache.is_cuda else None)


@functools.cache
def _kernels() -> Any:
    """The Triton kernels; None where there is no Triton."""
    try:
        from . import kernels
    except ImportError:
        return None
    return kernels


def extended(plain: type) -> type:
    """A backend of vLLM that also edits rows.

    Args:
        plain: vLLM's own, a subclass of its `AttentionBackend`.

    Raises:
        FoveateError: vLLM has changed what is extended.
    """
    given: Any = plain
    computes, builds = given.get_impl_cls(), given.get_builder_cls()
    for owner, name, parameters in ((computes, "forward", _FORWARD), (builds, "build", _BUILD)):
        found = inspect.signature(getattr(owner, name)).parameters
        if list(found) != parameters.split():
            raise FoveateError(
                f"vLLM {version()} has changed {owner.__name__}.{name}, which foveate "
                f"builds on: {_OTHERWISE}."
            )
    impl = type(f"Foveate{computes.__name__}", (Editing, computes), {})
    builder = type(f"Foveate{builds.__name__}", (Building, builds), {})
    parts = {
        "get_impl_cls": staticmethod(lambda: impl),
        "get_builder_cls": staticmethod(lambda: builder),
        "__module__": __name__,
    }
    return type(f"Foveate{plain.__name__}", (plain,), parts)


def __getattr__(name: str) -> type:
    if name not in PLACES:
        raise AttributeError(name)
    import importlib

    module, backend = PLACES[name]
    plain = getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), backend)
    globals()[name] = made = extended(plain)
    return made
