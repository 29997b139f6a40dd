"""Cross-layer injection (CLI, arXiv 2601.10710): its settings, its weights and its equations.

    injection = CLI(seed=0).resolve(anatomy).build(anatomy)
    injection.save_pretrained("folder"); CrossLayerInjection.from_pretrained("folder")

V_k are the states of vision layer k, P is the model's own projector, H^l the hidden states that
enter decoder layer l, and I are the columns of the image's tokens:

    AMP     (1)  V'_k  = P(V_k) + alpha / r B_k A_k V_k
    AGF     (2)  c_v   = MHA(q_v, V'_k, V'_k),   c_h = MHA(q_h, H^l, H^l)
            (3)  g_lk  = sigmoid(W_2 gelu(W_1 [c_v; c_h]))
    update  (4)  H^l_I = H^l_I + sum over k of g_lk V'_k

The numbers are this file's. (1), (2) and (4) are reported; the inside of the gate (3) is inferred.
`foveate.methods.cli.method` puts this into a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...base.artifact import INJECTION, Artifact
from ...base.errors import FoveateError
from ...base.form import costly

KIND = INJECTION


@dataclass(frozen=True)
class Settings:
    """What an injection is made with. A trained one has them in its config.json.

    Attributes:
        vision_layers: k is the output of block k - 1 of the tower (inferred; None: four, evenly
            spaced up to the one that the model itself uses, {6, 12, 18, 24} of SigLIP's).
        layers: decoder layers that take, 0-based (inferred). None: every sixth, on shallower models
            every fourth part, such as {0, 6, 12, 18} of 24.
        rank: r of the low-rank paths, 1 or more (inferred).
        alpha: a low-rank path counts alpha / rank times (inferred). Any number.
        gate: "scalar", a sigmoid per pair of layers (3) (inferred), or "static", a learnt number
            per pair that does not see the content.
        summary: what c_h sees: "prompt", image and question; or "image", the image's tokens, so
            that questions can share a prefix (both inferred).
        routes: "many-to-many"; "one-to-one", static injection from early to late; "one-to-many",
            the last vision layer into all decoder layers, as DeepStack does.
        heads: of the attention in (2), 1 or more (inferred); smaller models get fewer.
        width: of the attention in (2), as many as heads or more (inferred); smaller models get
            less.
        norm: of V'_k before it is added, "rms" or "none" (inferred).
        gate_norm: "rms" norms the input and the output of (2), "none" leaves both as they are (the
            reported equations). Hidden states have no bound, and a sigmoid of them may shut for
            good in training: then try "rms", or a lower rate.
        reduce: over vision layers in (4), "sum" or "mean" (inferred).
        place: "before" the decoder layer's block or "after" it (inferred).
        share: one gate per decoder "layer" for all its vision layers, or one per "pair" (inferred).
        start: the gate's bias before training, any number; sigmoid(-4) is 0.018 (inferred).
    """

    vision_layers: tuple[int, ...] | None = costly(None, limit=8)
    rank: int = costly(64, limit=256)
    alpha: float = 128.0
    gate: Literal["scalar", "static"] = "scalar"
    summary: Literal["prompt", "image"] = "prompt"
    routes: Literal["many-to-many", "one-to-one", "one-to-many"] = "many-to-many"
    heads: int = costly(8, limit=64)
    width: int = costly(256, limit=1024)
    norm: Literal["none", "rms"] = "none"
    gate_norm: Literal["none", "rms"] = "none"
    reduce: Literal["sum", "mean"] = "sum"
    place: Literal["before", "after"] = "before"
    share: Literal["layer", "pair"] = "layer"
    start: float = -4.0
    layers: tuple[int, ...] | None = None


def settings_in(values: Any) -> dict[str, Any]:
    """The `Settings` among the fields of a config.json or of a dataclass, lists as tuples."""
    values = values if isinstance(values, dict) else vars(values)
    known = [f.name for f in dataclasses.fields(Settings) if f.name in values]
    return {n: tuple(values[n]) if isinstance(values[n], list) else values[n] for n in known}


@dataclass(frozen=True)
class ImageFeatures:
    """The image in one piece of prompt, as the gates see it.

    Attributes:
        features: vision layer k -> V'_k (B, Q, D) in the image's columns, 0 in all others.
        visual: (B, Q) bool, the image's columns.
        summarised: (B, Q) bool, the columns that c_h sees.
    """

    features: dict[int, Tensor]
    visual: Tensor
    summarised: Tensor


class CrossLayerInjection(nn.Module):
    """AMP and AGF of one model.

    Args:
        config: layers and vision layers named.
        base: the shape of the model that it belongs to.
        vision_size, text_size: widths D_v and D of what the projector maps.
    """

    def __init__(
        self,
        config: Settings,
        *,
        base: dict[str, Any],
        vision_size: int,
        text_size: int,
    ) -> None:
        super().__init__()
        self.settings = config
        self.base, self.sizes = base, {"vision_size": vision_size, "text_size": text_size}
        self.vision_layers, self.layers = config.vision_layers or (), config.layers or ()
        self.routes = routing(config)
        used = sorted({k for ks in self.routes.values() for k in ks})
        self.paths = nn.ModuleDict(
            {str(k): LowRank(vision_size, text_size, config.rank, config.alpha) for k in used}
        )
        self.norm = nn.RMSNorm(text_size) if config.norm == "rms" else None
        self.gates = nn.ModuleDict()
        for layer, ks in self.routes.items():
            for k in ks:
                if (name := self._gate_name(layer, k)) not in self.gates:
                    static = config.gate == "static"
                    self.gates[name] = Static() if static else Gate(text_size, config)

    def _gate_name(self, layer: int, k: int) -> str:
        paired = self.settings.share == "pair" or self.settings.gate == "static"
        return f"{layer}-{k}" if paired else f"{layer}"

    def project(self, k: int, features: Tensor, states: Tensor) -> Tensor:
        """AMP (1): P(V_k) (..., D) and V_k (..., D_v), a vector per token -> V'_k (..., D)."""
        features = features + self.paths[str(k)](states)
        return features if self.norm is None else self.norm(features)

    def forward(self, hidden: Tensor, image: ImageFeatures, layer: int) -> tuple[Tensor, Tensor]:
        """The sum of (4) at a decoder layer, and its gates.

        Args:
            hidden: H^l (B, Q, D) of this piece of prompt. layer: one of `layers`.

        Returns:
            (B, Q, D), 0 outside the image's columns; and g (B, vision layers) float32, nan where
            the pair is not routed.
        """
        visual, summarised = (m.to(hidden.device) for m in (image.visual, image.summarised))
        total = torch.zeros_like(hidden)
        gates = torch.full((len(hidden), len(self.vision_layers)), math.nan, device=hidden.device)
        c_h: dict[str, Tensor] = {}  # by gate, which vision layers may share
        for column, k in enumerate(self.vision_layers):
            if k not in self.routes[layer]:
                continue
            name = self._gate_name(layer, k)
            gate: Any = self.gates[name]
            features = image.features[k].to(hidden.device)
            if name not in c_h:
                c_h[name] = gate.hidden(hidden, summarised)
            g = gate(features, visual, c_h[name])
            total = total + g[..., None] * features
            gates[:, column] = g.detach().float()[:, 0]
        if self.settings.reduce == "mean":
            total = total / len(self.routes[layer])
        return total, gates

    # -- files -------------------------------------------------------------------------------------

    def artifact(self, made: Mapping[str, Any] | None = None) -> Artifact:
        """It with its settings; `made` says how, ready for JSON."""
        settings = {**self.sizes, **dataclasses.asdict(self.settings)}
        return Artifact(KIND, self.base, self.state_dict(), settings, made or {})

    def save_pretrained(self, folder: Path | str, made: Mapping[str, Any] | None = None) -> None:
        """Write an artifact's folder; see `Artifact`."""
        self.artifact(made).save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Put it on the hub; see `Artifact.push_to_hub`."""
        return self.artifact().push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls, path: Path | str) -> CrossLayerInjection:
        """The injection of a folder or a hub repository, float32 on the CPU.

        Raises:
            FoveateError: there is none, or it is damaged.
        """
        found = Artifact.from_pretrained(path, KIND)
        try:
            sizes = {name: found.settings[name] for name in ("vision_size", "text_size")}
            settings = Settings(**settings_in(dict(found.settings)))
            injection = cls(settings, base=dict(found.model), **sizes)
            injection.load_state_dict(dict(found.tensors))
        except Exception as error:  # settings that do not go together raise nearly anything
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise FoveateError(f"cli: {path} could not be loaded: {reason}.") from error
        return injection.eval()


def routing(settings: Settings) -> dict[int, tuple[int, ...]]:
    """Decoder layer -> the vision layers that it may take from."""
    layers, vision_layers = settings.layers or (), settings.vision_layers or ()
    if settings.routes == "many-to-many":
        return dict.fromkeys(layers, vision_layers)
    if settings.routes == "one-to-many":
        return dict.fromkeys(layers, vision_layers[-1:])
    count = len(vision_layers)
    return {layer: (vision_layers[i * count // len(layers)],) for i, layer in enumerate(layers)}


class LowRank(nn.Module):
    """``alpha / r B A V`` of (1), with B zero at the start."""

    def __init__(self, vision_size: int, text_size: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(vision_size, rank, bias=False)
        self.up = nn.Linear(rank, text_size, bias=False)
        self.scale = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        return self.scale * self.up(self.down(states))


class Summary(nn.Module):
    """``MHA(q, X, X)`` of (2), with one learnt query q.

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
        """X (B, S, D), mask (B, S) bool -> (B, D); zero for a row that sees nothing."""
        x = self._normed(x)
        queries = self.q(self.query).unflatten(-1, (self.heads, -1))  # (H, d)
        keys = self.k.weight.unflatten(0, (self.heads, -1))  # (H, d, D)
        folded = torch.einsum("hd,hdD->Dh", queries, keys) * queries.shape[-1] ** -0.5
        scores = (x @ folded.to(x.dtype)).float().masked_fill(~mask[..., None], -math.inf)
        some = mask.any(1)[:, None, None]
        weights = scores.masked_fill(~some, 0).softmax(1) * some
        gathered = torch.einsum("bsh,bsD->bhD", weights.to(x.dtype), x)
        values = self.v.weight.unflatten(0, (self.heads, -1))
        attended = torch.einsum("bhD,hdD->bhd", gathered, values.to(x.dtype)).flatten(1)
        return self._normed(self.out(attended))

    def _normed(self, x: Tensor) -> Tensor:
        """Each vector (..., D) with a mean square of 1, where `norm` is "rms"."""
        return x if self.norm == "none" else F.rms_norm(x, x.shape[-1:])


class Gate(nn.Module):
    """AGF (2) and (3): how much of a vision layer a decoder layer takes, by what both hold."""

    def __init__(self, size: int, settings: Settings) -> None:
        super().__init__()
        attention = size, settings.width, settings.heads, settings.gate_norm
        self.vision, self.hidden = Summary(*attention), Summary(*attention)
        inner = max(1, size // 4)
        self.from_vision = nn.Linear(size, inner)
        self.from_hidden = nn.Linear(size, inner, bias=False)  # two halves of W_1
        self.last = nn.Linear(inner, 1)  # W_2
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, settings.start)

    def forward(self, features: Tensor, visual: Tensor, c_h: Tensor) -> Tensor:
        """V'_k (B, Q, D), the image's columns (B, Q) bool and c_h (B, D) -> g (B, 1)."""
        c_v = self.vision(features, visual)
        return self.last(F.gelu(self.from_vision(c_v) + self.from_hidden(c_h))).sigmoid()


class Static(nn.Module):
    """A learnt number in the gate's place, which does not see the content; 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, 1, 1))

    def hidden(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden.new_zeros(len(hidden), 0)

    def forward(self, features: Tensor, visual: Tensor, c_h: Tensor) -> Tensor:
        return self.value[0].to(features.dtype).expand(len(features), 1)
