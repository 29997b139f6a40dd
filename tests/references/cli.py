"""CLI (arXiv 2601.10710) from its equations: one prompt, no cache, every sum written out.

The vision states come from a pass of the tower of its own; keys and values of the summaries are
formed; the prompt and what was generated go through the model together, again for every token.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from foveate.methods.cli.module import CrossLayerInjection

GELU = torch.nn.functional.gelu


def one_per_token(states: Tensor, made: Tensor) -> Tensor:
    """What enters a projector, as one vector for each that it made."""
    if states.dim() == 2:  # patches of a token follow one another: Qwen
        return torch.stack(list(states.chunk(len(made)))).flatten(1)
    if states.shape[1] == made.shape[1]:
        return states
    side, new = math.isqrt(states.shape[1]), math.isqrt(made.shape[1])  # Gemma: means of squares
    step = side // new
    return torch.stack(
        [
            states.unflatten(1, (side, side))[
                :, step * row : step * row + step, step * col : step * col + step
            ].mean((1, 2))
            for row in range(new)
            for col in range(new)
        ],
        1,
    )


class CLI:
    """One model with an injection, one prompt at a time.

    Args:
        module: read for its weights and settings only.
    """

    def __init__(self, model: PreTrainedModel, module: CrossLayerInjection) -> None:
        self.model = model
        self.settings: dict[str, Any] = dataclasses.asdict(module.settings)
        self.weights = {k: v.detach() for k, v in module.state_dict().items()}
        self.gates: dict[tuple[int, int], Tensor] = {}

    def logits(self, inputs: dict[str, Tensor], written: Tensor | None = None) -> Tensor:
        """(S, V) of a prompt (1, Q) and what was written after it (n,)."""
        ids = inputs["input_ids"]
        self.length = ids.shape[1]
        self.image = (ids[0] == self.model.config.image_token_id).nonzero()[:, 0]
        if written is not None:
            ids = torch.cat([ids, written[None]], 1)
        with torch.no_grad():
            brought = self.amp(inputs)
            depth = len(self.model.get_decoder().layers)
            hooks = [
                layer.register_forward_pre_hook(self.entering(i, brought), with_kwargs=True)
                for i, layer in enumerate(self.model.get_decoder().layers)
            ]
            last = self.model.get_decoder().layers[-1]
            hooks.append(last.register_forward_hook(self.leaving(depth, brought)))
            try:
                rest = {k: v for k, v in inputs.items() if k != "attention_mask"}
                more = ids.shape[1] - self.length
                for name in ("mm_token_type_ids", "token_type_ids"):
                    if name in rest:
                        rest[name] = torch.nn.functional.pad(rest[name], (0, more))
                rest |= {"input_ids": ids}
                return self.model(**rest, use_cache=False).logits[0]
            finally:
                for hook in hooks:
                    hook.remove()

    def amp(self, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
        """V_k' of every vision layer, packed as the model packs: k -> (N, D)."""
        core, config = self.model.model, self.model.config
        if config.model_type not in ("llava", "llava_next", "llava_onevision"):
            return self.merged(inputs)
        pixels, sizes = inputs["pixel_values"], inputs.get("image_sizes")
        counts = [1] * len(pixels)
        if sizes is not None:
            alone = len(sizes) == 1 or config.model_type == "llava_next"
            counts = [
                image_size_to_num_patches(
                    size, config.image_grid_pinpoints, config.vision_config.image_size
                )
                if alone
                else 1
                for size in sizes
            ]
            pixels = torch.cat([p[:n] for p, n in zip(pixels, counts, strict=True)])
        states = core.vision_tower(pixels, output_hidden_states=True).hidden_states
        out = {}
        for k in self.settings["vision_layers"]:
            if f"paths.{k}.down.weight" not in self.weights:
                continue
            state = states[k]
            if config.vision_feature_select_strategy == "default":
                state = state[:, 1:]
            down, up = (self.weights[f"paths.{k}.{n}.weight"] for n in ("down", "up"))
            scale = self.settings["alpha"] / self.settings["rank"]
            brought = core.multi_modal_projector(state) + scale * (state @ down.T @ up.T)
            if self.settings["norm"] == "rms":
                eps = torch.finfo(brought.dtype).eps
                mean = brought.pow(2).mean(-1, keepdim=True)
                brought = brought / (mean + eps).sqrt() * self.weights["norm.weight"]
            if sizes is None:
                out[k] = brought.flatten(0, 1)
                continue
            extra: dict[str, Any] = {"image_newline": core.image_newline}
            if config.model_type == "llava_next":
                extra["vision_feature_select_strategy"] = config.vision_feature_select_strategy
            else:
                extra["vision_aspect_ratio"] = config.vision_aspect_ratio
            tiles = torch.split(brought, counts)
            packed, _ = core.pack_image_features(list(tiles), sizes, **extra)
            out[k] = torch.cat(list(packed))
        return out

    def merged(self, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
        """`amp` where patches are merged: a copy of the tower ends behind block k."""
        wanted = {k: v for k, v in inputs.items() if "ids" not in k and k != "attention_mask"}
        out = {}
        for k in self.settings["vision_layers"]:
            if f"paths.{k}.down.weight" not in self.weights:
                continue
            core: Any = copy.deepcopy(self.model.model)
            tower = next(
                getattr(core, name)
                for name in ("vision_tower", "visual", "vision_model")
                if hasattr(core, name)
            )
            blocks = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))
            del blocks[k:]
            if hasattr(core, "multi_modal_projector"):
                projector = core.multi_modal_projector
            else:
                projector = (
                    tower.merger if hasattr(tower, "merger") else core.connector.modality_projection
                )
            down, up = (self.weights[f"paths.{k}.{n}.weight"] for n in ("down", "up"))
            scale = self.settings["alpha"] / self.settings["rank"]

            def add(module: Any, args: Any, made: Tensor, to: Any = (down, up, scale)) -> Tensor:
                return made + to[2] * (one_per_token(args[0], made) @ to[0].T @ to[1].T)

            projector.register_forward_hook(add)
            found = core.get_image_features(**wanted, return_dict=True).pooler_output
            rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
            if self.settings["norm"] == "rms":
                eps = torch.finfo(rows.dtype).eps
                rows = rows / (rows.pow(2).mean(-1, keepdim=True) + eps).sqrt()
                rows = rows * self.weights["norm.weight"]
            out[k] = rows
        return out

    def routed(self, index: int) -> list[int]:
        """Vision layers of the decoder layer that is the `index`-th to take."""
        layers = list(self.settings["vision_layers"])
        if self.settings["routes"] == "one-to-many":
            return [layers[-1]]
        if self.settings["routes"] == "one-to-one":
            return [layers[index * len(layers) // len(self.settings["layers"])]]
        return layers

    def update(self, layer: int, hidden: Tensor, brought: dict[int, Tensor]) -> Tensor:
        """H_I + sum over k of g V_k', on (S, D)."""
        hidden = hidden.clone()
        before = hidden.clone()
        prompt = before[: self.length]
        if self.settings["summary"] == "image":
            prompt = before[self.image]
        ks = self.routed(self.settings["layers"].index(layer))
        for k in ks:
            gate = self.gate(layer, k, brought[k], prompt)
            share = 1 / len(ks) if self.settings["reduce"] == "mean" else 1.0
            for n, column in enumerate(self.image):
                hidden[column] += share * gate * brought[k][n]
        return hidden

    def gate(self, layer: int, k: int, features: Tensor, prompt: Tensor) -> Tensor:
        """g of a pair, ()."""
        if self.settings["gate"] == "static":
            gate = self.weights[f"gates.{layer}-{k}.value"].squeeze()
        else:
            name = f"gates.{layer}-{k}" if self.settings["share"] == "pair" else f"gates.{layer}"
            w = {n: v for n, v in self.weights.items() if n.startswith(f"{name}.")}
            c_v = self.summary(f"{name}.vision", features)
            c_h = self.summary(f"{name}.hidden", prompt)
            first = torch.cat([w[f"{name}.from_{n}.weight"] for n in ("vision", "hidden")], 1)
            inner = GELU(first @ torch.cat([c_v, c_h]) + w[f"{name}.from_vision.bias"])
            gate = (w[f"{name}.last.weight"] @ inner + w[f"{name}.last.bias"]).sigmoid()[0]
        self.gates[layer, k] = gate
        return gate

    def summary(self, name: str, x: Tensor) -> Tensor:
        """Multi-head attention of the learnt query over x (S, D): (D,)."""
        weights = {n: self.weights[f"{name}.{n}.weight"] for n in ("q", "k", "v", "out")}
        x = torch.stack([self.normed(row) for row in x])
        query, keys, values = weights["q"] @ self.weights[f"{name}.query"], x, x
        keys, values = keys @ weights["k"].T, values @ weights["v"].T
        size = len(query) // self.settings["heads"]
        heads = []
        for h in range(self.settings["heads"]):
            part = slice(h * size, (h + 1) * size)
            weight = (keys[:, part] @ query[part] / math.sqrt(size)).softmax(0)
            heads.append(weight @ values[:, part])
        return self.normed(weights["out"] @ torch.cat(heads))

    def normed(self, vector: Tensor) -> Tensor:
        if self.settings["gate_norm"] == "none":
            return vector
        return vector / (vector.pow(2).mean() + torch.finfo(vector.dtype).eps).sqrt()

    def entering(self, layer: int, brought: dict[int, Tensor]) -> Any:
        layer -= self.settings["place"] == "after"

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if layer not in self.settings["layers"]:
                return None
            return (self.update(layer, args[0][0], brought)[None], *args[1:]), kwargs

        return hook

    def leaving(self, depth: int, brought: dict[int, Tensor]) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> Any:
            if self.settings["place"] == "before" or depth - 1 not in self.settings["layers"]:
                return None
            return self.update(depth - 1, out[0], brought)[None]

        return hook
