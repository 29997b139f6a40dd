"""Cross-layer injection (CLI, arXiv 2601.10710): what is learnt, as a module.

    injection = CLI(seed=0).resolve(anatomy).build(anatomy)
    injection.save_pretrained("folder"); CrossLayerInjection.from_pretrained("folder")

Several layers of the vision tower are brought into the space of the language model: the model's
own projector plus a low-rank path for each (AMP). At chosen decoder layers they are added to the
residual stream of the image's tokens, each as much as a gate says that compares a summary of what
the vision layer holds with a summary of what the decoder holds (AGF).

Here are the parameters and the arithmetic; `foveate.methods.cli.method` puts them into a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

Gates = Literal["scalar", "tanh", "vector", "token", "static", "open"]
Routes = Literal["many-to-many", "one-to-one", "one-to-many"]
Summaries = Literal["prompt", "image"]

KIND = "cross-layer injection"
CARD = """\
---
{{ card_data }}
---

# A cross-layer injection

Trained with [foveate](https://github.com/foveate/foveate) after CLI
([arXiv 2601.10710](https://arxiv.org/abs/2601.10710)). It belongs to the model whose shape stands
under `base` in `config.json`:

```python
from foveate import enhance

with enhance(model, "cli(path=FOLDER)"):
    model.generate(**inputs)
```
"""


@dataclass(frozen=True)
class Seen:
    """The images of one piece of prompt, brought into the space of the language model.

    N is the largest number of visual tokens in a row of the batch; shorter rows are padded.

    Attributes:
        features: vision layer -> (B, N, D).
        places: (B, N) int64, the column of each visual token among the piece's columns.
        valid: (B, N) bool, False for padding.
        prompt: (B, Q) bool, the columns that a summary of the hidden state sees.
    """

    features: dict[int, Tensor]
    places: Tensor
    valid: Tensor
    prompt: Tensor


class CrossLayerInjection(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="foveate",
    tags=["cross-layer-injection"],
    model_card_template=CARD,
):
    """AMP and AGF of one model; see `foveate.methods.cli.method.CLI` for what the settings mean.

    Args:
        base: the shape of the model that it belongs to.
        vision_layers: layers of the vision tower that may be injected, k is the output of block
            k - 1.
        layers: decoder layers, 0-based.
        vision_size, text_size: widths D_v and D of what the projector maps.
        kind: what this is; stands in config.json, where a reader looks for it.
    """

    def __init__(
        self,
        *,
        base: dict[str, Any],
        vision_layers: list[int],
        layers: list[int],
        vision_size: int,
        text_size: int,
        rank: int = 64,
        alpha: float = 128.0,
        gate: Gates = "scalar",
        summary: Summaries = "prompt",
        routes: Routes = "many-to-many",
        heads: int = 8,
        width: int = 256,
        norm: Literal["none", "rms"] = "none",
        gate_norm: Literal["none", "rms"] = "none",
        reduce: Literal["sum", "mean"] = "sum",
        place: Literal["before", "after"] = "before",
        share: Literal["layer", "pair"] = "layer",
        start: float = -4.0,
        kind: str = KIND,
    ) -> None:
        super().__init__()
        self.vision_layers, self.layers = tuple(vision_layers), tuple(layers)
        self.reduce, self.summary = reduce, summary
        self.routes = routing(routes, self.vision_layers, self.layers)
        used = sorted({k for ks in self.routes.values() for k in ks})
        self.paths = nn.ModuleDict(
            {str(k): LowRank(vision_size, text_size, rank, alpha) for k in used}
        )
        self.norm = nn.RMSNorm(text_size) if norm == "rms" else None
        plain: dict[str, type[nn.Module]] = {"static": Static, "open": Open}
        sizes = (text_size, width, heads)
        self.gates = nn.ModuleDict()  # by decoder layer, or by pair
        for layer, ks in self.routes.items():
            for k in ks:
                name = f"{layer}-{k}" if share == "pair" or gate == "static" else f"{layer}"
                if name not in self.gates:
                    made = plain.get(gate)
                    self.gates[name] = made() if made else Gate(*sizes, gate, start, gate_norm)

    def gate(self, layer: int, k: int) -> nn.Module:
        """The gate of a pair; the vision layers of a decoder layer may share one."""
        name = f"{layer}-{k}"
        return self.gates[name if name in self.gates else f"{layer}"]

    def bring(self, projector: nn.Module, k: int, states: Tensor) -> Tensor:
        """AMP: ``P(V_k) + B_k A_k V_k``, (..., D_v) -> (..., D)."""
        out = projector(states) + self.paths[str(k)](states)
        return out if self.norm is None else self.norm(out)

    def forward(self, hidden: Tensor, seen: Seen, layer: int) -> tuple[Tensor, Tensor]:
        """What to add to the residual stream at a decoder layer, and how far each gate is open.

        Args:
            hidden: (B, Q, D) of this piece of prompt. layer: one of `layers`.

        Returns:
            (B, N, D) for the visual tokens, zero on padding; and (B, vision layers) float32, the
            gates' means, nan where the pair is not routed.
        """
        valid, prompt = seen.valid.to(hidden.device), seen.prompt.to(hidden.device)
        total = hidden.new_zeros(*valid.shape, hidden.shape[-1])
        gates = torch.full((len(hidden), len(self.vision_layers)), math.nan, device=hidden.device)
        summaries: dict[int, Tensor] = {}  # of the hidden state, once per gate
        for column, k in enumerate(self.vision_layers):
            if k not in self.routes[layer]:
                continue
            gate, features = self.gate(layer, k), seen.features[k].to(hidden.device)
            if isinstance(gate, Gate):
                if id(gate) not in summaries:
                    summaries[id(gate)] = gate.read(hidden, prompt)
                opened = gate(features, valid, summaries[id(gate)])
            else:
                opened = gate(features)
            total = total + opened * features
            gates[:, column] = self._mean(opened, valid)
        if self.reduce == "mean":
            total = total / len(self.routes[layer])
        return total * valid[..., None], gates

    @staticmethod
    def _mean(opened: Tensor, valid: Tensor) -> Tensor:
        """(B, 1 | N, 1 | D) -> (B,) float32, over the visual tokens and channels."""
        means = opened.detach().float().mean(-1).expand(len(valid), -1)
        if means.shape[1] == 1:
            return means[:, 0]
        return (means * valid).sum(1) / valid.sum(1).clamp(min=1)

    # -- files, by the hub's mixin -----------------------------------------------------------------

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, revision: str | None = None, cache_dir: Any = None,
        force_download: bool = False, local_files_only: bool = False, token: Any = None,
        map_location: str = "cpu", strict: bool = True, **settings: Any,
    ) -> CrossLayerInjection:  # fmt: skip
        file = Path(model_id) / constants.SAFETENSORS_SINGLE_FILE
        if not Path(model_id).is_dir():
            file = Path(
                hf_hub_download(
                    model_id, file.name, revision=revision, cache_dir=cache_dir, token=token,
                    force_download=force_download, local_files_only=local_files_only,
                )
            )  # fmt: skip
        injection = cls(**settings)
        injection.load_state_dict(load_file(file, device=map_location), strict=strict)
        return injection.eval()


def routing(
    routes: Routes, vision_layers: tuple[int, ...], layers: tuple[int, ...]
) -> dict[int, tuple[int, ...]]:
    """Decoder layer -> the vision layers that it may take from.

    "many-to-many" is CLI's. "one-to-one" gives each decoder layer one vision layer, from early to
    late (static layer injection). "one-to-many" gives the last one to all (as DeepStack feeds one
    tower's features to several decoder layers).
    """
    if routes == "many-to-many":
        return dict.fromkeys(layers, vision_layers)
    if routes == "one-to-many":
        return dict.fromkeys(layers, vision_layers[-1:])
    count = len(vision_layers)
    return {layer: (vision_layers[i * count // len(layers)],) for i, layer in enumerate(layers)}


class LowRank(nn.Module):
    """``alpha / rank * B A v`` with B zero at the start."""

    def __init__(self, vision_size: int, text_size: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(vision_size, rank, bias=False)
        self.up = nn.Linear(rank, text_size, bias=False)
        self.scale = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        return self.scale * self.up(self.down(states))


class Summary(nn.Module):
    """Multi-head attention of one learnt query over a set of vectors.

    Keys and values are never formed: the query goes through the key projection first, and what it
    gathers goes through the value projection, which is the same with far fewer products.
    """

    def __init__(self, size: int, width: int, heads: int, norm: str = "none") -> None:
        super().__init__()
        self.heads, self.norm = heads, norm
        self.query = nn.Parameter(torch.randn(size) * size**-0.5)
        self.q, self.k, self.v = (nn.Linear(size, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D), mask (B, S) bool -> (B, D); zero for a row that sees nothing."""
        x = self.normed(x)
        queries = self.q(self.query).unflatten(-1, (self.heads, -1))  # (H, d)
        keys = self.k.weight.unflatten(0, (self.heads, -1))  # (H, d, D)
        folded = torch.einsum("hd,hdD->Dh", queries, keys) * queries.shape[-1] ** -0.5
        scores = (x @ folded.to(x.dtype)).float().masked_fill(~mask[..., None], -math.inf)
        some = mask.any(1)[:, None, None]
        weights = scores.masked_fill(~some, 0).softmax(1) * some
        gathered = torch.einsum("bsh,bsD->bhD", weights.to(x.dtype), x)
        values = self.v.weight.unflatten(0, (self.heads, -1))
        found = torch.einsum("bhD,hdD->bhd", gathered, values.to(x.dtype)).flatten(1)
        return self.normed(self.out(found))

    def normed(self, x: Tensor) -> Tensor:
        """Each vector (..., D) with a mean square of 1, where this is asked for."""
        return x if self.norm == "none" else F.rms_norm(x, x.shape[-1:])


class Gate(nn.Module):
    """How much of a vision layer the decoder takes, from two summaries (AGF).

    ``sigma(W2 gelu(W1 [c_v; c_h]))`` per sample ("scalar"), per channel ("vector"), or per visual
    token, whose own feature then stands for c_v ("token"); "tanh" is a scalar that starts at 0.
    """

    def __init__(
        self, size: int, width: int, heads: int, kind: Gates, start: float, norm: str = "none"
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind != "token":
            self.vision = Summary(size, width, heads, norm)
        self.hidden = Summary(size, width, heads, norm)
        inner = max(1, size // 4)
        self.from_vision = nn.Linear(size, inner)
        self.from_hidden = nn.Linear(size, inner, bias=False)  # two halves of W1
        self.last = nn.Linear(inner, size if kind == "vector" else 1)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, 0.0 if kind == "tanh" else start)

    def read(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """c_h, the summary of the hidden state: (B, Q, D), (B, Q) bool -> (B, D)."""
        return self.hidden(hidden, mask)

    def forward(self, features: Tensor, valid: Tensor, read: Tensor) -> Tensor:
        """(B, N, D), (B, N) bool and c_h -> the gate, (B, 1 | N, 1 | D)."""
        own = (
            self.hidden.normed(features)
            if self.kind == "token"
            else self.vision(features, valid)[:, None]
        )
        inner = F.gelu(self.from_vision(own) + self.from_hidden(read)[:, None])
        out = self.last(inner)
        return out.tanh() if self.kind == "tanh" else out.sigmoid()


class Static(nn.Module):
    """A learnt number that does not look at the content; 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.value.to(features.dtype).expand(len(features), 1, 1)


class Open(nn.Module):
    """Always 1: everything is added."""

    def forward(self, features: Tensor) -> Tensor:
        return features.new_ones(len(features), 1, 1)


def place(images: Tensor) -> tuple[Tensor, Tensor]:
    """Where visual tokens lie: (B, Q) bool -> their columns (B, N) int64, and which are real."""
    counts = images.sum(1)
    width = int(counts.max())
    places = images.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return places, torch.arange(width, device=images.device) < counts[:, None]


def padded(packed: Tensor, valid: Tensor) -> Tensor:
    """Visual tokens of all rows one after the other, (total, D), as (B, N, D)."""
    counts = valid.sum(1)
    offsets = counts.cumsum(0) - counts
    index = offsets[:, None] + torch.arange(valid.shape[1], device=valid.device)
    return cast(Tensor, packed[index.clamp(max=len(packed) - 1).to(packed.device)])
