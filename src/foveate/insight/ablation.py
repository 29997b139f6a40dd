"""A model whose attention heads can be removed, many at a time.

The published code (modular attribution, ICLR 2025) runs the model once per head and token. Here
many heads and tokens share one forward: each is one query row, fed the same token again at the same
position, with a mask in which it sees the caption's own KV cache up to its place, and itself. The
result is the same to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.transformers import compat, compat_cache, compat_parts
from ..base.errors import FoveateError


@dataclass(frozen=True)
class Caption:
    """What a model produced, with everything needed to predict any of its tokens again."""

    ids: Tensor
    """(P + T,) int64: the prompt and the caption."""
    prompt: int
    """P."""
    positions: Tensor
    """(..., T) int64: the position of the query row that predicts each token of the caption, as
    the decoder was given it (one row, three or more under M-RoPE)."""
    cache: Any
    """Keys and values of all but the last token."""


class Ablation:
    """A model whose heads can be removed one by one, many at a time.

    Raises `FoveateError` where the decoder's heads do not meet in `self_attn.o_proj`, or where it
    attends in other ways than to everything before or to a sliding window.
    """

    def __init__(self, model: Any) -> None:
        name, decoder = type(model).__name__, model.get_decoder()
        config = decoder.config
        self.model, self.decoder = model, decoder
        self.projections = [_output_projection(name, layer) for layer in _layers(name, decoder)]
        self.layers, self.heads = len(self.projections), config.num_attention_heads
        self.window: int = getattr(config, "sliding_window", None) or 0
        self.kinds = set(compat.layer_kinds(config))
        if other := sorted(self.kinds - {"full_attention", "sliding_attention"}):
            raise FoveateError(
                f"{name} has layers of {other[0]}, whose rows do not see the KV cache one by one: "
                "its heads cannot be searched."
            )

    @torch.inference_mode()
    def describe(self, inputs: Mapping[str, Any], **options: Any) -> Caption:
        """Produce a caption for one prompt (batch of 1) greedily; `options` go to `generate`."""
        positions: list[Tensor] = []

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = kwargs.get("position_ids")
            if given is None:
                embeds, past = kwargs["inputs_embeds"], compat.cache_in(kwargs)
                last = compat_cache.length(past) + embeds.shape[1] - 1
                given = torch.tensor([[last]], device=embeds.device)
            positions.append(given[..., -1:])

        with _removing([self.decoder.register_forward_pre_hook(note, with_kwargs=True)]):
            out = self.model.generate(
                **inputs,
                **compat.passing(self.model, compat_cache.whole_cache()),
                use_cache=True,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                return_dict_in_generate=True,
                **options,
            )
        prompt = inputs["input_ids"].shape[1]
        return Caption(out.sequences[0], prompt, torch.cat(positions, -1), compat.cache_of(out))

    @torch.inference_mode()
    def influence(self, caption: Caption, places: Sequence[int], rows: int = 256) -> Tensor:
        """What the probability of some tokens loses without each head.

        Args:
            places: tokens by their index in the caption, n of them.
            rows: query rows per forward. More need more memory and fewer forwards.

        Returns:
            (n, layers, heads) float32 on the CPU: p(token) - p(token without the head).
        """
        variants = 1 + self.layers * self.heads  # nothing removed, then each head
        probabilities = [
            self._probabilities(caption, [places[i // variants] for i in chunk], chunk, variants)
            for start in range(0, len(places) * variants, rows)
            for chunk in [range(start, min(start + rows, len(places) * variants))]
        ]
        if not probabilities:
            return torch.zeros(0, self.layers, self.heads)
        p = torch.cat(probabilities).view(len(places), variants)
        return (p[:, :1] - p[:, 1:]).view(len(places), self.layers, self.heads)

    def _probabilities(
        self, caption: Caption, places: list[int], chunk: range, variants: int
    ) -> Tensor:
        """p(token) of one place per row (R,), with what `chunk` says removed from it."""
        device = caption.ids.device
        at = torch.tensor(places, device=device)
        query = caption.prompt - 1 + at
        removed: dict[int, tuple[list[int], list[int]]] = {}
        for row, i in enumerate(chunk):
            if i % variants:
                layer, head = divmod(i % variants - 1, self.heads)
                in_layer = removed.setdefault(layer, ([], []))
                in_layer[0].append(row)
                in_layer[1].append(head)
        masks = {kind: self._mask(caption, query, kind) for kind in self.kinds}
        changed = {
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "position_ids": caption.positions[..., at],
        }

        def steer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | changed

        handles = [self.decoder.register_forward_pre_hook(steer, with_kwargs=True)]
        for layer, (which, heads) in removed.items():
            handles.append(
                self.projections[layer].register_forward_pre_hook(self._remove(which, heads))
            )
        with _removing(handles):
            out = self.model(
                input_ids=caption.ids[query][None],
                use_cache=True,
                **compat.passing(self.model, caption.cache),
            )
        caption.cache.crop(-len(places))
        token = caption.ids[query + 1].to(out.logits.device)
        logits = out.logits[0].float()
        chosen = logits.gather(1, token[:, None])[:, 0]
        return (chosen - logits.logsumexp(-1)).exp().cpu()

    def _mask(self, caption: Caption, query: Tensor, kind: str) -> Tensor:
        """Additive (1, 1, R, keys + R): each row sees what lies before its place, and itself."""
        keys = torch.arange(caption.cache.get_seq_length(), device=query.device)
        seen = keys < query[:, None]
        if kind == "sliding_attention":
            seen &= keys > query[:, None] - self.window
        itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
        seen = torch.cat([seen, itself], 1)[None, None]
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=query.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        )

    def _remove(self, rows: list[int], heads: list[int]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            kept = args[0].clone()
            kept.view(*kept.shape[:2], self.heads, -1)[0, rows, heads] = 0
            return (kept,)

        return hook


def _layers(name: str, decoder: Any) -> Sequence[Any]:
    layers = getattr(decoder, "layers", None)
    if not layers:
        raise FoveateError(f"{name} has no list of decoder layers: its heads cannot be searched.")
    return layers


def _output_projection(name: str, layer: Any) -> nn.Module:
    projection = compat_parts.head_projection(layer)
    if projection is None:
        raise FoveateError(
            f"{name} has a decoder layer without `self_attn.o_proj`, where the heads meet: its "
            "heads cannot be searched."
        )
    return projection


@contextlib.contextmanager
def _removing(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
