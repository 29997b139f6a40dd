"""vLLM's attention backend of CPUs, with the rows that methods edit put into its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from . import settings
from .cache import Packed
from .requests import ROWS
from .step import edit_layer, number_of, planned


class Builder(CPUAttentionMetadataBuilder):
    """Adds the step's groups to the metadata that every layer gets."""

    def __init__(self, spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(spec, layer_names, vllm_config, device)
        self.edits = settings.check(vllm_config, spec, layer_names)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        given = super().build(common_prefix_len, common_attn_metadata, fast_build)
        given.foveate = None
        if self.edits:
            asked = common_attn_metadata, given.block_table, self.block_size, ROWS
            given.foveate = planned(*asked)
        return given


class Impl(CPUAttentionBackendImpl):
    """The kernel, then the rows that methods edit.

    Rows that are read as a whole need no kernel, so it is left out of a layer where all are.
    """

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        given = (layer, query, key, value, kv_cache, attn_metadata, output)
        groups = getattr(attn_metadata, "foveate", None)
        if groups is None:
            return super().forward(*given, *args, **kwargs)
        number = number_of(layer.layer_name)
        groups = [group for group in groups if number in group.layers]
        whole = [group for group in groups if group.rest is None and group.at_work(number)]
        if sum(len(group.places) for group in whole) < attn_metadata.num_actual_tokens:
            super().forward(*given, *args, **kwargs)
        edit_layer(self, number, groups, query, Packed(kv_cache), output)
        return output


class Backend(CPUAttentionBackend):
    """See the module."""

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder
